"""Finds the precision and memory layout that train fastest on this machine, with a short measurement."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Numerics:
    """precision: "no" (fp32) or "bf16" autocast; memory_format: of convolutions' inputs and weights."""

    precision: str
    memory_format: torch.memory_format


FP32 = Numerics("no", torch.contiguous_format)
_MARGIN = 1.25  # another format must be faster by this factor


def measure_numerics(device: torch.device, channels: int = 128, side: int = 16, batch: int = 16) -> Numerics:
    """The fastest format and layout of a residual block's forward and backward pass. Half a second on a CPU.

    A GPU gets bf16 channels-last without a measurement. On CPUs it varies: bf16 is faster with AMX or
    AVX512-BF16, and slower by a large factor with AVX2.
    """
    if device.type == "cuda":
        return Numerics("bf16", torch.channels_last)
    if device.type != "cpu":
        return FP32
    first = _block_seconds(FP32, channels, side, batch)
    seconds = {FP32: first}
    for precision in ("no", "bf16"):
        for layout in (torch.contiguous_format, torch.channels_last):
            other = Numerics(precision, layout)
            if other != FP32:
                seconds[other] = _MARGIN * _block_seconds(other, channels, side, batch, limit=2 * first)
    return min(seconds, key=lambda numerics: seconds[numerics])


def _block_seconds(
    numerics: Numerics, channels: int, side: int, batch: int, *, limit: float = float("inf"), repeats: int = 5
) -> float:
    """The time of the fastest of some passes; stops early if it exceeds `limit`."""
    block = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
    block.to(memory_format=numerics.memory_format)  # type: ignore[call-overload]
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=numerics.memory_format)
    x.requires_grad_()
    best = float("inf")
    for turn in range(repeats + 1):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=numerics.precision == "bf16"):
            loss = block(x).square().mean()
        loss.backward()
        if turn:  # the first pass is a warm-up
            best = min(best, time.perf_counter() - started)
            if best > limit:
                break
    return best
