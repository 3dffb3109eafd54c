"""The memory that a training run needs, computed before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ip2p.base.errors import ResourceError

# Bytes of an optimizer's two moments for each trained number: in fp32, or in 8 bits with a scale per 256.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 2 * 4 / 256}


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """What a run keeps on its device, in bytes; `loaded` of it is there already."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    activations: int  # an estimate
    loaded: int = 0

    @property
    def certain(self) -> int:
        """What the run needs whatever the size of a micro-batch."""
        return self.parameters + self.gradients + self.optimizer + self.ema

    @property
    def total(self) -> int:
        return self.certain + self.activations

    def line(self, device: str, free: int | None) -> str:
        """The need in one line, with what is free."""
        parts = {"parameters": self.parameters, "gradients": self.gradients, "optimizer": self.optimizer}
        parts |= {"EMA": self.ema, "activations about": self.activations}
        shown = ", ".join(f"{name} {_size(count)}" for name, count in parts.items())
        has = "" if free is None else f"; {device} has {_size(free + self.loaded)} for it"
        return f"memory: about {_size(self.total)}: {shown}{has}"

    def check(self, device: str, free: int | None, advice: str) -> str | None:
        """A warning when the run may not fit in `free` more bytes, or None.

        Raises ResourceError when it cannot fit, even with a micro-batch of nothing.
        """
        room = None if free is None else free + self.loaded
        if room is None or self.total <= room:
            return None
        if self.certain > room:
            raise ResourceError(
                f"the run needs {_size(self.certain)} on {device} for weights, gradients, optimizer and EMA, "
                f"and {_size(room)} are free. Try {advice}."
            )
        return f"warning: {device} may run out of memory. If it does, try {advice}."


def training_memory(
    unet: nn.Module,
    others: Iterable[nn.Module],
    *,
    micro_batch: int,
    latent_size: tuple[int, int],
    text_length: int = 77,
    optimizer: str = "adamw",
    ema: bool = True,
    half: bool = False,
    checkpointing: bool = False,
) -> TrainingMemory:
    """The memory of training the parameters of `unet` that require gradients.

    `others`: the frozen networks that stay on the device. `latent_size`: height and width of the latents.
    `half`: the passes are in bf16 or fp16. Gradients and EMA are fp32, as the weights. Activations are the
    outputs of all layers for one micro-batch, found by a forward pass on the meta device; with
    `checkpointing`, those of the blocks and the largest block's inside.
    """
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    modules = [unet, *others]
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    kept = _kept_bytes(unet, latent_size, text_length, half, checkpointing)
    return TrainingMemory(
        parameters=weights,
        gradients=4 * trained,
        optimizer=round(OPTIMIZER_BYTES[optimizer] * trained),
        ema=4 * trained if ema else 0,
        activations=kept * micro_batch,
    )


def _kept_bytes(
    unet: Any, latent_size: tuple[int, int], text_length: int, half: bool, checkpointing: bool
) -> int:
    """The bytes that the backward pass of one sample needs: the outputs of all layers.

    In half precision norms are still in fp32 (torch.autocast), and keep their input and output so.
    """
    usual, norm = (2, 8) if half else (4, 4)
    config = unet.config
    with torch.device("meta"):
        ghost = type(unet).from_config(config)
        latents = torch.empty(1, config.in_channels, *latent_size)
        text = torch.empty(1, text_length, config.cross_attention_dim)
        added = {}
        if config.get("addition_embed_type") == "text_time":
            size = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {"text_embeds": torch.empty(1, size), "time_ids": torch.empty(1, 6)}
    total, open_blocks, block, largest = 0, 0, 0, 0

    def leaf(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal total, block
        if isinstance(output, torch.Tensor):
            size = norm if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) else usual
            total += size * output.numel()
            block += size * output.numel()

    def enter(module: nn.Module, inputs: Any) -> None:
        nonlocal open_blocks, block
        open_blocks, block = open_blocks + 1, 0

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal open_blocks, block, largest, total
        open_blocks -= 1
        if checkpointing and isinstance(output, torch.Tensor):
            largest = max(largest, block)
            total += usual * output.numel() - block

    for module in ghost.modules():
        if type(module).__name__ in ("ResnetBlock2D", "BasicTransformerBlock"):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
        elif not any(True for _ in module.children()):
            module.register_forward_hook(leaf)
    with torch.no_grad():
        ghost(latents, torch.empty(1, device="meta"), text, added_cond_kwargs=added)
    return total + largest


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
