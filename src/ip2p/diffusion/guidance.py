"""Classifier-free guidance with two conditions (paper, section 3.2)."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ip2p.diffusion import Latent

Scale = float | Float[Tensor, "batch 1 1 1"]


class Passes(NamedTuple):
    """Which of the three predictions of equation 3 have a nonzero weight."""

    full: bool
    image_only: bool
    neither: bool


def guide(full: Latent, image_only: Latent, neither: Latent, *, text: Scale, image: Scale) -> Latent:
    """Mix three predictions into one (paper, eq. 3).

    e = e00 + image · (e0I - e00) + text · (eTI - e0I). It is linear with weights that sum to one, so it
    applies to noise, velocity and x0. `text` is s_T, `image` is s_I, for all samples or one each.
    """
    return neither + image * (image_only - neither) + text * (full - image_only)


def passes(*, text: float, image: float) -> Passes:
    """The predictions that equation 3 needs; their weights are text, image - text and 1 - image.

    Skipping a zero weight is exact: image = 1 or text = image needs two passes, and both equal to 1 need one.
    An image scale below 1 is an ordinary scale and disables nothing.
    """
    return Passes(full=text != 0, image_only=image != text, neither=image != 1)


def rescale(mixed: Latent, full: Latent, share: float) -> Latent:
    """Move each picture's standard deviation toward that of its full prediction (Lin et al. 2023, eq. 14-16).

    share · e · std(eTI) / std(e) + (1 - share) · e; `share` is their φ, in [0, 1]. Large guidance scales
    increase the deviation, which looks overexposed.
    """
    picture = tuple(range(1, mixed.ndim))
    ratio = full.std(dim=picture, keepdim=True) / mixed.std(dim=picture, keepdim=True)
    return share * mixed * ratio + (1 - share) * mixed


def embed_scales(scales: Float[Tensor, "batch 2"], size: int) -> Float[Tensor, "batch {size}"]:
    """The scales (s_T, s_I) of equation 3 as sinusoids, the input of a distilled UNet (`timestep_cond`).

    For each scale, size / 4 cosines and then as many sines, of wavelengths from 1 to 64 in geometric steps
    (Meng et al. 2023, section 3.1, which embeds one scale). size: a multiple of 4, at least 8.
    """
    count = size // 4
    steps = torch.arange(count, device=scales.device, dtype=torch.float32) / (count - 1)
    angles = scales.float()[..., None] * (2 * math.pi * 64.0**-steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)
