"""Toy worlds with known answers: a single point, and a Gaussian, whose ODE is solved in closed form."""

from itertools import islice

import pytest
import torch

from ip2p.base.devices import NoiseStream
from ip2p.diffusion.samplers import SAMPLERS, dpmpp_2m, euler, euler_ancestral
from ip2p.diffusion.schedule import karras_sigmas, linspace_sigmas, schedule_from_config

SCHEDULE = schedule_from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
SPREAD = 0.5


def point(x, sigma):
    return torch.full_like(x, 0.7)


def gaussian(x, sigma):
    """The best x0 where data is N(0, SPREAD²)."""
    return x * SPREAD**2 / (SPREAD**2 + sigma**2)


def start(sigmas, count=2):
    noise = NoiseStream(range(count), (4, 8, 8))
    return noise() * sigmas[0], noise


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_reaches_a_single_point(name):
    sigmas = linspace_sigmas(SCHEDULE, 7)
    x, noise = start(sigmas)
    steps = list(SAMPLERS[name](point, x, sigmas, noise))
    assert len(steps) == 7
    torch.testing.assert_close(steps[-1], torch.full_like(x, 0.7), rtol=0, atol=1e-5)


def error_on_the_gaussian(sampler, steps):
    """Distance at the smallest sigma from the exact x · sqrt((s² + sigma²) / (s² + sigma_max²))."""
    sigmas = karras_sigmas(SCHEDULE, steps)[:-1]
    x, _ = start(sigmas)
    *_, last = sampler(gaussian, x, sigmas)
    exact = x * ((SPREAD**2 + sigmas[-1] ** 2) / (SPREAD**2 + sigmas[0] ** 2)).sqrt()
    return (last - exact).abs().max().item()


def test_euler_is_of_first_order():
    ratio = error_on_the_gaussian(euler, 50) / error_on_the_gaussian(euler, 100)
    assert ratio == pytest.approx(2, abs=0.3)


def test_dpmpp_2m_is_of_second_order():
    ratio = error_on_the_gaussian(dpmpp_2m, 50) / error_on_the_gaussian(dpmpp_2m, 100)
    assert ratio == pytest.approx(4, abs=0.8)
    assert error_on_the_gaussian(dpmpp_2m, 20) < error_on_the_gaussian(euler, 20) / 4


def test_euler_ancestral_keeps_the_spread_of_the_data():
    sigmas = linspace_sigmas(SCHEDULE, 100)
    x, noise = start(sigmas, count=16)
    *_, last = euler_ancestral(gaussian, x, sigmas, noise)
    assert last.std().item() == pytest.approx(SPREAD, abs=0.05)


def test_euler_ancestral_asks_for_no_noise_at_the_end():
    sigmas = linspace_sigmas(SCHEDULE, 5)
    x, noise = start(sigmas)
    asked = []
    list(euler_ancestral(point, x, sigmas, lambda: asked.append(1) or noise()))
    assert len(asked) == 4


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_stops_where_its_reader_stops(name):
    sigmas = linspace_sigmas(SCHEDULE, 50)
    x, noise = start(sigmas)
    calls = []

    def denoise(x, sigma):
        calls.append(float(sigma))
        return point(x, sigma)

    assert len(list(islice(SAMPLERS[name](denoise, x, sigmas, noise), 3))) == 3
    assert len(calls) == 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_image_k_of_a_batch_equals_that_image_alone(name):
    sigmas = linspace_sigmas(SCHEDULE, 6)

    def run(seeds):
        noise = NoiseStream(seeds, (4, 8, 8))
        *_, last = SAMPLERS[name](gaussian, noise() * sigmas[0], sigmas, noise)
        return last

    torch.testing.assert_close(run([5, 6, 7])[1:2], run([6]), rtol=0, atol=0)
