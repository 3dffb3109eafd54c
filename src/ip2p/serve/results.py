"""Temporary storage of results in a folder, and of ended jobs in memory."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ip2p.base.errors import InputError, ResourceError
from ip2p.pictures.images import to_bytes
from ip2p.serve.jobs import Encode, Job, Kept

# 128 random bits in base64, and a suffix. Such a name cannot point to another folder.
NAME = re.compile(r"[A-Za-z0-9_-]{22}\.[a-z0-9]{1,8}", re.ASCII)
MARK = ".ip2p-store"  # marks a folder that a new store may empty
REMEMBERED = 10_000  # maximum number of early drops to remember


class Shelf:
    """An index of names, each kept for `seconds`. Beyond `size` bytes or `count`, the oldest are dropped.

    on_drop: called with each dropped name. Not thread-safe: the owner must hold a lock.
    """

    def __init__(self, *, seconds: float, size: int, count: int, on_drop: Callable[[str], object]) -> None:
        self.seconds, self.size, self.count = seconds, size, count
        self.bytes = 0
        self._on_drop = on_drop
        self._entries: dict[str, tuple[int, float]] = {}  # size and time, oldest first
        self._early: dict[str, None] = {}  # dropped before they expired, to make room

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, name: str, size: int) -> None:
        self._entries[name] = size, time.monotonic()
        self.bytes += size

    def resize(self, name: str, size: int) -> None:
        """Change the size of a name, if it is kept."""
        if name in self._entries:
            before, since = self._entries[name]
            self._entries[name] = size, since
            self.bytes += size - before

    def size_of(self, names: Sequence[str]) -> int:
        return sum(self._entries[name][0] for name in names if name in self._entries)

    def drop(self, name: str) -> None:
        if name in self._entries:
            self.bytes -= self._entries.pop(name)[0]
            self._on_drop(name)

    def drop_old(self, size: int = 0, count: int = 0, stay: Sequence[str] = ()) -> None:
        """Drop expired names, and the oldest ones until `size` more bytes and `count` more names fit.

        stay: names that are dropped only if they have expired.
        """
        now = time.monotonic()
        for name, (taken, since) in list(self._entries.items()):
            heavy, many = self.bytes + size > self.size, len(self._entries) + count > self.count
            past = now - since >= self.seconds
            if not (heavy or many or past):
                return
            # A name without bytes is dropped only for its age and the count, since that frees no memory.
            if past or (name not in stay and (many or (heavy and taken))):
                self.drop(name)
                if not past:
                    self._early[name] = None
                    if len(self._early) > REMEMBERED:
                        del self._early[next(iter(self._early))]

    def dropped_early(self, name: str) -> bool:
        """Whether a name was dropped before it expired, to make room. Needs no lock."""
        return name in self._early

    def clear(self) -> None:
        for name in list(self._entries):
            self.drop(name)


class Store:
    """A folder of files, each kept for `seconds`. Beyond `size` bytes or `count`, the oldest are deleted.

    Only the current user can read it (mode 0700, files 0600). A new store empties the folder, because its
    files belong to a process that has ended. Thread-safe. Raises InputError if the folder contains other
    files, is a link, or is not writable.
    """

    def __init__(self, folder: Path, *, seconds: float = 600, size: int = 2**30, count: int = 10_000) -> None:
        self.folder = folder
        self.shelf = Shelf(seconds=seconds, size=size, count=count, on_drop=self._unlink)
        self._lock = threading.Lock()
        try:
            if folder.is_symlink():
                raise InputError(f"{folder} is a link. Pass the folder itself.")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.chmod(folder, 0o700)
            self._empty()
            (folder / MARK).touch(mode=0o600)
        except OSError as error:
            raise InputError(f"The folder {folder} for results cannot be used ({error.strerror}).") from None

    def put(self, data: bytes, suffix: str, *, beside: Sequence[str] = ()) -> str:
        """Write a file and return its new name, which ends in `suffix`, such as ".png".

        beside: files of the same edit, which are not dropped to make room for this one. Raises ResourceError
        if all of them together do not fit in the store, or if the disk is full.
        """
        name = secrets.token_urlsafe(16) + suffix
        assert NAME.fullmatch(name), name
        with self._lock:
            total = len(data) + self.shelf.size_of(beside)
            if total > self.shelf.size or len(beside) >= self.shelf.count:
                subject = "The results of this edit have" if beside else "The result has"
                raise ResourceError(
                    f"{subject} {total:,} bytes; the server can keep {self.shelf.size:,} "
                    "(--store-mb). Request fewer or smaller results."
                )
            self.shelf.drop_old(len(data), 1, beside)
            self.shelf.put(name, len(data))  # before writing, so that concurrent writes stay within the limit
        partial = self.folder / f".{name}"
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
            with self._lock:
                # If it was dropped in the meantime, delete it: nothing else would.
                if name in self.shelf:
                    os.rename(partial, self.folder / name)
                else:
                    partial.unlink()
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self.remove(name)
            raise ResourceError(
                f"A result cannot be stored ({error.strerror}). Free some disk space."
            ) from None
        return name

    def read(self, name: str) -> bytes | None:
        """The contents of a file, or None if the name is invalid, unknown or expired."""
        if not NAME.fullmatch(name):
            return None
        with self._lock:
            self.shelf.drop_old()
            if name not in self.shelf:
                return None
        try:
            # Only this process writes here. As a precaution, do not follow links or block on pipes.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            with open(os.open(self.folder / name, flags), "rb") as file:
                return file.read() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
        except OSError:
            return None

    def remove(self, name: str) -> None:
        """Delete a file, if it exists."""
        with self._lock:
            self.shelf.drop(name)

    def close(self) -> None:
        """Delete all files."""
        with self._lock:
            self.shelf.clear()

    def __len__(self) -> int:
        return len(self.shelf)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self.folder / name).unlink(missing_ok=True)

    def _empty(self) -> None:
        entries = list(self.folder.iterdir())
        foreign = [
            entry
            for entry in entries
            if (entry.name != MARK and not NAME.fullmatch(entry.name.removeprefix(".")))
            or (entry.is_dir() and not entry.is_symlink())
        ]
        if entries and (foreign or self.folder / MARK not in entries):
            raise InputError(
                f"{self.folder} contains {(foreign or entries)[0].name}, which this server did not write. "
                "The folder would be emptied. Choose another folder for --store."
            )
        for entry in entries:
            entry.unlink()


class JobShelf:
    """Jobs by id: all active ones, and ended ones for `seconds`, up to `size` bytes and `count` jobs.

    store: where results are kept for clients that come back later. Thread-safe.
    """

    def __init__(self, *, seconds: float, size: int, count: int, store: Store | None) -> None:
        self.store = store
        self._jobs: dict[str, Job] = {}
        self.shelf = Shelf(seconds=seconds, size=size, count=count, on_drop=self._jobs.pop)
        self._newest = ""  # id of the last ended job with pictures in memory
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
        """The job with an id, or None if it is unknown or was dropped."""
        with self._lock:
            self._drop_old()
            return self._jobs.get(id)

    def end(self, job: Job) -> None:
        """Keep a job that ends until it expires."""
        with self._lock:
            size = job.bytes
            self.shelf.put(job.id, size)
            if size:
                self._newest = job.id
            self._drop_old()

    def keep(self, job: Job, encode: Encode) -> list[Kept]:
        """Move a job's results from memory to the store, unless they are already there.

        Raises ResourceError if they do not fit or the disk is full.
        """
        store = self.store
        assert store is not None
        with job.keeping:
            if job.kept is None:
                names: list[str] = []
                kept = []

                def put(data: bytes, suffix: str) -> str:
                    names.append(name := store.put(data, suffix, beside=names))
                    return name

                try:
                    for result in job.results:
                        file = put(*encode(result.image))
                        mask = None if result.mask is None else put(to_bytes(result.mask), ".png")
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
        # Keep the newest, whatever its size: its client has not had time to fetch it.
        self.shelf.drop_old(stay=(self._newest,))
