"""The training objective of InstructPix2Pix: noise prediction with exclusive conditioning dropout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Stable Diffusion's noise schedule.
TIMESTEPS, BETA_START, BETA_END = 1000, 0.00085, 0.012


@dataclass(frozen=True)
class Shares:
    """Fractions of samples that drop only the text, only the image, or both (paper, section 3.2.1: 5%)."""

    text: float = 0.05
    image: float = 0.05
    both: float = 0.05


def null_conditions(
    draw: Float[Tensor, " batch"], shares: Shares | None = None
) -> tuple[Bool[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Which samples drop their text, and which their image, from one uniform draw in [0, 1) per sample.

    One draw decides both, as in the released code: below `text`, the text is dropped; in the next `both`,
    both; in the next `image`, the image.
    """
    shares = shares or Shares()
    text_end = shares.text + shares.both
    return draw < text_end, (draw >= shares.text) & (draw < text_end + shares.image)


def add_noise(
    clean: Float[Tensor, "batch c h w"],
    noise: Float[Tensor, "batch c h w"],
    alpha_bar: Float[Tensor, " batch"],
) -> Float[Tensor, "batch c h w"]:
    """The forward process, `sqrt(a) x0 + sqrt(1 - a) eps` (Ho et al. 2020, eq. 4)."""
    a = alpha_bar[:, None, None, None]
    return a.sqrt() * clean + (1 - a).sqrt() * noise


def velocity(
    clean: Float[Tensor, "batch c h w"],
    noise: Float[Tensor, "batch c h w"],
    alpha_bar: Float[Tensor, " batch"],
) -> Float[Tensor, "batch c h w"]:
    """v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans and Ho 2022, appendix D)."""
    a = alpha_bar[:, None, None, None]
    return a.sqrt() * noise - (1 - a).sqrt() * clean


def prediction_target(
    prediction: str,
    clean: Float[Tensor, "batch c h w"],
    noise: Float[Tensor, "batch c h w"],
    alpha_bar: Float[Tensor, " batch"],
) -> Float[Tensor, "batch c h w"]:
    """What a network of diffusers' `prediction_type` predicts: the noise, the velocity, or x0 ("sample")."""
    if prediction == "v_prediction":
        return velocity(clean, noise, alpha_bar)
    return noise if prediction == "epsilon" else clean


def split_noisy(
    noisy: Float[Tensor, "batch c h w"],
    predicted: Float[Tensor, "batch c h w"],
    alpha_bar: Float[Tensor, " batch"],
    prediction: str,
) -> tuple[Float[Tensor, "batch c h w"], Float[Tensor, "batch c h w"]]:
    """The picture and the noise that `add_noise` mixed, by a network's prediction."""
    a = alpha_bar[:, None, None, None]
    if prediction == "sample":
        return predicted, (noisy - a.sqrt() * predicted) / (1 - a).sqrt()
    if prediction == "epsilon":
        return (noisy - (1 - a).sqrt() * predicted) / a.sqrt(), predicted
    return a.sqrt() * noisy - (1 - a).sqrt() * predicted, a.sqrt() * predicted + (1 - a).sqrt() * noisy


def snr_weight(
    alpha_bar: Float[Tensor, " batch"], clip: tuple[float, float] | None, prediction: str = "epsilon"
) -> Float[Tensor, " batch"]:
    """The loss weight that makes the weight of the x0 loss `clamp(SNR, low, high)`.

    In terms of x0, the squared error of the noise has weight SNR, that of the velocity SNR + 1, and that of a
    predicted x0 has weight 1. The upper limit is Min-SNR (Hang et al. 2023), the lower one the truncated SNR
    of Salimans and Ho (2022): without it, a small model hardly learns at the noise levels that determine the
    edit. None is the plain loss of the prediction (the paper's, for noise).
    """
    if clip is None:
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    weight = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
    return snr.clamp(*clip) / weight


def noise_loss(
    predicted: Float[Tensor, "batch c h w"],
    noise: Float[Tensor, "batch c h w"],
    sample_weight: Float[Tensor, " batch"],
    cell_weight: Float[Tensor, "batch 1 h w"] | None = None,
) -> Float[Tensor, ""]:
    """Weighted mean squared error of the predicted noise (or velocity).

    `cell_weight` weights latent cells (for example those that the edit changes). It is positive everywhere,
    so the minimum is still the conditional mean, as in plain training.
    """
    error = (predicted.float() - noise.float()).square()
    if cell_weight is not None:
        error = error * (cell_weight / cell_weight.mean(dim=(1, 2, 3), keepdim=True).sqrt())
    return (error.mean(dim=(1, 2, 3)) * sample_weight).mean()


def scaled_linear_alpha_bar(
    steps: int = TIMESTEPS, start: float = BETA_START, end: float = BETA_END
) -> Float[Tensor, " steps"]:
    """Stable Diffusion's noise schedule: cumulative products of 1 - beta, sqrt(beta) linear in t."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


def random_timesteps(
    uniform: Float[Tensor, " count"], power: float = 1.0, steps: int = TIMESTEPS
) -> Int[Tensor, " count"]:
    """Timesteps `floor(steps u^power)` from uniform draws u in [0, 1).

    They are uniform for power 1 (as in the paper); otherwise the density is proportional to t^(1 / power -
    1).
    """
    return (uniform.pow(power) * steps).long().clamp(max=steps - 1)


def change_weights(
    changed: Float[Tensor, "batch 1 h w"], share: float, most: float
) -> Float[Tensor, "batch 1 h w"]:
    """Weights of latent cells: 1, plus a bonus for changed cells.

    The bonus is `share` times the number of cells divided by the number of changed cells, at most `most`:
    without that limit, the bonuses add up to `share` of the number of cells.
    """
    cells = changed[0].numel()
    count = changed.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    return 1 + changed * (share * cells / count).clamp(max=most)


def pseudo_huber_loss(
    predicted: Float[Tensor, "batch c h w"], target: Float[Tensor, "batch c h w"], width: float = 0.001
) -> Float[Tensor, ""]:
    """Mean of `sqrt(d² + width²) - width` over the differences d (Song and Dhariwal 2023, eq. 9)."""
    return (((predicted - target).square() + width**2).sqrt() - width).mean()
