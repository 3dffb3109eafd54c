import errno
import os
import stat
import threading
import time

import pytest

from ip2p.base.errors import InputError, ResourceError
from ip2p.serve.results import NAME, Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def files(store):
    return sorted(path.name for path in store.folder.iterdir() if NAME.fullmatch(path.name))


def test_stored_data_is_read_back_by_its_name(store):
    names = [store.put(data, ".png") for data in (b"one", b"two")]
    assert [store.read(name) for name in names] == [b"one", b"two"]
    assert all(NAME.fullmatch(name) for name in names) and len(store) == 2 and store.shelf.bytes == 6


def test_names_are_unique_and_have_at_least_128_bits(store):
    names = {store.put(b"x", ".png") for _ in range(200)}
    assert len(names) == 200
    assert all(len(name.removesuffix(".png")) * 6 >= 128 for name in names)


def test_files_are_private_to_their_owner(store):
    name = store.put(b"secret", ".jpg")
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((store.folder / name).stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "ask",
    [
        "../secret.png",
        "..%2fsecret.png",
        "/etc/passwd",
        "{name}/../{name}",
        "{name}\0",
        "{name}\n",
        "./{name}",
        ".{name}",
        ".ip2p-store",
        "",
        "a" * 9000,
        "a" * 22 + ".png",
        "é" * 22 + ".png",
        "{stem}",
    ],
)
def test_only_names_that_the_store_issued_are_read(store, ask):
    (store.folder.parent / "secret.png").write_bytes(b"secret")
    name = store.put(b"kept", ".png")
    assert store.read(ask.format(name=name, stem=name.removesuffix(".png"))) is None
    assert store.read(name) == b"kept"


def test_a_file_that_the_store_did_not_write_is_not_read(store):
    (store.folder / ("a" * 22 + ".png")).write_bytes(b"strange")
    assert store.read("a" * 22 + ".png") is None


def test_a_symlink_in_place_of_a_file_is_not_followed(store, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    name = store.put(b"kept", ".png")
    (store.folder / name).unlink()
    (store.folder / name).symlink_to(tmp_path / "secret")
    assert store.read(name) is None


def test_a_fifo_in_place_of_a_file_does_not_block(store):
    name = store.put(b"kept", ".png")
    (store.folder / name).unlink()
    os.mkfifo(store.folder / name)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(store.read(name)), daemon=True)
    thread.start()
    thread.join(5)
    assert answers == [None]


def test_the_oldest_files_are_evicted_when_bytes_or_count_exceed_the_limit(tmp_path):
    store = Store(tmp_path / "bytes", size=10)
    names = [store.put(b"1234", ".png") for _ in range(4)]
    assert [store.read(name) for name in names] == [None, None, b"1234", b"1234"]
    assert store.shelf.bytes == 8 and files(store) == sorted(names[2:])
    store = Store(tmp_path / "count", count=3)
    names = [store.put(b"", ".png") for _ in range(5)]
    assert [store.read(name) for name in names] == [None, None, b"", b"", b""]


def test_files_of_one_edit_do_not_evict_each_other(tmp_path):
    store = Store(tmp_path / "results", size=10)
    old = store.put(b"1234", ".png")
    names = []
    for _ in range(2):
        names.append(store.put(b"1234", ".png", beside=names))
    assert store.read(old) is None and store.shelf.dropped_early(old)
    with pytest.raises(ResourceError, match="edit have 12 bytes.*--store-mb"):
        store.put(b"1234", ".png", beside=names)
    assert [store.read(name) for name in names] == [b"1234"] * 2
    later = store.put(b"1234", ".png")  # of another edit
    assert [store.shelf.dropped_early(name) for name in (names[0], later, "other")] == [True, False, False]


def test_a_file_expires_after_its_retention_time(tmp_path):
    store = Store(tmp_path / "results", seconds=0.05)
    name = store.put(b"brief", ".png")
    assert store.read(name) == b"brief"
    time.sleep(0.06)
    assert store.read(name) is None
    assert files(store) == [] and store.shelf.bytes == 0


def test_a_result_larger_than_the_store_is_refused_and_evicts_nothing(tmp_path):
    store = Store(tmp_path / "results", size=10)
    name = store.put(b"1234", ".png")
    with pytest.raises(ResourceError, match="11 bytes; the server can keep 10"):
        store.put(b"x" * 11, ".png")
    assert store.read(name) == b"1234"


def test_a_new_store_empties_the_folder_of_the_previous_one(store):
    name = store.put(b"old", ".png")
    (store.folder / f".{'b' * 22}.png").write_bytes(b"half writ")  # as left by a killed process
    again = Store(store.folder)
    assert again.read(name) is None
    assert [path.name for path in store.folder.iterdir()] == [".ip2p-store"]


@pytest.mark.parametrize("name", ["holiday.jpg", "a" * 22 + ".png"])
def test_a_folder_with_other_files_is_refused_and_left_unchanged(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(InputError, match=name):
        Store(tmp_path)
    assert (tmp_path / name).read_bytes() == b"mine"


def test_a_store_folder_with_a_foreign_file_is_refused_and_left_unchanged(store):
    name = store.put(b"old", ".png")
    (store.folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        Store(store.folder)
    assert (store.folder / name).exists()


def test_a_symlink_to_a_folder_is_refused(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(InputError, match="is a link"):
        Store(tmp_path / "link")


def test_a_full_disk_is_reported_and_leaves_no_file(store, monkeypatch):
    def full(*names):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(ResourceError, match="No space left"):
        store.put(b"x", ".png")
    assert [path.name for path in store.folder.iterdir()] == [".ip2p-store"]
    assert store.shelf.bytes == 0 and len(store) == 0


def test_concurrent_threads_stay_within_the_limits(tmp_path):
    store = Store(tmp_path / "results", size=1000, count=20)

    def work():
        for k in range(50):
            name = store.put(bytes(k), ".png")
            store.read(name)
            if k % 7 == 0:
                store.remove(name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    remaining = files(store)
    assert len(remaining) == len(store) <= 20
    assert sum((store.folder / name).stat().st_size for name in remaining) == store.shelf.bytes <= 1000


def test_a_file_evicted_while_it_is_written_is_removed(store, monkeypatch):
    real = os.open

    def slow(*args):
        monkeypatch.setattr(os, "open", real)
        store.close()  # drops every file, as many new ones would
        return real(*args)

    monkeypatch.setattr(os, "open", slow)
    name = store.put(b"x", ".png")
    assert store.read(name) is None and len(store) == 0
    assert [path.name for path in store.folder.iterdir()] == [".ip2p-store"]


def test_closing_leaves_no_file(store):
    store.put(b"x", ".png")
    store.close()
    assert files(store) == []
