"""LoRA training: two low-rank matrices for each chosen layer of the UNet, W + alpha / rank · up · down."""

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
NAME = "ip2p"  # adapter name; not stored in files


def add_lora(
    unet: UNet2DConditionModel,
    rank: int,
    alpha: float | None = None,
    *,
    targets: Literal["attention", "all"] | Sequence[str] = "attention",
    conv_in: bool = False,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Freeze a UNet, add a LoRA to some of its layers, and return the trainable parameters.

    The output does not change until the first step. targets: "attention" (the attention projections), "all"
    (all linear and convolutional layers), or suffixes of layer names. alpha: default `rank`. conv_in: also
    train the input convolution fully, which a widened one needs (`Bundle.widened`). The down matrices are
    initialized with `seed`. Raises InputError for bad values, and if PEFT is not installed.
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
    """The LoRA under diffusers' names, fp32 on the CPU, with alpha / rank folded into the up matrices.

    All readers then apply it in the same way: some ignore alpha in files with these names.
    """
    state = {}
    for name, layer in _layers(unet):
        up = layer.lora_B[NAME].weight * layer.scaling[NAME]
        for role, weight in (("A", layer.lora_A[NAME].weight), ("B", up)):
            state[f"unet.{name}.lora_{role}.weight"] = weight.detach().float().cpu().contiguous()
    return state


def save_lora(unet: UNet2DConditionModel, path: Path) -> None:
    """Write the LoRA as a file for `ip2p edit --lora` and diffusers' `load_lora_weights`.

    It applies to the editor that training started from. Raises InputError if the input convolution was
    trained fully: a LoRA file cannot contain it, and the merged model is the only output.
    """
    if unet.conv_in.weight.requires_grad:
        raise InputError(
            "A LoRA file cannot contain the input convolution, which was widened and fully trained; "
            "use the merged model."
        )
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(lora_state(unet), temporary, metadata={"format": "pt"})


def merged(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet with the LoRA merged into its weights, in eval mode and without gradients.

    Frozen weights without a LoRA are shared with `unet`; the others are copies.
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
                f"No linear or convolutional layer of the UNet is named {end!r}; use attention, all, or "
                "suffixes of layer names, for example to_q"
            )
    return chosen


def _config(rank: int, alpha: float, names: list[str]) -> Any:
    try:
        from peft import LoraConfig
    except ImportError:
        raise InputError("training a LoRA needs PEFT: pip install 'ip2p[lora]'") from None
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type] # it takes any number
        target_modules=names,
        init_lora_weights="gaussian",
    )
