"""`ip2p model info | convert | list`: describe, convert and list models."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ip2p.base.errors import InputError, ModelError
from ip2p.settings import OTHER, OverwriteSettings, PartsSettings, RunSettings, WeightSet, setting

if TYPE_CHECKING:
    from ip2p.models.load import Stored

SHOWN = 5  # names per list; --json prints all
# Subfolders of a model, whose files are not listed as models.
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder", "safety_checker")
NUMBERS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
ANY_MODEL = "a Hugging Face model id, a diffusers folder, a .safetensors or .ckpt file"


class InfoConfig(RunSettings, PartsSettings):
    """Describe a model and report missing parts: ip2p model info editor.safetensors"""

    model: str = setting("", f"storybook, {ANY_MODEL}", positional=1, metavar="MODEL")
    print_json: bool = setting(False, "print the result as JSON", group=OTHER, name="json")


class ConvertConfig(RunSettings, OverwriteSettings, PartsSettings):
    """Convert a diffusers folder to one file, or back: ip2p model convert editor.ckpt editor"""

    source: str = setting("", ANY_MODEL, positional=1, metavar="MODEL")
    target: str = setting("", "a .safetensors file, or a folder", positional=2, metavar="TARGET")
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = setting("keep", "number format of the saved weights")
    weights: WeightSet = setting(
        "auto", "for files with both: ema or plain weights; auto uses ema unless it belongs to another model"
    )
    names: Literal["kohya"] | None = setting(
        None, "rename the layers of a LoRA file for ComfyUI and A1111: kohya"
    )


class ListConfig(RunSettings):
    """List the models in the package, in a folder, and in the Hugging Face cache: ip2p model list"""

    folder: Path = setting(Path("."), "folder to search for models, too", positional=1, metavar="FOLDER")
    print_json: bool = setting(False, "print the result as JSON", group=OTHER, name="json")


def run_model_info(config: InfoConfig) -> None:
    """Print a description of a model without reading its weights. Raises ModelError if it is no model."""
    if not config.model:
        raise InputError("no model is given; write: ip2p model info editor.safetensors")
    from ip2p.models.bundle import find_model, not_an_editor, open_parts  # imports torch
    from ip2p.models.load import open_model

    stored = open_model(find_model(config.model), parts=open_parts(config.parts_from))
    info = describe(stored)
    if config.print_json:
        print(json.dumps(info, indent=2, ensure_ascii=False))
        return
    rows = {
        "model": info["model"],
        "layout": "single file, LDM" if info["layout"] == "file" else "diffusers folder",
        "architecture": info["architecture"]
        + (", CosXL" if info["cosxl"] else "")
        + (", an editor" if info["editor"] else ", not an editor")
        + f" (input of {info['channels']} channels)",
        "predicts": info["prediction"],
        "parameters": ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in info["parameters"].items()),
        "dtype": ", ".join(f"{part} {'+'.join(kinds)}" for part, kinds in info["dtype"].items()),
        "EMA": _ema(info),
        "tokenizer": "included" if info["tokenizer"] else "CLIP's, from the Hugging Face cache",
        "missing": _names(info["missing"]),
        "unexpected": _names(info["unexpected"]),
    }
    width = max(map(len, rows)) + 2
    for name, text in rows.items():
        print(f"{name:<{width}}{text}")
    if not info["editor"]:
        print(f"{'next':<{width}}{not_an_editor(stored)}")


def describe(stored: Stored) -> dict[str, Any]:
    """The output of `model info` as JSON values. parameters and dtype are given per network."""
    from ip2p.models import keys
    from ip2p.models.load import KNOWN_REST, empty_network, missing, table_of, unused

    parameters, dtypes, absent, more = {}, {}, [], []
    for part in stored.networks:
        if part in stored.lacking:
            absent.append(part)
            continue
        network = empty_network(part, stored.configs[part])
        table, weights = table_of(stored, part, network), stored.weights[part]
        names = network.state_dict()
        parameters[part] = sum(tensor.numel() for tensor in names.values())
        used = {table[name].key for name in names if name in table}
        counts = Counter(
            str(weights.dtypes[key]).removeprefix("torch.") for key in used & weights.dtypes.keys()
        )
        dtypes[part] = [NUMBERS.get(kind, kind) for kind, _ in counts.most_common()]
        lost = missing(network, table, weights)
        where = f"{part}/" if stored.layout == "folder" else ""
        absent += [where + key for key in dict.fromkeys(lost)]
        if stored.layout == "folder":
            more += [where + key for key in weights.shapes if key not in used]
    if stored.layout == "file":
        more = unused(stored)
    channels, needed = stored.channels
    return {
        "model": str(stored.path),
        "layout": stored.layout,
        "architecture": stored.architecture,
        "cosxl": stored.cosxl,
        "editor": channels == needed,
        "channels": channels,
        "prediction": stored.configs["scheduler"].get("prediction_type", "epsilon"),
        "parameters": parameters,
        "dtype": dtypes,
        "ema": stored.ema,
        "weights": stored.choice,
        "plain": any(key.startswith(keys.UNET) for key in stored.weights["unet"].shapes),
        "tokenizer": bool(stored.tokenizers),
        "missing": absent,
        "unexpected": [name for name in more if not KNOWN_REST.fullmatch(name.rpartition("/")[2])],
    }


def _ema(info: dict[str, Any]) -> str:
    if not info["ema"]:
        return "none" if info["layout"] == "file" else "none (a folder has one set of weights)"
    return f"{info['ema']} averaged weights; used: {info['weights'] or 'the plain weights'}"


def _names(names: list[str]) -> str:
    if not names:
        return "none"
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)}: {', '.join(names[:SHOWN])}{rest}"


def run_model_convert(config: ConvertConfig) -> None:
    """Write `config.source` as a file if the target ends in .safetensors, else as a folder.

    Raises InputError if the target cannot be written, ModelError if the source is incomplete.
    """
    if not config.source or not config.target:
        raise InputError("give a model and a target; write: ip2p model convert editor.ckpt editor")
    from ip2p.base.devices import DTYPE_ALIASES, DTYPES  # imports torch
    from ip2p.models.bundle import find_model, open_parts
    from ip2p.models.export import check_target, export_file, export_folder
    from ip2p.models.load import open_model

    target = Path(config.target).expanduser()
    check_target(target, overwrite=config.overwrite)
    if config.names == "kohya":
        rename_lora(Path(config.source).expanduser(), target)
        return
    source = find_model(config.source)
    if source.resolve() == target.resolve():
        raise InputError(f"{target} is the source itself; choose another name.")
    stored = open_model(source, weights=config.weights, parts=open_parts(config.parts_from))
    dtype = None if config.dtype == "keep" else DTYPES[DTYPE_ALIASES[config.dtype]]
    (export_file if target.suffix == ".safetensors" else export_folder)(stored, target, dtype=dtype)
    print(target)


def rename_lora(source: Path, target: Path) -> None:
    """Write a LoRA file with Kohya's layer names. Raises InputError, or ModelError for unknown layers."""
    from ip2p.models.lora import check_loras, write_kohya

    check_loras([(source, 1.0)])
    if target.suffix != ".safetensors" or source.resolve() == target.resolve():
        raise InputError(f"{target}: give another file that ends in .safetensors for the renamed LoRA.")
    write_kohya(source, target)
    print(target)


def run_model_list(config: ListConfig) -> None:
    """Print the models in the package, in a folder, and in the Hugging Face cache."""
    from ip2p.models.bundle import PACKAGED, packaged_models

    rows = [_row(name, "package", PACKAGED / name) for name in packaged_models()]
    rows += list(_local(config.folder))
    rows += list(_cached())
    if config.print_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    if not rows:
        print("no models found; download one: hf download timbrooks/instruct-pix2pix")
        return
    width = max(len(row["name"]) for row in rows) + 2
    for row in rows:
        kind = "editor" if row["editor"] else "no editor"
        known = f"{row['name']:<{width}}{row['architecture']:<8}{kind:<11}{_giga(row['bytes'])}"
        print(known, row["where"], row["revision"][:7], sep="  ")


def _local(folder: Path) -> Iterator[dict[str, Any]]:
    """The models in a folder and one level below it: diffusers folders, and files of complete models."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; write: ip2p model list FOLDER")
    from ip2p.models.load import open_model  # imports torch

    for path in sorted([folder, *folder.iterdir(), *folder.glob("*/*")]):
        name = path.name if path == folder else path.relative_to(folder).as_posix()
        if path.is_dir() and (path / "unet" / "config.json").is_file():
            yield _row(name or str(path.resolve()), "here", path)
        elif (
            path.is_file() and path.suffix in (".safetensors", ".ckpt") and path.parent.name not in COMPONENTS
        ):
            try:
                stored = open_model(path)
                channels, needed = stored.channels
            except Exception:  # not a complete model: an optimizer state, a LoRA, a single network
                continue
            yield {
                "name": name,
                "where": "here",
                "revision": "",
                "folder": str(path),
                "architecture": stored.architecture,
                "editor": channels == needed,
                "bytes": path.stat().st_size,
            }


def _cached() -> Iterator[dict[str, Any]]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        for revision in repository.revisions:
            folder = Path(revision.snapshot_path)
            if repository.repo_type == "model" and (folder / "unet" / "config.json").exists():
                yield _row(repository.repo_id, "cache", folder, revision.commit_hash)


def _row(name: str, where: str, folder: Path, revision: str = "") -> dict[str, Any]:
    from ip2p.models.load import read_json

    try:
        unet = read_json(folder / "unet" / "config.json")
        vae = read_json(folder / "vae" / "config.json")
    except ModelError:
        unet, vae = {}, {}
    xl = unet.get("addition_embed_type") == "text_time"
    return {
        "name": name,
        "where": where,
        "revision": revision,
        "folder": str(folder),
        "architecture": "SDXL" if xl else "SD 2.x" if unet.get("use_linear_projection") else "SD 1.x",
        "editor": unet.get("in_channels") == 2 * vae.get("latent_channels", 4),
        "bytes": sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file()),
    }


def _giga(count: int) -> str:
    return f"{count / 1e9:6.2f} GB"
