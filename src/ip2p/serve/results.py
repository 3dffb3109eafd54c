"""What has ended, kept for a while: results in a bounded folder, ended jobs by their ids in memory."""

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

# 128 random bits in base 64, and a suffix: nothing in it can name another folder.
NAME = re.compile(r"[A-Za-z0-9_-]{22}\.[a-z0-9]{1,8}", re.ASCII)
MARK = ".ip2p-store"  # marks a folder that may be emptied
REMEMBERED = 10_000  # names dropped before their time


class Shelf:
    """Names, each kept for `seconds`; the oldest go first beyond `size` bytes or `count`.

    on_drop is called with each name that goes. Its owner has the lock.
    """

    def __init__(self, *, seconds: float, size: int, count: int, on_drop: Callable[[str], object]) -> None:
        self.seconds, self.size, self.count = seconds, size, count
        self.bytes = 0
        self._on_drop = on_drop
        self._entries: dict[str, tuple[int, float]] = {}  # size and time, the oldest first
        self._early: dict[str, None] = {}  # dropped before their time, to make room

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, name: str, size: int) -> None:
        self._entries[name] = size, time.monotonic()
        self.bytes += size

    def resize(self, name: str, size: int) -> None:
        """Change the size of a name that is kept."""
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
        """Drop what is past its time and, except for `stay`, what so many more bytes and names need."""
        now = time.monotonic()
        for name, (taken, since) in list(self._entries.items()):
            heavy, many = self.bytes + size > self.size, len(self._entries) + count > self.count
            past = now - since >= self.seconds
            if not (heavy or many or past):
                return
            # Dropping what takes no memory frees none: it goes for the count and the time alone.
            if past or (name not in stay and (many or (heavy and taken))):
                self.drop(name)
                if not past:
                    self._early[name] = None
                    if len(self._early) > REMEMBERED:
                        del self._early[next(iter(self._early))]

    def dropped_early(self, name: str) -> bool:
        """Whether a name was dropped before its time, to make room. Needs no lock."""
        return name in self._early

    def clear(self) -> None:
        for name in list(self._entries):
            self.drop(name)


class Store:
    """A folder of files, each kept for `seconds`; the oldest go first beyond `size` bytes or `count`.

    Only its owner can read it (0700, files 0600). A new store empties the folder: what it held belongs to a
    process that is gone. Any thread may use it. Raises InputError for a folder that holds anything else, is
    a link, or cannot be written.
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
        if it and those are larger than the store, and for a full disk.
        """
        name = secrets.token_urlsafe(16) + suffix
        assert NAME.fullmatch(name), name
        with self._lock:
            whole = len(data) + self.shelf.size_of(beside)
            if whole > self.shelf.size or len(beside) >= self.shelf.count:
                what = "The results of this edit have" if beside else "The result has"
                raise ResourceError(
                    f"{what} {whole:,} bytes; the server can keep {self.shelf.size:,} "
                    "(--store-mb). Request fewer or smaller results."
                )
            self.shelf.drop_old(len(data), 1, beside)
            self.shelf.put(name, len(data))  # before it is written, or many at once would exceed the bound
        partial = self.folder / f".{name}"
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
            with self._lock:
                # If others took its room meanwhile it must go: a file that is not counted would stay forever.
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
        """The file of exactly this name; None for any other text, and once its time has passed."""
        if not NAME.fullmatch(name):
            return None
        with self._lock:
            self.shelf.drop_old()
            if name not in self.shelf:
                return None
        try:
            # Nobody else writes here; still, follow no link out of the folder and wait for no pipe.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            with open(os.open(self.folder / name, flags), "rb") as file:
                return file.read() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
        except OSError:
            return None

    def remove(self, name: str) -> None:
        """Drop a file, if it is kept."""
        with self._lock:
            self.shelf.drop(name)

    def close(self) -> None:
        """Drop everything."""
        with self._lock:
            self.shelf.clear()

    def __len__(self) -> int:
        return len(self.shelf)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self.folder / name).unlink(missing_ok=True)

    def _empty(self) -> None:
        entries = list(self.folder.iterdir())
        strange = [
            entry
            for entry in entries
            if (entry.name != MARK and not NAME.fullmatch(entry.name.removeprefix(".")))
            or (entry.is_dir() and not entry.is_symlink())
        ]
        if entries and (strange or self.folder / MARK not in entries):
            raise InputError(
                f"{self.folder} contains {(strange or entries)[0].name}, which this server did not write. "
                "The folder would be emptied. Choose another folder for --store."
            )
        for entry in entries:
            entry.unlink()


class JobShelf:
    """Jobs by their ids: those that wait or run, and ended ones for `seconds`, `size` bytes and `count`.

    store: for results that a client comes back for. Any thread may use it.
    """

    def __init__(self, *, seconds: float, size: int, count: int, store: Store | None) -> None:
        self.store = store
        self._jobs: dict[str, Job] = {}
        self.shelf = Shelf(seconds=seconds, size=size, count=count, on_drop=self._jobs.pop)
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
        # The newest stays, whatever its size: nobody had the time to ask for it.
        self.shelf.drop_old(stay=(self._newest,))
