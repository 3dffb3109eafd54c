"""The results over two settings as one labelled picture: how much to ask for, seen at a glance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from ip2p.pictures.images import resized

if TYPE_CHECKING:
    from ip2p.editing.editor import Editor

LABELS = {"text-cfg": "text CFG", "image-cfg": "image CFG", "seed": "seed", "steps": "steps"}
FONT, GAP = 14, 6


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting (a key of `LABELS`) and the values that it takes."""

    setting: str
    values: Sequence[float]

    @property
    def name(self) -> str:
        """The setting as `Editor.edit` calls it."""
        return self.setting.replace("-", "_")

    def label(self, value: float) -> str:
        return f"{LABELS[self.setting]} {value:g}"


def default_values(setting: str, *, text_cfg: float, image_cfg: float, seed: int) -> Sequence[float]:
    """The values of an axis that names none: around the scales that the model is used with."""
    if setting == "text-cfg":
        return [round(text_cfg * share, 2) for share in (0.5, 0.75, 1, 1.5)]
    if setting == "image-cfg":
        return [round(image_cfg * share, 2) for share in (0.8, 1, 1.25, 1.5)]
    return [seed, seed + 1, seed + 2, seed + 3] if setting == "seed" else [5, 10, 20, 50]


def draw(
    editor: Editor,
    picture: Image.Image,
    instruction: str,
    *,
    columns: Axis,
    rows: Axis,
    cell: int = 256,
    made: Callable[[], object] = lambda: None,
    **settings: Any,
) -> Image.Image:
    """Edit `picture` once for each value of both axes and lay the results out, the picture itself above.

    `cell`: the longer side of a result in the grid, in pixels; none is enlarged. `settings`: those of
    `Editor.edit`, with `seed` for one; `made` is called after each result.
    """
    share = min(1, cell / max(picture.size))
    size = (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
    cells: list[list[Image.Image]] = []
    for row in rows.values:
        cells.append([])
        for column in columns.values:
            chosen = settings | {rows.name: row, columns.name: column}
            seed = int(chosen.pop("seed"))
            if chosen.get("steps") is not None:
                chosen["steps"] = int(chosen["steps"])
            [result] = editor.edit(picture, instruction, seeds=[seed], **chosen)
            cells[-1].append(resized(result.convert("RGB"), size))
            made()
    return sheet(
        cells,
        columns=[columns.label(value) for value in columns.values],
        rows=[rows.label(value) for value in rows.values],
        title=f"“{instruction}”",
        picture=resized(picture.convert("RGB"), size),
    )


def sheet(
    cells: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    title: str = "",
    picture: Image.Image | None = None,
) -> Image.Image:
    """Pictures of one size on white: labels above the columns and before the rows, the input at the left."""
    width, height = cells[0][0].size
    font = ImageFont.load_default(FONT)
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))

    def length(words: str) -> int:
        return int(pen.textlength(words, font)) + 1

    line = FONT + GAP
    # The input stands in a column of its own, above which no label is.
    left = GAP + (0 if picture is None else width + 2 * GAP)
    labels = left + max(map(length, rows)) + 2 * GAP
    step = max(width, *map(length, columns)) + GAP
    top = GAP + (line if title else 0) + line
    size = (
        max(labels + len(columns) * step, length(title) + 2 * GAP),
        top + len(rows) * (height + GAP),
    )
    paper = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(paper)
    if title:
        pen.text((GAP, GAP // 2), title, "black", font)
    for k, words in enumerate(columns):
        pen.text((labels + k * step, top - line), words, "black", font)
    for y, (words, row) in enumerate(zip(rows, cells, strict=True)):
        at = top + y * (height + GAP)
        pen.text((left, at + (height - FONT) // 2), words, "black", font)
        for x, result in enumerate(row):
            paper.paste(result, (labels + x * step, at))
    if picture is not None:
        pen.text((GAP, top - line), "input", "black", font)
        paper.paste(picture, (GAP, top))
    return paper
