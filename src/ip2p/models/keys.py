"""Tables that map diffusers' names of weights to those of a single LDM file.

A table maps each diffusers name of a network to its `WeightName`. It is built from the network's own names,
so it fits any number of blocks and layers. `from_ldm` reads an LDM file with it and `to_ldm` writes one; they
are exact inverses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, cat

from ip2p.base.errors import ModelError

UNET, EMA, VAE = "model.diffusion_model.", "model_ema.", "first_stage_model."
# Prefixes of text encoders: SD 1.x, SD 2.x, and the two of SDXL.
CLIP, OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_XL, OPENCLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightName:
    """The name and form of a diffusers tensor in a file.

    third: it is this third of the file's tensor, along the rows (OpenCLIP packs query, key and value).
    turned: the file's tensor is transposed. conv: the file's tensor is a 1x1 convolution.
    """

    key: str
    third: Literal[0, 1, 2] | None = None
    turned: bool = False
    conv: bool = False


Table = dict[str, WeightName]


def from_ldm(place: WeightName, stored: Tensor) -> Tensor:
    """The diffusers tensor, a view of the stored one."""
    if place.third is not None:
        return stored.chunk(3)[place.third]
    if place.turned:
        return stored.T
    # Newer files store linear layers, which `flatten` does not change.
    return stored.flatten(1) if place.conv else stored


def to_ldm(table: Table, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each LDM name with a function that makes its tensor from the diffusers tensors that `read` returns."""
    thirds: dict[str, dict[int, str]] = {}
    for name, place in table.items():
        if place.third is not None:
            thirds.setdefault(place.key, {})[place.third] = name
    for name, place in table.items():
        if place.third is None:
            yield place.key, lambda name=name, place=place: _stored(place, read(name))  # type: ignore[misc]
        elif place.third == 0:
            names = [thirds[place.key][third] for third in range(3)]
            yield place.key, lambda names=names: cat([read(name) for name in names])  # type: ignore[misc]


def _stored(place: WeightName, tensor: Tensor) -> Tensor:
    if place.turned:
        return tensor.T
    return tensor[:, :, None, None] if place.conv else tensor


def stored_shape(place: WeightName, shape: Shape) -> Shape:
    """The shape in the file, for the shape of a diffusers tensor."""
    if place.third is not None:
        return (3 * shape[0], *shape[1:])
    if place.turned:
        return shape[::-1]
    return (*shape, 1, 1) if place.conv else shape


# --- the UNet ----------------------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
AROUND = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def unet_table(names: Iterable[str], config: Mapping[str, Any], prefix: str = UNET) -> Table:
    """The table of a UNet2DConditionModel from its names and its config. ModelError for other block types."""
    levels = len(config["block_out_channels"])
    layers = config.get("layers_per_block", 2)
    down = [layers] * levels if isinstance(layers, int) else list(layers)
    up = [count + 1 for count in reversed(down)]
    names = list(names)
    attends = {int(m[2]) for m in map(BLOCK.match, names) if m and m[1] == "up" and m[3] == "attentions"}

    def place(name: str) -> WeightName:
        found = BLOCK.match(name)
        if not found:
            head, _, last = name.rpartition(".")
            if head in AROUND:
                return WeightName(f"{prefix}{AROUND[head]}.{last}")
            if name.startswith("mid_block."):
                part, number, rest = name.removeprefix("mid_block.").split(".", 2)
                if f"{part}.{number}" in MIDDLE:
                    return WeightName(f"{prefix}{MIDDLE[f'{part}.{number}']}.{_inside(part, rest)}")
            raise _unknown("UNet", name)
        side, block, part, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if part == "downsamplers":
            # After the first convolution, the rows count each level's layers and its downsampler.
            row = sum(down[: block + 1]) + block + 1
            return WeightName(f"{prefix}input_blocks.{row}.0.{rest.replace('conv.', 'op.', 1)}")
        if part == "upsamplers":
            # In the row of its level's last layer, after the attention if there is one.
            row, slot = sum(up[: block + 1]) - 1, 2 if block in attends else 1
            return WeightName(f"{prefix}output_blocks.{row}.{slot}.{rest}")
        row = layer + (sum(down[:block]) + block + 1 if side == "down" else sum(up[:block]))
        where = "input" if side == "down" else "output"
        return WeightName(f"{prefix}{where}_blocks.{row}.{int(part == 'attentions')}.{_inside(part, rest)}")

    return {name: place(name) for name in names}


def _inside(part: str, rest: str) -> str:
    # Transformer blocks have the same names in both layouts.
    if part == "attentions":
        return rest
    head, _, last = rest.rpartition(".")
    if head not in RESNET:
        raise _unknown("UNet", rest)
    return f"{RESNET[head]}.{last}"


def ema_name(key: str) -> str:
    """The EMA twin of `model.diffusion_model.…`: without the dots, as the original's LitEma stores it."""
    return EMA + key.removeprefix("model.").replace(".", "")


# --- the autoencoder ---------------------------------------------------------------------------

ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# diffusers' former names of these layers, which many folders on the hub still have.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def vae_table(names: Iterable[str], config: Mapping[str, Any], prefix: str = VAE) -> Table:
    """The table of an AutoencoderKL from its names and its config."""
    levels = len(config["block_out_channels"])

    def place(name: str) -> WeightName:
        key = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        found = re.fullmatch(r"(encoder|decoder)\.(mid_block|down_blocks|up_blocks)\.(.+)", key)
        if not found:
            return WeightName(prefix + key)
        side, part, rest = found.groups()
        if part == "mid_block":
            kind, number, rest = rest.split(".", 2)
            if kind == "resnets":
                return WeightName(f"{prefix}{side}.mid.block_{int(number) + 1}.{rest}")
            head, _, last = rest.rpartition(".")
            if head not in ATTENTION:
                raise _unknown("autoencoder", name)
            conv = last == "weight" and head != "group_norm"
            return WeightName(
                f"{prefix}{side}.mid.attn_{int(number) + 1}.{ATTENTION[head]}.{last}", conv=conv
            )
        block, kind, number, rest = rest.split(".", 3)
        # The decoder's levels count from the finest.
        level = int(block) if part == "down_blocks" else levels - 1 - int(block)
        way = part.removesuffix("_blocks")
        inside = f"block.{number}" if kind == "resnets" else kind.removesuffix("rs")
        return WeightName(f"{prefix}{side}.{way}.{level}.{inside}.{rest}")

    return {name: place(name) for name in names}


# --- text encoders -----------------------------------------------------------------------------

OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPENCLIP_AROUND = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def clip_table(names: Iterable[str], prefix: str = CLIP, *, inner: str = "text_model.") -> Table:
    """The table of OpenAI's CLIP. inner: "" for older files, whose names lack `text_model.`."""
    return {name: WeightName(prefix + inner + name.removeprefix("text_model.")) for name in names}


def openclip_table(names: Iterable[str], prefix: str = OPENCLIP) -> Table:
    """The table of OpenCLIP's text encoder, which packs query, key and value into one tensor."""

    def place(name: str) -> WeightName:
        plain = name.removeprefix("text_model.")
        if plain in OPENCLIP_AROUND:
            return WeightName(prefix + OPENCLIP_AROUND[plain])
        if plain == "text_projection.weight":
            return WeightName(prefix + "text_projection", turned=True)
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", plain)
        if not found:
            raise _unknown("text encoder", name)
        block = f"{prefix}transformer.resblocks.{found[1]}."
        for third, which in enumerate("qkv"):
            if found[2] == f"self_attn.{which}_proj":
                return WeightName(f"{block}attn.in_proj_{found[3]}", third=third)  # type: ignore[arg-type]
        if found[2] not in OPENCLIP_LAYER:
            raise _unknown("text encoder", name)
        return WeightName(f"{block}{OPENCLIP_LAYER[found[2]]}.{found[3]}")

    return {name: place(name) for name in names}


# --- diffusers folders -------------------------------------------------------------------------


def folder_table(stored: Sequence[str], names: Sequence[str]) -> Table:
    """The table of a diffusers folder: names are the network's own, stored those of its files.

    They differ where the libraries renamed layers: a text encoder's `text_model.`, and the autoencoder's
    attention.
    """
    known = set(names)
    table: Table = {}
    for key in stored:
        candidates = [key, key.removeprefix("text_model."), f"text_model.{key}", _new_attention(key)]
        name = next((candidate for candidate in candidates if candidate in known), key)
        table[name] = WeightName(key)
    return table


def _new_attention(key: str) -> str:
    head, _, last = key.rpartition(".")
    before, _, layer = head.rpartition(".")
    return f"{before}.{OLD_ATTENTION.get(layer, layer)}.{last}"


def _unknown(part: str, name: str) -> ModelError:
    return ModelError(
        f"The {part}'s weight {name} has no place in an LDM file: its blocks are not those of SD or SDXL. "
        "Keep it as a diffusers folder."
    )
