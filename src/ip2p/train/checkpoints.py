"""Checkpoints that survive a crash at any moment: written beside, flushed to the disk, then renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that `path` is at every moment either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        # The one before is kept: if this file is ever found damaged, work goes on from there.
        os.replace(path, path.with_name(path.name + ".previous"))
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_state(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The newest readable state, and a warning when the newest file was not readable.

    Returns (None, None) when there is none. Only tensors and plain values are read, never code.
    """
    warning = None
    for candidate in (path, path.with_name(path.name + ".previous")):
        if not candidate.exists():
            continue
        try:
            return torch.load(candidate, map_location="cpu", weights_only=True), warning
        except Exception as error:  # a truncated zip raises many kinds
            warning = f"{candidate} cannot be read ({type(error).__name__}); going on from the one before"
    return None, warning
