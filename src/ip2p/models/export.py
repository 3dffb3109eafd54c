"""Writes a model as one .safetensors file in the LDM layout, or as a diffusers folder.

Tensors are written one by one, so a conversion needs the memory of the largest one. A round trip keeps all
names and values exactly; the file's header stores what the LDM layout has no place for.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ip2p.base.errors import InputError
from ip2p.base.files import check_output, make_folder, replacing, write_text
from ip2p.models import configs as ldm
from ip2p.models import keys
from ip2p.models.keys import Shape, Table, WeightName
from ip2p.models.load import (
    ALIGNED,
    CONFIGS_ENTRY,
    DTYPES,
    LEFTOVERS,
    TOKENIZERS_ENTRY,
    Stored,
    check_complete,
    empty_network,
    ldm_table,
    packed,
    part_weights,
    table_of,
    tokenizer_texts,
    unused,
)

NAMES = {dtype: name for name, dtype in DTYPES.items()}
FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


@dataclass(frozen=True)
class Item:
    """A tensor to be written; `make` returns it when its turn comes."""

    name: str
    shape: Shape
    dtype: torch.dtype
    make: Callable[[], Tensor]


def export_file(stored: Stored, path: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write one file in the LDM layout. dtype: of the networks' weights; None keeps theirs.

    If the averaged weights were chosen, they replace the others. Raises ModelError for a weight that is
    missing or has no place in the layout.
    """
    items: list[Item] = []
    for part in stored.networks:
        table, names, shapes = _read_table(stored, part)
        target = ldm_table(part, names, stored.configs[part], {}, stored.architecture)
        items += _turned(stored, part, table, target, shapes, dtype)
    taken = {item.name for item in items}
    items += [item for item in _leftovers(stored) if item.name not in taken]
    taken |= {item.name for item in items}
    items += [item for item in _marks(stored) if item.name not in taken]
    header = {"configs": stored.configs, "card": stored.card, "prefixed": sorted(stored.prefixed)}
    metadata = {
        "format": "pt",
        "modelspec.prediction_type": _prediction(stored),
        CONFIGS_ENTRY: json.dumps(header),
    }
    if stored.tokenizers:
        metadata[TOKENIZERS_ENTRY] = packed(stored.tokenizers)
    with replacing(path) as temporary:
        write_safetensors(temporary, items, metadata)
    if stored.architecture == "SD 1.x" and _prediction(stored) == "v":
        config = path.with_suffix(".yaml")
        write_text(config, original_config(stored))
        warnings.warn(
            f"{path} predicts velocity, which an SD 1.x file cannot declare, so other tools assume noise "
            f"prediction. {config.name} beside it tells AUTOMATIC1111's family; ComfyUI needs the node "
            "ModelSamplingDiscrete with v_prediction.",
            stacklevel=2,
        )
    if _prediction(stored) == "sample":
        warnings.warn(
            f"{path} predicts the picture itself (prediction_type sample). Only ip2p and diffusers can use "
            "it: other tools will read it as noise prediction.",
            stacklevel=2,
        )


def original_config(stored: Stored) -> str:
    """The YAML config of an SD 1.x model for the original code and AUTOMATIC1111's family."""
    import yaml

    unet, vae, noise = (stored.configs[part] for part in ("unet", "vae", "scheduler"))
    channels = list(unet["block_out_channels"])
    attends = ["CrossAttn" in kind for kind in unet["down_block_types"]]
    widths = list(vae["block_out_channels"])
    edits = stored.channels[0] == stored.channels[1]
    side = int(unet.get("sample_size") or 64)
    modules = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    params = {
        **({"parameterization": "v"} if _prediction(stored) == "v" else {}),
        "linear_start": noise.get("beta_start", 0.00085),
        "linear_end": noise.get("beta_end", 0.012),
        "timesteps": noise.get("num_train_timesteps", 1000),
        "first_stage_key": "edited" if edits else "jpg",
        "cond_stage_key": "edit" if edits else "txt",
        "image_size": side,
        "channels": stored.channels[1] // 2,
        "conditioning_key": "hybrid" if edits else "crossattn",
        "scale_factor": vae.get("scaling_factor", 0.18215),
        "use_ema": False,
        "unet_config": {
            "target": modules,
            "params": {
                "image_size": side,
                "in_channels": unet["in_channels"],
                "out_channels": unet["out_channels"],
                "model_channels": channels[0],
                "attention_resolutions": [2**level for level, yes in enumerate(attends) if yes],
                "num_res_blocks": unet["layers_per_block"],
                "channel_mult": [count // channels[0] for count in channels],
                "num_heads": 8,
                "use_spatial_transformer": True,
                "transformer_depth": 1,
                "context_dim": unet["cross_attention_dim"],
                "use_checkpoint": False,
                "legacy": False,
            },
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": vae["latent_channels"],
                "ddconfig": {
                    "double_z": True,
                    "z_channels": vae["latent_channels"],
                    "resolution": side * 2 ** (len(widths) - 1),
                    "in_channels": vae["in_channels"],
                    "out_ch": vae["out_channels"],
                    "ch": widths[0],
                    "ch_mult": [width // widths[0] for width in widths],
                    "num_res_blocks": vae["layers_per_block"],
                    "attn_resolutions": [],
                    "dropout": 0.0,
                },
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    }
    target = f"ldm.models.diffusion.{'ddpm_edit' if edits else 'ddpm'}.LatentDiffusion"
    model = {"base_learning_rate": 1e-4, "target": target, "params": params}
    return yaml.safe_dump({"model": model}, sort_keys=False)


def export_folder(stored: Stored, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a diffusers folder atomically; `dtype` as in `export_file`. Raises ModelError."""
    parts = {}
    for part in stored.networks:
        table, names, shapes = _read_table(stored, part)
        target = {name: WeightName(folder_name(name, part, stored.prefixed)) for name in names}
        parts[part] = _turned(stored, part, table, target, shapes, dtype)
    texts = tokenizer_texts(stored)
    write_folder(folder, stored.configs, parts, texts, card=stored.card, rest=list(_leftovers(stored)))


def write_folder(
    folder: Path,
    configs: Mapping[str, ldm.Config],
    parts: Mapping[str, Sequence[Item]],
    tokenizers: Mapping[str, Mapping[str, str]],
    *,
    card: ldm.Config,
    rest: Sequence[Item] = (),
    texts: Mapping[str, str] | None = None,
    files: Mapping[str, Path] | None = None,
    shard: int | None = None,
) -> None:
    """Write a diffusers folder atomically; it replaces all contents of `folder`.

    configs: of each part, the scheduler and `model_index`. parts: the weights of the networks, written one by
    one, in files of at most `shard` bytes (or of a single tensor). tokenizers: their files. rest: other
    tensors of a single file. texts, files: further files by name; a file may be a folder.
    """
    with replacing_folder(folder) as temporary:
        for part, items in parts.items():
            (temporary / part).mkdir()
            _write_weights(temporary / part, FILES.get(part, "model"), items, shard)
            _write_json(temporary / part / "config.json", configs[part])
        for name, found in tokenizers.items():
            (temporary / name).mkdir()
            for file_name, text in found.items():
                write_text(temporary / name / file_name, text)
        (temporary / "scheduler").mkdir()
        _write_json(temporary / "scheduler" / "scheduler_config.json", configs["scheduler"])
        if card:
            _write_json(temporary / "ip2p.json", card)
        if rest:
            write_safetensors(temporary / LEFTOVERS, rest, {"format": "pt"})
        for name, text in (texts or {}).items():
            write_text(temporary / name, text)
        for name, path in (files or {}).items():
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, temporary / name)
        _write_json(temporary / "model_index.json", configs["model_index"])


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise InputError unless the target can be written."""
    if target.suffix == ".safetensors":
        check_output(target, overwrite=overwrite)
    elif target.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise InputError(
            f"{target} would be a pickle, which can run code when it is opened; "
            f"write {target.with_suffix('.safetensors')}, or name a folder."
        )
    else:
        if target.is_file():
            raise InputError(f"{target} is a file; name a folder, or a file that ends in .safetensors.")
        if target.is_dir() and any(target.iterdir()) and not overwrite:
            raise InputError(f"{target} is there already; add --overwrite, or choose another name.")
        if target.is_dir() and any(target.iterdir()) and not (target / "model_index.json").exists():
            raise InputError(f"{target} holds other things than a model; choose another folder.")
        make_folder(target.parent)


# --- from one layout's names to the other's ----------------------------------------------------


def _read_table(stored: Stored, part: str) -> tuple[Table, list[str], dict[str, Shape]]:
    """The table of a network's weights, its own names, and their shapes. ModelError if one is missing."""
    network = empty_network(part, stored.configs[part])
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    table = table_of(stored, part, network)
    check_complete(network, table, stored.weights[part], source=stored.path)
    return table, list(shapes), shapes


def _turned(
    stored: Stored,
    part: str,
    table: Table,
    target: Table,
    shapes: dict[str, Shape],
    dtype: torch.dtype | None,
) -> list[Item]:
    weights = stored.weights[part]

    def read(name: str) -> Tensor:
        tensor = keys.from_ldm(table[name], weights.read(table[name].key))
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    first = {target[name].key: name for name in reversed(shapes)}
    items = []
    for key, make in keys.to_ldm(target, read):
        name = first[key]
        own = weights.dtypes[table[name].key]
        number = dtype if dtype is not None and own.is_floating_point else own
        items.append(Item(key, keys.stored_shape(target[name], shapes[name]), number, make))
    return items


def folder_name(name: str, part: str, prefixed: Container[str]) -> str:
    """The name of a part's weight in a folder; `prefixed` as in `Stored`."""
    # The network of `text_encoder_2` has the prefix in its own names too.
    plain = name.removeprefix("text_model.")
    bare = not part.startswith("text_encoder") or plain == "text_projection.weight"
    if bare or (part not in prefixed and plain == name):
        return name
    return "text_model." + plain


def _leftovers(stored: Stored) -> Iterator[Item]:
    """The other tensors of a single file, besides the networks and the UNet's averaged weights."""
    if stored.layout == "folder":
        path = stored.path / LEFTOVERS
        weights = part_weights(path.parent) if path.exists() else None
        names = [] if weights is None else list(weights.shapes)
    else:
        weights = stored.weights["unet"]
        names = unused(stored)
    for name in names:
        assert weights is not None
        yield Item(name, weights.shapes[name], weights.dtypes[name], partial(weights.read, name))


def _marks(stored: Stored) -> Iterator[Item]:
    """The marker weights by which other tools detect what an SDXL file predicts."""
    config = stored.configs["scheduler"]
    marks = {}
    if stored.cosxl:
        marks = {ldm.COSXL_MAX: config.get("sigma_max", 80.0), ldm.COSXL_MIN: config.get("sigma_min", 0.002)}
    elif stored.kind == "sdxl" and _prediction(stored) == "v":
        marks = {ldm.VELOCITY: []} | ({ldm.ZERO_SNR: []} if config.get("rescale_betas_zero_snr") else {})
    for name, value in marks.items():
        tensor = torch.tensor(value, dtype=torch.float32)
        yield Item(name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]


def _prediction(stored: Stored) -> str:
    prediction = str(stored.configs["scheduler"].get("prediction_type", "epsilon"))
    return "v" if prediction == "v_prediction" else prediction


# --- to the disk -------------------------------------------------------------------------------


def write_safetensors(path: Path, items: Iterable[Item], metadata: dict[str, str]) -> None:
    """Write tensors one by one in the safetensors format, those of aligned sizes first."""

    def order(item: Item) -> tuple[bool, int, str]:
        return bool(_bytes(item) % ALIGNED), -item.dtype.itemsize, item.name

    ordered = sorted(items, key=order)
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for item in ordered:
        size = _bytes(item)
        offsets = [end, end + size]
        table[item.name] = {"dtype": NAMES[item.dtype], "shape": list(item.shape), "data_offsets": offsets}
        end += size
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    # Alignment lets `load.fill` use mapped tensors without a copy.
    header += b" " * (-(8 + len(header)) % ALIGNED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for item in ordered:
            tensor = item.make().detach().cpu().contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (item.shape, item.dtype), item.name
            if tensor.numel():
                file.write(tensor.flatten().view(torch.uint8).numpy().data)


def _write_weights(folder: Path, stem: str, items: Sequence[Item], shard: int | None) -> None:
    """Write one file, or several with an index in the format of diffusers and transformers."""
    groups: list[list[Item]] = [[]]
    for item in items:
        if shard and groups[-1] and sum(map(_bytes, groups[-1])) + _bytes(item) > shard:
            groups.append([])
        groups[-1].append(item)
    index: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        ending = f"-{number:05}-of-{len(groups):05}" if len(groups) > 1 else ""
        name = f"{stem}{ending}.safetensors"
        index |= {item.name: name for item in group}
        with replacing(folder / name) as temporary:
            write_safetensors(temporary, group, {"format": "pt"})
    if len(groups) > 1:
        total = {"total_size": sum(map(_bytes, items))}
        _write_json(folder / f"{stem}.safetensors.index.json", {"metadata": total, "weight_map": index})


def _bytes(item: Item) -> int:
    return math.prod(item.shape) * item.dtype.itemsize


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces `folder` if the block succeeds, and is deleted if it fails.

    A kill leaves the old folder, and the temporary one beside it.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)
        if not folder.exists():
            os.replace(temporary, folder)
        elif _exchange(temporary, folder):
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            old = temporary.with_name(temporary.name + "-old")
            os.replace(folder, old)
            try:
                os.replace(temporary, folder)
            except BaseException:
                os.replace(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically. Returns False where the system cannot."""
    exchange, here = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux's renameat2, which Python lacks
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
