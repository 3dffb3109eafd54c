"""Opens model files without reading all of them, and loads weights into networks one by one.

A `Stored` model has its configs read and its weights on disk under known names; it hides the difference
between a diffusers folder and a single LDM file. No code from a file is ever executed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import math
import re
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ip2p.base.errors import ModelError, first_line
from ip2p.models import configs as ldm
from ip2p.models import families, keys
from ip2p.models.keys import Shape, Table
from ip2p.models.pickles import read_pickle

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

PHOTO_MODEL = "timbrooks/instruct-pix2pix"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SECOND = ("text_encoder_2", "tokenizer_2")  # only SDXL has these
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Single files that can be opened; of pickles such as .ckpt, only the tensors are read (`pickles`).
TORCH_FILES = (".ckpt", ".pt", ".pth", ".bin")
SINGLE_FILES = (".safetensors", *TORCH_FILES)
# Pickles can execute code when opened.
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)
# All published SD models use this tokenizer; it may be in the hub's cache in these places.
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
CLIP_TOKENIZERS = (
    (CLIP_TOKENIZER, ""),
    (PHOTO_MODEL, "tokenizer/"),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ("runwayml/stable-diffusion-v1-5", "tokenizer/"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer/"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"),
)
FETCH_TOKENIZER = "hf download " + CLIP_TOKENIZER + " vocab.json merges.txt tokenizer_config.json"
CLIP_WORDS = 49408
TINY = "AutoencoderTiny"
# Entries of a written file's header: the configs, and the tokenizers' files.
CONFIGS_ENTRY, TOKENIZERS_ENTRY = "ip2p", "ip2p.tokenizers"
# In a folder: the other tensors of the single file that it was converted from.
LEFTOVERS = "ip2p_leftovers.safetensors"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
Choice = Literal["auto", "ema", "plain"]
log = logging.getLogger("ip2p")
MAPPED = 64 * 2**20  # bytes of a file that stay mapped while its weights are loaded
ALIGNED = 64  # bytes, as torch allocates
# Prefixes that programs add to every name of a network that they wrap.
WRAPPERS = ("module.", "_forward_module.", "_orig_mod.")


class Weights:
    """The tensors of one or more files by name, memory-mapped, so unused ones cost nothing.

    shapes, dtypes: of every tensor. metadata: the text in the header of a safetensors file.
    """

    def __init__(self, files: Mapping[Path, Any]) -> None:
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.metadata: dict[str, str] = {}
        self._file: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        self._pickled: dict[str, Tensor] = {}
        self._served = 0
        self._names: dict[str, str] = {}  # names in the file, where they differ
        for path, tensors in files.items():
            if tensors is not None:
                self._pickled |= tensors
                self.shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
                self.dtypes |= {name: tensor.dtype for name, tensor in tensors.items()}
                continue
            handle = _open(path)
            self.metadata |= handle.metadata() or {}
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                part = handle.get_slice(name)
                self._file[name] = path
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes[name] = DTYPES.get(part.get_dtype(), torch.float32)
        while wrapper := next((one for one in WRAPPERS if self._all_begin_with(one)), None):
            self.rename({name: name.removeprefix(wrapper) for name in self.shapes})

    def _all_begin_with(self, start: str) -> bool:
        return bool(self.shapes) and all(name.startswith(start) for name in self.shapes)

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename all tensors; `names` maps the old names to the new ones."""
        self._names = {new: self._names.get(old, old) for old, new in names.items()}
        self.shapes = {new: self.shapes[old] for old, new in names.items()}
        self.dtypes = {new: self.dtypes[old] for old, new in names.items()}

    def read(self, name: str) -> Tensor:
        """A tensor, as a private view of the file's pages: changes do not reach the file."""
        name = self._names.get(name, name)
        if name in self._pickled:
            return self._pickled[name]
        path = self._file[name]
        if self._served > MAPPED:
            # Pages that were read count as used memory until they are unmapped.
            self._handles.clear()
            self._served = 0
        if path not in self._handles:
            self._handles[path] = _open(path)
        tensor: Tensor = self._handles[path].get_tensor(name)
        self._served += tensor.nbytes
        return tensor


def _open(path: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # the library's own, and OSError
        raise ModelError(unreadable(path, error)) from None


def open_weights(path: Path) -> Weights:
    """A .safetensors or .ckpt file. Raises ModelError if it is damaged or contains more than weights."""
    return Weights({path: None if path.suffix not in TORCH_FILES else read_pickle(path)})


# --- a model on disk ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """An opened model: its configs are read, its weights are not.

    configs: of the networks, the scheduler and `model_index`. weights: of each network. card: its
    `ip2p.json`. tokenizers: the files of each by name, {} if the model has none. ema: number of averaged
    weights in the file; averaged: whether they are used; choice: the reason, if there was a choice. prefixed:
    text encoders whose names begin with `text_model.` in a folder. borrowed: the models that supply parts
    that this one lacks. lacking: parts that must be supplied before networks are built.
    """

    path: Path
    layout: Literal["folder", "file"]
    architecture: str
    configs: dict[str, ldm.Config]
    weights: dict[str, Weights]
    tokenizers: dict[str, dict[str, str]]
    card: ldm.Config = field(default_factory=dict)
    ema: int = 0
    averaged: bool = False
    choice: str = ""
    prefixed: frozenset[str] = frozenset()
    borrowed: Mapping[str, Stored] = field(default_factory=dict)
    lacking: frozenset[str] = frozenset()

    @property
    def kind(self) -> Literal["sd", "sdxl"]:
        return "sdxl" if "text_encoder_2" in self.configs else "sd"

    @property
    def networks(self) -> list[str]:
        return [part for part in NETWORKS if part in self.configs]

    @property
    def channels(self) -> tuple[int, int]:
        """The UNet's input channels, and those of an editor: twice the latent channels."""
        latent = int(self.configs["vae"].get("latent_channels", 4))
        return int(self.configs["unet"].get("in_channels", 4)), 2 * latent

    @property
    def cosxl(self) -> bool:
        """Whether the image condition is scaled: only for CosXL, which has its own scheduler."""
        return self.kind == "sdxl" and (
            _is_edm(self.configs) or bool(self.configs["model_index"].get("is_cosxl_edit"))
        )


def open_model(path: Path, *, weights: Choice = "auto", parts: Stored | None = None) -> Stored:
    """Open a diffusers folder or a single file; reads only configs and headers.

    weights: which weights of a UNet to use if the file has averaged ones too. `auto` takes the averaged ones,
    unless they are incomplete or another model's, and says which. parts: a model that supplies missing parts.
    Raises ModelError.
    """
    if path.is_dir():
        return _open_unet_folder(path, parts) if _is_unet_folder(path) else _open_folder(path)
    return _open_file(path, weights, parts)


def _open_folder(folder: Path) -> Stored:
    index = read_json(folder / "model_index.json")
    kind = str(index.get("_class_name", ""))
    if family := families.of_pipeline(kind):
        raise ModelError(f"{folder}: {family.refusal()}")
    xl = "XL" in kind or (folder / "text_encoder_2").is_dir()
    parts = (*PARTS, *SECOND) if xl else PARTS
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(missing)}; an editor is a folder with {', '.join(parts)}. "
            "Save it with diffusers' save_pretrained."
        )
    configs = {part: read_json(folder / part / "config.json") for part in NETWORKS if part in parts}
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    configs["model_index"] = index
    stored = {part: part_weights(folder / part) for part in NETWORKS if part in parts}
    linear = bool(configs["unet"].get("use_linear_projection"))
    return Stored(
        path=folder,
        layout="folder",
        architecture="SDXL" if xl else "SD 2.x" if linear else "SD 1.x",
        configs=configs,
        weights=stored,
        tokenizers={part: texts_of(folder / part) for part in parts if part.startswith("tokenizer")},
        card=read_json(folder / "ip2p.json") if (folder / "ip2p.json").exists() else {},
        prefixed=frozenset(
            part for part in stored if any(key.startswith("text_model.") for key in stored[part].shapes)
        ),
    )


def _is_unet_folder(path: Path) -> bool:
    """Whether a folder, or that of a file, contains only a UNet saved by diffusers."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    return config.is_file() and read_json(config).get("_class_name") == "UNet2DConditionModel"


def _open_unet_folder(folder: Path, parts: Stored | None) -> Stored:
    config = read_json(folder / "config.json")
    if parts is None:
        width = _same_everywhere(config.get("cross_attention_dim"))
        raise ModelError(_unet_alone(folder, int(config.get("in_channels", 4)), width))
    # Unlike in a single file, the weights have the network's own names.
    return _with_parts(folder, "folder", config, part_weights(folder), parts)


def _with_parts(
    path: Path,
    layout: Literal["folder", "file"],
    unet: ldm.Config,
    weights: Weights,
    parts: Stored,
    *,
    scheduler: ldm.Config | None = None,
    **average: Any,
) -> Stored:
    """A UNet with everything else from another model; average: the fields of `Stored` on averaged weights.

    Raises ModelError if the two do not fit.
    """
    theirs = parts.configs["unet"]
    for name in ("cross_attention_dim", "addition_embed_type", "out_channels"):
        mine, other = unet.get(name), theirs.get(name)
        if _same_everywhere(mine) != _same_everywhere(other):
            raise ModelError(
                f"The UNet of {path} has {name} {mine}, that of {parts.path} has {other}. "
                f"Name a model of the same kind: --parts-from"
            )
    configs = parts.configs | {"unet": unet, "scheduler": scheduler or parts.configs["scheduler"]}
    return replace(
        parts,
        path=path,
        layout=layout,
        configs=configs | {"model_index": pipeline_index(configs)},
        weights=parts.weights | {"unet": weights},
        tokenizers=tokenizer_texts(parts),
        card={},
        borrowed={part: parts.borrowed.get(part, parts) for part in parts.networks if part != "unet"},
        **{"ema": 0, "averaged": False, "choice": "", **average},
    )


def _same_everywhere(value: Any) -> Any:
    """The number of a list of equal ones; some configs repeat it for each level."""
    return value[0] if isinstance(value, list | tuple) and len(set(value)) == 1 else value


# A public base model of each width of text embeddings: SD 1.x, SD 2.x and SDXL.
BASES = {
    768: "stable-diffusion-v1-5/stable-diffusion-v1-5",
    1024: "stabilityai/stable-diffusion-2-1",
    2048: "stabilityai/stable-diffusion-xl-base-1.0",
}


def completion_advice(path: Path, base: str) -> str:
    """How to make a complete model, which every command opens; not all have --parts-from and --vae."""
    return f"or make a complete model: ip2p model convert {path} whole.safetensors --parts-from {base}"


def _unet_alone(path: Path, channels: int, width: Any) -> str:
    """What a UNet without other parts needs. channels: of its input; width: of its text embeddings."""
    if refusal := families.unet_refusal(channels, 8):
        return f"{path}: {refusal}"
    base = BASES.get(width, BASES[768])
    line = f"{path} holds a UNet alone. "
    if channels == 4:
        return (
            f"{line}It takes 4 channels, so it is no editor; an editor takes 8. Train one: ip2p train "
            f"--base {path} --parts-from {base}"
        )
    return (
        f"{line}Name the model that brings the text encoder, the tokenizer and the autoencoder: "
        f"--parts-from {base}; {completion_advice(path, base)}"
    )


def _open_file(path: Path, choice: Choice, parts: Stored | None) -> Stored:
    weights = open_weights(path)
    shapes = weights.shapes
    if family := families.of_weights(shapes):
        raise ModelError(f"{path}: {family.refusal()}")
    if "conv_in.weight" in shapes and _is_unet_folder(path):
        return _open_unet_folder(path.parent, parts)
    if ldm.INPUT.removeprefix(keys.UNET) in shapes:  # an LDM UNet without the prefix
        weights.rename({name: keys.UNET + name for name in shapes})
        shapes = weights.shapes
    declared = _header(path, weights.metadata.get(CONFIGS_ENTRY))
    tokenizers = _unpacked(path, weights.metadata.get(TOKENIZERS_ENTRY))
    average = _choose_average(path, weights, choice)
    unet_alone = ldm.INPUT in shapes and not declared and not ldm.has_text_encoder(shapes)
    if unet_alone and parts is None:
        text = shapes.get(f"{keys.UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight", (0, 0))
        raise ModelError(_unet_alone(path, shapes[ldm.INPUT][1], text[1]))
    try:
        if unet_alone and parts is not None:
            return _open_unet_file(path, weights, parts, average)
        kind = ldm.architecture(shapes)
        configs = declared.get("configs") or ldm.ldm_configs(
            shapes, sigmas=_sigmas(weights), velocity=_velocity(weights, kind)
        )
        for part in ("unet", "vae", "text_encoder", "scheduler"):
            if not isinstance(configs.get(part), dict):
                raise ModelError(f"Its header has no config of the {part}. Export it again.")
    except ModelError as error:
        raise ModelError(f"{path} is no model that can be read. {error}") from None
    configs.setdefault("model_index", pipeline_index(configs))
    lacks_vae = not any(key.startswith(keys.VAE) for key in shapes)
    stored = Stored(
        path=path,
        layout="file",
        architecture=kind,
        configs=configs,
        weights={part: weights for part in NETWORKS if part in configs},
        tokenizers=tokenizers or _beside(path),
        card=declared.get("card") or {},
        **average,
        # Files on the hub have the prefix, and every version of the libraries reads it.
        prefixed=frozenset(declared.get("prefixed", ("text_encoder", "text_encoder_2"))),
        lacking=frozenset({"vae"} if lacks_vae else ()),
    )
    if lacks_vae and parts is not None:
        configs = configs | {"vae": parts.configs["vae"]}
        weights_of = stored.weights | {"vae": parts.weights["vae"]}
        borrowed = {"vae": parts.borrowed.get("vae", parts)}
        words = [one.configs["text_encoder"].get("vocab_size") for one in (stored, parts)]
        if not stored.tokenizers and words[0] == words[1]:
            stored = replace(stored, tokenizers=parts.tokenizers)
        return replace(stored, configs=configs, weights=weights_of, borrowed=borrowed, lacking=parts.lacking)
    return stored


def _open_unet_file(path: Path, weights: Weights, parts: Stored, average: Mapping[str, Any]) -> Stored:
    side = int(parts.configs["unet"].get("sample_size") or 64)
    config = ldm.unet_config(weights.shapes, sample_size=side)
    if added := parts.configs["unet"].get("addition_time_embed_dim"):
        config["addition_time_embed_dim"] = added
    scheduler = parts.configs["scheduler"]
    if weights.metadata.get("modelspec.prediction_type") or ldm.VELOCITY in weights.shapes:
        kind = "v_prediction" if _velocity(weights, parts.architecture) else "epsilon"
        kind = "sample" if weights.metadata.get("modelspec.prediction_type") == "sample" else kind
        scheduler = scheduler | {"prediction_type": kind}
    return _with_parts(path, "file", config, weights, parts, scheduler=scheduler, **average)


# Distance of weights from their average: a few percent within one training, far more between two models.
FAR = 0.1
COMPARED = 4096  # elements of each weight
# Entries that merging programs write into the header.
MERGED = ("sd_merge_recipe", "sd_merge_models", "modelspec.merged_from")


def _choose_average(path: Path, weights: Weights, choice: Choice) -> dict[str, Any]:
    """Whether the averaged weights (EMA) of the UNet are used, and why: fields of `Stored`."""
    shapes = weights.shapes
    count = sum(key.startswith(keys.EMA) for key in shapes)
    plain = [key for key in shapes if key.startswith(keys.UNET)]
    twins = {key: keys.ema_name(key) for key in plain}
    odd = [key for key in plain if shapes.get(twins[key]) != shapes[key]]

    def use(averaged: bool, why: str = "") -> dict[str, Any]:
        return {"averaged": averaged, "ema": count, "choice": why}

    def plain_instead(reason: str) -> dict[str, Any]:
        warnings.warn(f"{path}: the plain weights are used: {reason}", stacklevel=5)
        return use(False, f"the plain weights: {reason}")

    if len(odd) == len(plain) and keys.ema_name(ldm.INPUT) not in shapes:
        return use(False)
    if choice == "plain":
        return use(False, "the plain weights, as --weights says")
    if not plain:
        return use(True, "the averaged weights; there are no others")
    if odd:
        some = f"{len(odd)} of {len(plain)} averaged weights (EMA)"
        return plain_instead(f"{some} are missing or of another shape, {odd[0]} first")
    if choice == "auto" and (entry := next((name for name in MERGED if weights.metadata.get(name)), None)):
        # Two related models may be nearer to each other than FAR.
        return plain_instead(f"the header says that the file is a merge ({entry}), so they hold all of it")
    far = _distance(weights, twins)
    if choice == "auto" and far > FAR:
        reason = f"the averaged weights (EMA) are {far:.0%} away from them, so they are another model's"
        return plain_instead(f"{reason} (a merge leaves such); --weights ema takes them")
    log.info("%s: the averaged weights (EMA) are used; they are %.1f%% from the plain ones", path, 100 * far)
    return use(True, f"the averaged weights, {far:.1%} from the plain ones")


def _distance(weights: Weights, twins: Mapping[str, str]) -> float:
    """Distance of weights from their twins: the root mean square, over matrices, of |difference| / |weight|.

    Compares the first elements of each matrix, less their means, so that most of the file is not read.
    0 for equal weights, about 1.4 for unrelated ones.
    """
    squares = []
    for key, twin in twins.items():
        if len(weights.shapes[key]) < 2:
            continue
        one, other = (weights.read(name).flatten()[:COMPARED].double() for name in (key, twin))
        one, other = one - one.mean(), other - other.mean()
        size = float(one.square().sum())
        if size > 0:
            squares.append(min(2.0, float((one - other).square().sum()) / size))
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def _sigmas(weights: Weights) -> dict[str, float]:
    names = {ldm.COSXL_MAX: "sigma_max", ldm.COSXL_MIN: "sigma_min"}
    return {name: float(weights.read(key)) for key, name in names.items() if key in weights.shapes}


def _velocity(weights: Weights, kind: str) -> bool:
    """Whether the UNet predicts velocity, which its shapes do not show."""
    declared = weights.metadata.get("modelspec.prediction_type", "")
    if declared or ldm.VELOCITY in weights.shapes:
        return not declared or declared.startswith("v")
    last = f"{keys.UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if kind == "SD 2.x" and last in weights.shapes:
        # The two published bases differ clearly here; other tools use the same test.
        return float(weights.read(last).float().std(correction=0)) > 0.09
    return False


def _is_edm(configs: Mapping[str, ldm.Config]) -> bool:
    return str(configs["scheduler"].get("_class_name", "")).startswith("EDM")


def pipeline_index(configs: Mapping[str, ldm.Config]) -> ldm.Config:
    """The `model_index.json` of the pipeline with these configs."""
    xl = "text_encoder_2" in configs
    name = f"StableDiffusion{'XL' if xl else ''}"
    edits = configs["unet"].get("in_channels") == 2 * configs["vae"].get("latent_channels", 4)
    index: ldm.Config = {
        "_class_name": name + ("InstructPix2PixPipeline" if edits else "Pipeline"),
        "scheduler": ["diffusers", configs["scheduler"].get("_class_name")],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if xl:
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
            **({"is_cosxl_edit": True} if _is_edm(configs) and edits else {}),
        }
        return index
    empty = [None, None]
    return index | {"feature_extractor": empty, "safety_checker": empty, "requires_safety_checker": False}


def part_weights(folder: Path) -> Weights:
    """The weights of a part of a diffusers folder: one file or shards; full precision is preferred to fp16.

    Only the tensors of .bin files are read (`pickles`). Raises ModelError.
    """
    groups: dict[str, list[Path]] = {}
    # Pickles are read only if there are no safetensors, and only those with the name of weights.
    names = sorted(folder.glob("*.safetensors")) or sorted(
        path for path in folder.glob("*.bin") if re.match(r"(diffusion_)?(pytorch_)?model\b", path.name)
    )
    for path in names:
        plain = re.sub(r"-\d+-of-\d+", "", path.stem)
        groups.setdefault(plain.partition(".")[2], []).append(path)
    groups.pop("non_ema", None)
    if not groups:
        raise ModelError(f"{folder} has no .safetensors or .bin weights. Fetch or save the model again.")
    files = groups.get("") or groups.get("fp16") or next(iter(groups.values()))
    shards = [path for path in files if "-of-" in path.stem]
    return Weights(
        {path: read_pickle(path) if path.suffix in TORCH_FILES else None for path in shards or files[:1]}
    )


def texts_of(folder: Path) -> dict[str, str]:
    """The contents of a tokenizer's files by name. Raises ModelError."""
    try:
        return {
            name: (folder / name).read_bytes().decode("utf-8")
            for name in TOKENIZER_FILES
            if (folder / name).is_file()
        }
    except (OSError, ValueError) as error:
        raise ModelError(unreadable(folder, error)) from None


def _beside(path: Path) -> dict[str, dict[str, str]]:
    """The tokenizers in the folders `tokenizer` and `tokenizer_2` beside a single file."""
    found = {name: texts_of(path.parent / name) for name in ("tokenizer", "tokenizer_2")}
    return {name: texts for name, texts in found.items() if texts}


def _header(path: Path, text: str | None) -> dict[str, Any]:
    try:
        declared = json.loads(text) if text else {}
        if not isinstance(declared, dict) or not isinstance(declared.get("configs", {}), dict):
            raise ValueError("its header's ip2p entry is not an object")
        return declared
    except ValueError as error:
        raise ModelError(unreadable(path, error)) from None


def packed(tokenizers: Mapping[str, Mapping[str, str]]) -> str:
    """Tokenizers as text for a file's header."""
    return base64.b64encode(zlib.compress(json.dumps(tokenizers).encode(), 9)).decode()


def _unpacked(path: Path, text: str | None) -> dict[str, dict[str, str]]:
    if not text:
        return {}
    try:
        # Limited, so that a small file cannot fill the memory; CLIP's tokenizers have 4 MB.
        found = json.loads(zlib.decompressobj().decompress(base64.b64decode(text), 2**27))
        return {
            name: {file: str(found[name][file]) for file in TOKENIZER_FILES if file in found[name]}
            for name in ("tokenizer", "tokenizer_2")
            if name in found
        }
    except (ValueError, TypeError, zlib.error) as error:
        raise ModelError(unreadable(path, error)) from None


# --- networks ----------------------------------------------------------------------------------


def empty_network(part: str, config: Mapping[str, Any]) -> nn.Module:
    """The network of a part, with weights that use no memory. Raises ModelError for a wrong config."""
    import diffusers
    import transformers

    tiny = part == "vae" and config.get("_class_name") == TINY
    autoencoder = diffusers.AutoencoderTiny if tiny else diffusers.AutoencoderKL
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": autoencoder}
    texts = {
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    return _empty(kinds.get(part) or texts[part], config, part)


def _empty(kind: Any, config: Mapping[str, Any], name: str | Path) -> nn.Module:
    from accelerate import init_empty_weights

    try:
        # Buffers are allocated, because they are computed, not loaded.
        with quiet(), init_empty_weights(include_buffers=False):
            if hasattr(kind, "from_config"):
                network = kind.from_config(dict(config))
            else:
                text = dict(config.get("text_config") or config)
                network = kind(kind.config_class.from_dict(text))
    except Exception as error:  # a wrong value can raise anything
        raise ModelError(f"The config of {name} makes no network. {unreadable(Path(name), error)}") from None
    return network  # type: ignore[no-any-return]


def table_of(stored: Stored, part: str, network: nn.Module) -> Table:
    """The table of the network's weights in the model's files."""
    names = list(network.state_dict())
    if part in stored.borrowed:
        return table_of(stored.borrowed[part], part, network)
    if stored.layout == "folder":
        return keys.folder_table(list(stored.weights[part].shapes), names)
    shapes, config = stored.weights[part].shapes, stored.configs[part]
    if part == "unet":
        table = keys.unet_table(names, dict(network.config))  # type: ignore[arg-type]
        if stored.averaged:
            return {name: keys.WeightName(keys.ema_name(place.key)) for name, place in table.items()}
        return table
    return ldm_table(part, names, config, shapes, stored.architecture)


def ldm_table(
    part: str, names: list[str], config: Mapping[str, Any], shapes: Mapping[str, Shape], architecture: str
) -> Table:
    """The table of a part in an LDM file. shapes: those of a file to read; {} for a file to write."""
    if part == "unet":
        return keys.unet_table(names, config)
    if part == "vae":
        return keys.vae_table(names, config)
    if part == "text_encoder_2":
        return keys.openclip_table(names, keys.OPENCLIP_XL)
    if architecture == "SD 2.x":
        return keys.openclip_table(names)
    prefix = keys.CLIP_XL if architecture == "SDXL" else keys.CLIP
    inner = ldm.clip_inner(shapes, prefix) if shapes else "text_model."
    return keys.clip_table(names, prefix, inner=inner)


def missing(network: nn.Module, table: Table, weights: Weights) -> list[str]:
    """The network's weights that the files lack or have in another shape, by their names there."""
    absent = []
    for name, tensor in network.state_dict().items():
        place = table.get(name)
        if place is None:
            absent.append(name)
            continue
        there = weights.shapes.get(place.key)
        expected = keys.stored_shape(place, tuple(tensor.shape))
        if there != expected and not (place.conv and there == tuple(tensor.shape)):
            absent.append(place.key)
    return absent


def check_complete(network: nn.Module, table: Table, weights: Weights, *, source: str | Path) -> None:
    """Raise ModelError if a weight of the network is missing: random weights would make pictures of noise."""
    if absent := missing(network, table, weights):
        raise ModelError(f"{source} lacks {len(absent)} weights, {absent[0]} first. Fetch or save it again.")


# Other tensors in LDM files: the noise schedule, and unused parts of text encoders.
KNOWN_REST = re.compile(
    r"betas|alphas_cumprod\w*|(sqrt|log)_\w+|posterior_\w+|logvar|lvlb_weights|scale_factor|denoiser\.\w+"
    r"|.*position_ids|.*logit_scale|.*attn_mask"
    r"|cond_stage_model\.model\.(text_projection|transformer\.resblocks\..+)"
    r"|edm_vpred\.\w+|v_pred|ztsnr"
)


def unused(stored: Stored) -> list[str]:
    """The names in a single file that belong to no network and are not averaged weights."""
    used = set()
    for part in stored.networks:
        table = table_of(replace(stored, averaged=False), part, empty_network(part, stored.configs[part]))
        used |= {place.key for place in table.values()}
    names = stored.weights["unet"].shapes
    return [name for name in names if name not in used and not name.startswith(keys.EMA)]


def fill(
    network: nn.Module,
    table: Table,
    weights: Weights,
    *,
    source: str | Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Any:
    """Load weights into an empty network, in eval mode and without gradients.

    Weights stored in `dtype` stay memory-mapped if possible. Raises ModelError if any are missing.
    """
    check_complete(network, table, weights, source=source)
    state = {}
    for name in network.state_dict():
        tensor = keys.from_ldm(table[name], weights.read(table[name].key))
        tensor = tensor.to(device, dtype if tensor.is_floating_point() else None).contiguous()
        # Kernels may round differently for another alignment; a model must not depend on its file.
        state[name] = tensor.clone() if tensor.data_ptr() % ALIGNED else tensor
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False).to(device)


def load_part(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A network of class `kind` from the part of a diffusers folder. Raises ModelError."""
    network = _empty(kind, read_json(folder / "config.json"), folder)
    weights = part_weights(folder)
    table = keys.folder_table(list(weights.shapes), list(network.state_dict()))
    return fill(network, table, weights, source=folder, dtype=dtype)


# --- tokenizers --------------------------------------------------------------------------------


def tokenizer_texts(stored: Stored) -> dict[str, dict[str, str]]:
    """The files of each tokenizer: the model's own, else CLIP's from the hub or its cache.

    Raises ModelError if there are none, with the command that downloads them.
    """
    found = dict(stored.tokenizers)
    words = stored.configs["text_encoder"].get("vocab_size")
    if "tokenizer" not in found:
        if words != CLIP_WORDS:
            raise ModelError(
                f"{stored.path} brings no tokenizer, and its {words} words are not CLIP's. "
                "Put the folder named tokenizer of the model beside the file."
            )
        found["tokenizer"] = texts_of(_clip_tokenizer(stored.path))
    if stored.kind == "sdxl" and "tokenizer_2" not in found:
        found["tokenizer_2"] = _for_openclip(found["tokenizer"])
    own = stored.layout == "folder" or TOKENIZERS_ENTRY in stored.weights["unet"].metadata
    if stored.architecture == "SD 2.x" and words == CLIP_WORDS and not own:
        found["tokenizer"] = _for_openclip(found["tokenizer"])
    return found


def _for_openclip(texts: dict[str, str]) -> dict[str, str]:
    """CLIP's tokenizer for OpenCLIP (SD 2.x and SDXL), which was trained with zeros as padding."""
    changed = dict(texts)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if file in texts or file == "tokenizer_config.json":
            changed[file] = json.dumps(json.loads(texts.get(file, "{}")) | {"pad_token": "!"}, indent=2)
    return changed


def _clip_tokenizer(path: Path) -> Path:
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    for name, folder in CLIP_TOKENIZERS:
        for file in ("tokenizer.json", "vocab.json"):
            cached = try_to_load_from_cache(name, folder + file)
            if isinstance(cached, str) and (
                file == "tokenizer.json" or Path(cached).with_name("merges.txt").exists()
            ):
                return Path(cached).parent
    if not constants.HF_HUB_OFFLINE:
        with contextlib.suppress(Exception):  # reported below
            return Path(snapshot_download(CLIP_TOKENIZER, allow_patterns=list(TOKENIZER_FILES)))
    raise ModelError(
        f"{path} needs CLIP's tokenizer, which an LDM file does not hold and the cache lacks. "
        f"Fetch it: {FETCH_TOKENIZER}"
    )


def tokenizer_from_texts(texts: Mapping[str, str], source: Path) -> CLIPTokenizer:
    """A tokenizer from its files. Raises ModelError."""
    from transformers import CLIPTokenizer

    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            for name in TOKENIZER_FILES:
                if name in texts:
                    (Path(folder) / name).write_bytes(texts[name].encode("utf-8"))
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(unreadable(source, error)) from None
    if not 0 < tokenizer.model_max_length <= 1000:
        tokenizer.model_max_length = 77  # a bare vocabulary does not declare it
    return tokenizer


# --- reading -----------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A config file. Raises ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path} is missing; a model is a folder in the diffusers format. Check the path."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(unreadable(path, error)) from None
    if not isinstance(value, dict):
        raise ModelError(unreadable(path, ValueError("not a JSON object")))
    return value


def unreadable(path: Path, error: Exception) -> str:
    """The message for an unreadable file, with the first line of the reason."""
    return f"{path} cannot be read ({first_line(error)}). Fetch or save the model again."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the libraries' log messages and progress bars; problems are raised as errors."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    levels = diffusers_log.get_verbosity(), transformers_log.get_verbosity()
    bars = transformers_log.is_progress_bar_enabled(), diffusers_log.is_progress_bar_enabled()
    diffusers_log.set_verbosity_error()
    transformers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    diffusers_log.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_log.set_verbosity(levels[0])
        transformers_log.set_verbosity(levels[1])
        if bars[0]:
            transformers_log.enable_progress_bar()
        if bars[1]:
            diffusers_log.enable_progress_bar()
