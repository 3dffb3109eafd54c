"""Draw the results over two settings as one labeled picture, to choose good values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from ip2p.base.errors import InputError
from ip2p.pictures.images import flattened, resized
from ip2p.settings import EditSettings, Voice, numeric_settings, written_value

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ip2p.editing.arguments import EditArguments
    from ip2p.editing.editor import Editor

FONT, GAP = 14, 6


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A numeric field of EditSettings and the values to try."""

    setting: str
    values: Sequence[float]

    def label(self, value: float) -> str:
        return f"{self.setting.replace('_', ' ').replace('cfg', 'CFG')} {value:g}"


def parse_axis(
    flag: str, text: str, kind: type[EditSettings] = EditSettings
) -> tuple[str, tuple[float, ...] | None]:
    """ "text-cfg=3,5" → ("text_cfg", (3.0, 5.0)); the values are None if omitted. Raises InputError."""
    name, equals, listed = text.partition("=")
    name = name.strip().replace("-", "_")
    # List the settings with default values first.
    known = sorted(numeric_settings(kind), key=lambda name: name not in DEFAULTS)
    if name not in known:
        names = ", ".join(each.replace("_", "-") for each in known)
        raise InputError(f"{flag} is {text!r}; choose one of: {names}. Try {flag} text-cfg=3,5,7.5.")
    shown = name.replace("_", "-")
    if not equals:
        if name not in DEFAULTS:
            raise InputError(f"{flag} {shown} needs values. Try {flag} {shown}=1,2,3.")
        return name, None
    voice = Voice(
        lambda setting: f"{flag} {shown}", lambda setting, value: f"{flag} {shown}={written_value(value)}"
    )
    return name, tuple(getattr(kind.read({name: word}, voice), name) for word in listed.split(","))


# The values of an axis without values, around those of the settings.
DEFAULTS: dict[str, Callable[[Any], Sequence[float]]] = {
    "text_cfg": lambda base: [round(base.text_cfg * factor, 2) for factor in (0.5, 0.75, 1, 1.5)],
    "image_cfg": lambda base: [round(base.image_cfg * factor, 2) for factor in (0.8, 1, 1.25, 1.5)],
    "seed": lambda base: [base.seed + k for k in range(4)],
    "steps": lambda base: [5, 10, 20, 50],
}


def default_values(setting: str, settings: EditSettings) -> Sequence[float]:
    """The values of an axis without values."""
    return DEFAULTS[setting](settings.resolved())


def draw_grid(
    editor: Editor,
    picture: Image.Image,
    instruction: str = "",
    *,
    columns: Axis,
    rows: Axis,
    cell: int = 256,
    on_result: Callable[[], object] = lambda: None,
    settings: EditSettings | None = None,
    **changes: Unpack[EditArguments],
) -> Image.Image:
    """Edit `picture` for each pair of values and arrange the results in a grid, the input at the left.

    cell: the longer side of a result in the grid, in pixels; results are never enlarged. on_result: called
    after each result. settings, changes: as in `Editor.edit`.
    """
    chosen = (settings or EditSettings()).changed(**changes)
    chosen = chosen.changed(instruction=instruction) if instruction else chosen
    scale = min(1, cell / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    cells: list[list[Image.Image]] = []
    for row in rows.values:
        cells.append([])
        for column in columns.values:
            varied = chosen.changed(**{rows.setting: row, columns.setting: column})
            [result] = editor.edit(picture, settings=varied)
            cells[-1].append(resized(flattened(result, "white"), size))
            on_result()
    return draw_sheet(
        cells,
        columns=[columns.label(value) for value in columns.values],
        rows=[rows.label(value) for value in rows.values],
        title=f"“{chosen.instruction}”",
        picture=resized(flattened(picture, "white"), size),
    )


def draw_sheet(
    cells: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    title: str = "",
    picture: Image.Image | None = None,
) -> Image.Image:
    """Arrange pictures of one size on white, with labels for columns and rows and the input at the left."""
    width, height = cells[0][0].size
    font = ImageFont.load_default(FONT)
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))

    def length(words: str) -> int:
        return int(pen.textlength(words, font)) + 1

    line = FONT + GAP
    # The input has its own column, without a label of its own.
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
