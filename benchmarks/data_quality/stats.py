"""Shares with intervals, areas under curves, and the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ip2p_storybook.metrics import wilson


@dataclass(frozen=True)
class Share:
    """A share with its interval of 95%; all NaN of nothing."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return "-" if not self.count else f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


def share_of(flags: Sequence[bool], groups: Sequence[Any] | None = None) -> Share:
    """The share of true flags; those of one group (one edit) do not count as independent.

    Their number is divided by the design effect: the variance of the share by groups over the binomial one.
    """
    values = np.asarray(flags, dtype=float)
    if not len(values):
        return Share(math.nan, math.nan, math.nan, 0)
    share, count = float(values.mean()), float(len(values))
    if groups is not None and 0 < share < 1:
        place = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        sums = np.zeros(len(place))
        np.add.at(sums, [place[group] for group in groups], values - share)
        effect = float((sums**2).sum()) / (count * share * (1 - share))
        count /= max(1.0, effect)
    return Share(share, *wilson(share, count), len(values))


def auc(scores: Sequence[float], flags: Sequence[bool]) -> float:
    """The chance that a true one scores above a false one, ties half (the area under the ROC curve)."""
    values, true = np.asarray(scores, dtype=float), np.asarray(flags, dtype=bool)
    if true.all() or not true.any():
        return math.nan
    order = np.sort(values[~true])
    below, upto = (np.searchsorted(order, values[true], side=side) for side in ("left", "right"))
    return float((below + upto).mean() / 2 / len(order))


def curve(
    scores: Sequence[float], flags: Sequence[bool], thresholds: Sequence[float]
) -> list[tuple[float, float, float]]:
    """For each threshold: (threshold, share that is kept, share of the kept that are true)."""
    values, true = np.asarray(scores, dtype=float), np.asarray(flags, dtype=bool)
    points = []
    for least in thresholds:
        kept = values >= least
        right = float(true[kept].mean()) if kept.any() else math.nan
        points.append((float(least), float(kept.mean()), right))
    return points


def bootstrap(
    statistic: Callable[[NDArray[Any]], float], count: int, *, rounds: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """A statistic of `count` items, given their numbers, with an interval of 95% by the bootstrap."""
    picks = np.random.default_rng(seed).integers(0, count, (rounds, count))
    again = np.array([statistic(pick) for pick in picks])
    low, high = np.nanpercentile(np.where(np.isinf(again), 1e12, again), [2.5, 97.5])
    return statistic(np.arange(count)), float(low), float(high)


def ratio(over: Sequence[float], under: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """sum(over) / sum(under) of the same items, with its interval."""
    one, two = np.asarray(over, dtype=float), np.asarray(under, dtype=float)

    def divide(picks: NDArray[Any]) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(one[picks].sum() / two[picks].sum())

    return bootstrap(divide, len(one), seed=seed)


def signed_percent(value: float, low: float, high: float) -> str:
    return f"{value:+.1%} ({low:+.1%} to {high:+.1%})"
