"""Validation every K steps: edits held-out pictures, scores and shows them, and updates curves.

Only the weights differ between steps and runs: the rows, seeds, noise and timesteps are derived from the
rows' ids.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ip2p.base.errors import InputError
from ip2p.base.files import make_folder
from ip2p.base.terminal import say
from ip2p.data.records import BrokenRow, Pair
from ip2p.editing.editor import Editor
from ip2p.evaluation import metrics
from ip2p.models.clip import Clip, similarities
from ip2p.pictures.images import contact_sheet, save_image
from ip2p.training.cache import Latents, encode_pictures
from ip2p.training.curves import Curves
from ip2p.training.loss import TIMESTEPS
from ip2p.training.objective import Draws, EditBatch, EditTask, place_seed
from ip2p.training.samples import Reader
from ip2p.training.transform import Transform

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ip2p.models.bundle import Bundle

GRIDS = "held-out"
DRAWS = 4  # noise levels for the loss of each held-out row


def held_out(ids: Sequence[str], count: int, seed: int = 0) -> list[int]:
    """The positions of the `count` rows to hold out, ascending: those with the smallest id hashes.

    The choice does not depend on the order of the rows, and a row stays held out when rows are added, unless
    theirs have smaller hashes. `LatentCache.ids` has the ids without decoding pictures. Raises InputError if
    no rows are left for training.
    """
    if count >= len(ids):
        raise InputError(
            f"Holding out {count} of {len(ids)} rows leaves none for training. "
            "Hold out fewer rows, or use more data."
        )
    order = sorted(range(len(ids)), key=lambda place: place_seed("held out", seed, ids[place]))
    return sorted(order[:count])


# --- loss --------------------------------------------------------------------------------------


def held_out_loss(
    loss: Callable[[Latents, Sequence[int], Tensor, Tensor], Tensor],
    ids: Sequence[str],
    latents: Latents,
    *,
    batch: int = 8,
    seed: int = 0,
    draws: int = DRAWS,
    steps: int = TIMESTEPS,
) -> float:
    """The mean denoising loss of some rows, each at `draws` fixed noise levels.

    loss: (latents, places, noise [b, channels, h, w], timesteps [b]) → the loss of each row [b]; places index
    `ids`. latents: of the rows with these ids, unaugmented. Their deviation is set to zero, so that a sampled
    target is the mean. The noise is derived from the row's id. A row's timesteps are `steps / draws` apart
    from a random start, so every row covers high and low noise. The batch size affects only rounding.
    """

    def generator(*parts: object) -> torch.Generator:
        return torch.Generator().manual_seed(place_seed("held-out loss", seed, *parts))

    tasks = [(place, draw) for place in range(len(ids)) for draw in range(draws)]
    total = 0.0
    for first in range(0, len(tasks), batch):
        chunk = tasks[first : first + batch]
        rows = [place for place, _ in chunk]
        mean = latents.mean[rows]
        noise, times = [], []
        for place, draw in chunk:
            start = torch.rand((), generator=generator(ids[place])).item()
            times.append(min(steps - 1, int((start + draw) / draws * steps)))
            noise.append(torch.randn(mean.shape[1:], generator=generator(ids[place], draw)))
        some = Latents(latents.before[rows], mean, torch.zeros_like(mean))
        with torch.no_grad():
            losses = loss(some, rows, torch.stack(noise), torch.tensor(times))
        assert losses.shape == (len(rows),), "one loss per row"
        total += float(losses.double().sum())
    return total / len(tasks)


# --- edits -------------------------------------------------------------------------------------


@dataclass
class HeldOut:
    """Edits the same pictures with the same seeds in every validation, scores the results and shows them.

    pairs: held-out rows; rows without an instruction or with a broken picture are skipped. folder: of the
    run; grids are written to `held-out/step-00000500.png` in it. size: width and height for editing.
    settings: of `Editor.edit` (steps, text_cfg, …). clip: adds CLIP scores. score: adds its own numbers, such
    as the storybook score. shown: pairs per grid. batch: pairs edited at once.
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
                    # Drop the encoded pictures: the tensors hold smaller ones.
                    kept.append(replace(pair, before=b"", after=b"", mask=None))
        if not kept:
            raise InputError("No held-out row can be edited: each needs two pictures and an instruction.")
        self.pairs = kept
        self.before, self.after = (torch.stack(column) for column in zip(*pictures, strict=True))

    def __call__(self, step: int, bundle: Bundle) -> dict[str, float]:
        """Edit with the networks of `bundle`, write the grid; returns the numbers of `judged` and `score`."""
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
            chunk = range(first, min(first + self.batch, len(self.pairs)))
            results += editor.edit_batch(
                [_picture(self.before[k]) for k in chunk],
                [self.pairs[k].instruction for k in chunk],
                seeds=list(chunk),
                **({"size": self.size, "fit": "model"} | dict(self.settings)),
            )
        return torch.stack([_levels(result) for result in results])

    def show(self, step: int, results: Tensor) -> Path:
        """Write the grid of a step: one row per pair (before, result, after) with its instruction."""
        shown = range(min(self.shown, len(self.pairs)))
        rows = [[_picture(column[k]) for column in (self.before, results, self.after)] for k in shown]
        sheet = contact_sheet(
            rows,
            [" ".join(self.pairs[k].instruction.split()) for k in shown],
            header=("before", f"step {step}", "after"),
        )
        return save_image(sheet, self.folder / GRIDS / f"step-{step:08}.png")


def judged(
    before: Tensor, results: Tensor, after: Tensor, pairs: Sequence[Pair], clip: Clip | None = None
) -> dict[str, float]:
    """Score results against their targets; pictures are uint8 [batch, 3, h, w]. Returns means over the batch.

    psnr (dB) and l1 (0..1) compare with `after`. With CLIP: clip_image is the similarity of result and input;
    clip_directional is the similarity of the change from input to result and the change from caption to
    edited caption, or, if any pair lacks a caption or has two equal ones, the change from input to `after`.
    """
    source, result, target = (pictures.float() / 255 for pictures in (before, results, after))
    numbers = {
        metric.__name__: sum(map(metric, result, target)) / len(result)
        for metric in (metrics.psnr, metrics.l1)
    }
    if clip is None:
        return numbers
    start = clip.images(source)
    captions = [(pair.caption.strip(), pair.edited_caption.strip()) for pair in pairs]
    if all(a and b and a != b for a, b in captions):
        change = [clip.texts([pair[k] for pair in captions]) for k in (0, 1)]
    else:
        change = [start, clip.images(target)]
    found = similarities(start, clip.images(result), *change)
    numbers["clip_image"] = float(found.image_image.mean())
    numbers["clip_directional"] = float(found.directional.mean())
    return numbers


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _levels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


# --- early stopping ----------------------------------------------------------------------------


class Watch:
    """Early stopping after `patience` validations without a new best of the number `key`; 0 disables it."""

    def __init__(self, key: str, patience: int, *, higher_is_better: bool = True) -> None:
        self.key, self.patience, self.higher_is_better = key, patience, higher_is_better
        self.best: float | None = None
        self.best_step: int | None = None
        self.worse = 0

    def see(self, step: int, values: Mapping[str, float]) -> bool:
        """Add a validation and return whether to stop. A nonfinite number is never a new best.

        Raises InputError if the validation lacks the number.
        """
        if self.key not in values:
            raise InputError(
                f"--stop-when-worse needs {self.key}, which this validation does not compute. "
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
        """Whether training should stop after the last validation."""
        return 0 < self.patience <= self.worse

    def state_dict(self) -> dict[str, Any]:
        return {"key": self.key, "best": self.best, "best_step": self.best_step, "worse": self.worse}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state; a state of another number is ignored."""
        if state["key"] == self.key:
            self.best, self.best_step, self.worse = state["best"], state["best_step"], state["worse"]


# --- one validation ----------------------------------------------------------------------------


class Validation:
    """Validates at a step: held-out loss, edits, curves and log. Returns True to stop the run early.

    autocast: as in `encode_pictures`.
    """

    def __init__(
        self,
        edits: HeldOut,
        watch: Watch,
        task: EditTask,
        bundle: Bundle,
        read_texts: Reader,
        accelerator: Accelerator,
        autocast: torch.dtype | None,
    ) -> None:
        self.edits, self.watch, self.task, self.bundle = edits, watch, task, bundle
        self.read_texts, self.accelerator = read_texts, accelerator
        self.curves = Curves(edits.folder)
        (before, _), (mean, std) = (
            encode_pictures(bundle.vae, pixels, autocast=autocast) for pixels in (edits.before, edits.after)
        )
        self.latents = Latents(before.cpu(), mean.cpu(), std.cpu())

    def __call__(self, step: int) -> bool:
        started = time.monotonic()
        loss = held_out_loss(self._loss, [pair.id for pair in self.edits.pairs], self.latents)
        values = {"loss": loss, **self.edits(step, self.bundle)}
        self.curves.forget_after(step - 1)
        self.curves.add(step, values)
        self.curves.draw()
        self.accelerator.log({f"held out/{name}": value for name, value in values.items()}, step=step)
        text = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        say(f"held out: step {step} {text} ({time.monotonic() - started:.0f} s)")
        watch = self.watch
        stop = watch.see(step, values)
        if stop:
            say(
                f"{watch.key} was best at step {watch.best_step} ({watch.best:.4g}), with no new best in "
                f"{watch.patience} validations since; stopping."
            )
        return stop

    def _loss(self, latents: Latents, places: Sequence[int], noise: Tensor, times: Tensor) -> Tensor:
        keep = torch.zeros(len(places), dtype=torch.bool)
        texts = self.read_texts([self.edits.pairs[place].instruction for place in places])
        batch = EditBatch(
            **vars(latents),
            **texts._asdict(),
            draws=Draws(torch.zeros_like(noise), noise, times, keep, keep, keep),
            ids=[],
        )
        with torch.no_grad(), self.accelerator.autocast():
            predicted, target, *_ = self.task.predict(batch.map(lambda t: t.to(self.accelerator.device)))
        return (predicted.float() - target).square().mean(dim=(1, 2, 3)).cpu()
