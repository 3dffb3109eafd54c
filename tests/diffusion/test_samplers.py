"""Toy data with known answers: a single point, and a Gaussian, whose ODE has a closed-form solution."""

from itertools import islice

import pytest
import torch

from ip2p.base.devices import NoiseStream
from ip2p.diffusion.samplers import OWN_SPACING, SAMPLERS, dpmpp_2m, euler, euler_ancestral, sampler_for
from ip2p.diffusion.schedule import SPACINGS, karras_sigmas, linspace_sigmas, schedule_from_config

SCHEDULE = schedule_from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
SPREAD = 0.5


def point(x, sigma):
    return torch.full_like(x, 0.7)


def gaussian(x, sigma):
    """The optimal x0 if the data is N(0, SPREAD²)."""
    return x * SPREAD**2 / (SPREAD**2 + sigma**2)


def initial_sample(sigmas, count=2):
    noise = NoiseStream(range(count), (4, 8, 8))
    return noise() * sigmas[0], noise


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_converges_to_a_single_point(name):
    sigmas = linspace_sigmas(SCHEDULE, 7)
    x, noise = initial_sample(sigmas)
    steps = list(SAMPLERS[name](point, x, sigmas, noise))
    assert len(steps) == 7
    torch.testing.assert_close(steps[-1], torch.full_like(x, 0.7), rtol=0, atol=1e-5)


def error_on_the_gaussian(sampler, steps):
    """Distance at the smallest sigma from the exact x · sqrt((s² + sigma²) / (s² + sigma_max²))."""
    sigmas = karras_sigmas(SCHEDULE, steps)[:-1]
    x, _ = initial_sample(sigmas)
    *_, last = sampler(gaussian, x, sigmas)
    exact = x * ((SPREAD**2 + sigmas[-1] ** 2) / (SPREAD**2 + sigmas[0] ** 2)).sqrt()
    return (last - exact).abs().max().item()


def test_euler_is_first_order():
    ratio = error_on_the_gaussian(euler, 50) / error_on_the_gaussian(euler, 100)
    assert ratio == pytest.approx(2, abs=0.3)


def test_dpmpp_2m_is_second_order():
    ratio = error_on_the_gaussian(dpmpp_2m, 50) / error_on_the_gaussian(dpmpp_2m, 100)
    assert ratio == pytest.approx(4, abs=0.8)
    assert error_on_the_gaussian(dpmpp_2m, 20) < error_on_the_gaussian(euler, 20) / 4


def test_euler_ancestral_keeps_the_standard_deviation_of_the_data():
    sigmas = linspace_sigmas(SCHEDULE, 100)
    x, noise = initial_sample(sigmas, count=16)
    *_, last = euler_ancestral(gaussian, x, sigmas, noise)
    assert last.std().item() == pytest.approx(SPREAD, abs=0.05)


def test_euler_ancestral_draws_no_noise_at_the_last_step():
    sigmas = linspace_sigmas(SCHEDULE, 5)
    x, noise = initial_sample(sigmas)
    asked = []
    list(euler_ancestral(point, x, sigmas, lambda: asked.append(1) or noise()))
    assert len(asked) == 4


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_makes_no_calls_beyond_the_consumed_steps(name):
    sigmas = linspace_sigmas(SCHEDULE, 50)
    x, noise = initial_sample(sigmas)
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


# --- distilled models ---


class DiffusersSampler:
    """Runs diffusers' schedulers; computes their noise prediction from our x0."""

    def __init__(self, kind, steps):
        self.scheduler = kind(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        )
        self.scheduler.set_timesteps(steps)
        kept = self.scheduler.alphas_cumprod.double()
        self.levels = ((1 - kept) / kept).sqrt()

    def steps(self, network, x, noise, **more):
        """x of every step in our scale, x / sqrt(ᾱ), and x0 at the last; draws noise as we do."""
        import diffusers.schedulers.scheduling_lcm as lcm_module
        import diffusers.schedulers.scheduling_tcd as tcd_module

        sample = x / (1 + self.levels[self.scheduler.timesteps[0]] ** 2).sqrt()
        for number, time in enumerate(self.scheduler.timesteps):
            sigma = self.levels[time]
            scaled = sample * (1 + sigma**2).sqrt()
            epsilon = (scaled - network(scaled, sigma)) / sigma
            with pytest.MonkeyPatch.context() as patch:
                for module in (lcm_module, tcd_module):
                    patch.setattr(module, "randn_tensor", lambda *_, **__: noise())
                out = self.scheduler.step(epsilon, int(time), sample, **more)
            sample = out.prev_sample
            last = number + 1 == len(self.scheduler.timesteps)
            following = self.levels[self.scheduler.timesteps[number + 1]] if not last else None
            yield sample * (1 + following**2).sqrt() if following is not None else network(scaled, sigma)


def network(x, sigma):
    """A smooth x0 that depends on all of x and on sigma."""
    return torch.tanh(0.3 * x.roll(1, -1) / (1 + sigma**2).sqrt() + 0.1 * sigma.log())


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_samplers_of_distilled_models_agree_with_diffusers_schedulers(name, steps):
    from diffusers import LCMScheduler, TCDScheduler

    oracle = DiffusersSampler({"lcm": LCMScheduler, "tcd": TCDScheduler}[name], steps)
    sigmas = SPACINGS[OWN_SPACING[name]](SCHEDULE, steps)
    torch.testing.assert_close(
        sigmas[:-1].double(), oracle.levels[oracle.scheduler.timesteps], rtol=1e-5, atol=0
    )
    first, noise = initial_sample(sigmas)
    ours = list(sampler_for(name, SCHEDULE)(network, first, sigmas, noise))
    _, noise = initial_sample(sigmas)
    theirs = list(oracle.steps(network, first, noise, **({"eta": 0.3} if name == "tcd" else {})))
    assert len(ours) == len(theirs) == steps
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.float(), rtol=1e-4, atol=1e-4)


def test_more_steps_than_distilled_still_give_decreasing_sigmas():
    sigmas = SPACINGS["lcm"](SCHEDULE, 80)
    assert len(sigmas) == 81 and (sigmas.diff() < 0).all() and sigmas[0] == SCHEDULE.levels[-1].float()
