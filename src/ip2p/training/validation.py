"""What happens every K steps: held-out pictures are edited, judged and shown, and curves go on.

Everything here is the same at every step and in every run but for the weights: the rows, seeds, noise and
timesteps follow from the rows' ids.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ip2p.base.errors import InputError
from ip2p.base.files import append_row, make_folder, write_text
from ip2p.data.records import BrokenRow, Pair
from ip2p.editing.editor import Editor
from ip2p.models.clip import Clip
from ip2p.pictures.images import grid, save_image, signed_psnr
from ip2p.training.cache import LatentCache, Latents
from ip2p.training.loss import TIMESTEPS
from ip2p.training.objective import place_seed
from ip2p.training.transform import Transform

if TYPE_CHECKING:
    from ip2p.models.bundle import Bundle

CURVES, PICTURE, GRIDS = "curves.jsonl", "curves.png", "held-out"
DRAWS = 4  # noise levels at which each held-out row's loss is measured
# Of the drawn curves: pixels of a panel, panels side by side, and points that are told apart in it.
PANEL, ACROSS, POINTS = (480, 240), 2, 1000


def held_out(ids: Sequence[str], count: int, seed: int = 0) -> list[int]:
    """Places of the `count` rows to hold out of training, ascending: those of the smallest hashes of the ids.

    So a row is held out wherever it stands, and stays so when others are added behind it, unless theirs are
    smaller. `LatentCache.ids` has the ids without a look at the pictures. Raises InputError when nothing is
    left to train on.
    """
    if count >= len(ids):
        raise InputError(
            f"{count} rows to hold out of {len(ids)} leave none to train on. "
            "Hold out fewer, or give more data."
        )
    order = sorted(range(len(ids)), key=lambda place: place_seed("held out", seed, ids[place]))
    return sorted(order[:count])


# --- loss --------------------------------------------------------------------------------------


def held_out_loss(
    loss: Callable[[Latents, Sequence[int], Tensor, Tensor], Tensor],
    cache: LatentCache,
    places: Sequence[int],
    *,
    batch: int = 8,
    seed: int = 0,
    draws: int = DRAWS,
    steps: int = TIMESTEPS,
) -> float:
    """The mean denoising loss of the rows at `places` of a cache, each at `draws` fixed noise levels.

    loss: (latents, places, noise [b, channels, h, w], timesteps [b]) → each row's loss [b]. The latents are
    the plain variant's, and their deviation is zero, so that a target sampled from them is their mean. Noise
    comes from the row's id. A row's timesteps lie `steps / draws` apart from a random start, so that every
    row tells of high noise and of low. The batch changes nothing but the rounding.
    """
    turns = [(place, draw) for place in places for draw in range(draws)]
    total = 0.0
    for first in range(0, len(turns), batch):
        some = turns[first : first + batch]
        rows = [place for place, _ in some]
        latents = cache.read(rows, [0] * len(rows))
        noise, times = [], []
        for place, draw in some:
            begin = torch.Generator().manual_seed(place_seed("held-out loss", seed, cache.ids[place]))
            start = torch.rand((), generator=begin).item()
            times.append(min(steps - 1, int((start + draw) / draws * steps)))
            generator = torch.Generator().manual_seed(
                place_seed("held-out loss", seed, cache.ids[place], draw)
            )
            noise.append(torch.randn(latents.mean.shape[1:], generator=generator))
        still = replace(latents, std=torch.zeros_like(latents.std))
        with torch.no_grad():
            losses = loss(still, rows, torch.stack(noise), torch.tensor(times))
        assert losses.shape == (len(rows),), "a loss for each row"
        total += float(losses.double().sum())
    return total / len(turns)


# --- edits -------------------------------------------------------------------------------------


@dataclass
class HeldOut:
    """Edits the same pictures with the same seeds whenever it is called, judges the results and shows them.

    pairs: held-out rows; those without an instruction or with a broken picture are passed over. folder: of
    the run; grids go to `held-out/step-00000500.png` in it. size: width and height to edit at. settings: of
    `Editor.edit` (steps, text_cfg, …). clip: adds CLIP's judgement. score: adds numbers of its own, such as
    the storybook's. shown: how many of the pairs a grid shows. batch: how many are edited at once.
    """

    pairs: Sequence[Pair]
    folder: Path
    size: tuple[int, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    clip: Clip | None = None
    score: Callable[[Editor], Mapping[str, float]] | None = None
    shown: int = 16
    batch: int = 4

    def __post_init__(self) -> None:
        make_folder(self.folder / GRIDS)
        transform = Transform(size=self.size, flip=False)
        kept: list[Pair] = []
        pictures: list[tuple[Tensor, Tensor]] = []
        for pair in self.pairs:
            with contextlib.suppress(BrokenRow):
                if pair.instruction.strip():
                    pictures.append(transform(pair, 0))
                    # The pictures lie in the tensors, smaller than in the files.
                    kept.append(replace(pair, before=b"", after=b"", mask=None))
        if not kept:
            raise InputError("No held-out row can be edited: each needs two pictures and an instruction.")
        self.pairs = kept
        self.before, self.after = (torch.stack(some) for some in zip(*pictures, strict=True))

    def __call__(self, step: int, bundle: Bundle) -> dict[str, float]:
        """Edit with the networks of `bundle`, write the grid; the numbers of `judged` and of `score`."""
        networks = [bundle.unet, bundle.vae, bundle.text_encoder, bundle.text_encoder_2]
        learning = [network for network in networks if network is not None and network.training]
        for network in learning:
            network.eval()
        try:
            editor = Editor(bundle)
            results = self.edited(editor)
            numbers = {} if self.score is None else {k: float(v) for k, v in self.score(editor).items()}
        finally:
            for network in learning:
                network.train()
        self.show(step, results)
        return judged(self.before, results, self.after, self.pairs, self.clip) | numbers

    def edited(self, editor: Editor) -> Tensor:
        """The results, uint8 [pairs, 3, height, width]; pair k has seed k."""
        results: list[Image.Image] = []
        for first in range(0, len(self.pairs), self.batch):
            some = range(first, min(first + self.batch, len(self.pairs)))
            results += editor.edit_batch(
                [_picture(self.before[k]) for k in some],
                [self.pairs[k].instruction for k in some],
                seeds=list(some),
                **({"size": self.size, "fit": "model"} | dict(self.settings)),
            )
        return torch.stack([_levels(result) for result in results])

    def show(self, step: int, results: Tensor) -> Path:
        """Write the grid of a step: a row a pair, before, result and after, with the instruction below."""
        shown = range(min(self.shown, len(self.pairs)))
        rows = [[_picture(some[k]) for some in (self.before, results, self.after)] for k in shown]
        sheet = grid(
            rows,
            [" ".join(self.pairs[k].instruction.split()) for k in shown],
            header=("before", f"step {step}", "after"),
        )
        return save_image(sheet, self.folder / GRIDS / f"step-{step:08}.png")


def judged(
    before: Tensor, results: Tensor, after: Tensor, pairs: Sequence[Pair], clip: Clip | None = None
) -> dict[str, float]:
    """How near the results are to the pictures wanted; pictures uint8 [batch, 3, h, w]. Means over the batch.

    psnr in dB and l1 in 0..1 are against `after`. With CLIP: clip_image, the similarity of result and input;
    and clip_directional, that of the change from input to result with the change from caption to edited
    caption, or, where a pair lacks one or they are equal, with the change from input to `after`.
    """
    was, got, wanted = (pictures.float() / 255 for pictures in (before, results, after))
    error = (got - wanted).square().mean(dim=(1, 2, 3)) * 4  # of pictures in [-1, 1]
    numbers = {"psnr": float(signed_psnr(error).mean()), "l1": float((got - wanted).abs().mean())}
    if clip is None:
        return numbers
    start, end = clip.images(was), clip.images(got)
    numbers["clip_image"] = float(F.cosine_similarity(start, end).mean())
    told = [(pair.caption.strip(), pair.edited_caption.strip()) for pair in pairs]
    if all(a and b and a != b for a, b in told):
        change = clip.texts([b for _, b in told]) - clip.texts([a for a, _ in told])
    else:
        change = clip.images(wanted) - start
    numbers["clip_directional"] = float(F.cosine_similarity(end - start, change).mean())
    return numbers


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _levels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


# --- curves ------------------------------------------------------------------------------------


class Curves:
    """Numbers by step: a line each in `curves.jsonl` of a folder, and the picture `curves.png` of them."""

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self.folder = folder
        self.path = folder / CURVES
        self.rows: list[dict[str, Any]] = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.path.read_bytes().splitlines():
                with contextlib.suppress(ValueError):  # a line that a kill or a full disk cut short
                    row = json.loads(line)
                    if isinstance(row, dict) and isinstance(row.get("step"), int):
                        self.rows.append(row)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append the numbers of a step, on the disk before this returns; what is not finite becomes null."""
        told = {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
        row: dict[str, Any] = {"step": step, **told}
        append_row(self.path, row)
        self.rows.append(row)

    def forget_after(self, step: int) -> None:
        """Drop what came after `step`, from which a run is resumed: it comes again."""
        kept = [row for row in self.rows if row["step"] <= step]
        if len(kept) < len(self.rows):
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.rows = kept

    def keys(self) -> list[str]:
        """The names of the numbers, in the order in which they came first."""
        return list(dict.fromkeys(key for row in self.rows for key in row if key != "step"))

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of one number, where it is finite."""
        return [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]

    def draw(self) -> Path | None:
        """Draw all curves, a panel each; None when there is nothing to draw yet."""
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
    """One curve from step 0 to `last`, with its range beside it and its newest value above."""
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
    every = -(-len(points) // POINTS)
    # Counted from the newest, so that it is always there.
    drawn = [
        (left + (right - left) * step / max(last, 1), bottom - (bottom - top) * (value - low) / room)
        for step, value in points[::-1][::every]
    ]
    pen.line(drawn, "#1f6fb2", 2)
    if len(drawn) < 40:
        for x, y in drawn:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), "#1f6fb2")
    return panel


# --- stopping when it gets worse ---------------------------------------------------------------


class Watch:
    """Says when `patience` validations in a row brought no new best of the number `key`; 0 never does."""

    def __init__(self, key: str, patience: int, *, higher_is_better: bool = True) -> None:
        self.key, self.patience, self.higher_is_better = key, patience, higher_is_better
        self.best: float | None = None
        self.best_step: int | None = None
        self.worse = 0

    def see(self, step: int, values: Mapping[str, float]) -> bool:
        """Take in a validation; whether to stop now. A number that is not finite is no new best.

        Raises InputError when the validation does not give the number.
        """
        if self.key not in values:
            raise InputError(
                f"--stop-when-worse watches {self.key}, which this validation does not give. "
                f"Choose one of: {', '.join(values)}."
            )
        value = values[self.key]
        sign = 1 if self.higher_is_better else -1
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best):
            self.best, self.best_step, self.worse = value, step, 0
        else:
            self.worse += 1
        return self.stopped

    @property
    def stopped(self) -> bool:
        """Whether the last validation was the one to stop at."""
        return 0 < self.patience <= self.worse

    def state_dict(self) -> dict[str, Any]:
        return {"key": self.key, "best": self.best, "best_step": self.best_step, "worse": self.worse}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; one of another number is passed over, for its best says nothing here."""
        if state["key"] == self.key:
            self.best, self.best_step, self.worse = state["best"], state["best_step"], state["worse"]
