"""Checkpoints that survive a crash at any moment: written beside, flushed, renamed, and then listed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ip2p.base.errors import InputError
from ip2p.base.files import replacing, write_text

log = logging.getLogger("ip2p")

MANIFEST = "manifest.jsonl"


class Checkpoints:
    """The saved states of one run: `step-00000500.pt` and so on, and a manifest that lists the whole ones.

    The manifest is the only truth: a file that it does not list was never finished. The `keep` newest
    stay; an older one goes only when the new one is listed.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state` as the newest; at every moment the ones before are whole. OSError on a full disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".step-*.pt"):
            stale.unlink(missing_ok=True)  # of a run that was killed as it wrote
        path = self.folder / f"step-{step:08}.pt"
        with replacing(path) as temporary:
            with open(temporary, "wb") as file:
                hashing = _Hashing(file)
                try:
                    torch.save(state, typing.cast(typing.IO[bytes], hashing))
                except Exception:
                    # torch says that the archive's end is in the wrong place, not that the disk is full.
                    if hashing.trouble is not None:
                        raise OSError(hashing.trouble.errno, hashing.trouble.strerror, str(path)) from None
                    raise
            size = temporary.stat().st_size
        row = {"id": path.stem, "step": step, "bytes": size, "sha256": hashing.digest.hexdigest()}
        rows = [old for old in self.rows() if old["step"] != step]
        kept = [*rows, row][-self.keep :]
        write_text(self.folder / MANIFEST, "".join(json.dumps(each) + "\n" for each in kept))
        listed = {each["id"] for each in kept}
        for old in self.folder.glob("step-*.pt"):
            if old.stem not in listed:
                old.unlink(missing_ok=True)
        return path

    def rows(self) -> list[dict[str, Any]]:
        """The manifest's lines, the oldest first; none when there is no manifest."""
        try:
            lines = (self.folder / MANIFEST).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def load(self) -> dict[str, Any] | None:
        """The newest whole state, None when there is none yet; a damaged one is told and passed over.

        Only tensors and plain values are read, never code. Raises InputError when states are listed and
        none of them can be read, for starting anew would lose what they held.
        """
        rows = self.rows()
        for row in reversed(rows):
            path = self.folder / f"{row['id']}.pt"
            trouble = _trouble(path, row)
            if trouble is None:
                # Mapped, so that a large state is not held twice while it is copied into the networks.
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # type: ignore[no-any-return]
            log.warning("%s %s; going on from the checkpoint before it", path, trouble)
        if rows:
            raise InputError(
                f"no checkpoint in {self.folder} can be read; bring them back, or delete that folder to "
                "begin anew."
            )
        return None


def _trouble(path: Path, row: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    if size != row["bytes"]:
        return f"has {size:,} bytes, not {row['bytes']:,}"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    return None if digest.hexdigest() == row["sha256"] else "is damaged (another sha256)"


def _digest(file: BinaryIO) -> Any:
    digest = hashlib.sha256()  # Python 3.10
    for part in _parts(file):
        digest.update(part)
    return digest


def _parts(file: BinaryIO) -> Iterator[bytes]:
    while part := file.read(2**20):
        yield part


class _Hashing:
    """A file that is hashed as it is written, so that it need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.trouble: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.trouble = error
            raise

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.trouble = error
            raise
