"""Samplers: generators over descending sigmas that yield x after each step.

Each takes a denoiser, x at sigmas[0] (noise · sigmas[0], plus x0 when starting from a picture), the sigmas
including the final zero, and a source of noise. The caller iterates, which allows progress, previews and
cancellation.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ip2p.diffusion import Denoiser, Latent, Noise, Sigma, Steps
from ip2p.diffusion.schedule import Schedule


def euler(denoise: Denoiser, x: Latent, sigmas: Float[Tensor, " steps"], noise: Noise | None = None) -> Steps:
    """Euler's method on dx/dsigma = (x - x0) / sigma (Karras et al. 2022, algorithm 1)."""
    for sigma, following in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        x = x + slope * (following - sigma)
        yield x


def euler_ancestral(
    denoise: Denoiser, x: Latent, sigmas: Float[Tensor, " steps"], noise: Noise | None = None
) -> Steps:
    """An Euler step down to sigma_down, then new noise up to the next sigma (the paper's sampler, η = 1).

    sigma_up² = s'² (s² - s'²) / s², sigma_down² = s'² - sigma_up², for a step from s to s'.
    """
    assert noise is not None, "an ancestral sampler needs a source of noise"
    for sigma, following in pairwise(sigmas):
        up = (following**2 * (sigma**2 - following**2) / sigma**2).sqrt()
        down = (following**2 - up**2).sqrt()
        slope = (x - denoise(x, sigma)) / sigma
        x = x + slope * (down - sigma)
        if following > 0:
            x = x + noise() * up
        yield x


def dpmpp_2m(
    denoise: Denoiser, x: Latent, sigmas: Float[Tensor, " steps"], noise: Noise | None = None
) -> Steps:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), in λ = -log sigma.

    The first step has no history and the last one ends at sigma = 0 (λ = ∞); both are first order.
    """
    previous: Latent | None = None
    width_before: Tensor | None = None
    for sigma, following in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if following == 0:
            x = x0
        else:
            width = (sigma / following).log()
            target = x0
            if previous is not None and width_before is not None:
                target = x0 + (x0 - previous) * (width / (2 * width_before))
            x = x * (following / sigma) - torch.expm1(-width) * target
            previous, width_before = x0, width
        yield x


def lcm(denoise: Denoiser, x: Latent, sigmas: Float[Tensor, " steps"], noise: Noise | None = None) -> Steps:
    """Consistency sampling (Luo et al. 2023, algorithm 3): x0, then fresh noise of the next sigma.

    For LCM-LoRA and other distilled models, at `schedule.lcm_sigmas`. Their boundary factors c_skip and c_out
    are 0 and 1 to 1e-5 at these.
    """
    assert noise is not None, "this sampler needs a source of noise"
    for sigma, following in pairwise(sigmas):
        x = denoise(x, sigma)
        if following > 0:
            x = x + following * noise()
        yield x


def tcd(
    denoise: Denoiser,
    x: Latent,
    sigmas: Float[Tensor, " steps"],
    noise: Noise | None = None,
    *,
    earlier: Callable[[Sigma], Sigma] = lambda sigma: 0.7 * sigma,
) -> Steps:
    """Strategic stochastic sampling of trajectory consistency (Zheng et al. 2024, algorithm 4).

    Straight to a sigma below the next one, then fresh noise up to it: with s' the next one and
    e = earlier(s'), x' = x0 + e (x - x0) / s + sqrt(s'² - e²) noise. `sampler_for` has the paper's choice:
    the sigma of the time (1 - γ) t'.
    """
    assert noise is not None, "this sampler needs a source of noise"
    for sigma, following in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if following == 0:
            x = x0
        else:
            down = earlier(following)
            x = x0 + down * (x - x0) / sigma + (following**2 - down**2).clamp(min=0).sqrt() * noise()
        yield x


Sampler = Callable[..., Steps]
SAMPLERS: dict[str, Sampler] = {
    "euler_ancestral": euler_ancestral,
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
    "lcm": lcm,
    "tcd": tcd,
}
# Samplers that are made for the noise levels of one spacing (`schedule.SPACINGS`).
OWN_SPACING = {"lcm": "lcm", "tcd": "lcm"}
TCD_GAMMA = 0.3  # the share of the time that is gone back, as the published LoRAs have it


def sampler_for(name: str, schedule: Schedule) -> Sampler:
    """A sampler by its name in `SAMPLERS`, for a model's schedule."""
    if name != "tcd":
        return SAMPLERS[name]

    def earlier(sigma: Sigma) -> Sigma:
        time = schedule.time(sigma.double())
        # Rounded as diffusers has it: times of the next step are whole, but for what fp32 lost.
        return schedule.sigma(((1 - TCD_GAMMA) * time.round()).floor()).to(sigma)

    return partial(tcd, earlier=earlier)
