"""The results over two settings as one labelled picture: how much to ask for, seen at a glance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    """A setting that is one number, as EditSettings calls it, and the values that it takes."""

    setting: str
    values: Sequence[float]

    def label(self, value: float) -> str:
        return f"{self.setting.replace('_', ' ').replace('cfg', 'CFG')} {value:g}"


def parse_axis(
    flag: str, text: str, kind: type[EditSettings] = EditSettings
) -> tuple[str, tuple[float, ...] | None]:
    """ "text-cfg=3,5" → ("text_cfg", (3.0, 5.0)); without values None. Raises InputError for any other."""
    name, equals, listed = text.partition("=")
    name = name.strip().replace("-", "_")
    # The four that have values of their own come first.
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


# The values of an axis that names none: around the values that the settings have.
DEFAULTS: dict[str, Callable[[EditSettings], Sequence[float]]] = {
    "text_cfg": lambda own: [round((own.text_cfg or 7.5) * share, 2) for share in (0.5, 0.75, 1, 1.5)],
    "image_cfg": lambda own: [round((own.image_cfg or 1.5) * share, 2) for share in (0.8, 1, 1.25, 1.5)],
    "seed": lambda own: [own.seed + k for k in range(4)],
    "steps": lambda own: [5, 10, 20, 50],
}


def default_values(setting: str, settings: EditSettings) -> Sequence[float]:
    """The values of an axis that names none."""
    return DEFAULTS[setting](settings)


def draw_grid(
    editor: Editor,
    picture: Image.Image,
    instruction: str = "",
    *,
    columns: Axis,
    rows: Axis,
    cell: int = 256,
    made: Callable[[], object] = lambda: None,
    settings: EditSettings | None = None,
    **changes: Unpack[EditArguments],
) -> Image.Image:
    """Edit `picture` once for each value of both axes and lay the results out, the picture itself above.

    `cell`: the longer side of a result in the grid, in pixels; none is enlarged. `settings` and `changes`
    are those of `Editor.edit`; `made` is called after each result.
    """
    chosen = (settings or EditSettings()).changed(**changes)
    chosen = chosen.changed(instruction=instruction) if instruction else chosen
    share = min(1, cell / max(picture.size))
    size = (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
    cells: list[list[Image.Image]] = []
    for row in rows.values:
        cells.append([])
        for column in columns.values:
            varied = chosen.changed(**{rows.setting: row, columns.setting: column})
            [result] = editor.edit(picture, settings=varied)
            cells[-1].append(resized(flattened(result, "white"), size))
            made()
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
