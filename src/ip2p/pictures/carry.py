"""From the size at which a model works back to the photograph: the change is carried, the detail stays.

A model sees a photograph small and through its autoencoder. Both lose detail that nobody asked to lose, so
its result is not enlarged and handed out. With o the photograph, r what the model's path makes of it
when nothing is asked, and e the edited result (both small), the photograph becomes

    up(e) + K · (o - up(r))

where K, a 3x3 matrix at each place, says how much of what the path lost is put back, and how. It is the
local linear model e ≈ K r + b of the guided filter (He et al. 2013, with the joint upsampling of its
section 3.4), fitted where things are small and applied where they are large:
- nothing changed: e = r and K = 1, so the photograph comes out as it went in;
- light, colour or weather changed: the detail follows, dimmed or tinted as its surroundings are;
- the content is another: e has nothing of r, K falls to 0, and the enlarged result is what is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Field = NDArray[np.floating[Any]]

# In levels of 255. Below QUIET (root mean square over 3x3) a change is the model's own unrest and not
# carried; from LOUD on it is carried whole.
QUIET, LOUD = 1.5, 4.0
# Texture weaker than this, in levels, does not tell what became of the detail: K stays near 1 there.
FLAT = 5.0
# The share of the result's texture that r does not explain: from the first on detail is withheld, from the
# second on the content counts as another.
FOREIGN = 0.3, 0.7
STRIP = 2**20  # pixels worked on at a time: about 100 MB, whatever the size of the photograph


def carry(original: Image.Image, shown: Image.Image, edited: Image.Image) -> Image.Image:
    """The edit of `original`, an RGB picture of any size, that `edited` shows at the model's size.

    shown: RGB of the size of `edited`, what the model's path makes of the original when nothing is
    asked: scaled, and best also through the autoencoder, whose losses are then put back.
    """
    assert shown.size == edited.size, (shown.size, edited.size)
    before, after = _levels(shown), _levels(edited)
    radius = max(2, round(min(shown.size) / 100))
    gain, weight = _fit(before, after, radius)
    height, width = len(before), before.shape[1]
    smooth, sharp = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
    result = np.asarray(original.convert("RGB")).copy()
    tall, wide = result.shape[:2]
    rows = max(1, STRIP // wide)
    for top in range(0, tall, rows):
        strip = result[top : top + rows]
        box = (0.0, top * height / tall, float(width), (top + len(strip)) * height / tall)
        size = (wide, len(strip))
        share = _resized(weight, size, box, smooth)
        if not share.any():
            continue
        lost = strip - _resized(before, size, box, sharp)
        new = _resized(after, size, box, sharp)
        for channel in range(3):
            gains = _resized(gain[..., channel, :], size, box, smooth)
            new[..., channel] += (gains * lost).sum(axis=-1)
        blended = strip + share[..., None] * (new - strip)
        result[top : top + rows] = blended.round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(result)


def _fit(before: Field, after: Field, radius: int) -> tuple[Field, Field]:
    """K [h, w, 3, 3] and the share of the change that counts, [h, w], from pictures [h, w, 3] in levels."""
    change = after - before
    mean_before, mean_change = _box(before, radius), _box(change, radius)
    spread = _covariance(before, mean_before, before, mean_before, radius)  # [h, w, 3, 3]
    joint = _covariance(before, mean_before, change, mean_change, radius)
    solid = spread + FLAT**2 * np.eye(3)
    # change ≈ slope · before + b; the ridge draws the slope to 0 and so K = 1 + slope to 1.
    slope = np.linalg.solve(solid, joint).swapaxes(-1, -2).clip(-2, 2)
    change_spread = _box((change**2).sum(axis=-1), radius) - (mean_change**2).sum(axis=-1)
    trace = np.einsum("...ij,...ji->...", slope, joint)
    foreign = change_spread - 2 * trace + np.einsum("...ij,...jk,...ik->...", slope, spread, slope)
    whole = np.trace(spread, axis1=-2, axis2=-1) + 2 * np.trace(joint, axis1=-2, axis2=-1) + change_spread
    known = 1 - _smoothstep(foreign / (whole.clip(0) + 3 * FLAT**2), *FOREIGN)
    gain = known[..., None, None] * (np.eye(3) + _box(slope, radius))
    loudness = np.sqrt(_box((change**2).mean(axis=-1), 1).clip(0))
    return gain.astype(np.float32), _smoothstep(loudness, QUIET, LOUD).astype(np.float32)


def _levels(image: Image.Image) -> Field:
    # In 64 bits: variances are differences of large numbers.
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def _covariance(a: Field, mean_a: Field, b: Field, mean_b: Field, radius: int) -> Field:
    """[h, w, 3, 3] over windows: rows go with the channels of a, columns with those of b."""
    product = _box(a[..., :, None] * b[..., None, :], radius)
    return product - mean_a[..., :, None] * mean_b[..., None, :]


def _box(values: Field, radius: int) -> Field:
    """The mean over a square of 2·radius + 1 in the first two axes, cut off at the borders."""
    for axis in (0, 1):
        size = values.shape[axis]
        sums = np.cumsum(values, axis=axis)
        sums = np.concatenate([np.zeros_like(sums.take([0], axis)), sums], axis)
        low = np.arange(size) - radius
        high = low + 2 * radius + 1
        low, high = low.clip(0), high.clip(max=size)
        count = (high - low).reshape([-1 if k == axis else 1 for k in range(values.ndim)])
        values = (sums.take(high, axis) - sums.take(low, axis)) / count
    return values


def _smoothstep(x: Field, low: float, high: float) -> Field:
    t = ((x - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)


def _resized(
    field: Field, size: tuple[int, int], box: tuple[float, float, float, float], how: Image.Resampling
) -> Field:
    """A strip of `field`, [h, w] or [h, w, channels], at another size, in fp32: `box` is its place."""
    if field.ndim == 2:
        layer = Image.fromarray(np.ascontiguousarray(field, dtype=np.float32))
        # Pillow looks beyond the box where there is picture, so strips meet without a seam.
        return np.asarray(layer.resize(size, how, box))
    return np.stack([_resized(field[..., k], size, box, how) for k in range(field.shape[-1])], axis=-1)
