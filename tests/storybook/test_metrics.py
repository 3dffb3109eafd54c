"""The metrics of edits with a known answer, on pictures small enough to count by hand."""

import math

import numpy as np
import pytest

from ip2p_storybook.metrics import (
    edge_energy,
    gain,
    is_nearest,
    is_strict,
    mean,
    page_psnr,
    ratio,
    share,
)

EVERYWHERE = np.ones((4, 4), bool)


def flat(value: float) -> np.ndarray:
    return np.full((4, 4, 3), value, np.uint8)


def test_psnr_of_a_known_error():
    a = np.zeros((4, 4), np.uint8)
    assert page_psnr(a, a) == float("inf")
    assert abs(page_psnr(a, a + 255)) < 1e-9


def test_nearest_needs_the_least_error_and_fails_a_tie():
    page, exact, other = flat(0), flat(100), flat(200)
    assert is_nearest(flat(60), exact, (page, other), EVERYWHERE)
    assert not is_nearest(flat(50), exact, (page, other), EVERYWHERE)
    assert not is_nearest(flat(160), exact, (page, other), EVERYWHERE)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (50, 0.5), (100, 1), (150, 1.5)])
def test_gain_is_the_fraction_of_the_change_that_was_made(value: int, expected: float):
    assert gain(flat(value), flat(0), flat(100), EVERYWHERE) == pytest.approx(expected)


def test_gain_of_a_change_in_the_other_direction_is_negative():
    assert gain(flat(50), flat(100), flat(150), EVERYWHERE) == pytest.approx(-1)


def test_gain_ignores_pixels_that_the_edit_does_not_change():
    page, exact, output = flat(100), flat(100), flat(100)
    exact[0], output[0], output[3] = 200, 200, 0
    assert gain(output, page, exact, EVERYWHERE) == pytest.approx(1)


def test_gain_is_nan_if_the_edit_changes_nothing():
    assert math.isnan(gain(flat(1), flat(0), flat(0), EVERYWHERE))


@pytest.mark.parametrize(
    ("nearest", "amount", "preservation", "right"),
    [
        (True, 1.0, None, True),
        (True, 0.75, 24.0, True),
        (True, 1.25, math.inf, True),
        (False, 1.0, None, False),
        (True, 0.74, None, False),
        (True, 1.26, None, False),
        (True, 1.0, 23.9, False),
        (True, math.nan, None, False),
    ],
)
def test_strict_needs_nearest_gain_and_preservation(
    nearest: bool, amount: float, preservation: float | None, right: bool
):
    assert is_strict(nearest, amount, preservation) is right


def test_edge_energy_counts_each_step_once():
    picture = flat(0)
    picture[:, 2:] = 10  # one step of 10 in three colors in each of four rows
    assert edge_energy(picture, EVERYWHERE) == pytest.approx(4 * 10 * math.sqrt(3))
    assert edge_energy(flat(7), EVERYWHERE) == 0
    region = np.zeros((4, 4), bool)
    region[0] = True
    assert edge_energy(picture, region) == pytest.approx(10 * math.sqrt(3))


def test_blur_lowers_the_edge_energy_of_a_line():
    line, blurred = np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9, 3), np.uint8)
    line[:, 4] = 90
    blurred[:, 3:6] = 30
    everywhere = np.ones((9, 9), bool)
    assert edge_energy(blurred, everywhere) < 0.5 * edge_energy(line, everywhere)


def test_wilson_interval_matches_newcombe_1998():
    # Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for right, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = share([True] * right + [False] * (count - right))
        assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
        assert (found.value, found.count) == (pytest.approx(right / count), count)


def test_one_of_two_gives_a_wide_interval():
    found = share([True, False])
    assert found.low < 0.1 and found.high > 0.9


def test_mean_has_the_normal_interval():
    values = [1.0, 2.0, 3.0, 4.0]
    found = mean(values)
    half = 1.959964 * np.std(values, ddof=1) / 2
    assert found.value == 2.5
    assert (found.low, found.high) == (pytest.approx(2.5 - half), pytest.approx(2.5 + half))


def test_intervals_of_ratio_cover_the_true_ratio_about_95_percent_of_the_time():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        wholes = rng.gamma(2, size=60)
        parts = wholes * rng.normal(0.7, 0.2, size=60)
        found = ratio(list(parts), list(wholes))
        hits += found.low <= 0.7 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


def test_averages_of_no_values_are_none_and_of_one_value_have_no_interval():
    assert share([]) is None and mean([]) is None and ratio([1.0], [0.0]) is None
    alone = mean([3.0])
    assert (alone.value, alone.low, alone.high, alone.count) == (3.0, None, None, 1)
