"""Noise levels: the training schedule from a scheduler's config, and the sigmas for sampling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ip2p.base.errors import ModelError
from ip2p.settings import Prediction


@dataclass(frozen=True)
class Schedule:
    """The training noise levels sigma(t), t = 0 … T-1, and the type of prediction.

    `levels`: [T] fp64, ascending, on the CPU (as are all sigmas). sigma = sqrt((1 - ᾱ) / ᾱ), so that
    x = x0 + sigma · noise. With fp64, the inverse from sigma to t is exact to fp32. logarithmic: the network
    gets ln(sigma) / 4 instead of t (Karras et al. 2022; CosXL).
    """

    levels: Float[Tensor, " train_steps"]
    prediction: str = "epsilon"
    logarithmic: bool = False

    def sigma(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """sigma at a (fractional) time t in [0, T-1], interpolated linearly as in diffusers.

        The original interpolates log sigma; for the spacings in use, both agree to 1e-4.
        """
        low = t.floor().clamp(0, len(self.levels) - 2).long()
        return torch.lerp(self.levels[low], self.levels[low + 1], t - low)

    def time(self, sigma: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The (fractional) training time in [0, T-1] of a sigma: the inverse of `sigma`."""
        low = (torch.searchsorted(self.levels, sigma.contiguous(), right=True) - 1).clamp(
            0, len(self.levels) - 2
        )
        part = (sigma - self.levels[low]) / (self.levels[low + 1] - self.levels[low])
        return low + part.clamp(0, 1)

    def share(self, sigma: Float[Tensor, ""]) -> float:
        """The position of a sigma in the schedule by its time, from 0 to 1 (the noisiest)."""
        return float(self.time(sigma)) / (len(self.levels) - 1)

    def network_time(self, sigma: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The noise level as the network's time input."""
        return sigma.log() / 4 if self.logarithmic else self.time(sigma)


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """Read a diffusers `scheduler_config.json` with betas (`alpha_bar_from_config`) or CosXL's EDM.

    Raises ModelError for an unsupported beta schedule or prediction type.
    """
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in get_args(Prediction):
        raise ModelError(
            f"The scheduler's prediction_type is {prediction!r}; only epsilon, v_prediction and sample are "
            "supported. Use another model."
        )
    if "sigma_data" in config:
        return _edm_schedule(config, prediction)
    kept = alpha_bar_from_config(config)
    if config.get("rescale_betas_zero_snr"):
        # Zero signal would mean an infinite sigma; diffusers also starts at 4096.
        kept[-1] = 2**-24
    return Schedule((((1 - kept) / kept) ** 0.5).double(), prediction)


def alpha_bar_from_config(config: Mapping[str, Any]) -> Float[Tensor, " train_steps"]:
    """ᾱ(t) of training for t = 0 … T-1, descending, from a diffusers `scheduler_config.json`.

    Supports scaled_linear, linear, squaredcos_cap_v2 (Nichol and Dhariwal 2021, eq. 17) and trained betas;
    with `rescale_betas_zero_snr`, the last ᾱ becomes zero (Lin et al. 2024, algorithm 1). Raises ModelError
    for any other schedule.
    """
    kind = config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    count = config.get("num_train_timesteps", 1000)
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    elif kind == "squaredcos_cap_v2":
        cosine = ((torch.arange(count + 1, dtype=torch.float64) / count + 0.008) / 1.008 * torch.pi / 2).cos()
        betas = (1 - (cosine[1:] / cosine[:-1]).square()).clamp(max=0.999).float()
    else:
        raise ModelError(
            f"The scheduler's beta_schedule is {kind!r}; only scaled_linear, linear and squaredcos_cap_v2 "
            "are supported. Use another model."
        )
    # The product is in fp32, as in diffusers; in fp64, sigma would differ by 3e-6 (relative).
    kept = torch.cumprod(1 - betas, dim=0)
    if config.get("rescale_betas_zero_snr"):
        root = kept.sqrt()
        kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return kept


def _edm_schedule(config: Mapping[str, Any], prediction: str) -> Schedule:
    """diffusers' EDMEulerScheduler with sigma_data 1, where its x0 from a velocity equals ours: CosXL."""
    if (config.get("sigma_data"), config.get("sigma_schedule"), prediction) != (
        1.0,
        "exponential",
        "v_prediction",
    ):
        raise ModelError(
            "The scheduler is EDM, but not with CosXL's settings: sigma_data 1, exponential and "
            "v_prediction. Use another model."
        )
    ends = torch.tensor([config.get("sigma_min", 0.002), config.get("sigma_max", 80.0)], dtype=torch.float64)
    low, high = ends.log()
    count = config.get("num_train_timesteps", 1000)
    return Schedule(torch.linspace(low, high, count, dtype=torch.float64).exp(), prediction, logarithmic=True)


def linspace_sigmas(schedule: Schedule, steps: int) -> Float[Tensor, " steps_and_zero"]:
    """sigma at evenly spaced times from T-1 down to 0, then a zero: the original's spacing."""
    times = torch.linspace(len(schedule.levels) - 1, 0, steps, dtype=torch.float64)
    return torch.cat([schedule.sigma(times), torch.zeros(1)]).float()


def karras_sigmas(schedule: Schedule, steps: int, rho: float = 7.0) -> Float[Tensor, " steps_and_zero"]:
    """The sigmas of Karras et al. 2022 (eq. 5) from the schedule's largest to its smallest, then a zero."""
    low, high = schedule.levels[0] ** (1 / rho), schedule.levels[-1] ** (1 / rho)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1)]).float()


def exponential_sigmas(schedule: Schedule, steps: int) -> Float[Tensor, " steps_and_zero"]:
    """Sigmas evenly spaced in log sigma from the schedule's largest to its smallest, then a zero."""
    logs = torch.linspace(1, 0, steps, dtype=torch.float64)
    return torch.cat(
        [torch.lerp(schedule.levels[0].log(), schedule.levels[-1].log(), logs).exp(), torch.zeros(1)]
    ).float()


def lcm_sigmas(schedule: Schedule, steps: int) -> Float[Tensor, " steps_and_zero"]:
    """sigma at the times at which LCM and TCD models were distilled, every 20th of 1000, then a zero.

    `steps` of these, evenly chosen from the noisiest on (Luo et al. 2023). Where more steps are asked for,
    the times are spaced evenly over the same range.
    """
    count = len(schedule.levels)
    known = min(50, count)
    times = (torch.arange(known, 0, -1, dtype=torch.float64) * (count // known)) - 1
    places = torch.linspace(0, known, steps + 1, dtype=torch.float64)[:-1]
    chosen = times[places.floor().long()] if steps <= known else count - 1 - places * (count // known)
    return torch.cat([schedule.sigma(chosen), torch.zeros(1)]).float()


def trailing_sigmas(schedule: Schedule, steps: int) -> Float[Tensor, " steps_and_zero"]:
    """sigma at times T-1, T-1-T/n, … for n steps, rounded, then a zero (Lin et al. 2024, table 2).

    The step from the last time to zero is as long as the others, where `linspace_sigmas` is at time 0 already
    and wastes it: two of its steps give what one gives. Equal to diffusers' timestep_spacing "trailing";
    steps: 1 to T.
    """
    count = len(schedule.levels)
    times = (count - torch.arange(steps, dtype=torch.float64) * count / steps).round() - 1
    return torch.cat([schedule.sigma(times.clamp(min=0)), torch.zeros(1)]).float()


SPACINGS = {
    "linspace": linspace_sigmas,
    "karras": karras_sigmas,
    "exponential": exponential_sigmas,
    "trailing": trailing_sigmas,
    "lcm": lcm_sigmas,
}
