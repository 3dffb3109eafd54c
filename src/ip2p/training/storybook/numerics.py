"""Finds the precision and memory layout that train fastest on this machine, with a short measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
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
_ROUNDS = 6


def measure_numerics(device: torch.device, channels: int = 128, side: int = 16, batch: int = 16) -> Numerics:
    """The fastest format and layout of a residual block's forward and backward pass. About a second on a CPU.

    A GPU gets bf16 channels-last without a measurement. On CPUs it varies: bf16 is faster with AMX or
    AVX512-BF16, and slower by a large factor with AVX2.
    """
    if device.type == "cuda":
        return Numerics("bf16", torch.channels_last)
    if device.type != "cpu":
        return FP32
    candidates = [
        Numerics(precision, layout)
        for precision in ("no", "bf16")
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    passes = {each: _block_pass(each, channels, side, batch) for each in candidates}
    best = dict.fromkeys(candidates, float("inf"))
    for number in range(_ROUNDS + 1):  # each in turn, so that other work slows all of them down
        for each, seconds in passes.items():
            taken = seconds()
            if number:  # the first one warms up
                best[each] = min(best[each], taken)
    return min(candidates, key=lambda each: best[each] * (1 if each == FP32 else _MARGIN))


def _block_pass(numerics: Numerics, channels: int, side: int, batch: int) -> Callable[[], float]:
    """A function that runs a residual block forward and backward and returns the seconds."""
    block = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
    block.to(memory_format=numerics.memory_format)  # type: ignore[call-overload]
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=numerics.memory_format)
    x.requires_grad_()

    def seconds() -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=numerics.precision == "bf16"):
            loss = block(x).square().mean()
        loss.backward()
        return time.perf_counter() - started

    return seconds
