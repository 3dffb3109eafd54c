"""Weights from files: opened without being read, run or copied, and put into networks one by one.

A model is `Stored` when its configs are known and its weights lie on disk under known names; a diffusers
folder and a single LDM file are then the same thing. Nothing in a file is ever run.
"""

from __future__ import annotations

import base64
import contextlib
import json
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

from ip2p.base.errors import ModelError
from ip2p.models import configs as ldm
from ip2p.models import keys
from ip2p.models.keys import Shape, Table

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

PHOTO_MODEL = "timbrooks/instruct-pix2pix"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SECOND = ("text_encoder_2", "tokenizer_2")  # which SDXL has besides
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Single files that are opened; .ckpt and its like are pickles, read with an allow-list.
TORCH_FILES = (".ckpt", ".pt", ".pth")
SINGLE_FILES = (".safetensors", *TORCH_FILES)
# Weights that are pickles: opening one carelessly can run code.
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)
# All published SD models read with this tokenizer; these are where it may lie in the hub's cache.
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
# In a written file's header: the configs, and the tokenizers' files.
CONFIGS_ENTRY, TOKENIZERS_ENTRY = "ip2p", "ip2p.tokenizers"
# Beside a folder's parts: what else lay in the single file that it came from.
LEFTOVERS = "ip2p_leftovers.safetensors"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
MAPPED = 64 * 2**20  # bytes of a file that stay mapped beside the weights made from them
ALIGNED = 64  # bytes, as torch allocates


class Weights:
    """The tensors of one or more files by name. They are mapped, not read: what is not used costs nothing.

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
        for path, tensors in files.items():
            if tensors is not None:
                self._pickled |= tensors
                self.shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
                self.dtypes |= {name: tensor.dtype for name, tensor in tensors.items()}
                continue
            handle = _open(path)
            self.metadata |= handle.metadata() or {}
            for name in handle.keys():  # noqa: SIM118 (it is no dict)
                part = handle.get_slice(name)
                self._file[name] = path
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes[name] = DTYPES.get(part.get_dtype(), torch.float32)

    def read(self, name: str) -> Tensor:
        """A tensor of the file: a private view of its pages, so that a change to it changes no file."""
        if name in self._pickled:
            return self._pickled[name]
        path = self._file[name]
        if self._served > MAPPED:
            # Pages once touched count as memory until they are unmapped, which ends those no longer used.
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
    """A .safetensors or .ckpt file. Raises ModelError for one that is damaged, or holds more than weights."""
    return Weights({path: None if path.suffix not in TORCH_FILES else _unpickled(path)})


class _Ignored:
    """Stands in for what a training program leaves in a checkpoint beside the weights; it does nothing."""

    def __new__(cls, *arguments: Any, **more: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **more: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


IGNORED = (
    *("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "_codecs.encode", "numpy.dtype"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "collections.Counter"),
)


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a .ckpt, read by torch's unpickler of weights alone, which calls nothing else."""
    import pickle

    allowed = torch.serialization.safe_globals([(_Ignored, name) for name in IGNORED])
    with allowed, path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickles by other protocols, which are then read or refused
        # Only the format of torch 1.6 and later can be mapped; the one before is read whole.
        zipped = file.read(4) == b"PK\x03\x04"
        try:
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
        except pickle.UnpicklingError as error:
            asked = re.search(r"GLOBAL (\S+)|function (.+?)(?: which|\n|$)", str(error))
            what = f"asks to run {(asked[1] or asked[2]).strip()}" if asked else "is not one of weights alone"
            raise ModelError(
                f"{path} is a pickle that {what}, so it was refused and nothing in it was run. "
                "Use a .safetensors file of the model."
            ) from None
        except MemoryError:
            raise
        except Exception as error:  # zipfile's, struct's, EOFError, RuntimeError
            raise ModelError(unreadable(path, error)) from None
    state = value.get("state_dict", value) if isinstance(value, dict) else None
    found = state.items() if isinstance(state, dict) else ()
    tensors = {name: tensor for name, tensor in found if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not tensors:
        raise ModelError(f"{path} holds no weights by name. Use a .safetensors file of the model.")
    return tensors


# --- a model on disk ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A model whose configs are read and whose weights are not.

    configs: of the networks, the scheduler and `model_index`. weights: each network's. card: its
    `ip2p.json`. tokenizers: the files of each by name, {} if the model brings none. ema: how many of its
    weights are averaged twins; averaged: whether those are taken. prefixed: text encoders whose names
    begin with `text_model.` in a folder.
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
    prefixed: frozenset[str] = frozenset()

    @property
    def kind(self) -> Literal["sd", "sdxl"]:
        return "sdxl" if "text_encoder_2" in self.configs else "sd"

    @property
    def networks(self) -> list[str]:
        return [part for part in NETWORKS if part in self.configs]

    @property
    def channels(self) -> tuple[int, int]:
        """How many channels the UNet takes, and how many an editor's does."""
        latent = int(self.configs["vae"].get("latent_channels", 4))
        return int(self.configs["unet"].get("in_channels", 4)), 2 * latent

    @property
    def cosxl(self) -> bool:
        """Whether the image condition is scaled as CosXL's is, which alone has this scheduler."""
        return self.kind == "sdxl" and (
            _is_edm(self.configs) or bool(self.configs["model_index"].get("is_cosxl_edit"))
        )


def open_model(path: Path, *, weights: Literal["ema", "plain"] = "ema") -> Stored:
    """A diffusers folder or a single file. Only configs and headers are read. Raises ModelError."""
    return _open_folder(path) if path.is_dir() else _open_file(path, weights)


def _open_folder(folder: Path) -> Stored:
    index = read_json(folder / "model_index.json")
    xl = "XL" in str(index.get("_class_name", "")) or (folder / "text_encoder_2").is_dir()
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


def _open_file(path: Path, choice: Literal["ema", "plain"]) -> Stored:
    weights = open_weights(path)
    shapes = weights.shapes
    said = _header(path, weights.metadata.get(CONFIGS_ENTRY))
    tokenizers = _unpacked(path, weights.metadata.get(TOKENIZERS_ENTRY))
    try:
        kind = ldm.architecture(shapes)
        configs = said.get("configs") or ldm.ldm_configs(
            shapes, sigmas=_sigmas(weights), velocity=_velocity(weights, kind)
        )
        for part in ("unet", "vae", "text_encoder", "scheduler"):
            if not isinstance(configs.get(part), dict):
                raise ModelError(f"Its header has no config of the {part}. Export it again.")
    except ModelError as error:
        raise ModelError(f"{path} is no model that can be read. {error}") from None
    configs.setdefault("model_index", pipeline_index(configs))
    ema = sum(key.startswith(keys.EMA) for key in shapes)
    return Stored(
        path=path,
        layout="file",
        architecture=kind,
        configs=configs,
        weights={part: weights for part in NETWORKS if part in configs},
        tokenizers=tokenizers or _beside(path),
        card=said.get("card") or {},
        ema=ema,
        averaged=choice == "ema" and keys.ema_name(ldm.INPUT) in shapes,
        # Files on the hub have it, and every version of the libraries reads it.
        prefixed=frozenset(said.get("prefixed", ("text_encoder", "text_encoder_2"))),
    )


def _sigmas(weights: Weights) -> dict[str, float]:
    names = {ldm.COSXL_MAX: "sigma_max", ldm.COSXL_MIN: "sigma_min"}
    return {name: float(weights.read(key)) for key, name in names.items() if key in weights.shapes}


def _velocity(weights: Weights, kind: str) -> bool:
    """Whether the UNet predicts velocity, which no shape tells."""
    said = weights.metadata.get("modelspec.prediction_type", "")
    if said or ldm.VELOCITY in weights.shapes:
        return not said or said.startswith("v")
    last = f"{keys.UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if kind == "SD 2.x" and last in weights.shapes:
        # The two published bases differ so much here that other tools tell them apart by it.
        return float(weights.read(last).float().std(correction=0)) > 0.09
    return False


def _is_edm(configs: Mapping[str, ldm.Config]) -> bool:
    return str(configs["scheduler"].get("_class_name", "")).startswith("EDM")


def pipeline_index(configs: Mapping[str, ldm.Config]) -> ldm.Config:
    """The `model_index.json` of the pipeline that these configs of networks and scheduler make."""
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
    return index | {
        "feature_extractor": empty,
        "safety_checker": empty,
        "requires_safety_checker": False,
    }


def part_weights(folder: Path) -> Weights:
    """The weights of a part of a diffusers folder: whole or in shards, full precision before fp16."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        plain = re.sub(r"-\d+-of-\d+", "", path.stem)
        groups.setdefault(plain.partition(".")[2], []).append(path)
    groups.pop("non_ema", None)
    if not groups:
        pickles = [path.name for path in folder.iterdir() if path.suffix in PICKLES]
        if pickles:
            raise ModelError(
                f"{folder / pickles[0]} is a pickle, which can run code when it is opened, so it was not "
                f"opened. Use a folder with .safetensors weights, such as {PHOTO_MODEL}."
            )
        raise ModelError(f"{folder} has no .safetensors weights. Fetch or save the model again.")
    files = groups.get("") or groups.get("fp16") or next(iter(groups.values()))
    shards = [path for path in files if "-of-" in path.stem]
    return Weights(dict.fromkeys(shards or files[:1]))


def texts_of(folder: Path) -> dict[str, str]:
    """The files of a tokenizer's folder that make it. Raises ModelError."""
    try:
        return {
            name: (folder / name).read_bytes().decode("utf-8")
            for name in TOKENIZER_FILES
            if (folder / name).is_file()
        }
    except (OSError, ValueError) as error:
        raise ModelError(unreadable(folder, error)) from None


def _beside(path: Path) -> dict[str, dict[str, str]]:
    """The tokenizers in folders of that name beside a single file."""
    found = {name: texts_of(path.parent / name) for name in ("tokenizer", "tokenizer_2")}
    return {name: texts for name, texts in found.items() if texts}


def _header(path: Path, text: str | None) -> dict[str, Any]:
    try:
        said = json.loads(text) if text else {}
        if not isinstance(said, dict) or not isinstance(said.get("configs", {}), dict):
            raise ValueError("its header's ip2p entry is not an object")
        return said
    except ValueError as error:
        raise ModelError(unreadable(path, error)) from None


def packed(tokenizers: Mapping[str, Mapping[str, str]]) -> str:
    """Tokenizers as the text of a header's entry."""
    return base64.b64encode(zlib.compress(json.dumps(tokenizers).encode(), 9)).decode()


def _unpacked(path: Path, text: str | None) -> dict[str, dict[str, str]]:
    if not text:
        return {}
    try:
        # A limit, so that a small file cannot fill the memory; CLIP's tokenizers are 4 MB together.
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
    """The network of a part, with weights that take no memory yet. Raises ModelError for a wrong config."""
    import diffusers
    import transformers

    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    texts = {
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    return _empty(kinds.get(part) or texts[part], config, part)


def _empty(kind: Any, config: Mapping[str, Any], name: str | Path) -> nn.Module:
    from accelerate import init_empty_weights

    try:
        # Buffers are made for real: they are computed, not loaded.
        with quiet(), init_empty_weights(include_buffers=False):
            if hasattr(kind, "from_config"):
                network = kind.from_config(dict(config))
            else:
                text = dict(config.get("text_config") or config)
                network = kind(kind.config_class.from_dict(text))
    except Exception as error:  # whatever a wrong number leads to
        raise ModelError(f"The config of {name} makes no network. {unreadable(Path(name), error)}") from None
    return network  # type: ignore[no-any-return]


def table_of(stored: Stored, part: str, network: nn.Module) -> Table:
    """Where each weight of the network lies in the model's files."""
    names = list(network.state_dict())
    if stored.layout == "folder":
        return keys.folder_table(list(stored.weights[part].shapes), names)
    shapes, config = stored.weights[part].shapes, stored.configs[part]
    if part == "unet":
        table = keys.unet_table(names, dict(network.config))  # type: ignore[arg-type]
        if stored.averaged:
            return {name: keys.Place(keys.ema_name(place.key)) for name, place in table.items()}
        return table
    return ldm_table(part, names, config, shapes, stored.architecture)


def ldm_table(
    part: str, names: list[str], config: Mapping[str, Any], shapes: Mapping[str, Shape], architecture: str
) -> Table:
    """The table of any part for an LDM file of this architecture; shapes are an older file's, else {}."""
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
    """The weights of the network that the files lack, or hold in another shape, by their names there."""
    absent = []
    for name, tensor in network.state_dict().items():
        place = table.get(name)
        if place is None:
            absent.append(name)
            continue
        there = weights.shapes.get(place.key)
        wanted = keys.stored_shape(place, tuple(tensor.shape))
        if there != wanted and not (place.conv and there == tuple(tensor.shape)):
            absent.append(place.key)
    return absent


# What LDM files hold beside the networks: the noise schedule, and parts of text encoders that nothing reads.
KNOWN_REST = re.compile(
    r"betas|alphas_cumprod\w*|(sqrt|log)_\w+|posterior_\w+|logvar|lvlb_weights|scale_factor|denoiser\.\w+"
    r"|.*position_ids|.*logit_scale|.*attn_mask"
    r"|cond_stage_model\.model\.(text_projection|transformer\.resblocks\..+)"
    r"|edm_vpred\.\w+|v_pred|ztsnr"
)


def unused(stored: Stored) -> list[str]:
    """The names in a single file that belong to no network and are no averaged twins."""
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
    """Put weights into an empty network, in eval mode and without gradients. Raises ModelError if one lacks.

    One that is stored in `dtype` stays mapped if it can: only when it is used is it read.
    """
    absent = missing(network, table, weights)
    # A loader that fills what is missing with noise makes pictures of noise.
    if absent:
        raise ModelError(f"{source} lacks {len(absent)} weights, {absent[0]} first. Fetch or save it again.")
    state = {}
    for name in network.state_dict():
        tensor = keys.from_ldm(table[name], weights.read(table[name].key))
        tensor = tensor.to(device, dtype if tensor.is_floating_point() else None).contiguous()
        # Kernels may round otherwise where a tensor begins elsewhere: a model is the same from any file.
        state[name] = tensor.clone() if tensor.data_ptr() % ALIGNED else tensor
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False).to(device)


def load_part(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A network of the given class from the part of a diffusers folder. Raises ModelError."""
    network = _empty(kind, read_json(folder / "config.json"), folder)
    weights = part_weights(folder)
    table = keys.folder_table(list(weights.shapes), list(network.state_dict()))
    return fill(network, table, weights, source=folder, dtype=dtype)


# --- tokenizers --------------------------------------------------------------------------------


def tokenizer_texts(stored: Stored) -> dict[str, dict[str, str]]:
    """The files of each tokenizer: the model's own, else those of CLIP from the hub or its cache.

    Raises ModelError if they are nowhere, with the command that fetches them.
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
    """CLIP's tokenizer as the folders of SD 2.x and SDXL have it: OpenCLIP saw zeros after the text."""
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
        with contextlib.suppress(Exception):  # said below, whatever it was
            return Path(snapshot_download(CLIP_TOKENIZER, allow_patterns=list(TOKENIZER_FILES)))
    raise ModelError(
        f"{path} needs CLIP's tokenizer, which an LDM file does not hold and the cache lacks. "
        f"Fetch it: {FETCH_TOKENIZER}"
    )


def make_tokenizer(texts: Mapping[str, str], source: Path) -> CLIPTokenizer:
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
        tokenizer.model_max_length = 77  # a bare vocabulary does not say it
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
    """The message for a file that cannot be read, with the first line of the reason."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"{path} cannot be read ({reason}). Fetch or save the model again."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the loaders' progress bars and tables off the terminal; what matters becomes an error."""
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
