"""Training data of the stages: pages drawn during training, and shards of edited pages.

Batch k of a stream and shard k of a world depend only on the seed and k, so that a resumed run sees the same
data as an uninterrupted one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ip2p.training.storybook.presets import kind_shares
from ip2p.training.workers import start_worker
from ip2p_storybook.captions import caption
from ip2p_storybook.cells import cell_map, scene_classes, thing_map
from ip2p_storybook.draw import draw
from ip2p_storybook.edits import EDIT_KINDS, Edit, propose
from ip2p_storybook.labels import edit_labels
from ip2p_storybook.language import loosen
from ip2p_storybook.rewording import reversible, same_page, say_change, say_two_changes
from ip2p_storybook.scene import Scene, rng_for, sample_scene


class Stream(torch.utils.data.IterableDataset):
    """An endless stream of batches. Subclasses define `make(index)`; the workers split the indices."""

    def __init__(self, batch: int, size: int, seed: int, start: int = 0) -> None:
        self.batch, self.size, self.seed, self.start = batch, size, seed, start

    def make(self, index: int) -> Any:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        first, step = (self.start, 1) if info is None else (self.start + info.id, info.num_workers)
        while True:
            yield self.make(first)
            first += step


def read_ahead(batches: torch.utils.data.IterableDataset, workers: int, ahead: int = 8) -> Iterator[Any]:
    """The batches, about `ahead` of them prepared in advance by worker processes."""
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=start_worker,
        prefetch_factor=max(2, -(-ahead // workers)) if workers else None,
    )
    return iter(loader)


def draw_planes(scene: Scene, size: int) -> np.ndarray:
    """A page as uint8 [3, size, size]."""
    return np.ascontiguousarray(draw(scene, size).transpose(2, 0, 1))


def to_signed(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 [batch, 3, h, w] to float in [-1, 1]."""
    return pixels.to(device, non_blocking=True).float() / 127.5 - 1


def training_scene(*parts: object) -> Scene:
    """A training page. Its seed is even; all other pages have odd seeds (`edits.sample_edit`)."""
    scene = sample_scene(rng_for("train", *parts))
    return replace(scene, seed=scene.seed & ~1)


class Pages(Stream):
    """Whole pages: uint8 [batch, 3, size, size]."""

    def make(self, index: int) -> Tensor:
        scenes = [training_scene("page", self.seed, index, i) for i in range(self.batch)]
        return torch.from_numpy(np.stack([draw_planes(scene, self.size) for scene in scenes]))


class Crops(Stream):
    """Square crops, most of them of a thing: uint8 [batch, 3, crop, crop], `per_page` of each page."""

    def __init__(
        self, batch: int, size: int, seed: int, start: int = 0, *, crop: int, per_page: int = 4
    ) -> None:
        super().__init__(batch, size, seed, start)
        self.crop, self.per_page = crop, per_page

    def make(self, index: int) -> Tensor:
        cut: list[np.ndarray] = []
        while len(cut) < self.batch:
            scene = training_scene("crop", self.seed, index, len(cut))
            rng = rng_for("crop place", self.seed, index, len(cut))
            page, covered = draw_planes(scene, self.size), np.argwhere(thing_map(scene, self.size) > 0)
            room = self.size - self.crop
            for _ in range(min(self.per_page, self.batch - len(cut))):
                y, x = rng.randint(0, room), rng.randint(0, room)
                if len(covered) and rng.random() < 0.75:
                    a, b = covered[rng.randrange(len(covered))] - rng.randint(
                        self.crop // 4, self.crop * 3 // 4
                    )
                    y, x = min(max(int(a), 0), room), min(max(int(b), 0), room)
                cut.append(page[:, y : y + self.crop, x : x + self.crop])
        return torch.from_numpy(np.stack(cut))


# --- edited pages -------------------------------------------------------------------------------

LOOSE_SHARE = 0.5  # of the training instructions


@dataclass(frozen=True, kw_only=True)
class World:
    """An endless sequence of shards. Each has `groups` base pages with `edits` edited versions each.

    A pair of pages of one group is used if an instruction can express the edit between them: each edit, its
    reversal, and edits from one result to another. Each pair has `wordings` instructions, of which the share
    `loose` has loose grammar (`language.loosen`).
    """

    size: int
    cells: int  # along a side
    seed: int
    groups: int = 64
    edits: int = 5
    wordings: int = 4
    loose: float = LOOSE_SHARE
    cross_pairs: int = 5  # maximum pairs of two results per group
    often: Mapping[str, float] = field(default_factory=dict)  # factors on the share of kinds of edits

    @property
    def pages(self) -> int:
        """Pages per shard."""
        return self.groups * (self.edits + 1)


@dataclass(frozen=True)
class PagePair:
    """Two pages of a group, by number, and wordings of the edit from one to the other."""

    before: int
    after: int
    edits: tuple[Edit, ...]


def draw_group(world: World, number: int) -> tuple[list[Scene], list[PagePair]]:
    """A base page with its edited versions, and the pairs among them that have an instruction."""
    rng = rng_for("group", world.seed, number)
    kinds = kind_shares(world.often)
    base = reversible(training_scene("group page", world.seed, number))
    scenes = [base]
    edits: list[Edit] = []
    while len(edits) < world.edits:
        edit = propose(base, rng, rng.choices(tuple(kinds), tuple(kinds.values()))[0])
        if edit is not None and not any(same_page(edit.after, scene) for scene in scenes):
            scenes.append(edit.after)
            edits.append(edit)

    def reword(edit: Edit, before: Scene, after: Scene) -> Edit | None:
        if edit.steps:
            return say_two_changes(before, edit.steps[0].after, after, rng)
        return say_change(before, after, rng)

    pairs = []
    for k, edit in enumerate(edits, 1):
        again = [reword(edit, base, edit.after) for _ in range(world.wordings - 1)]
        pairs.append(PagePair(0, k, (edit, *(e for e in again if e is not None))))
        if edit.steps:
            middle = edit.steps[0].after
            back = [say_two_changes(edit.after, middle, base, rng) for _ in range(world.wordings)]
        else:
            back = [say_change(edit.after, base, rng) for _ in range(world.wordings)]
        pairs.append(PagePair(k, 0, tuple(e for e in back if e is not None)))
    across = [(a, b) for a in range(1, len(scenes)) for b in range(1, len(scenes)) if a != b]
    rng.shuffle(across)
    found = 0
    for a, b in across:
        if found == world.cross_pairs:
            break
        wordings = [_say_across(scenes[a], base, scenes[b], rng) for _ in range(world.wordings)]
        if any(wordings):
            found += 1
            pairs.append(PagePair(a, b, tuple(e for e in wordings if e is not None)))
    return scenes, [pair for pair in pairs if pair.edits]


def _say_across(before: Scene, base: Scene, after: Scene, rng: random.Random) -> Edit | None:
    """The edit from one result to another, directly or as undoing one and applying the other."""
    return say_change(before, after, rng) or say_two_changes(before, base, after, rng)


class Shards(torch.utils.data.IterableDataset):
    """The drawn shards of a world with the given numbers, as tensors, before the pages are encoded.

    pixels: uint8 [pages, 3, size, size]. cells, things, page: as in `ip2p_storybook.cells`, of each page.
    captions: tokens int16 [pages, 2, length]. before, after: page numbers [pairs]. kind: number in
    EDIT_KINDS [pairs]. changed: bool [pairs, cells, cells], where any pixel differs. words: tokens int16
    [pairs, wordings, length]. edit: `labels.edit_labels` as int8 [pairs, fields].
    """

    def __init__(self, world: World, numbers: Sequence[int], tokens: Callable[[list[str]], Tensor]) -> None:
        self.world, self.numbers, self.tokens = world, numbers, tokens

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return (self.make(number) for number in self.numbers[first::step])

    def make(self, number: int) -> dict[str, Tensor]:
        world = self.world
        pixels: list[np.ndarray] = []
        captions: list[str] = []
        cells, things, page = [], [], []
        rows: list[tuple[int, int, Edit, np.ndarray]] = []
        words: list[str] = []
        for group in range(number * world.groups, (number + 1) * world.groups):
            scenes, pairs = draw_group(world, group)
            first = len(pixels)
            rng = rng_for("captions", world.seed, group)
            for scene in scenes:
                pixels.append(draw_planes(scene, world.size))
                cells.append(cell_map(thing_map(scene, world.size), world.cells))
                of_things, of_page = scene_classes(scene)
                things.append(of_things)
                page.append(of_page)
                captions += [caption(scene), caption(scene, rng)]
            for pair in pairs:
                before, after = first + pair.before, first + pair.after
                rows.append(
                    (before, after, pair.edits[0], changed_cells(pixels[before], pixels[after], world.cells))
                )
                texts = [pair.edits[k % len(pair.edits)].instruction for k in range(world.wordings)]
                words += [loosen(text, rng) if rng.random() < world.loose else text for text in texts]
        return {
            "pixels": torch.from_numpy(np.stack(pixels)),
            "cells": torch.from_numpy(np.stack(cells)),
            "things": torch.from_numpy(np.stack(things)),
            "page": torch.from_numpy(np.stack(page)),
            "captions": self.tokens(captions).short().view(len(pixels), 2, -1),
            "before": torch.tensor([row[0] for row in rows]),
            "after": torch.tensor([row[1] for row in rows]),
            "kind": torch.tensor([EDIT_KINDS.index(row[2].kind) for row in rows]),
            "changed": torch.from_numpy(np.stack([row[3] for row in rows])),
            "words": self.tokens(words).short().view(len(rows), world.wordings, -1),
            "edit": torch.from_numpy(np.stack([edit_labels(row[2]) for row in rows]).astype(np.int8)),
        }


def changed_cells(before: np.ndarray, after: np.ndarray, cells: int) -> np.ndarray:
    """Where two pages, uint8 [3, size, size], differ in any pixel: bool [cells, cells]."""
    differ = (before != after).any(axis=0)
    side = len(differ) // cells
    return differ.reshape(cells, side, cells, side).any(axis=(1, 3))
