"""A model written: as one .safetensors file in the LDM layout, or as a diffusers folder.

Tensors go to the disk one by one, so that a conversion needs the memory of the largest of them. Names
and values survive the way there and back exactly; what LDM has no place for lies in the file's header.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ip2p.errors import InputError, ModelError
from ip2p.files import check_output, make_folder, replacing, write_text
from ip2p.models import configs as ldm
from ip2p.models import keys
from ip2p.models.keys import Place, Shape, Table
from ip2p.models.load import (
    ALIGNED,
    CONFIGS_ENTRY,
    DTYPES,
    LEFTOVERS,
    TOKENIZERS_ENTRY,
    Stored,
    empty_network,
    ldm_table,
    missing,
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
    """A tensor to be written, which `make` gives when its turn comes."""

    name: str
    shape: Shape
    dtype: torch.dtype
    make: Callable[[], Tensor]


def export_file(stored: Stored, path: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write one file in the LDM layout; `dtype` of the networks' weights, None keeps theirs.

    The averaged weights, if they were chosen, take the place of the others. Raises ModelError if one
    is missing or has no place there.
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
    header = {
        "configs": stored.configs,
        "card": stored.card,
        "prefixed": sorted(stored.prefixed),
    }
    metadata = {
        "format": "pt",
        "modelspec.prediction_type": _prediction(stored),
        CONFIGS_ENTRY: json.dumps(header),
    }
    # A foreign file is not asked to bring more than it has.
    if stored.tokenizers:
        metadata[TOKENIZERS_ENTRY] = packed(stored.tokenizers)
    with replacing(path) as temporary:
        write_safetensors(temporary, items, metadata)


def export_folder(stored: Stored, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a diffusers folder, whole or not at all; `dtype` as in `export_file`. Raises ModelError."""
    texts = tokenizer_texts(stored)
    with replacing_folder(folder) as temporary:
        for part in stored.networks:
            table, names, shapes = _read_table(stored, part)
            target = {name: Place(_folder_name(stored, part, name)) for name in names}
            (temporary / part).mkdir()
            items = _turned(stored, part, table, target, shapes, dtype)
            file = temporary / part / f"{FILES.get(part, 'model')}.safetensors"
            write_safetensors(file, items, {"format": "pt"})
            _write_json(temporary / part / "config.json", stored.configs[part])
        for name, files in texts.items():
            (temporary / name).mkdir()
            for file_name, text in files.items():
                (temporary / name / file_name).write_bytes(text.encode("utf-8"))
        (temporary / "scheduler").mkdir()
        _write_json(temporary / "scheduler" / "scheduler_config.json", stored.configs["scheduler"])
        if stored.card:
            _write_json(temporary / "ip2p.json", stored.card)
        rest = list(_leftovers(stored))
        if rest:
            write_safetensors(temporary / LEFTOVERS, rest, {"format": "pt"})
        _write_json(temporary / "model_index.json", stored.configs["model_index"])


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise InputError unless a file or a folder of that name can be written now."""
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
    """Where a network's weights lie, its own names, and their shapes. ModelError if one is missing."""
    network = empty_network(part, stored.configs[part])
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    table = table_of(stored, part, network)
    absent = missing(network, table, stored.weights[part])
    if absent:
        raise ModelError(
            f"{stored.path} lacks {len(absent)} weights, {absent[0]} first. Fetch or save it again."
        )
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


def _folder_name(stored: Stored, part: str, name: str) -> str:
    # `text_encoder_2` has the prefix in its network's own names too.
    plain = name.removeprefix("text_model.")
    bare = not part.startswith("text_encoder") or plain == "text_projection.weight"
    if bare or (part not in stored.prefixed and plain == name):
        return name
    return "text_model." + plain


def _leftovers(stored: Stored) -> Iterator[Item]:
    """What else lies in a single file, beside the networks and the twins of the UNet."""
    if stored.layout == "folder":
        path = stored.path / LEFTOVERS
        weights = part_weights(path.parent) if path.exists() else None
        names = [] if weights is None else list(weights.shapes)
    else:
        weights = stored.weights["unet"]
        names = unused(stored)
    for name in names:
        assert weights is not None
        yield Item(
            name,
            weights.shapes[name],
            weights.dtypes[name],
            lambda name=name: weights.read(name),  # type: ignore[misc]
        )


def _marks(stored: Stored) -> Iterator[Item]:
    """The weights by which other tools know what an SDXL file predicts."""
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
    return "v" if stored.configs["scheduler"].get("prediction_type") == "v_prediction" else "epsilon"


# --- to the disk -------------------------------------------------------------------------------


def write_safetensors(path: Path, items: Iterable[Item], metadata: dict[str, str]) -> None:
    """Write tensors one by one in the safetensors format, those that can all lie aligned first."""

    def order(item: Item) -> tuple[bool, int, str]:
        return bool(_bytes(item) % ALIGNED), -item.dtype.itemsize, item.name

    ordered = sorted(items, key=order)
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for item in ordered:
        size = _bytes(item)
        table[item.name] = {
            "dtype": NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    # So that the tensors can be used where they lie (`load.fill`).
    header += b" " * (-(8 + len(header)) % ALIGNED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for item in ordered:
            tensor = item.make().detach().cpu().contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (item.shape, item.dtype), item.name
            if tensor.numel():
                file.write(tensor.flatten().view(torch.uint8).numpy().data)


def _bytes(item: Item) -> int:
    return math.prod(item.shape) * item.dtype.itemsize


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes when not."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    old = temporary.with_name(temporary.name + "-old")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(temporary, folder)
        except BaseException:
            if old.exists():
                os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
