"""Merges LoRA files into networks: diffusers', PEFT's and Kohya's names; linear and convolutional layers."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ip2p.base.errors import InputError, ModelError
from ip2p.base.files import replacing
from ip2p.models.keys import unet_table
from ip2p.models.load import Weights, open_weights, unreadable
from ip2p.pictures.images import closest_file

if TYPE_CHECKING:
    from ip2p.models.bundle import Bundle

# A key is network, module, role. Kohya replaces a module's dots by underscores; PEFT may add an adapter name.
NETWORKS = {
    "unet": ("unet.", "lora_unet_"),
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
}
ROLE = re.compile(
    r"(?P<module>.+?)(?:"
    r"(?:\.lora_linear_layer|\.lora|_lora)\.(?P<old>down|up)\.weight"
    r"|\.lora_(?P<new>down|up|mid|A|B)(?:\.\w+)?\.weight"
    r"|\.(?P<alpha>alpha))"
)
ROLES = {"A": "down", "B": "up"}
# diffusers' former names of a text encoder's attention projections and of the UNet's output projection.
OLD_NAMES = {
    "self_attn_to_q": "self_attn_q_proj",
    "self_attn_to_k": "self_attn_k_proj",
    "self_attn_to_v": "self_attn_v_proj",
    "self_attn_to_out": "self_attn_out_proj",
    "attn1_to_out": "attn1_to_out_0",
    "attn2_to_out": "attn2_to_out_0",
}
Layer = nn.Linear | nn.Conv2d
WeightName = tuple[str, str]  # a network and a module's name in it, with underscores


def check_loras(loras: Sequence[tuple[str | Path, float]]) -> None:
    """Raise InputError for a weight that is not finite or a missing file, before a model is loaded."""
    for name, weight in loras:
        path = Path(name).expanduser()
        if not math.isfinite(weight):
            raise InputError(f"The weight of {name} is {weight}; use a number, for example --lora {name}:1")
        if not path.is_file():
            close = closest_file(path)
            hint = f"Did you mean {close}?" if close else "Check the path."
            raise InputError(f"{name}: no such LoRA file. {hint}")


def apply_loras(bundle: Bundle, loras: Sequence[tuple[str | Path, float]]) -> None:
    """Merge LoRA files into a bundle's networks: W + weight · alpha / rank · up · down, for each.

    Raises InputError for a weight that is not finite, and ModelError for a file with keys that do not fit;
    nothing of that file is then merged.
    """
    check_loras(loras)
    networks = {name: getattr(bundle, name) for name in NETWORKS if getattr(bundle, name) is not None}
    modules = {
        (network, _plain(alias)): module
        for network, root in networks.items()
        for alias, module in _named(network, root)
    }
    for name, weight in loras:
        path = Path(name).expanduser()
        for module, delta in _deltas(path, modules):
            with torch.no_grad():
                merged = module.weight.float() + weight * delta.to(module.weight.device)
                module.weight.copy_(merged.to(module.weight.dtype))


def _named(network: str, root: Any) -> Iterator[tuple[str, Layer]]:
    """The layers of a network that a LoRA may change, by all their names."""
    layers = {
        name: module for name, module in root.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    yield from layers.items()
    if network == "unet":
        # Kohya's trainer for SDXL uses the names of the LDM code.
        with contextlib.suppress(ModelError):  # only the blocks of SD and SDXL have them
            table = unet_table([f"{name}.weight" for name in layers], root.config, prefix="")
            for name, module in layers.items():
                yield table[f"{name}.weight"].key.removesuffix(".weight"), module


def _deltas(path: Path, modules: Mapping[WeightName, Layer]) -> Iterator[tuple[Layer, Tensor]]:
    """Each module that a file changes, with the change of its weights (fp32, LoRA weight 1)."""
    file = open_weights(path)
    weights = {key: file.read(key) for key in file.shapes}
    metadata = _metadata(path, file)
    parts: dict[WeightName, dict[str, Tensor]] = {}
    keys: dict[WeightName, list[str]] = {}
    strangers = []
    for key, value in weights.items():
        place, role = _place(key, modules)
        if place is None:
            strangers.append(key)
        else:
            parts.setdefault(place, {})[role] = value
            keys.setdefault(place, []).append(key)
    for place, part in parts.items():
        if not {"down", "up"} <= part.keys() or not _fits(part, modules[place].weight.shape):
            strangers += keys[place]
    if strangers:
        raise ModelError(
            f"{path}: {len(strangers)} of {len(weights)} keys do not fit this model, {strangers[0]} first. "
            "Use a LoRA made for the same base model; DoRA, LoHa and LoKr are not read."
        )
    # Lazily, because together they are as large as the networks.
    return (
        (modules[place], _delta(part, place, metadata).reshape(modules[place].weight.shape))
        for place, part in parts.items()
    )


def _metadata(path: Path, file: Weights) -> dict[str, Any]:
    """The ranks and alphas in diffusers' metadata."""
    try:
        return dict(json.loads(file.metadata.get("lora_adapter_metadata") or "{}"))
    except ValueError as error:
        raise ModelError(unreadable(path, error)) from None


def _place(key: str, modules: Container[WeightName]) -> tuple[WeightName | None, str]:
    match = ROLE.fullmatch(key)
    if match is None:
        return None, ""
    role = match["alpha"] or match["old"] or ROLES.get(match["new"], match["new"])
    # PEFT's keys have no network: they belong to the UNet.
    network, name = "unet", match["module"].removeprefix("base_model.model.")
    for candidate, prefixes in NETWORKS.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                network, name = candidate, name.removeprefix(prefix)
    place = (network, _plain(name))
    return (place if place in modules else None), role


def _plain(name: str) -> str:
    """A module's name in one spelling for all conventions, with underscores for dots."""
    plain = name.replace(".", "_").replace("_processor", "").removeprefix("text_model_")
    for old, new in OLD_NAMES.items():
        if plain.endswith(old):
            return plain.removesuffix(old) + new
    return plain


def _fits(part: Mapping[str, Tensor], shape: torch.Size) -> bool:
    down, up = part["down"], part["up"]
    if min(down.ndim, up.ndim) < 2:
        return False
    if "mid" in part:
        mid = part["mid"]
        return (
            mid.shape[:2] == (up.flatten(1).shape[1], down.shape[0])
            and up.shape[0] * down.flatten(1).shape[1] * mid[0, 0].numel() == shape.numel()
        )
    same_rank = up.flatten(1).shape[1] == down.shape[0]
    return same_rank and up.shape[0] == shape[0] and down.flatten(1).shape[1] == shape[1:].numel()


def _delta(part: Mapping[str, Tensor], place: WeightName, metadata: Mapping[str, Any]) -> Tensor:
    """alpha / rank · up · down, in fp32; with LyCORIS' middle tensor, up · mid · down."""
    down, up = part["down"].float(), part["up"].float()
    if "mid" in part:
        product = torch.einsum("nmkl,in,mj->ijkl", part["mid"].float(), up.flatten(1), down.flatten(1))
    else:
        product = up.flatten(1) @ down.flatten(1)
    return _scale(part, place, metadata, rank=down.shape[0]) * product


def _scale(part: Mapping[str, Tensor], place: WeightName, metadata: Mapping[str, Any], rank: int) -> float:
    network, name = place
    own = f"{network}."
    declared = {key.removeprefix(own): value for key, value in metadata.items() if key.startswith(own)}
    alpha = declared.get("lora_alpha") or rank
    for pattern, value in (declared.get("alpha_pattern") or {}).items():
        if name.endswith(_plain(pattern)):
            alpha = value
    if "alpha" in part:
        alpha = float(part["alpha"])
    return float(alpha) / (math.sqrt(rank) if declared.get("use_rslora") else rank)


# --- Kohya's names -----------------------------------------------------------------------------


def write_kohya(source: Path, target: Path) -> int:
    """Write a LoRA file with Kohya's names, for ComfyUI and AUTOMATIC1111's family; return its layer count.

    Each layer gets `lora_down`, `lora_up` and its own `alpha`, so all readers scale it the same. Names in
    Kohya's format are kept. Raises ModelError for keys without such a name, such as DoRA's.
    """
    from safetensors.torch import save_file

    file = open_weights(source)
    metadata = _metadata(source, file)
    parts: dict[WeightName, dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    strangers = []
    for key in file.shapes:
        place, role = _place(key, _Everything())
        if key.startswith("lora_"):
            state[key] = file.read(key).contiguous()
        elif place is None:
            strangers.append(key)
        else:
            parts.setdefault(place, {})[role] = file.read(key)
    if strangers or not (parts or state):
        first = strangers[0] if strangers else "no LoRA"
        raise ModelError(
            f"{source}: {first} has no name of Kohya's. Name a LoRA file of diffusers' or PEFT's naming."
        )
    xl = any(network == "text_encoder_2" or _sees_sdxl(name, part) for (network, name), part in parts.items())
    starts = {"unet": "lora_unet_", "text_encoder_2": "lora_te2_text_model_"}
    starts["text_encoder"] = "lora_te1_text_model_" if xl else "lora_te_text_model_"
    for place, part in parts.items():
        if not {"down", "up"} <= part.keys():
            raise ModelError(f"{source}: the layer {place[1]} lacks one of its two matrices. Fetch it again.")
        name, rank = starts[place[0]] + place[1], part["down"].shape[0]
        for role in part.keys() & {"down", "up", "mid"}:
            state[f"{name}.lora_{role}.weight"] = part[role].contiguous()
        state[f"{name}.alpha"] = torch.tensor(_scale(part, place, metadata, rank) * rank)
    with replacing(target) as temporary:
        save_file(state, temporary, metadata={"format": "pt", "ss_network_module": "networks.lora"})
    return len({key.partition(".")[0] for key in state})


class _Everything:
    """Contains every place: a file is renamed without its model."""

    def __contains__(self, place: object) -> bool:
        return True


def _sees_sdxl(name: str, part: Mapping[str, Tensor]) -> bool:
    """Whether a UNet layer takes SDXL's text features (2048)."""
    return name.endswith(("attn2_to_k", "attn2_to_v")) and part["down"].flatten(1).shape[1] == 2048
