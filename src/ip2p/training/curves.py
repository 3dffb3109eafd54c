"""Metrics by training step: a JSON Lines file that survives a crash, and a plot of it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ip2p.base.files import append_row, make_folder, write_text
from ip2p.pictures.images import save_image

PICTURE = "curves.png"
# Panel size in pixels, panels per row, and maximum points per curve.
PANEL, ACROSS, POINTS = (480, 240), 2, 1000


class Curves:
    """Metrics by step, one line per step in the file `name` of a folder."""

    def __init__(self, folder: Path, name: str = "curves.jsonl") -> None:
        make_folder(folder)
        self.folder, self.path = folder, folder / name
        self.rows: list[dict[str, Any]] = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.path.read_bytes().splitlines():
                with contextlib.suppress(ValueError):  # a line truncated by a kill or a full disk
                    row = json.loads(line)
                    if isinstance(row, dict) and isinstance(row.get("step"), int):
                        self.rows.append(row)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append the metrics of a step and sync them to disk; nonfinite values become null."""
        finite = {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
        row: dict[str, Any] = {"step": step, **finite}
        append_row(self.path, row)
        self.rows.append(row)

    def forget_after(self, step: int) -> None:
        """Drop the rows after `step`, from which a run resumes: they will be written again."""
        kept = [row for row in self.rows if row["step"] <= step]
        if len(kept) < len(self.rows):
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.rows = kept

    def keys(self) -> list[str]:
        """The names of the metrics, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row if key != "step"))

    def series(self, key: str) -> list[tuple[int, float]]:
        """The finite values of one metric as (step, value)."""
        return [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]

    def draw(self) -> Path | None:
        """Draw each curve in its own panel of `curves.png`; None if there is nothing to draw yet."""
        series = {key: points for key in self.keys() if (points := self.series(key))}
        if not series:
            return None
        width, height = PANEL
        columns = min(ACROSS, len(series))
        sheet = Image.new("RGB", (columns * width, -(-len(series) // columns) * height), "white")
        last = max(points[-1][0] for points in series.values())
        for number, (key, points) in enumerate(series.items()):
            panel = _panel(key, points, last)
            sheet.paste(panel, (number % columns * width, number // columns * height))
        return save_image(sheet, self.folder / PICTURE)


def _panel(key: str, points: Sequence[tuple[int, float]], last: int) -> Image.Image:
    """The panel of one curve from step 0 to `last`, with its range and its latest value."""
    width, height = PANEL
    left, top, right, bottom = 72, 32, width - 16, height - 28
    low, high = min(v for _, v in points), max(v for _, v in points)
    room = (high - low) or max(abs(high), 1.0)
    panel = Image.new("RGB", PANEL, "white")
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(13)
    pen.text((left, 8), f"{key}: {points[-1][1]:.4g} at step {points[-1][0]}", "black", font)
    pen.line([(left, top), (left, bottom), (right, bottom)], "#999999")
    for bound, at in ((low, bottom), (high, top)):
        pen.text((left - 6, at), f"{bound:.4g}", "#555555", font, anchor="rm")
    pen.text((left, bottom + 6), "0", "#555555", font)
    pen.text((right, bottom + 6), str(last), "#555555", font, anchor="ra")
    stride = -(-len(points) // POINTS)
    # Subsampled from the end, so that the latest point is always included.
    drawn = [
        (left + (right - left) * step / max(last, 1), bottom - (bottom - top) * (value - low) / room)
        for step, value in points[::-1][::stride]
    ]
    pen.line(drawn, "#1f6fb2", 2)
    if len(drawn) < 40:
        for x, y in drawn:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), "#1f6fb2")
    return panel
