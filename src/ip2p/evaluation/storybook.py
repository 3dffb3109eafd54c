"""How good an editor is on storybook edits, whose exact answers are known: `ip2p storybook score`.

*Success*: within the region where any candidate differs, the output is nearer (mean squared error) to
the exact answer than to the unedited page and to each of at least 15 other exact answers of the same
kind of edit. *Preservation*: PSNR between output and page outside the region that the edit may change.
*Reconstruction*: PSNR of the autoencoder on the exact answers.
Two rows stand beside the model: `copy`, which returns the page as it is, and `ceiling`, the
autoencoder's reconstruction of the exact answer, the best that any editor in its latents can do.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ip2p_storybook.draw import draw
from ip2p_storybook.edits import EDIT_KINDS, Edit, alternatives, change_mask, is_unique, sample_edit
from ip2p_storybook.scene import rng_for

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ip2p.editing.editor import Editor

SPLITS = ("test", "unseen_phrasings", "unseen_combinations")
OTHER_ANSWERS = 15
ROWS_SHOWN = 48


@dataclass(frozen=True, kw_only=True)
class Case:
    """One edit to score, with everything needed to judge an output of it.

    page, exact: uint8 [size, size, 3]; others: uint8 [n, size, size, 3], n >= 15; region: bool
    [size, size], where any candidate differs from the page; fixed: bool [size, size], what must stay.
    """

    edit: Edit
    page: NDArray[np.uint8]
    exact: NDArray[np.uint8]
    others: NDArray[np.uint8]
    region: NDArray[np.bool_]
    fixed: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The numbers of one output: preservation is None where the edit may change the whole page."""

    kind: str
    success: bool
    preservation: float | None
    distance: float  # PSNR to the exact answer, over the whole page


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays; infinite when they are equal."""
    error = float(np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def make_case(edit: Edit, size: int) -> Case:
    """Draw the page, the exact answer and the other answers of an edit."""
    page, exact = draw(edit.before, size), draw(edit.after, size)
    others: list[NDArray[np.uint8]] = []
    for scene in alternatives(edit):
        picture = draw(scene, size)
        # Two records may look alike (a recoloured thing in a blueprint): no output can be told apart by them.
        if not any(np.array_equal(picture, seen) for seen in (exact, page, *others)):
            others.append(picture)
        if len(others) >= OTHER_ANSWERS + 1:
            break
    stack = np.stack(others)
    region = (exact != page).any(axis=-1) | (stack != page).any(axis=(0, 3))
    return Case(
        edit=edit, page=page, exact=exact, others=stack, region=region, fixed=~change_mask(edit, size)
    )


def cases(count: int, seed: int, size: int, split: str) -> Iterator[Case]:
    """`count` edits whose answer is unique and visible, the kinds in turn."""
    for i in range(count):
        rng = rng_for("score", split, seed, i)
        while True:
            edit = sample_edit(rng, kind=EDIT_KINDS[i % len(EDIT_KINDS)], split=split)
            if not is_unique(edit):
                continue
            case = make_case(edit, size)
            # A change that cannot be seen (a colour in a blueprint) has no answer to look for.
            if len(case.others) >= OTHER_ANSWERS and visible(case.page, case.exact):
                yield case
                break


def visible(page: NDArray[np.uint8], exact: NDArray[np.uint8]) -> bool:
    """Whether at least a thousandth of the page changes by more than 16 of 255 in some channel."""
    apart = np.abs(page.astype(np.int16) - exact.astype(np.int16)).max(axis=-1) > 16
    return float(apart.mean()) > 0.001


def judge(case: Case, output: NDArray[np.uint8]) -> Verdict:
    """Compare an output, uint8 [size, size, 3], with all candidates."""

    def error(candidate: NDArray[np.uint8]) -> float:
        a, b = output[case.region].astype(np.float32), candidate[case.region].astype(np.float32)
        return float(np.mean((a - b) ** 2))

    own = error(case.exact)
    success = own < error(case.page) and all(own < error(other) for other in case.others)
    kept = psnr(output[case.fixed], case.page[case.fixed]) if case.fixed.mean() > 0.01 else None
    return Verdict(kind=case.edit.kind, success=success, preservation=kept, distance=psnr(output, case.exact))


# --- tables -------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float | None:
    """The mean of the finite values; None without any."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None


def table(verdicts: Sequence[Verdict]) -> dict[str, dict[str, float | int | None]]:
    """Success (share), preservation (mean dB) and distance (mean dB) for each edit kind and overall."""
    rows: dict[str, dict[str, float | int | None]] = {}
    for kind in (*EDIT_KINDS, "overall"):
        own = [v for v in verdicts if kind in (v.kind, "overall")]
        if own:
            rows[kind] = {
                "count": len(own),
                "success": sum(v.success for v in own) / len(own),
                "preservation": mean([v.preservation for v in own if v.preservation is not None]),
                "distance": mean([v.distance for v in own]),
            }
    return rows


def edit_pages(
    editor: Editor,
    pages: NDArray[np.uint8],
    instructions: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    sampler: str,
    text_cfg: float,
    image_cfg: float,
) -> list[NDArray[np.uint8]]:
    """Edit a batch of pages, uint8 [batch, size, size, 3], each by its own instruction."""

    from ip2p.base.devices import NoiseStream
    from ip2p.diffusion.schedule import SPACINGS
    from ip2p.models.text import join_prompts

    images = editor.encode_image(_signed(pages))
    latents = editor.edit_latents(
        images,
        join_prompts([editor.encode_text(text) for text in instructions]),
        editor.encode_text(""),
        noise=NoiseStream(list(seeds), images.shape[1:], editor.device),
        text_cfg=text_cfg,
        image_cfg=image_cfg,
        sampler=sampler,
        sigmas=SPACINGS["linspace"](editor.schedule, steps),
    )
    for last in latents:
        final = last
    return _pixels(editor.decode(final))


def reconstruct_pages(editor: Editor, pages: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Pages, uint8 [batch, size, size, 3], through the autoencoder and back."""
    return _pixels(editor.decode(editor.encode_image(_signed(pages)) * editor.bundle.latent_scale))


def _signed(pages: NDArray[np.uint8]) -> Tensor:
    import torch

    return torch.from_numpy(pages.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1


def _pixels(signed: Tensor) -> list[NDArray[np.uint8]]:
    return list(((signed.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().permute(0, 2, 3, 1).numpy())


def score(
    editor: Editor,
    *,
    count: int,
    seed: int = 0,
    steps: int = 20,
    sampler: str = "euler_ancestral",
    text_cfg: float | None = None,
    image_cfg: float | None = None,
    size: int | None = None,
    batch_size: int = 16,
    splits: Sequence[str] = SPLITS,
    advance: Callable[[], None] | None = None,
    rows: list[tuple[Case, NDArray[np.uint8]]] | None = None,
    keep_rows: int = 0,
) -> dict[str, Any]:
    """Score an editor on `count` edits of each split; returns the tables as plain numbers.

    `rows` receives the first `keep_rows` (case, output) of the test split, for a picture of them.
    """
    size = size or editor.bundle.card.native_size
    text_cfg, image_cfg = editor.scales(text_cfg, image_cfg)
    result: dict[str, Any] = {
        "count": count,
        "seed": seed,
        "size": size,
        "steps": steps,
        "sampler": sampler,
        "text_cfg": text_cfg,
        "image_cfg": image_cfg,
    }
    for split in splits:
        verdicts: dict[str, list[Verdict]] = {"model": [], "copy": [], "ceiling": []}
        reconstruction: list[float] = []
        remaining = cases(count, seed, size, split)
        while batch := list(islice(remaining, batch_size)):
            first = len(verdicts["model"])
            outputs = edit_pages(
                editor,
                np.stack([case.page for case in batch]),
                [case.edit.instruction for case in batch],
                seeds=[seed * 1_000_003 + first + i for i in range(len(batch))],
                steps=steps,
                sampler=sampler,
                text_cfg=text_cfg,
                image_cfg=image_cfg,
            )
            rebuilt = reconstruct_pages(editor, np.stack([case.exact for case in batch]))
            for case, output, again in zip(batch, outputs, rebuilt, strict=True):
                verdicts["model"].append(judge(case, output))
                verdicts["copy"].append(judge(case, case.page))
                verdicts["ceiling"].append(judge(case, again))
                reconstruction.append(psnr(again, case.exact))
                if rows is not None and split == "test" and len(rows) < keep_rows:
                    rows.append((case, output))
                if advance:
                    advance()
        result[split] = {name: table(v) for name, v in verdicts.items()}
        result[split]["reconstruction"] = mean(reconstruction)
    return result


def as_text(result: dict[str, Any]) -> str:
    """The score as a table for people."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        f"{result['count']} edits a split at {result['size']} px, seed {result['seed']}, "
        f"{result['steps']} steps of {result['sampler']}, "
        f"text CFG {result['text_cfg']:g}, image CFG {result['image_cfg']:g}",
        "",
    ]
    splits = [s for s in SPLITS if s in result]
    head = f"{'edit':<12}" + "".join(f"{s.replace('_', ' '):>21}" for s in splits)
    lines += [
        head + f"{'preservation':>15}{'ceiling':>10}{'copy':>10}",
        "-" * (len(head) + 35),
    ]
    first = splits[0]
    for kind in (*EDIT_KINDS, "overall"):
        if kind not in result[first]["model"]:
            continue
        line = f"{kind:<12}"
        for split in splits:
            row = result[split]["model"].get(kind)
            line += f"{number(row and row['success'], '.1%'):>21}"
        kept = result[first]["model"][kind]["preservation"]
        line += f"{number(kept, '.1f') + (' dB' if kept is not None else ''):>15}"
        line += "".join(f"{result[first][row][kind]['success']:>10.1%}" for row in ("ceiling", "copy"))
        lines.append(line)
    lines += [
        "",
        f"autoencoder: {number(result[first]['reconstruction'], '.1f')} dB on the exact answers",
    ]
    return "\n".join(lines)


def rows_picture(rows: Sequence[tuple[Case, NDArray[np.uint8]]], columns: int = 2) -> Any:
    """A PIL picture with (page, instruction, result, exact answer) a row, `columns` rows side by side."""
    from PIL import Image, ImageDraw, ImageFont

    size = 128
    width, height, gap = 3 * size + 200, size, 6
    font = ImageFont.load_default(15)
    lines = math.ceil(len(rows) / columns)
    sheet = Image.new("RGB", (columns * (width + 2 * gap), 24 + lines * (height + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for column in range(columns):
        x = column * (width + 2 * gap)
        for offset, text in (
            (0, "page"),
            (size, "instruction"),
            (size + 200, "result"),
            (2 * size + 200, "exact"),
        ):
            pen.text((x + offset + 4, 3), text, fill="black", font=font)
    for i, (case, output) in enumerate(rows):
        x, y = (i % columns) * (width + 2 * gap), 24 + (i // columns) * (height + gap)
        for offset, picture in ((0, case.page), (size + 200, output), (2 * size + 200, case.exact)):
            sheet.paste(
                Image.fromarray(picture).resize((size - 4, size - 4), Image.Resampling.LANCZOS),
                (x + offset, y),
            )
        pen.multiline_text(
            (x + size + 4, y + 8),
            "\n".join(textwrap.wrap(case.edit.instruction, 24)),
            fill="black",
            font=font,
        )
        right = judge(case, output).success
        pen.text(
            (x + size + 4, y + height - 24),
            "right" if right else "wrong",
            fill="#2a7a2a" if right else "#b03030",
            font=font,
        )
    return sheet


def run(config: Any) -> None:
    """The command `ip2p storybook score`: print the table, and write what the config asks for."""
    from ip2p.base.files import check_output, replacing, write_text
    from ip2p.base.terminal import progress
    from ip2p.editing.editor import Editor

    for path in (config.out, config.sheet):
        if path is not None:
            check_output(path, overwrite=config.overwrite)
    editor = Editor.load(config.model, device=config.device, dtype=config.dtype)
    rows: list[tuple[Case, NDArray[np.uint8]]] = []
    with progress("scoring", config.count * len(SPLITS)) as advance:
        result = score(
            editor,
            count=config.count,
            seed=config.seed,
            steps=config.steps,
            sampler=config.sampler,
            text_cfg=config.text_cfg,
            image_cfg=config.image_cfg,
            size=config.size,
            batch_size=config.batch_size,
            advance=advance,
            rows=rows,
            keep_rows=ROWS_SHOWN if config.sheet else 0,
        )
    print(as_text(result))
    if config.out:
        write_text(config.out, json.dumps({"model": config.model, **result}, indent=1) + "\n")
    if config.sheet:
        with replacing(config.sheet) as temporary:
            rows_picture(rows).save(temporary)
