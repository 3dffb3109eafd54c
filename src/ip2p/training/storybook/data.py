"""What the stages learn from: pages that are drawn while training runs.

Batch k of every stream follows from the seed and k alone, so that a resumed run sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ip2p.training.workers import start_worker
from ip2p_storybook.cells import thing_map
from ip2p_storybook.draw import draw
from ip2p_storybook.scene import Scene, rng_for, sample_scene


class Stream(torch.utils.data.IterableDataset):
    """An endless stream of batches. Subclasses define `make(index)`; workers share the indices in turn."""

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
    """The batches, about `ahead` of them made in advance by worker processes."""
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
    """A page for training, whose seed is even; all other pages have odd seeds (`edits.sample_edit`)."""
    scene = sample_scene(rng_for("train", *parts))
    return replace(scene, seed=scene.seed & ~1)


class Pages(Stream):
    """Whole pages: uint8 [batch, 3, size, size]."""

    def make(self, index: int) -> Tensor:
        scenes = [training_scene("page", self.seed, index, i) for i in range(self.batch)]
        return torch.from_numpy(np.stack([draw_planes(scene, self.size) for scene in scenes]))


class Crops(Stream):
    """Square cutouts, most of them over a thing: uint8 [batch, 3, crop, crop], `per_page` of each page."""

    def __init__(
        self, batch: int, size: int, seed: int, start: int = 0, *, crop: int, per_page: int = 2
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
