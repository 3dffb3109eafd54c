"""Transfer an edit from the model's size to the full-size photograph and keep the photograph's detail.

A model sees a downscaled photograph through its autoencoder. Both steps lose detail, so the result is not
simply enlarged. With o the photograph, r the model's reconstruction of it without an edit, and e the edited
result (both small), the output is

    up(e) + K · (o - up(r))

where K, a 3x3 matrix at each position, controls how much of the lost detail is restored, and how. It is the
local linear model e ≈ K r + b of the guided filter (He et al. 2013, with the joint upsampling of section
3.4), fitted at the small size and applied at the full size:

- no change: e = r and K = 1, so the photograph is unchanged;
- new light, color or weather: the detail is dimmed or tinted like its surroundings;
- new content: e is unrelated to r, K falls to 0, and only the enlarged result remains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Field = NDArray[np.floating[Any]]

# In levels of 255, RMS over 3x3. A change below QUIET is treated as model noise and ignored; a change above
# LOUD is transferred fully.
QUIET, LOUD = 1.5, 4.0
# Texture weaker than this (in levels) gives no evidence about the detail: K stays near 1.
FLAT = 3.0
# Fraction of the result's texture that r does not explain: above the first value, detail is reduced; above
# the second, the content is considered new.
FOREIGN = 0.1, 0.35
STRIP = 2**20  # pixels processed at a time: about 100 MB for any size of photograph


def carry(original: Image.Image, shown: Image.Image, edited: Image.Image) -> Image.Image:
    """Apply the edit that `edited` shows at the model's size to `original`, an RGB picture of any size.

    shown: RGB of the same size as `edited`; the original without an edit, downscaled and preferably also
    passed through the autoencoder, so that its losses are restored.
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
    """K [h, w, 3, 3] and the weight of the change [h, w], from pictures [h, w, 3] in levels."""
    change = after - before
    mean_before, mean_change = _box(before, radius), _box(change, radius)
    spread = _covariance(before, mean_before, before, mean_before, radius)  # [h, w, 3, 3]
    joint = _covariance(before, mean_before, change, mean_change, radius)
    solid = spread + FLAT**2 * np.eye(3)
    # change ≈ slope · before + b; the ridge term pulls the slope to 0, so K = 1 + slope to 1.
    slope = np.linalg.solve(solid, joint).swapaxes(-1, -2).clip(-2, 2)
    change_spread = _box((change**2).sum(axis=-1), radius) - (mean_change**2).sum(axis=-1)
    trace = np.einsum("...ij,...ji->...", slope, joint)
    foreign = change_spread - 2 * trace + np.einsum("...ij,...jk,...ik->...", slope, spread, slope)
    texture = np.trace(spread, axis1=-2, axis2=-1)
    whole = texture + 2 * np.trace(joint, axis1=-2, axis2=-1) + change_spread
    known = 1 - _smoothstep(foreign / (whole.clip(0) + 3 * FLAT**2), *FOREIGN)
    # Each pixel is in many windows. Those with more texture count more, since they say more about the detail.
    evidence = texture.clip(0) + 3 * FLAT**2
    total = _box(evidence, radius)
    slope = _box(evidence[..., None, None] * slope, radius) / total[..., None, None]
    known = _box(evidence * known, radius) / total
    gain = known[..., None, None] * (np.eye(3) + slope)
    loudness = np.sqrt(_box((change**2).mean(axis=-1), 1).clip(0))
    return gain.astype(np.float32), _smoothstep(loudness, QUIET, LOUD).astype(np.float32)


def _levels(image: Image.Image) -> Field:
    # fp64, because variances are differences of large numbers.
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def _covariance(a: Field, mean_a: Field, b: Field, mean_b: Field, radius: int) -> Field:
    """Windowed covariance [h, w, 3, 3]: rows are the channels of a, columns those of b."""
    product = _box(a[..., :, None] * b[..., None, :], radius)
    return product - mean_a[..., :, None] * mean_b[..., None, :]


def _box(values: Field, radius: int) -> Field:
    """The box mean over 2·radius + 1 in the first two axes, truncated at the borders."""
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
    """The region `box` of `field`, [h, w] or [h, w, channels], resized to `size`, in fp32."""
    if field.ndim == 2:
        layer = Image.fromarray(np.ascontiguousarray(field, dtype=np.float32))
        # Pillow also samples outside the box, so strips have no seams.
        return np.asarray(layer.resize(size, how, box))
    return np.stack([_resized(field[..., k], size, box, how) for k in range(field.shape[-1])], axis=-1)
