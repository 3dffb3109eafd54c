"""Finished files kept for a while in a bounded folder, under names made here and read back by them alone."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ip2p.base.errors import InputError, ResourceError

# 128 random bits in base 64, and an ending: nothing in it can name another folder.
NAME = re.compile(r"[A-Za-z0-9_-]{22}\.[a-z0-9]{1,8}", re.ASCII)
MARK = ".ip2p-store"  # stands in a folder that may be emptied


@dataclass(frozen=True)
class _Entry:
    size: int
    since: float


class Store:
    """A folder of files, each kept for `seconds`; the oldest go first when `size` bytes or `count` is passed.

    The folder is this store's alone, for its owner only (0700, files 0600), and is emptied when a store is
    made: what it held belongs to a process that is gone. Any number of threads may use it. Raises InputError
    for a folder that holds anything else, that is a link, or that cannot be written.
    """

    def __init__(self, folder: Path, *, seconds: float = 600, size: int = 2**30, count: int = 10_000) -> None:
        self.folder = folder
        self.seconds = seconds
        self.size = size
        self.count = count
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._early: OrderedDict[str, None] = OrderedDict()  # what made room before its time
        self._bytes = 0
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
            whole = len(data) + sum(self._entries[other].size for other in beside if other in self._entries)
            if whole > self.size or len(beside) >= self.count:
                what = "The results of this edit, together" if beside else "A result of"
                raise ResourceError(
                    f"{what} {whole:,} bytes is more than the {self.size:,} that the server keeps "
                    "(--store-mb). Ask for fewer or smaller ones."
                )
            self._drop_old(len(data), 1, beside)
            # Before it is written, or many at once would pass the bound.
            self._entries[name] = _Entry(len(data), time.monotonic())
            self._bytes += len(data)
        partial = self.folder / f".{name}"
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
            with self._lock:
                # Others may have needed its room meanwhile: a file that nobody counts would stay for ever.
                if name in self._entries:
                    os.rename(partial, self.folder / name)
                else:
                    partial.unlink()
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            with self._lock:
                self._forget(name)
            raise ResourceError(f"A result cannot be kept ({error.strerror}). Free the disk.") from None
        return name

    def read(self, name: str) -> bytes | None:
        """The file kept under exactly this name; None for any other text, and once its time has passed."""
        if not NAME.fullmatch(name):
            return None
        with self._lock:
            self._drop_old()
            if name not in self._entries:
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
            return name in self._early

    def remove(self, name: str) -> None:
        """Drop a file before its time; nothing happens for a name that is not kept."""
        with self._lock:
            if name in self._entries:
                self._forget(name)

    def tidy(self) -> None:
        """Drop what is past its time; `put` and `read` do so too."""
        with self._lock:
            self._drop_old()

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    @property
    def bytes(self) -> int:
        """Of all that is kept now."""
        with self._lock:
            return self._bytes

    def close(self) -> None:
        """Drop everything."""
        with self._lock:
            for name in list(self._entries):
                self._forget(name)

    def _drop_old(self, size: int = 0, count: int = 0, stay: Sequence[str] = ()) -> None:
        """Drop what is past its time, and what, but for `stay`, is in the way of so many bytes and files."""
        now = time.monotonic()
        for name, entry in list(self._entries.items()):
            full = self._bytes + size > self.size or len(self._entries) + count > self.count
            past = now - entry.since >= self.seconds
            if not full and not past:
                return
            if past or name not in stay:
                self._forget(name)
                if not past:
                    self._early[name] = None
                    while len(self._early) > self.count:
                        self._early.popitem(last=False)

    def _forget(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._bytes -= entry.size
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
