"""The ledger of a folder, which lists its committed files, and the lock that excludes other processes.

A file is written under a temporary name in the same folder, synced and renamed, and the folder is synced.
Then a line with its size and SHA-256 is appended to the folder's `manifest.jsonl`. The manifest is the single
source of truth: files that no line lists and truncated lines are ignored.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from ip2p.base import terminal
from ip2p.base.errors import InputError, translated_errors
from ip2p.base.files import append_row, checksum, remove_temporaries, replacing, write_text

MANIFEST, LOCK = "manifest.jsonl", ".lock"
DONE = {"done": True}  # the last line of work that is finished

Line = dict[str, Any]  # a line of a manifest
Files = dict[str, tuple[int | None, str]]  # name below the folder → size in bytes, if known, and SHA-256
Say = Callable[[str], None]

log = logging.getLogger("ip2p")


# --- the lock -------------------------------------------------------------------------------------


class Lock:
    """A file that one process at a time can lock. The system releases the lock of a killed process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # The library's fallback without `flock` is a file that stays when its process is killed.
        self._lock = FileLock(path, thread_local=False, fallback_to_soft=False)

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the lock; False if another process has it. Raises InputError if the disk supports no locks."""
        try:
            self._lock.acquire(blocking=wait, poll_interval=0.01)
        except Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            raise InputError(
                f"cannot lock {self.path}: {getattr(error, 'strerror', None) or error}; choose a folder on "
                "another disk."
            ) from None
        return True

    def release(self) -> None:
        """Remove the file and unlock it. A process that has it open notices the removal and retries."""
        if sys.platform != "win32":  # on Windows the library removes it after the release
            self.path.unlink(missing_ok=True)
        self._lock.release()

    @contextlib.contextmanager
    def waited(self) -> Iterator[None]:
        """Wait for the lock and hold it for the block."""
        self.acquire(wait=True)
        try:
            yield
        finally:
            self.release()


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder for this process. Raises InputError that names the owner if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / LOCK)
    if not lock.acquire():
        owner = ""
        with contextlib.suppress(OSError, ValueError):
            number, host = lock.path.read_text(encoding="utf-8").split()
            owner = f" (process {number} on {host})"
        raise InputError(
            f"another ip2p process is writing to {folder}{owner}; wait for it to finish, or choose another "
            "folder with -o."
        )
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock works, only without its owner's name
            lock.path.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


# --- the manifest ---------------------------------------------------------------------------------


class Ledger:
    """The manifest of a folder.

    lines: all readable lines, in order. done: the last line of each value of `key`; these lines commit
    files. shared: other processes append too. files_of: returns the files that a line lists.
    """

    def __init__(
        self,
        folder: Path,
        *,
        key: str = "part",
        shared: bool = False,
        files_of: Callable[[Line], Files] = lambda row: row["files"],
    ) -> None:
        self.folder, self.path = folder, folder / MANIFEST
        self.key, self.files_of = key, files_of
        self.lines: list[Line] = []
        self.done: dict[Any, Line] = {}
        self._end = 0  # offset after the last complete line
        self._threads = threading.Lock()
        self._others = Lock(folder / f"{LOCK}-{MANIFEST}") if shared else None
        self.refresh()

    def refresh(self) -> None:
        """Read the lines that any process has appended since the last call."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(self._end)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._end += len(whole)
            for line in parse_lines(whole, self.path):
                self.lines.append(line)
                if isinstance(line.get(self.key), (int, str)):
                    self.done[line[self.key]] = line

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line and sync it. Raises ResourceError if the disk is full."""
        waited = self._others.waited() if self._others else contextlib.nullcontext()
        with self._threads, waited, self._full_disk(self.path):
            self.refresh()
            if self.path.exists() and self.path.stat().st_size > self._end:
                os.truncate(self.path, self._end)  # remove an incomplete line of a killed process
            append_row(self.path, line)
            self.refresh()

    def replace(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replace all lines in one atomic step."""
        write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self.lines.clear()
        self.done.clear()
        self._end = 0
        self.refresh()

    @contextlib.contextmanager
    def write(self, name: str, files: Files, *, sync: bool = True) -> Iterator[Path]:
        """A temporary path for the file `name`. When the block succeeds, the file is renamed to `name`.

        Its size and SHA-256 are added to `files`. sync: as in `replacing`. Raises ResourceError if the disk
        is full.
        """
        path = self.folder / name
        with self._full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, sync=sync) as temporary:
                yield temporary
                files[name] = (temporary.stat().st_size, checksum(temporary))

    def finish(self) -> None:
        """Record that all work is committed."""
        if not self.finished:
            self.append(DONE)

    @property
    def finished(self) -> bool:
        return DONE in self.lines

    def drop_lost(self, say: Say) -> None:
        """Check the sizes of all committed files; report wrong ones and drop their lines from `done`."""
        for key, line in list(self.done.items()):
            for name, (size, _) in self.files_of(line).items():
                if damage := find_damage(self.folder / name, size):
                    say(f"{self.folder / name} {damage}; recreating it")
                    del self.done[key]
                    break

    def damaged(self) -> list[str]:
        """The committed files that are missing or changed. Hashes all of them."""
        files = (item for line in self.done.values() for item in self.files_of(line).items())
        return [name for name, (size, sha256) in files if find_damage(self.folder / name, size, sha256)]

    def _full_disk(self, path: Path) -> contextlib.AbstractContextManager[None]:
        return translated_errors(
            disk=f"no space left on the disk of {path}; free some space and run the same command again to "
            f"resume from the {len(self.done):,} parts already written."
        )


def find_damage(path: Path, size: int | None, sha256: str | None = None) -> str | None:
    """What is wrong with a committed file, or None. The file is read only if `sha256` is given."""
    try:
        if size is not None and path.stat().st_size != size:
            return "is missing or truncated"
        if sha256 is not None and checksum(path) != sha256:
            return "is damaged (its SHA-256 differs)"
    except OSError:
        return "is missing or truncated"
    return None


def parse_lines(data: bytes, path: Path) -> Iterator[Line]:
    """The readable lines of the manifest `path`; warns of each other line."""
    for text in data.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            yield line
        else:
            log.warning("ignoring a line of %s that cannot be read", path)


# --- a folder of one kind of work -----------------------------------------------------------------


def is_kind(folder: Path, kind: str) -> bool:
    """Whether a folder holds work of this kind; the first line of its manifest names the kind."""
    with contextlib.suppress(OSError, ValueError), open(folder / MANIFEST, "rb") as file:
        line = file.readline()
        first = json.loads(line)
        return line.endswith(b"\n") and isinstance(first, dict) and kind in first
    return False


def check_free(folder: Path, kind: str, *, beside: Collection[str] = ()) -> None:
    """Raise InputError for a folder that holds anything but this kind of work.

    beside: names of other files that may be there before the work starts.
    """
    if not folder.is_dir() or is_kind(folder, kind):
        return
    known = {*beside, LOCK}
    with contextlib.suppress(OSError):
        # A killed run may leave an incomplete first line, before any file.
        data = (folder / MANIFEST).read_bytes()
        if json.dumps({kind: {}}).encode().startswith(data[: len(kind) + 5]):
            known.add(MANIFEST)
    if any(path.name not in known for path in folder.iterdir()):
        raise InputError(f"{folder} already contains other files; choose another folder.")


@contextlib.contextmanager
def open_ledger(
    folder: Path,
    kind: str,
    header: Mapping[str, Any],
    *,
    remove: Callable[[Path], None],
    overwrite: bool | Literal["changed"] = False,
    beside: Collection[str] = (),
    phrase: Phrase | None = None,
    say: Say = terminal.say,
) -> Iterator[Ledger]:
    """Start work of a kind in a folder, or resume it. Yields its ledger, locked for this process.

    header: everything that determines the result, as JSON values; it must be the same on resume. overwrite:
    delete the outputs with `remove` and start over; "changed": only if the header changed. beside: as in
    `check_free`. phrase: as in `check_same`. Raises InputError for a folder that contains other files, was
    started with another header, or is locked by another process.
    """
    check_free(folder, kind, beside=beside)
    with lock_folder(folder):
        ledger = Ledger(folder)
        before = ledger.lines[0][kind] if ledger.lines else None
        if before is not None and (overwrite is True or (overwrite and before != header)):
            remove(folder)
            ledger.replace([])
            before = None
        if before is None:
            ledger.append({kind: header})
        else:
            check_same(folder, before, header, phrase)
        for each in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            remove_temporaries(each)
        ledger.drop_lost(say)
        yield ledger


Phrase = Callable[[str, Any, Any], tuple[str, str]]  # name, old value, new value → texts for both values


def check_same(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], phrase: Phrase | None = None
) -> None:
    """Raise InputError that names the first setting that changed since the work in a folder started."""
    for name in dict.fromkeys([*now, *before]):
        values = before.get(name), now.get(name)
        if values[0] != values[1]:
            old, new = (phrase or _phrase)(name, *values)
            change = f"{old}, but it is now {new}" if old != new else old
            raise InputError(f"{folder} was started {change}; add --overwrite, or choose another folder.")


def _phrase(name: str, before: object, now: object) -> tuple[str, str]:
    old, new = (json.dumps(value, ensure_ascii=False) for value in (before, now))
    return f"with {name} {old}", new
