"""Count the largest maps alive at once in the published shapes of UNet and autoencoder, without weights.

    python -m benchmarks.speed memory

`ip2p.models.memory` has these counts. Networks and inputs are made on the meta device, where nothing is
computed; a mode sees each tensor come and go. Attention is taken to keep no matrix, as in fused kernels.
"""

from __future__ import annotations

import argparse
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.speed.loading import SD15

SD1 = {"in_channels": 8, "cross_attention_dim": 768}
SD2 = {
    "in_channels": 8,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
XL = {
    "in_channels": 8,
    "cross_attention_dim": 2048,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


class Alive(TorchDispatchMode):
    """The bytes alive of all tensors made inside it, but for a network's own, and their peak."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.known = {weight.untyped_storage()._cdata for weight in network.parameters()}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, count = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.now += count
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, count)
        return out

    def _gone(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.now -= count


def unet_maps(config: dict[str, Any], cells: int = 64, rows: int = 1) -> float:
    network = UNet2DConditionModel(**config).eval()
    words = torch.empty(rows, 77, config["cross_attention_dim"])
    added = {"text_embeds": torch.empty(rows, 1280), "time_ids": torch.empty(rows, 6)}
    with torch.no_grad(), Alive(network) as alive:
        network(
            torch.empty(rows, 8, cells, cells),
            torch.empty(rows),
            words,
            added_cond_kwargs=added if "addition_embed_type" in config else None,
        )
    return alive.peak / (rows * cells**2 * 4 * network.config.block_out_channels[0])


def control_maps(cells: int = 64) -> float:
    """What the residuals of an SD 1.x ControlNet, and their addition, add to the UNet's peak."""
    network, control = UNet2DConditionModel(**SD1).eval(), ControlNetModel(cross_attention_dim=768).eval()
    words, time = torch.empty(1, 77, 768), torch.empty(1)
    x, picture = torch.empty(1, 8, cells, cells), torch.empty(1, 3, 8 * cells, 8 * cells)
    with torch.no_grad(), Alive(torch.nn.ModuleList([network, control])) as alive:
        down, middle = control(x[:, :4], time, words, picture, return_dict=False)
        network(
            x,
            time,
            words,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        )
    return alive.peak / (cells**2 * 4 * network.config.block_out_channels[0]) - unet_maps(SD1)


def vae_maps(decode: bool, side: int = 512) -> float:
    network = AutoencoderKL(**SD15["vae"]).eval()
    with torch.no_grad(), Alive(network) as alive:
        if decode:
            network.decode(torch.empty(1, network.config.latent_channels, side // 8, side // 8))
        else:
            network.encode(torch.empty(1, 3, side, side))
    return alive.peak / (side**2 * 4 * network.config.block_out_channels[0])


def add_options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(args: argparse.Namespace) -> int:
    F.scaled_dot_product_attention = lambda query, key, value, *args, **kwargs: torch.empty_like(query)
    with torch.device("meta"):
        for name, config in (("SD 1.x", SD1), ("SD 2.x", SD2), ("SDXL", XL)):
            print(f"{name}: {unet_maps(config):.1f} maps a cell and row")
        print(f"ControlNet for SD 1.x: {control_maps():.1f} maps more")
        print(f"autoencoder: {vae_maps(False):.1f} maps a pixel to encode, {vae_maps(True):.1f} to decode")
    return 0
