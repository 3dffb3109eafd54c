"""Metrics of edits with a known exact answer, and confidence intervals of their averages.

Pictures are uint8 arrays [height, width, 3] in 0..255. A region is a bool array [height, width]. All
computations use float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_GAIN, MAX_GAIN = 0.75, 1.25
MIN_PRESERVATION = 24.0  # dB
MAX_PSNR = 60.0  # dB; used in averages for a page that is unchanged to the byte
NORMAL_95 = 1.959964  # 97.5% quantile of the normal distribution


# --- one edit -----------------------------------------------------------------------------------


def page_psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of equal shape: 10 log10(255² / mean((a - b)²)).

    Infinite for equal arrays.
    """
    error = _mean_squared_error(a, b)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def is_nearest(
    output: NDArray[np.uint8],
    exact: NDArray[np.uint8],
    wrong: Sequence[NDArray[np.uint8]],
    region: NDArray[np.bool_],
) -> bool:
    """Whether the output is closer to the exact answer than to every wrong one, by mean squared error.

    mean((output - exact)²) < mean((output - w)²) in the region for each w in `wrong`, which includes
    the unedited page. A tie is a failure.
    """
    inside = output[region]
    error = _mean_squared_error(inside, exact[region])
    return all(error < _mean_squared_error(inside, other[region]) for other in wrong)


def gain(
    output: NDArray[np.uint8],
    page: NDArray[np.uint8],
    exact: NDArray[np.uint8],
    region: NDArray[np.bool_],
) -> float:
    """The fraction of the requested change in the output: <output - page, exact - page> / |exact - page|².

    0 for the page, 1 for the exact answer, 0.5 halfway between them; below 0 for a change in the other
    direction. The sums are over the pixels and channels of the region. NaN if the page and the exact answer
    are equal in it.
    """
    made = _difference(output[region], page[region])
    change = _difference(exact[region], page[region])
    size = float((change**2).sum())
    return float((made * change).sum()) / size if size else math.nan


def is_strict(nearest: bool, gain: float, preservation: float | None) -> bool:
    """Whether an edit is correct by the strict criterion.

    It is nearest to the exact answer, its gain is in [0.75, 1.25], and the PSNR of the unchanged region is at
    least 24 dB (`preservation`, in dB; None if the edit may change the whole page).
    """
    kept = preservation is None or preservation >= MIN_PRESERVATION
    return nearest and MIN_GAIN <= gain <= MAX_GAIN and kept


def edge_energy(picture: NDArray[np.uint8], region: NDArray[np.bool_]) -> float:
    """The gradient magnitude of a picture, summed over a region.

    Σ |∇x|, |∇x|² = Σ over channels of (x[i, j + 1] - x[i, j])² + (x[i + 1, j] - x[i, j])², without steps
    out of the picture. Blur lowers it at lines and small details, noise raises it. The squared magnitude
    would penalize blur more than the eye does: an autoencoder of 30.6 dB keeps 0.55 of it, and 0.96 of the
    magnitude.
    """
    x = picture.astype(np.float64)
    squared = np.zeros(picture.shape[:2])
    squared[:, :-1] += (np.diff(x, axis=1) ** 2).sum(axis=-1)
    squared[:-1] += (np.diff(x, axis=0) ** 2).sum(axis=-1)
    return float(np.sqrt(squared[region]).sum())


def _difference(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    return a.astype(np.float64) - b.astype(np.float64)


def _mean_squared_error(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float((_difference(a, b) ** 2).mean())


# --- many edits ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """An average of `count` values with its 95% interval; low and high are None if it is unknown."""

    value: float
    low: float | None
    high: float | None
    count: int


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95% score interval of a share of `count` independent values (Wilson 1927); NaN for none.

    (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n), z = 1.96. It stays within 0 and 1, and is
    accurate for few values and for shares of 0 and 1.
    """
    if not count:
        return math.nan, math.nan
    z2 = NORMAL_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def share(right: Sequence[bool]) -> Estimate | None:
    """The share of True with its Wilson score interval (`wilson`); None without values."""
    count = len(right)
    if not count:
        return None
    p = sum(right) / count
    return Estimate(p, *wilson(p, count), count)


def mean(values: Sequence[float]) -> Estimate | None:
    """The mean with its normal 95% interval, mean ± 1.96 s / sqrt(n); None without values."""
    return ratio(values, [1.0] * len(values))


def ratio(parts: Sequence[float], wholes: Sequence[float]) -> Estimate | None:
    """Σ parts / Σ wholes with its normal 95% interval; None without values, or with Σ wholes = 0.

    The standard error is that of a ratio estimator, s_e / (sqrt(n) · mean(wholes)) with e = part - ratio ·
    whole (Cochran 1977, eq. 6.4). A single value has no interval. For fewer than about ten values the
    normal interval is too narrow.
    """
    count, total = len(wholes), sum(wholes)
    if not total:
        return None
    value = sum(parts) / total
    if count < 2:
        return Estimate(value, None, None, count)
    rest = np.asarray(parts, np.float64) - value * np.asarray(wholes, np.float64)
    half = NORMAL_95 * float(np.sqrt((rest**2).sum() / (count - 1) / count)) * count / total
    return Estimate(value, value - half, value + half, count)
