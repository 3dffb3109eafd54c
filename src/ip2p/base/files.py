"""Output files: checked before any work starts, and written atomically."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ip2p.base.errors import InputError

_SAMPLED = 1 << 20  # bytes


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise InputError unless `path` can be written: its folder exists, and the file does not."""
    folder = path.parent
    if not folder.exists():
        raise InputError(
            f"the folder {folder} of the output {path.name} does not exist; create it: mkdir -p {folder}"
        )
    if not folder.is_dir():
        raise InputError(
            f"{folder} is a file, so {path.name} cannot be written to it; choose another path with -o."
        )
    if path.is_dir():
        raise InputError(f"the output {path} is a folder; give a file in it.")
    if path.exists():
        if not overwrite:
            raise InputError(f"{path} already exists; add --overwrite, or choose another name with -o.")
        if not os.access(path, os.W_OK):
            raise InputError(f"{path} is not writable; choose another name with -o.")
    _probe(folder)


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents. Raises InputError if it cannot be created or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot create the folder {folder}: {error.strerror}; choose another with -o."
        ) from None
    _probe(folder)


def _probe(folder: Path) -> None:
    # `os.access` is not enough: it reports a read-only disk as writable for root.
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to the folder {folder}: {error.strerror}; choose another with -o."
        ) from None


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`. It replaces `path` if the block succeeds, else it is removed.

    sync: wait for the disk, so that the file also survives a power failure; too slow for thousands of
    pictures. The temporary name keeps the suffix, because some writers choose the format by it.
    `remove_temporaries` removes the temporary files of killed processes.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.tmp-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes the file private
        if sync:
            with open(temporary, "r+b") as file:  # Windows cannot sync a file that is open for reading only
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync:
            _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_temporaries(folder: Path, stem: str = "*") -> None:
    """Remove temporary files of `replacing` that killed processes left in a folder. stem: of one file."""
    for path in folder.glob(f".{stem}.tmp-????????*"):
        path.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_key(path: Path, *patterns: str) -> str:
    """A short hash of a file, or of the files in a folder that match a pattern (default: all files).

    It covers the name, size, start and end of each file: weights differ there after more training, and
    gigabytes need not be read. Unlike modification times, it is the same on every machine.
    """
    files = [path]
    if path.is_dir():
        found = {file for pattern in patterns or ("**/*",) for file in path.glob(pattern)}
        files = sorted(file for file in found if file.is_file())
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            digest.update(f"{file.relative_to(path).as_posix()}\x1f{size}\x1e".encode())
            for start in (0, max(_SAMPLED, size - _SAMPLED)):
                opened.seek(start)
                digest.update(opened.read(_SAMPLED))
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line of JSON and sync it. An incomplete last line of the file gets a line break first."""
    text = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if end and file.read(1) != b"\n":  # cut short by a kill or a full disk
            text = b"\n" + text
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":  # Windows cannot open a folder
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that can be written but not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder; the rename still holds there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def is_hub_name(name: str) -> bool:
    """Whether a name that is not a local path can be a Hugging Face name: owner/name."""
    local = name.startswith((".", "~", "/", "\\")) or Path(name).parent.is_dir()
    return not local and re.fullmatch(r"[\w.\-]+/[\w.\-]+", name) is not None
