"""Devices, dtypes, the memory allocator, and noise that depends on the seed alone."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ip2p.base.errors import InputError, ResourceError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device of this name; "auto" takes the first of cuda, mps, cpu that is available.

    Raises InputError for a name that torch does not know, ResourceError for a device this machine lacks.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"Device {device!r} is unknown; use auto, cuda, cuda:N, mps or cpu.") from None
    missing_gpu = chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()
    if missing_gpu or (chosen.type == "mps" and not torch.backends.mps.is_available()):
        raise ResourceError(f"Device {device} is not available on this machine; use --device auto or cpu.")
    return chosen


def has_fast_bf16(device: torch.device) -> bool:
    """Whether `device` has hardware for bf16 matrix products (on a CPU: AMX or AVX512-BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("amx_bf16") or able.get("avx512_bf16"))
    return False


def pick_dtype(device: torch.device, dtype: str | torch.dtype = "auto") -> torch.dtype:
    """The dtype of this name; "auto" is fp16 on a GPU, bf16 on a CPU with bf16 hardware, else fp32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        if device.type in ("cuda", "mps"):
            return torch.float16
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    try:
        return DTYPES[DTYPE_ALIASES.get(dtype, dtype)]
    except KeyError:
        raise InputError(f"Number format {dtype!r} is unknown; use auto, fp32, fp16 or bf16.") from None


@functools.cache
def reuse_freed_memory() -> bool:
    """Make glibc keep freed memory for the next tensor. Returns False where that is not supported.

    By default glibc returns each large tensor to the system, and the next one is zeroed page by page: about
    300,000 page faults per pass of Stable Diffusion's UNet. `return_freed_memory` releases the memory.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8  # malloc.h
    # glibc before 2.35 refuses more than 32 MiB.
    large = mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)
    # Only the main arena grows beyond 64 MiB, but servers compute in other threads.
    return bool(large and mallopt(trim_threshold, 2**31 - 1) and mallopt(arena_max, 1))


def return_freed_memory() -> None:
    """Return the memory that `reuse_freed_memory` kept to the system."""
    if reuse_freed_memory.cache_info().currsize and reuse_freed_memory():
        ctypes.CDLL(None).malloc_trim(0)


class NoiseStream:
    """Standard normal noise with one generator per seed: `stream()` returns the next [len(seeds), *shape].

    Row k depends on seed k alone, not on the rest of the batch. The noise is drawn in fp32 on the CPU, so
    that a seed gives the same picture on every device and in every dtype.
    """

    def __init__(
        self, seeds: Sequence[int], shape: Sequence[int], device: str | torch.device = "cpu"
    ) -> None:
        self.shape = tuple(shape)
        self.device = torch.device(device)
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        rows = [torch.randn((1, *self.shape), generator=g) for g in self.generators]
        return torch.cat(rows).to(self.device)
