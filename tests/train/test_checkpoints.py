import errno
import json
import logging

import pytest
import torch

from ip2p.base.errors import InputError
from ip2p.base.ledger import MANIFEST
from ip2p.training.checkpoints import Checkpoints


def saved(tmp_path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "deep" / "run", keep=keep)
    for step in steps:
        checkpoints.save(step, {"step": step, "weights": torch.full((1000,), float(step))})
    return checkpoints


def test_no_state_is_none(tmp_path):
    assert Checkpoints(tmp_path / "none").load() is None


def test_the_newest_is_read_and_the_oldest_go(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3)
    assert checkpoints.load()["step"] == 3
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        MANIFEST,
        "step-00000002.pt",
        "step-00000003.pt",
    ]


def test_the_sha_in_the_manifest_is_the_files(tmp_path):
    import hashlib

    checkpoints = saved(tmp_path, 7)
    [row] = checkpoints.rows()
    data = (checkpoints.folder / "step-00000007.pt").read_bytes()
    assert (row["bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_newest_is_told_and_the_one_before_taken(tmp_path, caplog, damage):
    checkpoints = saved(tmp_path, 1, 2)
    path = checkpoints.folder / "step-00000002.pt"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:500])
    elif damage == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with caplog.at_level(logging.WARNING, "ip2p"):
        assert checkpoints.load()["step"] == 1
    assert "step-00000002.pt" in caplog.text and "resuming from the checkpoint before it" in caplog.text


def test_when_all_are_damaged_the_run_does_not_begin_anew(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    for path in checkpoints.folder.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint in .* is readable"):
        checkpoints.load()


def test_a_file_that_is_not_listed_counts_nothing(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    lines = (checkpoints.folder / MANIFEST).read_text().splitlines()
    (checkpoints.folder / MANIFEST).write_text(lines[0] + "\n")
    assert checkpoints.load()["step"] == 1


def test_a_cut_line_of_the_manifest_is_passed_over(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    path = checkpoints.folder / MANIFEST
    path.write_text(path.read_text()[:-20])
    assert checkpoints.load()["step"] == 1


def test_a_full_disk_leaves_the_states_before(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1, 2)
    from ip2p.training import checkpoints as module

    real = module._Hashing.write

    def full(self, data):
        if self.file.tell() > 1000:
            self.error = OSError(errno.ENOSPC, "No space left on device")
            raise self.error
        return real(self, data)

    monkeypatch.setattr(module._Hashing, "write", full)
    with pytest.raises(OSError) as caught:
        checkpoints.save(3, {"step": 3, "weights": torch.zeros(10_000)})
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert checkpoints.load()["step"] == 2
    assert len(list(checkpoints.folder.iterdir())) == 3


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": Evil()})
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoints.load()
    assert not (tmp_path / "touched").exists()
    assert json.loads((tmp_path / MANIFEST).read_text())["step"] == 1
