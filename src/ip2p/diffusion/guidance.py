"""Classifier-free guidance with two conditions (paper, section 3.2)."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ip2p.diffusion import Denoiser, Latent, Sigma
from ip2p.diffusion.denoiser import NullText, Text, UNetDenoiser, text_inputs

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


def rescale_mixed(mixed: Latent, full: Latent, share: float) -> Latent:
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


def guided(
    model: UNetDenoiser,
    *,
    text: Text,
    null_text: NullText,
    image: Latent | None,
    text_cfg: float,
    image_cfg: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    every: int = 1,
    in_turn: bool = False,
) -> Denoiser:
    """Classifier-free guidance (equation 3) for an edit model: a denoiser with one to three passes per call.

    A distilled model, which takes the scales as an input, needs one. It has no null text and no rescaling.

    text and null_text: [1 or batch, tokens, features] or Prompts. image: [1 or batch, channel, h, w], or None
    to draw from the text alone; the two null branches are then the same. rescale: the strength of
    `rescale_mixed`. interval: the range of noise levels with guidance, as fractions (1 is the noisiest);
    outside it, only the full prediction is used (Kynkäänniemi et al. 2024). every: compute guidance at every
    nth call only. The calls between need one pass; they add the last difference of the guided and the full
    prediction to their full prediction, which is an approximation. Such a denoiser is for one sampling run.
    in_turn: run the passes one by one to save memory.
    """
    low, high = interval
    calls = 0  # with guidance
    difference: Latent | None = None

    def denoise(x: Latent, sigma: Sigma) -> Latent:
        nonlocal calls, difference
        count = len(x)
        inside = low <= model.schedule.share(sigma) <= high
        s_text, s_image = (text_cfg, image_cfg) if inside else (1.0, 1.0)
        # Without a picture, e0I = e00, so the image scale has no effect.
        need = passes(text=s_text, image=s_image if image is not None else 1.0)
        if rescale or every > 1:
            need = need._replace(full=True)  # the reference for its spread, and for the difference
        reuse = inside and every > 1 and calls % every > 0
        if reuse:
            need = Passes(full=True, image_only=False, neither=False)
        calls += inside
        nothing = torch.zeros_like(x)
        shown = nothing if image is None else image.to(x).expand(count, -1, -1, -1)
        inputs = text_inputs(text, count)
        if model.scales_size is not None:
            scales = embed_scales(torch.tensor([[s_text, s_image]]), model.scales_size).expand(count, -1)
            return model.x0(
                x, model.predict_from_inputs(x, sigma, {**inputs, "timestep_cond": scales}, shown), sigma
            )
        null = text_inputs(null_text, count)
        branches = []
        if need.full:
            branches.append((inputs, shown))
        if need.image_only:
            branches.append((null, shown))
        if need.neither:
            branches.append((null, nothing))
        if in_turn:
            out = [model.predict_from_inputs(x, sigma, words, picture) for words, picture in branches]
        else:
            batched = model.predict_from_inputs(
                x.repeat(len(branches), 1, 1, 1),
                sigma,
                {name: torch.cat([words[name] for words, _ in branches]) for name in branches[0][0]},
                torch.cat([picture for _, picture in branches]),
            )
            out = list(batched.chunk(len(branches)))
        # A skipped pass has weight zero; its neighbor replaces it, so that their difference is exactly zero.
        full = out[0]
        neither = out[-1]
        image_only = out[int(need.full)] if need.image_only else neither
        if not need.full:
            full = image_only
        if not need.neither:
            neither = image_only
        # Equal to mixing x0s, but without the rounding of x, which is far larger at high noise.
        mixed = guide(full, image_only, neither, text=s_text, image=s_image)
        if reuse:
            assert difference is not None, "the first call with guidance computes it"
            mixed = full + difference
        elif inside:
            difference = mixed - full
        if rescale and (reuse or len(branches) > 1):
            mixed = rescale_mixed(mixed, full, rescale)
        return model.x0(x, mixed, sigma)

    return denoise
