"""Checkpoints that survive a crash at any point: a ledger of a run's saved states."""

from __future__ import annotations

import hashlib
import logging
import typing
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ip2p.base.errors import InputError
from ip2p.base.files import remove_temporaries, replacing
from ip2p.base.ledger import Ledger, Line, find_damage

log = logging.getLogger("ip2p")


class Checkpoints:
    """The saved states of one run, `step-00000500.pt` and so on, and a manifest of the complete ones.

    A file that the manifest does not list was never finished. The `keep` newest states are kept; an older one
    is deleted only after the new one is listed.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state` as the newest; earlier states remain intact. Raises OSError if the disk is full."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.folder, "step-*")
        path = self.folder / f"step-{step:08}.pt"
        with replacing(path) as temporary:
            with open(temporary, "wb") as file:
                hashing = _Hashing(file)
                try:
                    torch.save(state, typing.cast(typing.IO[bytes], hashing))
                except Exception:
                    # torch reports a wrong position in the archive instead of the full disk.
                    if hashing.error is not None:
                        raise OSError(hashing.error.errno, hashing.error.strerror, str(path)) from None
                    raise
            size = temporary.stat().st_size
        row = {"id": path.stem, "step": step, "bytes": size, "sha256": hashing.digest.hexdigest()}
        ledger = Ledger(self.folder, key="step")
        older = [line for line in ledger.lines if line["step"] != step]
        ledger.replace([*older, row][-self.keep :])
        listed = {line["id"] for line in ledger.lines}
        for old in self.folder.glob("step-*.pt"):
            if old.stem not in listed:
                old.unlink(missing_ok=True)
        return path

    def rows(self) -> list[Line]:
        """The manifest's lines, oldest first; none if there is no manifest."""
        return Ledger(self.folder, key="step").lines

    def load(self) -> dict[str, Any] | None:
        """The newest undamaged state, or None if there are no states; warns of damaged ones.

        Reads only tensors and plain values, never code. Raises InputError if states are listed but none can
        be read, because a new run would overwrite them.
        """
        rows = self.rows()
        for row in reversed(rows):
            path = self.folder / f"{row['id']}.pt"
            damage = find_damage(path, row["bytes"], row["sha256"])
            if damage is None:
                # Memory-mapped, so that a large state is not in memory twice while it is copied.
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # type: ignore[no-any-return]
            log.warning("%s %s; resuming from the checkpoint before it", path, damage)
        if rows:
            raise InputError(
                f"no checkpoint in {self.folder} is readable; restore one, or delete the folder."
            )
        return None


class _Hashing:
    """A file that is hashed while it is written, so that it need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.error = error
            raise
