import errno
import json
import logging

import pytest
import torch

from ip2p.base.errors import InputError
from ip2p.base.ledger import MANIFEST
from ip2p.training.checkpoints import Checkpoints


def save_checkpoints(tmp_path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "deep" / "run", keep=keep)
    for step in steps:
        checkpoints.save(step, {"step": step, "weights": torch.full((1000,), float(step))})
    return checkpoints


def test_load_returns_none_without_checkpoints(tmp_path):
    assert Checkpoints(tmp_path / "none").load() is None


def test_the_newest_is_loaded_and_the_oldest_is_deleted(tmp_path):
    checkpoints = save_checkpoints(tmp_path, 1, 2, 3)
    assert checkpoints.load()["step"] == 3
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        MANIFEST,
        "step-00000002.pt",
        "step-00000003.pt",
    ]


def test_the_manifest_has_the_size_and_sha256_of_the_file(tmp_path):
    import hashlib

    checkpoints = save_checkpoints(tmp_path, 7)
    [row] = checkpoints.rows()
    data = (checkpoints.folder / "step-00000007.pt").read_bytes()
    assert (row["bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_one_is_loaded(tmp_path, caplog, damage):
    checkpoints = save_checkpoints(tmp_path, 1, 2)
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


def test_loading_fails_if_all_checkpoints_are_damaged(tmp_path):
    checkpoints = save_checkpoints(tmp_path, 1, 2)
    for path in checkpoints.folder.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint in .* is readable"):
        checkpoints.load()


def test_a_checkpoint_that_is_not_in_the_manifest_is_ignored(tmp_path):
    checkpoints = save_checkpoints(tmp_path, 1, 2)
    lines = (checkpoints.folder / MANIFEST).read_text().splitlines()
    (checkpoints.folder / MANIFEST).write_text(lines[0] + "\n")
    assert checkpoints.load()["step"] == 1


def test_a_truncated_line_of_the_manifest_is_ignored(tmp_path):
    checkpoints = save_checkpoints(tmp_path, 1, 2)
    path = checkpoints.folder / MANIFEST
    path.write_text(path.read_text()[:-20])
    assert checkpoints.load()["step"] == 1


def test_a_full_disk_keeps_the_previous_checkpoints(tmp_path, monkeypatch):
    checkpoints = save_checkpoints(tmp_path, 1, 2)
    from ip2p.training import checkpoints as module

    original_write = module._Hashing.write

    def full(self, data):
        if self.file.tell() > 1000:
            self.error = OSError(errno.ENOSPC, "No space left on device")
            raise self.error
        return original_write(self, data)

    monkeypatch.setattr(module._Hashing, "write", full)
    with pytest.raises(OSError) as caught:
        checkpoints.save(3, {"step": 3, "weights": torch.zeros(10_000)})
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert checkpoints.load()["step"] == 2
    assert len(list(checkpoints.folder.iterdir())) == 3


def test_a_malicious_pickle_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": Evil()})
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoints.load()
    assert not (tmp_path / "touched").exists()
    assert json.loads((tmp_path / MANIFEST).read_text())["step"] == 1
