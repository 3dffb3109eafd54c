"""What has ended, kept for a while: finished files in a bounded folder, ended jobs by their ids in memory."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ip2p.base.errors import InputError, ResourceError
from ip2p.pictures.images import to_bytes
from ip2p.serve.jobs import Encode, Job, Kept

# 128 random bits in base 64, and an ending: nothing in it can name another folder.
NAME = re.compile(r"[A-Za-z0-9_-]{22}\.[a-z0-9]{1,8}", re.ASCII)
MARK = ".ip2p-store"  # marks a folder that may be emptied
REMEMBERED = 10_000  # names that made room before their time


@dataclass
class _Entry:
    size: int
    since: float


class Shelf:
    """Names, each kept for `seconds`; the oldest go first when `size` bytes or `count` is passed.

    on_drop is called with each name that goes. It has no lock of its own.
    """

    def __init__(self, *, seconds: float, size: int, count: int, on_drop: Callable[[str], None]) -> None:
        self.seconds, self.size, self.count = seconds, size, count
        self.bytes = 0
        self._on_drop = on_drop
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._early: OrderedDict[str, None] = OrderedDict()  # what made room before its time

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, name: str, size: int) -> None:
        self._entries[name] = _Entry(size, time.monotonic())
        self.bytes += size

    def resize(self, name: str, size: int) -> None:
        """Count a name that is kept with another size."""
        if name in self._entries:
            self.bytes += size - self._entries[name].size
            self._entries[name].size = size

    def size_of(self, names: Sequence[str]) -> int:
        return sum(self._entries[name].size for name in names if name in self._entries)

    def drop(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self.bytes -= entry.size
            self._on_drop(name)

    def drop_old(self, size: int = 0, count: int = 0, stay: Sequence[str] = ()) -> None:
        """Drop what is past its time, and what, but for `stay`, is in the way of so many bytes and names."""
        now = time.monotonic()
        for name, entry in list(self._entries.items()):
            heavy, many = self.bytes + size > self.size, len(self._entries) + count > self.count
            past = now - entry.since >= self.seconds
            if not (heavy or many or past):
                return
            # What takes no memory gives none: it goes for the count and the time alone.
            if past or (name not in stay and (many or (heavy and entry.size))):
                self.drop(name)
                if not past:
                    self._early[name] = None
                    while len(self._early) > REMEMBERED:
                        self._early.popitem(last=False)

    def went_early(self, name: str) -> bool:
        """Whether a name was dropped before its time, to make room."""
        return name in self._early

    def clear(self) -> None:
        for name in list(self._entries):
            self.drop(name)


class Store:
    """A folder of files, each kept for `seconds`; the oldest go first when `size` bytes or `count` is passed.

    The folder is this store's alone, for its owner only (0700, files 0600), and is emptied when a store is
    made: what it held belongs to a process that is gone. Any number of threads may use it. Raises InputError
    for a folder that holds anything else, that is a link, or that cannot be written.
    """

    def __init__(self, folder: Path, *, seconds: float = 600, size: int = 2**30, count: int = 10_000) -> None:
        self.folder = folder
        self.shelf = Shelf(seconds=seconds, size=size, count=count, on_drop=self._unlink)
        self._lock = threading.Lock()
        try:
            if folder.is_symlink():
                raise InputError(f"{folder} is a link; name the folder itself for the results.")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.chmod(folder, 0o700)
            self._empty()
            (folder / MARK).touch(mode=0o600)
        except OSError as error:
            raise InputError(f"The folder {folder} for results cannot be used ({error.strerror}).") from None

    def put(self, data: bytes, suffix: str, *, beside: Sequence[str] = ()) -> str:
        """Keep a file, written whole; its new name, which ends in `suffix`, such as ".png".

        beside: names of files of the same edit, which do not go to make room for this one. Raises
        ResourceError where it and those are larger than the store, and for a full disk.
        """
        name = secrets.token_urlsafe(16) + suffix
        assert NAME.fullmatch(name), name
        with self._lock:
            whole = len(data) + self.shelf.size_of(beside)
            if whole > self.shelf.size or len(beside) >= self.shelf.count:
                what = "The results of this edit, together" if beside else "A result of"
                raise ResourceError(
                    f"{what} {whole:,} bytes is more than the {self.shelf.size:,} that the server keeps "
                    "(--store-mb). Ask for fewer or smaller ones."
                )
            self.shelf.drop_old(len(data), 1, beside)
            self.shelf.put(name, len(data))  # before it is written, or many at once would pass the bound
        partial = self.folder / f".{name}"
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
            with self._lock:
                # Others may have needed its room meanwhile: a file that nobody counts would stay forever.
                if name in self.shelf:
                    os.rename(partial, self.folder / name)
                else:
                    partial.unlink()
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self.remove(name)
            raise ResourceError(f"A result cannot be kept ({error.strerror}). Free the disk.") from None
        return name

    def read(self, name: str) -> bytes | None:
        """The file kept under exactly this name; None for any other text, and once its time has passed."""
        if not NAME.fullmatch(name):
            return None
        with self._lock:
            self.shelf.drop_old()
            if name not in self.shelf:
                return None
        try:
            # Nobody else writes here, and still no link is followed out of the folder, no pipe waited for.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            with open(os.open(self.folder / name, flags), "rb") as file:
                return file.read() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
        except OSError:
            return None

    def went_early(self, name: str) -> bool:
        """Whether a file was dropped before its time, to make room."""
        with self._lock:
            return self.shelf.went_early(name)

    def remove(self, name: str) -> None:
        """Drop a file before its time; nothing happens for a name that is not kept."""
        with self._lock:
            self.shelf.drop(name)

    def close(self) -> None:
        """Drop everything."""
        with self._lock:
            self.shelf.clear()

    def __len__(self) -> int:
        return len(self.shelf)

    @property
    def bytes(self) -> int:
        """Of all that is kept now."""
        return self.shelf.bytes

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self.folder / name).unlink(missing_ok=True)

    def _empty(self) -> None:
        there = list(self.folder.iterdir())
        known = {
            entry for entry in there if entry.name == MARK or NAME.fullmatch(entry.name.removeprefix("."))
        }
        if there and (self.folder / MARK not in there or known != set(there)):
            strange = next((entry for entry in there if entry not in known), there[0])
            raise InputError(
                f"{self.folder} holds {strange.name}, which is no result of this server's, and would be "
                "emptied. Name a folder of its own."
            )
        for entry in known:
            if entry.is_dir() and not entry.is_symlink():
                raise InputError(f"{self.folder} holds the folder {entry.name}. Name a folder of its own.")
            entry.unlink()


class JobShelf:
    """Jobs by their ids: those that wait or run, and ended ones for `seconds`, `size` bytes and `count`.

    store: where results go that somebody comes back for. Any number of threads may use it.
    """

    def __init__(self, *, seconds: float, size: int, count: int, store: Store | None) -> None:
        self.store = store
        self.shelf = Shelf(seconds=seconds, size=size, count=count, on_drop=self._forget)
        self._jobs: dict[str, Job] = {}
        self._newest = ""  # of those with pictures in memory
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job) -> None:
        with self._lock:
            self._jobs[job.id] = job

    def remove(self, job: Job) -> None:
        with self._lock:
            self._jobs.pop(job.id, None)

    def get(self, id: str) -> Job | None:
        """The job of an id; None once it is forgotten."""
        with self._lock:
            self._drop_old()
            return self._jobs.get(id)

    def went_early(self, id: str) -> bool:
        """Whether the job of an id was forgotten before its time, to make room."""
        with self._lock:
            return self.shelf.went_early(id)

    def end(self, job: Job) -> None:
        """Keep a job that ends, for its time."""
        with self._lock:
            size = job.bytes
            self.shelf.put(job.id, size)
            if size:
                self._newest = job.id
            self._drop_old()

    def keep(self, job: Job, encode: Encode) -> list[Kept]:
        """Move a job's results from memory to the store, unless they are there.

        Raises ResourceError where they do not fit, or the disk is full.
        """
        store = self.store
        assert store is not None
        with job.keeping:
            if job.kept is None:
                names: list[str] = []
                kept = []
                try:
                    for result in job.results:
                        names.append(file := store.put(*encode(result.image), beside=names))
                        mask = None
                        if result.mask is not None:
                            mask = store.put(to_bytes(result.mask), ".png", beside=names)
                            names.append(mask)
                        kept.append(Kept(file, mask, result.seed, result.parameters))
                except BaseException:
                    for name in names:
                        store.remove(name)
                    raise
                job.put_away(kept)
                with self._lock:
                    self.shelf.resize(job.id, 0)
            return job.kept or []

    def _drop_old(self) -> None:
        # The newest stays, whatever its size: nobody had the time to ask for it.
        self.shelf.drop_old(stay=(self._newest,))

    def _forget(self, id: str) -> None:
        self._jobs.pop(id, None)
