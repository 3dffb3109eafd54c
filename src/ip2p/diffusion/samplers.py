"""Samplers: generators over descending sigmas that yield x after each step.

Each takes a denoiser, x at sigmas[0] (noise · sigmas[0], plus x0 when starting from a picture), the sigmas
including the final zero, and a source of noise. The caller iterates, which allows progress, previews and
cancellation.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ip2p.diffusion import Denoiser, Latent, Noise, Steps


def euler(denoise: Denoiser, x: Latent, sigmas: Float[Tensor, "steps"], noise: Noise | None = None) -> Steps:
    """Euler's method on dx/dsigma = (x - x0) / sigma (Karras et al. 2022, algorithm 1)."""
    for sigma, following in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        x = x + slope * (following - sigma)
        yield x


def euler_ancestral(
    denoise: Denoiser, x: Latent, sigmas: Float[Tensor, "steps"], noise: Noise | None = None
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
    denoise: Denoiser, x: Latent, sigmas: Float[Tensor, "steps"], noise: Noise | None = None
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


Sampler = Callable[..., Steps]
SAMPLERS: dict[str, Sampler] = {"euler_ancestral": euler_ancestral, "euler": euler, "dpmpp_2m": dpmpp_2m}
