"""Checkpoints that survive a crash at any moment: the ledger of a run's saved states."""

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
    """The saved states of one run: `step-00000500.pt` and so on, and a manifest that lists the whole ones.

    The manifest is the only truth: a file that it does not list was never finished. The `keep` newest
    stay; an older one goes only when the new one is listed.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state` as the newest; the earlier ones stay intact throughout. OSError on a full disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.folder, "step-*")
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
        ledger = Ledger(self.folder, key="step")
        older = [line for line in ledger.lines if line["step"] != step]
        ledger.replace([*older, row][-self.keep :])
        listed = {line["id"] for line in ledger.lines}
        for old in self.folder.glob("step-*.pt"):
            if old.stem not in listed:
                old.unlink(missing_ok=True)
        return path

    def rows(self) -> list[Line]:
        """The manifest's lines, the oldest first; none if there is no manifest."""
        return Ledger(self.folder, key="step").lines

    def load(self) -> dict[str, Any] | None:
        """The newest undamaged state, None if there is none yet. A damaged one is a warning.

        Only tensors and plain values are read, never code. Raises InputError if states are listed and none of
        them can be read: starting again would overwrite them.
        """
        rows = self.rows()
        for row in reversed(rows):
            path = self.folder / f"{row['id']}.pt"
            damage = find_damage(path, row["bytes"], row["sha256"])
            if damage is None:
                # Mapped, so that a large state is not held twice while it is copied into the networks.
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # type: ignore[no-any-return]
            log.warning("%s %s; going on from the checkpoint before it", path, damage)
        if rows:
            raise InputError(
                f"no checkpoint in {self.folder} can be read; bring them back, or delete that folder to "
                "begin anew."
            )
        return None


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
