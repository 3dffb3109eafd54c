"""The memory layout of an editor's networks, and their compilation by torch."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ip2p.base.errors import ResourceError

if TYPE_CHECKING:
    from ip2p.models.bundle import Bundle

SHAPES = 64  # compiled variants per kind of block; torch allows 8, and a UNet has about 30


def use_fast_layout(bundle: Bundle) -> None:
    """Put the convolutions of UNet and autoencoder into the layout that is faster on their device.

    Channels-last on CPUs. CUDA keeps torch's own, which is faster for the three passes of one picture.
    """
    for network in (bundle.unet, bundle.vae):
        if network.device.type == "cpu":
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compile_networks(bundle: Bundle) -> None:
    """Compile UNet and autoencoder in place; the work is done at the first call of each new shape.

    On CPUs, block by block, since blocks of the same shape share their kernels. On GPUs, the whole UNet as a
    CUDA graph, which the launch overhead of small batches calls for. Results differ from eager ones by
    rounding. Kernels are kept in ~/.cache/ip2p/compiled for the next process. Raises ResourceError without a
    C++ compiler.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "ip2p" / "compiled"))
    if bundle.unet.device.type == "cuda":
        bundle.unet.compile(mode="reduce-overhead", dynamic=False)
        _compile_blocks([bundle.vae])
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # its error depends on the version
        raise ResourceError(
            "Compilation needs a C++ compiler, such as g++. Install one, or leave --compile out."
        ) from None
    _compile_blocks([bundle.unet, bundle.vae])


def compile_for_training(unet: Any, device: torch.device) -> None:
    """Compile a UNet in place for forward and backward passes on a GPU. On other devices, warn and leave it.

    torch 2.13 computes wrong gradients of a compiled UNet on CPUs under bf16 autocast, and nonfinite ones of
    its blocks compiled alone. The outputs are right.
    """
    if device.type == "cuda":
        unet.compile()
        return
    warnings.warn(
        f"The UNet is not compiled for training on this device ({device.type}): torch computes wrong "
        "gradients of compiled networks on CPUs in bf16.",
        stacklevel=2,
    )


def _compile_blocks(networks: list[Any]) -> None:
    import torch._dynamo
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
    for network in networks:
        for block in network.modules():
            if isinstance(block, (ResnetBlock2D, Transformer2DModel)):
                block.compile(dynamic=False)
