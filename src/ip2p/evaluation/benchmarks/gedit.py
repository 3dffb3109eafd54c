"""GEdit-Bench (Liu et al. 2025): parquet with task_type, instruction, input_image; scored by a judge."""

from __future__ import annotations

from pathlib import Path

from ip2p.evaluation.benchmarks.files import Cell, picture_of, table_cells
from ip2p.evaluation.rows import EvalRow

COLUMNS = ("task_type", "key", "instruction", "instruction_language", "input_image")
LANGUAGE = "en"  # the other half repeats the same edits in Chinese
# The groups that the public script averages; the data has an eleventh, tone_transfer.
PUBLISHED_GROUPS = {
    *("background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change"),
    *("subject-add", "subject-remove", "subject-replace", "text_change"),
}


def read_gedit_edits(path: Path, published: bool) -> list[Cell]:
    """The English edits; with `published`, only those of ten groups."""
    import pyarrow.parquet as pq

    cells = table_cells(path, COLUMNS)
    labels: dict[str, list[tuple[str, str]]] = {}
    for file in dict.fromkeys(cell.path for cell in cells):
        table = pq.read_table(file, columns=["instruction_language", "task_type"])
        labels[file] = list(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
    number = dict.fromkeys(labels, 0)
    kept = []
    for cell in cells:
        language, group = labels[cell.path][number[cell.path]]
        number[cell.path] += 1
        if language == LANGUAGE and (not published or group in PUBLISHED_GROUPS):
            kept.append(cell)
    return kept


def make_gedit_row(cell: Cell) -> EvalRow:
    row = cell.read()
    id = str(row["key"])
    picture = picture_of(row["input_image"], id)
    return EvalRow(id=id, before=picture, turns=(row["instruction"],), kind=row["task_type"])
