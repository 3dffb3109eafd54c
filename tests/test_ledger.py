"""The ledger and the lock on their own; the code built on them has its own crash tests."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import ip2p
from ip2p.base import files, ledger
from ip2p.base.errors import InputError, ResourceError
from ip2p.base.ledger import MANIFEST, Ledger, Lock, check_same, lock_folder, open_ledger

HOLD = """
import sys
from pathlib import Path
from ip2p.base.ledger import lock_folder

with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has locked the folder `held`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "held")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def commit(book, part, text="whole"):
    written = {}
    with book.write(f"data/{part}.txt", written) as temporary:
        temporary.write_text(text)
    book.append({"part": part, "files": written})


# --- the lock -------------------------------------------------------------------------------------


def test_a_second_process_is_refused_with_the_owner_of_the_lock(tmp_path, holder):
    owner = re.escape(f"(process {holder.pid} on {socket.gethostname()})")
    message = rf"another ip2p process is writing to .*held {owner}; wait for it"
    with pytest.raises(InputError, match=message), lock_folder(tmp_path / "held"):
        pytest.fail("both have it")


@pytest.mark.parametrize("end", ["by itself", "killed"])
def test_a_lock_ends_with_its_process(tmp_path, holder, end):
    holder.kill() if end == "killed" else holder.stdin.close()
    holder.wait()
    with lock_folder(tmp_path / "held"):
        pass
    assert list((tmp_path / "held").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="its locks are not flock's")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EIO])
def test_a_disk_without_locks_is_not_mistaken_for_another_process(tmp_path, monkeypatch, number):
    import fcntl

    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    message = rf"cannot lock .*{os.strerror(number)}; choose a folder on another disk"
    with pytest.raises(InputError, match=message), lock_folder(tmp_path):
        pytest.fail("nobody has it")


def test_a_folder_where_no_lock_file_can_be_created_is_an_error(tmp_path):
    (tmp_path / ledger.LOCK).mkdir()
    with pytest.raises(InputError, match="cannot lock"), lock_folder(tmp_path):
        pytest.fail("nobody has it")


def test_two_locks_in_one_process_exclude_each_other(tmp_path):
    one, two = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert one.acquire() and not two.acquire()
    one.release()
    assert two.acquire()
    two.release()
    assert list(tmp_path.iterdir()) == []


def test_no_module_imports_a_module_that_windows_lacks():
    root = Path(ip2p.__file__).parent
    found = [path for path in root.rglob("*.py") if re.search(r"import (fcntl|pwd|grp)\b", path.read_text())]
    assert found == []


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [sys.platform, "win32"])
def test_a_file_is_synced_before_its_rename_and_its_folder_after(tmp_path, monkeypatch, system):
    calls = []
    sync, rename, open_ = os.fsync, os.replace, os.open
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("sync"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), rename(a, b)))
    monkeypatch.setattr(
        os,
        "open",
        lambda path, *more: (calls.append("folder") if path == tmp_path else 0, open_(path, *more))[1],
    )
    monkeypatch.setattr(sys, "platform", system)
    files.write_text(tmp_path / "a.txt", "whole")
    monkeypatch.undo()
    # Windows cannot open a folder.
    assert calls == ["sync", "rename"] + (["folder", "sync"] if system != "win32" else [])


def test_a_file_that_fails_to_sync_is_not_renamed_into_place(tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError):
        files.write_text(tmp_path / "a.txt", "whole")
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_a_killed_process_are_removed_and_no_others(tmp_path):
    ours, others = ".train-0.tmp-abc_4567.tar", [".train-0.tar", "train.tmp-abc_4567.tar", ".tmp-1"]
    for name in [ours, *others]:
        (tmp_path / name).touch()
    files.remove_temporaries(tmp_path, "other")
    assert (tmp_path / ours).exists()
    files.remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


# --- the manifest ---------------------------------------------------------------------------------


def test_an_unfinished_line_is_replaced_by_the_next_and_a_damaged_one_gives_a_warning(tmp_path, caplog):
    book = Ledger(tmp_path)
    commit(book, 0)
    with open(tmp_path / MANIFEST, "a") as file:
        file.write('nonsense\n["a list"]\n{"part": 1, "files": {}}')  # killed before the end of the line
    again = Ledger(tmp_path)
    assert list(again.done) == [0] and caplog.text.count("that cannot be read") == 2
    commit(again, 2)
    assert list(again.done) == list(Ledger(tmp_path).done) == [0, 2]
    assert json.loads((tmp_path / MANIFEST).read_text().splitlines()[-1])["part"] == 2


def test_shared_ledgers_see_each_others_lines(tmp_path):
    one, two = Ledger(tmp_path, shared=True), Ledger(tmp_path, shared=True)
    commit(one, 0)
    commit(two, 1)
    one.refresh()
    assert list(one.done) == list(two.done) == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", MANIFEST]


def test_damage_is_found_by_size_or_hash_and_lost_parts_no_longer_count(tmp_path):
    book, messages = Ledger(tmp_path), []
    for part in range(4):
        commit(book, part)
    (tmp_path / "data/1.txt").write_text("other")
    (tmp_path / "data/2.txt").write_text("cut")
    (tmp_path / "data/3.txt").unlink()
    assert book.damaged() == ["data/1.txt", "data/2.txt", "data/3.txt"]
    book.drop_lost(messages.append)
    assert list(book.done) == [0, 1]
    assert messages == [
        f"{tmp_path / 'data' / name} is missing or truncated; recreating it" for name in ("2.txt", "3.txt")
    ]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_while_a_line_is_written_keeps_the_earlier_lines(tmp_path, monkeypatch, number):
    book = Ledger(tmp_path)
    commit(book, 0)

    def half(path, line):
        with open(path, "a") as file:
            file.write(json.dumps(line)[:10])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ledger, "append_row", half)
    with pytest.raises(ResourceError, match=r"no space left .* from the 1 parts already written"):
        commit(book, 1)
    monkeypatch.undo()
    assert list(Ledger(tmp_path).done) == [0]
    commit(book, 1)
    assert [line["part"] for line in Ledger(tmp_path).lines] == [0, 1]


def test_work_is_resumed_only_with_the_same_header(tmp_path):
    def begin(kind="draw", seed=1, **more):
        return open_ledger(tmp_path, kind, {"seed": seed}, remove=lambda folder: None, **more)

    with begin() as book:
        commit(book, 0)
    with begin() as book:
        assert list(book.done) == [0] and not book.finished
        book.finish()
    message = "was started with seed 1, but it is now 2; add --overwrite"
    with pytest.raises(InputError, match=message), begin(seed=2):
        pass
    with pytest.raises(InputError, match="already contains other files"), begin("paint"):
        pass
    with begin(overwrite="changed") as book:
        assert book.finished
    with begin(seed=2, overwrite="changed") as book:
        assert not book.done and not book.finished


def test_an_added_or_removed_setting_counts_as_a_change(tmp_path):
    for before, now in (({}, {"seed": 1}), ({"seed": 1}, {})):
        with pytest.raises(InputError, match="started with seed"):
            check_same(tmp_path, before, now)
    check_same(tmp_path, {}, {})
