"""Transforms a row's pictures for training: both are resized, cropped and flipped in the same way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ip2p.base.errors import InputError
from ip2p.data.records import BrokenRow, Pair, open_picture
from ip2p.pictures.images import resized

# Tolerance for the aspect ratios of a row's two pictures, since sizes are integers.
SHAPE_TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Makes the variants of a row's pictures; the result depends only on the row's id.

    size: width and height in pixels. resize_to: None resizes both pictures to cover `size` and crops the
    center. A number draws random crops: the shorter side is resized to a random integer from min(size) to
    resize_to, and a random box of `size` is cropped. flip: mirror odd variants. crops: the number of variants
    with random crops.
    """

    size: tuple[int, int]
    resize_to: int | None = None
    flip: bool = True
    crops: int = 8

    def __post_init__(self) -> None:
        if self.resize_to is not None and self.resize_to < min(self.size):
            raise InputError(
                f"Pictures resized to {self.resize_to} pixels are smaller than the crop of "
                f"{self.size[0]}x{self.size[1]}. Resize to at least {min(self.size)}."
            )

    @property
    def variants(self) -> int:
        """The number of variants of a row."""
        if self.resize_to is not None:
            return self.crops
        return 2 if self.flip else 1

    def __call__(self, pair: Pair, variant: int) -> tuple[Tensor, Tensor]:
        """The pictures before and after in one variant, 0 to variants - 1: uint8 [3, height, width] each.

        Raises BrokenRow for an unreadable picture, and for pictures of different aspect ratios.
        """
        before, after = self.versions(pair, [variant])[0]
        return torch.from_numpy(before), torch.from_numpy(after)

    def versions(self, pair: Pair, variants: Sequence[int] | None = None) -> np.ndarray:
        """Several variants (all of them if None): uint8 [variants, 2, 3, height, width]. Decodes once."""
        chosen = range(self.variants) if variants is None else variants
        before, after = (open_picture(data, pair.id) for data in (pair.before, pair.after))
        (a, b), (c, d) = before.size, after.size
        if abs(a * d - b * c) > SHAPE_TOLERANCE * a * d:
            raise BrokenRow(pair.id, f"its aspect ratios differ: {a}x{b} before and {c}x{d} after")
        made = np.empty((len(chosen), 2, 3, self.size[1], self.size[0]), np.uint8)
        kept: dict[tuple[int, int], tuple[Image.Image, Image.Image]] = {}
        for version, variant in zip(made, chosen, strict=True):
            whole, box = self._place(before.size, pair.id, variant)
            if whole not in kept:
                kept[whole] = resized(before, whole), resized(after, whole)
            for planes, picture in zip(version, kept[whole], strict=True):
                pixels = np.asarray(picture.crop(box))
                planes[...] = (pixels[:, ::-1] if self.flip and variant % 2 else pixels).transpose(2, 0, 1)
        return made

    def _place(
        self, pixels: tuple[int, int], id: str, variant: int
    ) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
        """The size to which a picture of size `pixels` is resized, and the crop box in it."""
        rng = random.Random(f"crop {variant} of {id}")
        short = min(self.size)
        to = short if self.resize_to is None else rng.randint(short, self.resize_to)
        # `size` scaled to the shorter side `to`; the resized picture covers it.
        least = [-(-side * to // short) for side in self.size]
        (width, height), (over, high) = pixels, least
        if width * high >= height * over:
            whole = max(over, round(width * high / height)), high
        else:
            whole = over, max(high, round(height * over / width))
        room = [have - want for have, want in zip(whole, self.size, strict=True)]
        left, top = (rng.randint(0, r) if self.resize_to is not None else r // 2 for r in room)
        return whole, (left, top, left + self.size[0], top + self.size[1])
