import math

import pytest
import torch

from ip2p.base.errors import ModelError
from ip2p.diffusion.schedule import (
    Schedule,
    alpha_bar_from_config,
    exponential_sigmas,
    karras_sigmas,
    linspace_sigmas,
    schedule_from_config,
    trailing_sigmas,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return schedule_from_config(SD)


def test_stable_diffusion_starts_at_the_original_sigma(schedule):
    assert linspace_sigmas(schedule, 100)[0].item() == pytest.approx(14.6146, abs=1e-4)


@pytest.mark.parametrize("steps", [5, 20, 100])
def test_linspace_equals_the_original_code_within_1e_4(schedule, steps):
    # The original interpolates log sigma between times; diffusers and we interpolate sigma.
    times = torch.linspace(999, 0, steps, dtype=torch.float64)
    low = times.floor().long().clamp(max=998)
    logs = schedule.levels.log()
    original = torch.lerp(logs[low], logs[low + 1], times - low).exp()
    ours = linspace_sigmas(schedule, steps)
    torch.testing.assert_close(ours[:-1].double(), original, rtol=0, atol=1e-4)
    assert ours[-1] == 0


def test_time_is_the_inverse_of_sigma(schedule):
    times = torch.tensor([0.0, 0.25, 1.0, 500.5, 998.75, 999.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.sigma(times)), times)


def test_time_is_clamped_to_the_training_range(schedule):
    assert schedule.time(torch.tensor(1000.0)).item() == 999
    assert schedule.time(torch.tensor(0.0)).item() == 0


@pytest.mark.parametrize("spacing", [linspace_sigmas, karras_sigmas, exponential_sigmas, trailing_sigmas])
@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_sigmas_decrease_from_the_largest_to_zero(schedule, spacing, steps):
    sigmas = spacing(schedule, steps)
    assert len(sigmas) == steps + 1
    assert sigmas[0].item() == pytest.approx(schedule.levels[-1].item())
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("train_steps", [1000, 500])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 30, 50, 500])
def test_trailing_equals_diffusers(train_steps, steps):
    """Oracles: diffusers' EulerDiscreteScheduler and DDIMScheduler."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    config = SD | {"num_train_timesteps": train_steps}
    schedule = schedule_from_config(config)
    sigmas = trailing_sigmas(schedule, steps)
    euler = EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")
    euler.set_timesteps(steps)
    torch.testing.assert_close(sigmas, euler.sigmas)
    ddim = DDIMScheduler.from_config(config, timestep_spacing="trailing")
    ddim.set_timesteps(steps)
    times = schedule.time(sigmas[:-1].double())
    torch.testing.assert_close(times, ddim.timesteps.double(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_exponential_equals_diffusers(schedule, steps):
    """Oracle: diffusers' EulerDiscreteScheduler, whose range is that of its own times."""
    from diffusers import EulerDiscreteScheduler

    euler = EulerDiscreteScheduler.from_config(SD, use_exponential_sigmas=True, timestep_spacing="linspace")
    euler.set_timesteps(steps)
    torch.testing.assert_close(exponential_sigmas(schedule, steps), euler.sigmas, rtol=1e-5, atol=0)


def test_the_last_of_two_steps_has_noise_with_trailing_but_almost_none_with_linspace(schedule):
    assert linspace_sigmas(schedule, 2)[1] < 0.05
    assert trailing_sigmas(schedule, 2)[1] > 1


def test_other_betas_and_prediction_types_are_read():
    assert schedule_from_config({"beta_schedule": "linear"}).levels[-1] > 100
    assert len(schedule_from_config({"trained_betas": [0.1, 0.2]}).levels) == 2
    assert schedule_from_config(SD | {"prediction_type": "v_prediction"}).prediction == "v_prediction"


@pytest.mark.parametrize(
    "change",
    [{"beta_schedule": "laplace"}, {"prediction_type": "flow_prediction"}],
)
def test_an_unsupported_setting_is_named(change):
    with pytest.raises(ModelError, match=next(iter(change))):
        schedule_from_config(SD | change)


NOISES = [
    SD,
    SD | {"num_train_timesteps": 500},
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.01, 0.2, 0.4]},
    SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"beta_schedule": "linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("config", NOISES, ids=lambda config: "-".join(map(str, config)))
def test_noise_levels_equal_diffusers_in_training_and_sampling(config):
    """Oracles: diffusers' DDPMScheduler and EulerAncestralDiscreteScheduler."""
    from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler

    theirs = DDPMScheduler.from_config(config).alphas_cumprod
    kept = alpha_bar_from_config(config)
    assert kept.shape == theirs.shape and (kept.diff() < 0).all()
    torch.testing.assert_close(kept, theirs, rtol=1e-6, atol=1e-7)
    if config.get("rescale_betas_zero_snr"):
        assert kept[-1] == 0  # training sees pure noise
    sampler = EulerAncestralDiscreteScheduler.from_config(config)
    sigmas = sampler.sigmas.flip(0)[1:].double()
    # The smallest rescaled sigmas keep few digits: diffusers converts ᾱ to betas and back.
    rtol = 1e-3 if config.get("rescale_betas_zero_snr") else 2e-6
    torch.testing.assert_close(schedule_from_config(config).levels, sigmas, rtol=rtol, atol=1e-7)


COSXL = {
    "_class_name": "EDMEulerScheduler",
    "sigma_min": 0.002,
    "sigma_max": 120.0,
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
    "prediction_type": "v_prediction",
}


def test_the_network_time_of_cosxl_is_a_quarter_of_log_sigma():
    schedule = schedule_from_config(COSXL)
    assert schedule.levels[0].item() == pytest.approx(0.002)
    assert schedule.levels[-1].item() == pytest.approx(120)
    sigma = torch.tensor(3.0)
    assert schedule.network_time(sigma).item() == pytest.approx(math.log(3) / 4)
    assert schedule.share(schedule.levels[-1]) == 1
    # Half of the steps are spent on each half of the logarithm.
    assert schedule.share(torch.tensor((0.002 * 120) ** 0.5).double()) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    "change", [{"sigma_data": 0.5}, {"sigma_schedule": "karras"}, {"prediction_type": "epsilon"}]
)
def test_edm_with_other_settings_is_refused(change):
    with pytest.raises(ModelError, match="EDM, but not with CosXL's settings"):
        schedule_from_config(COSXL | change)
