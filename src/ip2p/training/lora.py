"""LoRA training: two small matrices beside each chosen layer of the UNet, W + alpha / rank · up · down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ip2p.base.errors import InputError
from ip2p.base.files import replacing

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
NAME = "ip2p"  # of the adapter, which no file says


def add_lora(
    unet: UNet2DConditionModel,
    rank: int,
    alpha: float | None = None,
    *,
    targets: Literal["attention", "all"] | Sequence[str] = "attention",
    conv_in: bool = False,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Freeze a UNet, put a LoRA beside some of its layers, and return what is then trained.

    It answers as before until a step is made. targets: the projections of attention, all linear and
    convolutional layers, or the ends of the names of those wanted. alpha: `rank` unless given. conv_in:
    train the input convolution whole, as one that was widened must be (`Bundle.widened`). The down
    matrices are drawn with `seed`. Raises InputError, also when peft is not installed.
    """
    if rank < 1:
        raise InputError(f"The rank of the LoRA is {rank}; use 1 or more, for example --lora 16")
    alpha = float(rank) if alpha is None else float(alpha)
    if not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"The alpha of the LoRA is {alpha:g}; use a positive number, for example {rank}")
    config = _config(rank, alpha, _names(unet, targets, skip_input=conv_in))
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config, adapter_name=NAME)
    if conv_in:
        unet.conv_in.requires_grad_(True)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def lora_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The LoRA under diffusers' names, fp32 on the CPU, with alpha / rank multiplied into the up matrices.

    So every reader applies it alike: some take no alpha from a file with these names.
    """
    state = {}
    for name, layer in _layers(unet):
        up = layer.lora_B[NAME].weight * layer.scaling[NAME]
        for role, weight in (("A", layer.lora_A[NAME].weight), ("B", up)):
            state[f"unet.{name}.lora_{role}.weight"] = weight.detach().float().cpu().contiguous()
    return state


def save_lora(unet: UNet2DConditionModel, path: Path) -> None:
    """Write the LoRA as a file that `ip2p edit --lora` and diffusers' `load_lora_weights` open.

    It fits the editor that training started from. Raises InputError where the input convolution was
    trained whole: no such file holds it, and the merged model is the only output.
    """
    if unet.conv_in.weight.requires_grad:
        raise InputError(
            "A LoRA file cannot hold the input convolution, which was widened and trained whole; "
            "use the merged model."
        )
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(lora_state(unet), temporary, metadata={"format": "pt"})


def merged(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet with the LoRA added to its weights, in eval mode and without gradients.

    Weights that are frozen and have no LoRA are shared with `unet`; the others are copies.
    """
    from ip2p.models.load import empty_network

    network = empty_network("unet", unet.config)
    changes = {f"{name}.weight": layer.get_delta_weight(NAME) for name, layer in _layers(unet)}
    state = {}
    for name, weight in unet.named_parameters():
        own = name.replace(".base_layer.", ".")
        if f".{NAME}." in name:
            continue
        weight = weight.detach().clone() if weight.requires_grad else weight.detach()
        state[own] = weight + changes[own].to(weight.dtype) if own in changes else weight
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _layers(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with a LoRA, by their names in the UNet."""
    from peft.tuners.lora import LoraLayer

    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer) and NAME in module.lora_A:
            yield name, module


def _names(unet: nn.Module, targets: str | Sequence[str], *, skip_input: bool) -> list[str]:
    layers = [name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if targets == "all":
        return [name for name in layers if not (skip_input and name == "conv_in")]
    ends = ATTENTION if targets == "attention" else tuple(targets)
    chosen = [name for name in layers if any(name == end or name.endswith(f".{end}") for end in ends)]
    for end in ends:
        if not any(name == end or name.endswith(f".{end}") for name in chosen):
            raise InputError(
                f"No linear or convolutional layer of the UNet is named {end!r}; use attention, all, or the "
                "ends of names, for example to_q"
            )
    return chosen


def _config(rank: int, alpha: float, names: list[str]) -> Any:
    try:
        from peft import LoraConfig
    except ImportError:
        raise InputError("training a LoRA needs peft: pip install 'ip2p[lora]'") from None
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type] # it takes any number
        target_modules=names,
        init_lora_weights="gaussian",
    )
