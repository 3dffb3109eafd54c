"""A UNet made to take more: a picture beside the noise, or the guidance scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ip2p.base.errors import ModelError


def widen_conv_in(unet: Any, channels: int) -> None:
    """Let a UNet take `channels` input channels, in place: those that it had, then new ones of weight zero.

    The bias is copied, so that before any step the UNet answers as it did whatever the new channels hold
    (paper, section 3.2). Its config says the new number. Raises ModelError if it takes more already.
    """
    old = unet.conv_in
    if old.in_channels > channels:
        raise ModelError(
            f"This UNet takes {old.in_channels} channels, more than the {channels} of an editor. "
            "Use one that takes fewer."
        )
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        if new.bias is not None:
            new.bias.copy_(old.bias)
    unet.conv_in = new.requires_grad_(old.weight.requires_grad)
    unet.register_to_config(in_channels=channels)


def add_scales_input(unet: Any, size: int = 128) -> None:
    """Let a UNet take the guidance scales (`guidance.embed_scales` of `size`), in place.

    They are added to its time embedding by a linear layer, diffusers' `time_cond_proj_dim`. It starts at
    zero: whatever the scales, the UNet first predicts what it did.
    """
    embedding = unet.time_embedding
    weight = embedding.linear_1.weight
    embedding.cond_proj = nn.Linear(
        size, embedding.linear_1.in_features, bias=False, device=weight.device, dtype=weight.dtype
    )
    nn.init.zeros_(embedding.cond_proj.weight)
    embedding.cond_proj.requires_grad_(weight.requires_grad)
    unet.register_to_config(time_cond_proj_dim=size)
