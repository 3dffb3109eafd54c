"""Emu Edit's test set (Sheynin et al. 2024): parquet with image, instruction, task and both captions."""

from __future__ import annotations

from pathlib import Path

from ip2p.evaluation.benchmarks.files import Cell, picture_of, table_cells
from ip2p.evaluation.encoders import Encoders
from ip2p.evaluation.metrics import Metric, Shot
from ip2p.evaluation.rows import EvalRow
from ip2p.models.clip import similarities

# The paper does not name its encoders, so both common ones are reported.
METRICS = (
    *("clip_directional", "clip_image", "clip_text"),
    *("clip_b32_directional", "clip_b32_image", "clip_b32_text"),
    *("dino_image", "l1_input"),
)
COLUMNS = ("image", "instruction", "task", "idx", "input_caption", "output_caption")


def read_rows_of(path: Path, published: bool) -> list[Cell]:
    """The rows of the parquet files."""
    return table_cells(path, COLUMNS)


def make_emu_row(cell: Cell) -> EvalRow:
    row = cell.read()
    id = str(row["idx"])
    return EvalRow(
        id=id,
        before=picture_of(row["image"], id),
        turns=(row["instruction"],),
        caption=row["input_caption"] or "",
        edited_caption=row["output_caption"] or "",
        kind=row["task"] or "",
    )


def published_direction(shot: Shot, encoders: Encoders) -> float:
    """Directional similarity of every row; 0 for equal captions, which have no direction."""
    rows = (
        *(encoders.image("clip_b32", picture) for picture in (shot.before, shot.output)),
        *(encoders.text("clip_b32", text) for text in (shot.caption, shot.edited_caption)),
    )
    return float(similarities(*(row.cpu()[None] for row in rows)).directional)


PUBLISHED = {
    "emu_direction": Metric(
        measure=published_direction, higher=True, slots=("clip_b32",), about="CLIP direction, all rows"
    )
}
PUBLISHED_METRICS = ("emu_direction", "clip_b32_image", "clip_b32_text", "dino_image", "l1_input")
