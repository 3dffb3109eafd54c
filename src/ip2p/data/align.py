"""Detects whether the picture after is aligned with the picture before, or was shifted or cropped."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 256  # pictures are compared at this longer side
BLOCK = 16
CORNERS = 0.15  # a block counts if it has this fraction of the strongest structure in both directions
ALIKE = 0.8  # blocks with a higher correlation match
# Measured on drawn pairs: 420 of 450 aligned pairs have more than a fifth of their blocks in place. In the
# others, at most a third of the blocks agree on another position, all on one object that was moved or
# enlarged.
ALIGNED = 0.2  # a pair with more matching blocks (fraction) in place was not moved
MOVED = 0.3  # minimum fraction of matching blocks after the move, and twice as many as in place
SPREAD = 0.5  # fraction of the width and height that these must span
MIN_BLOCKS = 8
MIN_SHIFT = 2.5  # pixels at SIDE; less is indistinguishable from the drift of a generative model
# Scale of the picture after relative to before: above 1 is cropped and enlarged, below 1 is shrunk.
SCALES = tuple(float(scale) for scale in np.geomspace(0.76, 1.32, 34))
PROPOSALS = 6


@dataclass(frozen=True)
class Move:
    """after(x) = before((x - shift) / scale), in pixels of the picture before at its own size."""

    scale: float
    shift: tuple[float, float]

    def __str__(self) -> str:
        across, down = (round(v) for v in self.shift)
        if abs(self.scale - 1) < 0.015:
            return f"shifted by {across:+d}, {down:+d} px"
        if self.scale > 1:
            return f"cropped by {1 - 1 / self.scale:.0%} and enlarged"
        return f"shrunk by {1 - self.scale:.0%}"


def find_move(before: Image.Image, after: Image.Image) -> Move | None:
    """How the picture after was moved as a whole relative to the picture before; None if it was not.

    Phase correlation proposes a shift at each of `SCALES`. A proposal counts only if blocks with corners that
    the edit left unchanged agree with it and hardly any agree in place. So edits that move or change a part
    do not count, nor do edits that leave nothing to compare. Detects shifts of more than 1% of the longer
    side and crops of 2 to 24%.
    """
    factor = SIDE / max(before.size)
    size = tuple(max(BLOCK, round(side * factor)) for side in before.size)
    one, two = _gray(before, size), _gray(after, size)
    blocks = _corner_blocks(two)
    if len(blocks) < MIN_BLOCKS or (in_place := float(_alike(one, two, blocks).mean())) > ALIGNED:
        return None
    best: tuple[float, Move] | None = None
    for scale, shift in _proposals(one, two):
        moved, covered = _moved(one, scale, shift)
        kept = [block for block in blocks if covered[block].all()]
        if len(kept) < MIN_BLOCKS:
            continue
        alike = _alike(moved, two, kept)
        share = float(alike.mean())
        if share > max(MOVED, 2 * in_place, best[0] if best else 0) and _spread(kept, alike, size):
            best = share, Move(scale, (shift[0] / factor, shift[1] / factor))
    if best is None:
        return None
    corners = _displacement(best[1], before.size)
    return best[1] if corners * factor >= MIN_SHIFT else None


def _spread(blocks: list[tuple[slice, slice]], alike: NDArray[np.bool_], size: tuple[int, ...]) -> bool:
    """Whether there are enough matching blocks, spread over the page rather than on one object."""
    places = [block for block, same in zip(blocks, alike, strict=True) if same]
    if len(places) < MIN_BLOCKS:
        return False
    for axis, side in ((0, size[1]), (1, size[0])):
        starts = [block[axis].start for block in places]
        if max(starts) - min(starts) + BLOCK < SPREAD * side:
            return False
    return True


def _displacement(move: Move, size: tuple[int, int]) -> float:
    """The largest displacement of a corner of the picture."""
    return max(
        abs(side * far * (move.scale - 1) + by)
        for side, by in zip(size, move.shift, strict=True)
        for far in (0, 1)
    )


def _gray(image: Image.Image, size: tuple[int, ...]) -> NDArray[np.float32]:
    shown = image.convert("L").resize((size[0], size[1]), Image.Resampling.BILINEAR, reducing_gap=2)
    return np.asarray(shown, dtype=np.float32)


def _corner_blocks(gray: NDArray[np.float32]) -> list[tuple[slice, slice]]:
    """The blocks with structure in both directions: a shift along an edge is invisible."""
    down, across = np.gradient(gray)
    rows, columns = gray.shape[0] // BLOCK, gray.shape[1] // BLOCK

    def summed(values: Any) -> NDArray[np.float32]:
        whole = values[: rows * BLOCK, : columns * BLOCK]
        return whole.reshape(rows, BLOCK, columns, BLOCK).mean(axis=(1, 3))

    xx, yy, xy = summed(across**2), summed(down**2), summed(across * down)
    least = (xx + yy) / 2 - np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    enough = max(4.0, CORNERS * float(np.percentile(least, 90)))
    return [
        (slice(r * BLOCK, (r + 1) * BLOCK), slice(c * BLOCK, (c + 1) * BLOCK))
        for r, c in zip(*np.nonzero(least > enough), strict=True)
    ]


def _alike(
    one: NDArray[np.float32], two: NDArray[np.float32], blocks: list[tuple[slice, slice]]
) -> NDArray[np.bool_]:
    """Whether each block matches in both pictures, regardless of brightness."""
    a = np.stack([one[block].ravel() for block in blocks])
    b = np.stack([two[block].ravel() for block in blocks])
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    product = (a * b).sum(1)
    return product > ALIKE * np.sqrt((a**2).sum(1) * (b**2).sum(1) + 1e-6)


def _proposals(one: NDArray[np.float32], two: NDArray[np.float32]) -> list[tuple[float, tuple[float, float]]]:
    """The most likely scales and shifts in pixels, by phase correlation at half size."""
    side = SIDE // 2
    target = np.conj(_spectrum(two, 1.0, side))
    found = []
    for scale in (1.0, *SCALES):
        cross = _spectrum(one, scale, side) * target
        peaks = np.fft.irfft2(cross / (np.abs(cross) + 1e-6), (side, side))
        for _ in range(2):  # the highest peak may belong to an object that the edit moved
            down, across = divmod(int(peaks.argmax()), side)
            shift = [-(v - side if v > side // 2 else v) * 2.0 for v in (across, down)]
            found.append((float(peaks[down, across]), scale, shift[0], shift[1]))
            around = np.arange(-2, 3)
            peaks[np.ix_((down + around) % side, (across + around) % side)] = 0
    found.sort(reverse=True)
    near = (-1.0, 0.0, 1.0)  # the result at half size is accurate to about one pixel
    return [(scale, (x + u, y + v)) for _, scale, x, y in found[:PROPOSALS] for u in near for v in near]


def _spectrum(gray: NDArray[np.float32], scale: float, side: int) -> NDArray[np.complex64]:
    """The spectrum of the picture at half size times `scale`, tapered at its edges."""
    image = Image.fromarray(gray)
    size = tuple(max(8, round(length * scale / 2)) for length in reversed(gray.shape))
    small = np.asarray(image.resize((size[0], size[1]), Image.Resampling.BILINEAR, reducing_gap=2))[
        :side, :side
    ]
    page = np.zeros((side, side), np.float32)
    page[: small.shape[0], : small.shape[1]] = (small - small.mean()) * _fade(*small.shape)
    return np.fft.rfft2(page).astype(np.complex64)


@lru_cache(maxsize=64)
def _fade(rows: int, columns: int) -> NDArray[np.float32]:
    # Flatter than a Hann window, so that structure near the edge counts, too.
    down, across = (np.sqrt(np.hanning(n + 2)[1:-1]) for n in (rows, columns))
    return np.outer(down, across).astype(np.float32)


def _moved(
    gray: NDArray[np.float32], scale: float, shift: tuple[float, float]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The picture moved, and where it covers the page."""
    image = Image.fromarray(gray)
    rows, columns = gray.shape
    # Pillow's affine transform uses pixel corners, as the scales here do.
    back = (1 / scale, 0, -shift[0] / scale, 0, 1 / scale, -shift[1] / scale)
    moved = image.transform((columns, rows), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
    x = (np.arange(columns) + 0.5 - shift[0]) / scale
    y = (np.arange(rows) + 0.5 - shift[1]) / scale
    inside = ((y >= 0.5) & (y <= rows - 0.5))[:, None] & ((x >= 0.5) & (x <= columns - 0.5))[None]
    return np.asarray(moved), inside
