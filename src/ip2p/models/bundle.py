"""Finds and loads an editor: the packaged `storybook`, a hub name, a diffusers folder or a single file."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ip2p.base.errors import InputError, ModelError, hub_error
from ip2p.base.files import is_hub_name
from ip2p.models import configs as ldm
from ip2p.models import keys
from ip2p.models.families import unet_refusal
from ip2p.models.load import (
    BASES,
    PARTS,
    PHOTO_MODEL,
    PICKLES,
    SINGLE_FILES,
    TINY,
    Choice,
    Stored,
    Weights,
    completion_advice,
    empty_network,
    fill,
    load_part,
    open_model,
    open_weights,
    part_weights,
    read_json,
    table_of,
    tokenizer_from_texts,
    tokenizer_texts,
)
from ip2p.pictures.images import closest_file, closest_name
from ip2p.settings import EditSettings, meta_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PACKAGED = Path(__file__).parent
EXAMPLES = "examples"  # in the folder of the packaged storybook model; scripts/make_examples.py writes it
HUB_FILES = (
    *("model_index.json", "ip2p.json", "scheduler/*.json", "tokenizer*/*.json", "tokenizer*/*.txt"),
    *("unet/config.json", "vae/config.json", "text_encoder*/config.json"),
    # Full-precision weights, in one file or shards, without the fp16 and non-EMA variants beside them.
    *("*/diffusion_pytorch_model.safetensors", "*/diffusion_pytorch_model-*-of-*.safetensors"),
    *("text_encoder*/model.safetensors", "text_encoder*/model-*-of-*.safetensors"),
    "*/*.safetensors.index.json",
)
# For a repository that only has these.
HUB_HALVES = ("unet/*.fp16*.safetensors", "vae/*.fp16*.safetensors", "text_encoder*/*.fp16*.safetensors")
# For a repository that only has pickles; only their tensors are read.
HUB_PICKLES = (
    *("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model-*-of-*.bin"),
    *("vae/diffusion_pytorch_model.bin", "text_encoder*/pytorch_model.bin"),
)
# A file of a repository: owner/name/file.safetensors.
HUB_FILE = re.compile(r"([\w.\-]+/[\w.\-]+)/([\w.\-/]+\.(?:safetensors|ckpt|pt|pth|bin))")
# For the repository of a single network, such as an autoencoder.
HUB_PART = ("config.json", "diffusion_pytorch_model.safetensors", "vae/config.json", "vae/*model.safetensors")


# The settings that a card may recommend, and their values where it does not.
RECOMMENDED: dict[str, Any] = {
    name: meta_of(found).fallback
    for name, found in EditSettings.model_fields.items()
    if meta_of(found).fallback is not None
}


@dataclass(frozen=True)
class Card:
    """The contents of a model's `ip2p.json`, where every field is optional.

    native_size: the side in pixels of the training pictures. known_psnr: a picture that the autoencoder
    reconstructs with a lower PSNR (dB) is far from the training data. closed_vocabulary: the model does not
    know words that its tokenizer splits (`models.text.unknown_words`). text_cfg_range, image_cfg_range: the
    range of each scale for which it was distilled (`ip2p distill`). The other fields are recommended
    settings, with the defaults of `Settings.resolved`.
    """

    name: str
    native_size: int
    known_psnr: float | None = None
    closed_vocabulary: bool = False
    text_cfg_range: tuple[float, float] | None = None
    image_cfg_range: tuple[float, float] | None = None
    steps: int = RECOMMENDED["steps"]
    sampler: str = RECOMMENDED["sampler"]
    schedule: str = RECOMMENDED["schedule"]
    text_cfg: float = RECOMMENDED["text_cfg"]
    image_cfg: float = RECOMMENDED["image_cfg"]
    cfg_interval: tuple[float, float] = RECOMMENDED["cfg_interval"]

    @property
    def allows_interval(self) -> bool:
        """Whether guidance can be limited to some noise levels: outside of them, both scales are 1."""
        ranges = filter(None, (self.text_cfg_range, self.image_cfg_range))
        return all(low <= 1 <= high for low, high in ranges)


@dataclass(frozen=True)
class Bundle:
    """The parts of an editor, in eval mode and without gradients.

    latent_scale multiplies target latents; condition_scale those of the input picture, which most editors
    take unscaled. latent_factor: pixels per latent cell. size_multiple: picture sizes must be a multiple of
    it. zero_empty_text: SDXL's empty text is all zeros, not encoded. widened: the UNet was not an editor's;
    its new input channels are still zero (`base.load_base`).
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: Mapping[str, Any]
    latent_scale: float
    latent_factor: int
    size_multiple: int
    card: Card
    folder: Path
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    kind: Literal["sd", "sdxl"] = "sd"
    condition_scale: float = 1.0
    zero_empty_text: bool = True
    widened: bool = False


def load_bundle(
    model: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    weights: Choice = "auto",
    vae: str | Path | None = None,
    parts_from: str | Path | None = None,
    stored: Stored | None = None,
) -> Bundle:
    """Load an editor of SD 1.x, SD 2.x or SDXL, in eval mode and without gradients.

    model: `storybook`, a diffusers folder, a hub name such as timbrooks/instruct-pix2pix (at `revision`), or
    a single .safetensors or .ckpt file in the LDM layout. weights: averaged or last weights, if the file has
    both (`load.open_model`). vae: another autoencoder: a folder, a hub name or a single file. parts_from: a
    model that supplies the parts that a UNet file lacks. stored: the model, if already opened. No code from
    a file is executed. All networks get `dtype`, except that SDXL's autoencoder stays in fp32, whose range it
    needs. Raises ModelError, and InputError for a revision of a local model.
    """
    stored = stored or open_model(
        find_model(model, revision=revision), weights=weights, parts=open_parts(parts_from)
    )
    check_editor(stored)
    return make_bundle(stored, str(model), device=device, dtype=dtype, vae=vae)


def open_parts(model: str | Path | None) -> Stored | None:
    """The model that supplies missing parts (`--parts-from`), or None. Raises ModelError."""
    return None if model is None else open_model(find_model(model))


def make_bundle(
    stored: Stored,
    name: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    vae: str | Path | None = None,
    unet: UNet2DConditionModel | None = None,
) -> Bundle:
    """Load an opened model with any number of UNet input channels; otherwise as `load_bundle`.

    name: used if the model's card has none. unet: replaces the model's UNet. Raises ModelError.
    """
    path = stored.path
    if vae is None and "vae" in stored.lacking:
        example = "madebyollin/sdxl-vae-fp16-fix" if stored.kind == "sdxl" else "stabilityai/sd-vae-ft-mse"
        base = BASES[{"SD 1.x": 768, "SD 2.x": 1024, "SDXL": 2048}[stored.architecture]]
        advice = completion_advice(path, base)
        raise ModelError(f"{path} holds no autoencoder. Name one: --vae {example}; {advice}")
    texts = tokenizer_texts(stored)
    own = set(stored.networks) - ({"unet"} if unet is not None else set()) - ({"vae"} if vae else set())
    parts = {part: _part(stored, part) for part in stored.networks if part in own}
    if vae is not None:
        parts["vae"] = _find_vae(vae, stored)
    whole = stored.kind == "sdxl" and parts["vae"].config.get("force_upcast", True)
    half = torch.float32 if whole else dtype
    # All files were checked above; building the networks takes seconds.
    networks = {key: _load(part, key, half if key == "vae" else dtype, device) for key, part in parts.items()}
    tokenizers = {
        key: tokenizer_from_texts(files, path / key if stored.layout == "folder" else path)
        for key, files in texts.items()
    }
    if parts["vae"].config.get("_class_name") == TINY:
        scale = float(stored.configs["vae"].get("scaling_factor") or 0.18215)
        networks["vae"] = ScaledTiny(networks["vae"], scale)
    unet, autoencoder = unet or networks["unet"], networks["vae"]
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    halvings = len(unet.config.block_out_channels) - 1
    native = _square(unet.config.sample_size) * factor
    return Bundle(
        unet=unet,
        vae=autoencoder,
        text_encoder=networks["text_encoder"],
        tokenizer=tokenizers["tokenizer"],
        scheduler_config=stored.configs["scheduler"],
        latent_scale=autoencoder.config.scaling_factor,
        latent_factor=factor,
        size_multiple=max(8, factor * 2**halvings),
        card=_card(stored, name, native_size=native),
        folder=path,
        text_encoder_2=networks.get("text_encoder_2"),
        tokenizer_2=tokenizers.get("tokenizer_2"),
        kind=stored.kind,
        condition_scale=autoencoder.config.scaling_factor if stored.cosxl else 1.0,
        zero_empty_text=bool(stored.configs["model_index"].get("force_zeros_for_empty_prompt", True)),
    )


def check_editor(stored: Stored) -> None:
    """Raise ModelError unless the UNet takes noise and a picture."""
    channels, needed = stored.channels
    if channels != needed:
        raise ModelError(not_an_editor(stored))


def not_an_editor(stored: Stored) -> str:
    """Why a model is not an editor (by its UNet's input channels), and what to do about it."""
    channels, needed = stored.channels
    known = unet_refusal(channels, needed)
    if known is not None:
        return f"{stored.path}: {known}"
    line = f"This UNet takes {channels} channels; an editor needs {needed}. "
    if channels != needed // 2:
        return line + (
            f"Use an editor such as {PHOTO_MODEL}; one can be trained only from a base of {needed // 2} "
            "channels."
        )
    config = stored.configs["scheduler"]
    if stored.cosxl or str(config.get("_class_name", "")).startswith(("EDM", "FlowMatch")):
        return (
            line + f"Bases with its noise levels cannot be trained here. Use an editor such as {PHOTO_MODEL}."
        )
    parts = "".join(f" --parts-from {one.path}" for one in list(stored.borrowed.values())[:1])
    vae = " --vae stabilityai/sd-vae-ft-mse" if "vae" in stored.lacking and not parts else ""
    return line + f"Train one: ip2p train --base {stored.path}{parts}{vae}"


@dataclass(frozen=True)
class _Part:
    """A network on disk: its config, its weights, and the table of their names."""

    config: Mapping[str, Any]
    weights: Weights
    table: Callable[[nn.Module], keys.Table]
    path: Path


def _part(stored: Stored, name: str) -> _Part:
    source = stored.borrowed.get(name, stored)
    alone = source.layout == "folder" and (source.path / name).is_dir()
    path = source.path / name if alone else source.path
    table = partial(table_of, stored, name)
    return _Part(stored.configs[name], stored.weights[name], table, path)


def _load(part: _Part, name: str, dtype: torch.dtype, device: torch.device | str) -> Any:
    network = empty_network(name, part.config)
    table = part.table(network)
    return fill(network, table, part.weights, source=part.path, dtype=dtype, device=device)


# --- another autoencoder -----------------------------------------------------------------------


def _find_vae(vae: str | Path, stored: Stored) -> _Part:
    path = Path(vae).expanduser()
    own = stored.configs["vae"]
    scale = float(own.get("scaling_factor") or 0.18215)
    if path.is_dir():
        part = _vae_folder(path)
    elif path.is_file() or path.suffix in SINGLE_FILES:
        part = _vae_file(path, scale)
    elif is_hub_model(str(vae)):
        part = _vae_folder(from_hub(str(vae), HUB_PART, lambda folder: _has_config(folder)))
    else:
        raise ModelError(f"{vae}: no such autoencoder. {_closest(path, [])}")
    tiny = part.config.get("_class_name") == TINY
    # A tiny one makes scaled latents; its config does not say for which model.
    theirs = scale if tiny else float(part.config.get("scaling_factor") or 0.18215)
    levels = "decoder_block_out_channels" if tiny else "block_out_channels"
    shape = [int(part.config.get("latent_channels", 4)), len(part.config.get(levels, (1,) * 4))]
    expected = [int(own.get("latent_channels", 4)), len(own.get("block_out_channels", ()))]
    if "vae" in stored.lacking:
        expected[1] = shape[1]  # the file's own autoencoder is unknown
    if shape != expected or abs(theirs - scale) > 1e-6:
        raise ModelError(
            f"The autoencoder {vae} has other latents than the model's: {shape[0]} channels of scale "
            f"{theirs:g}, not {expected[0]} of {scale:g}. Use one made for {stored.architecture}."
        )
    return part


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "vae" / "config.json").is_file()


def _vae_folder(folder: Path) -> _Part:
    inner = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    config = read_json(inner / "config.json")
    kind = config.get("_class_name", "AutoencoderKL")
    if kind not in ("AutoencoderKL", TINY):
        raise ModelError(f"{folder} holds a {kind}, not an AutoencoderKL or {TINY}. Name another --vae.")
    weights = part_weights(inner)
    stored = list(weights.shapes)
    return _Part(config, weights, lambda vae: keys.folder_table(stored, list(vae.state_dict())), inner)


class ScaledTiny(nn.Module):
    """An AutoencoderTiny (TAESD) with the interface of an AutoencoderKL.

    TAESD's latents [batch, 4, h, w] are already multiplied by the scale; here they are divided by it.
    """

    def __init__(self, tiny: Any, scale: float) -> None:
        super().__init__()
        self.tiny, self.scale = tiny, scale
        self.config = SimpleNamespace(
            **{**tiny.config, "scaling_factor": scale, "force_upcast": False}
            | {"block_out_channels": tuple(tiny.config.decoder_block_out_channels)}
        )
        self.tile_sample_min_size = tiny.tile_sample_min_size

    @property
    def dtype(self) -> torch.dtype:
        return self.tiny.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.tiny.device  # type: ignore[no-any-return]

    def encode(self, pictures: torch.Tensor) -> SimpleNamespace:
        """Pictures [batch, 3, H, W] in [-1, 1] to a distribution of latents with zero variance."""
        latents = self.tiny.encode(pictures).latents / self.scale
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents, sample=lambda *_: latents))

    def decode(self, latents: torch.Tensor) -> Any:
        """Unscaled latents to `sample`, pictures [batch, 3, H, W] in about [-1, 1]."""
        return self.tiny.decode(latents * self.scale)

    def enable_tiling(self, use_tiling: bool = True) -> None:
        self.tiny.enable_tiling(use_tiling)

    def disable_tiling(self) -> None:
        self.tiny.disable_tiling()


def load_tiny(tiny: str | Path, bundle: Bundle) -> AutoencoderTiny:
    """An AutoencoderTiny (TAESD) from a folder or a hub name, for previews of `bundle`'s latents.

    It decodes scaled latents, as samplers return them. Raises ModelError if its latents differ.
    """
    from diffusers import AutoencoderTiny

    path = find_folder(tiny, HUB_PART, _has_config, what="tiny autoencoder")
    network = load_part(AutoencoderTiny, path, bundle.vae.dtype)
    check_tiny(network, bundle)
    return network.to(bundle.vae.device)  # type: ignore[no-any-return]


def check_tiny(tiny: AutoencoderTiny, bundle: Bundle) -> None:
    """Raise ModelError unless a tiny autoencoder's latents have the shape of the bundle's."""
    shape = tiny.config.latent_channels, 2 ** (len(tiny.config.decoder_block_out_channels) - 1)
    expected = bundle.vae.config.latent_channels, bundle.latent_factor
    if shape != expected:
        raise ModelError(
            f"The tiny autoencoder has {shape[0]} latent channels and {shape[1]} pixels per cell, the model "
            f"has {expected[0]} and {expected[1]}. Use a tiny autoencoder that was made for this model."
        )


def _vae_file(path: Path, scale: float) -> _Part:
    if path.suffix not in SINGLE_FILES:
        raise ModelError(_unopened(path))
    if not path.is_file():
        raise ModelError(f"{path}: no such file. {_closest(path, [])}")
    weights = open_weights(path)
    if {"encoder.down_blocks.0.resnets.0.conv1.weight", "encoder.layers.0.weight"} & weights.shapes.keys():
        if (path.parent / "config.json").is_file():
            return _vae_folder(path.parent)
        raise ModelError(f"{path} is a part of a diffusers folder. Name the folder, with its config.json.")
    prefix = keys.VAE if any(key.startswith(keys.VAE) for key in weights.shapes) else ""
    try:
        config = ldm.vae_config(weights.shapes, scale=scale, side=512, prefix=prefix)
    except (ModelError, KeyError) as error:
        raise ModelError(f"{path} is no autoencoder that can be read ({error}). Name another.") from None
    return _Part(config, weights, lambda vae: keys.vae_table(list(vae.state_dict()), config, prefix), path)


# --- finding -----------------------------------------------------------------------------------


def find_model(model: str | Path, *, revision: str | None = None) -> Path:
    """The path of a model: packaged, a folder, a single file, or from the hub's cache. Raises ModelError."""
    name = str(model)
    if not name.strip():
        raise ModelError(
            f"The model's name is empty. Use storybook, a folder, a file, or a hub name like {PHOTO_MODEL}."
        )
    path = Path(name).expanduser()
    packaged = packaged_models()
    if not path.exists() and (file := HUB_FILE.fullmatch(name)) and not path.parent.is_dir():
        return _hub_file(file[1], file[2], revision)
    if not path.exists() and name not in packaged and is_hub_model(name):
        return _single_file_of(from_hub(name, HUB_FILES, _is_model, revision=revision), name)
    if revision is not None:
        raise InputError(f"{name} is not a hub name, so it has no --revision {revision}; leave it out.")
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix in SINGLE_FILES:
            return path
        raise ModelError(_unopened(path))
    if name in packaged:
        return PACKAGED / name
    if name == "storybook":
        raise ModelError(
            "The storybook model is not in this installation. Make it: ip2p storybook build --preset smoke"
        )
    what = "file" if path.suffix in SINGLE_FILES else "folder"
    raise ModelError(f"{name}: no such model {what}. {_closest(path, packaged)}")


def _hub_file(name: str, file: str, revision: str | None) -> Path:
    if name.startswith((".", "~")):
        raise ModelError(f"{name}/{file}: no such model file. Check the path.")
    folder = from_hub(name, (file,), lambda found: (found / file).is_file(), revision=revision)
    if not (folder / file).is_file():
        raise ModelError(f"{name} has no file {file}. Check it on the model's page.")
    return folder / file


def _single_file_of(folder: Path, name: str) -> Path:
    """The folder of a repository, or the single file in it that is the model. Raises ModelError."""
    if (folder / "model_index.json").is_file():
        return folder
    chosen = _choose_root([path.name for path in folder.iterdir()], name)
    return folder / chosen[0] if chosen else folder


def _choose_root(files: Sequence[str], name: str) -> list[str]:
    """The file in a repository's root that is the model: the only one, or the only editor. ModelError."""
    models = sorted(file for file in files if _is_root_model(Path(file)))
    editors = [file for file in models if "edit" in file or "pix2pix" in file]
    chosen = models if len(models) == 1 else editors
    if models and len(chosen) != 1:
        raise ModelError(f"{name} holds {', '.join(models)}. Name one of them: {name}/{models[0]}")
    return chosen


def _is_root_model(path: Path) -> bool:
    return path.suffix in (".safetensors", ".ckpt")


def _listed_root(name: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(name, revision=revision)
    return _choose_root([file for file in files if "/" not in file], name)


def is_hub_model(name: str) -> bool:
    """Whether a name can only mean a model on the hub: OWNER/NAME, neither a path here nor a single file."""
    return is_hub_name(name) and Path(name).suffix not in SINGLE_FILES


def called(model: str | Path) -> str:
    """The name of a model in tables: a path's last part only, since the table may go to other machines."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else str(model)


def packaged_models() -> list[str]:
    """The names of the models inside the package."""
    return sorted(entry.parent.name for entry in PACKAGED.glob("*/model_index.json"))


@dataclass(frozen=True)
class PackagedExample:
    """A page to try the packaged storybook model on: a PNG file, its title, and instructions."""

    file: Path
    title: str
    instructions: tuple[str, ...]


def packaged_examples() -> list[PackagedExample]:
    """The example pages of the packaged storybook model; none if it is not installed."""
    folder = PACKAGED / "storybook" / EXAMPLES
    if not folder.is_dir():
        return []
    rows = json.loads((folder / "pages.json").read_text(encoding="utf-8"))
    return [PackagedExample(folder / row["page"], row["title"], tuple(row["instructions"])) for row in rows]


def _closest(path: Path, packaged: list[str]) -> str:
    ours = closest_name(path.name, packaged) if path.parent == Path(".") else None
    if close := ours or closest_file(path):
        return f"Did you mean {close}?"
    return f"Use storybook, a folder, a .safetensors or .ckpt file, or a hub name like {PHOTO_MODEL}."


def _unopened(path: Path) -> str:
    if path.suffix in PICKLES:
        return (
            f"{path} is a pickle, which can run code when it is opened, so it was not opened. "
            f"Use a .safetensors file, or a diffusers folder such as {PHOTO_MODEL}."
        )
    return f"{path} is not a model: use a .safetensors or .ckpt file, or a folder with model_index.json."


def _is_whole(folder: Path) -> bool:
    # A cached snapshot may lack some files of the repository.
    parts = [part for part in PARTS if part in ("unet", "vae", "text_encoder")]
    if (folder / "text_encoder_2").is_dir():
        parts.append("text_encoder_2")
    return all((folder / part).is_dir() for part in PARTS) and all(
        any((folder / part).glob("*.safetensors")) or any((folder / part).glob("*.bin")) for part in parts
    )


def _is_model(folder: Path) -> bool:
    alone = not (folder / "model_index.json").is_file()
    return _is_whole(folder) or (alone and any(map(_is_root_model, folder.iterdir())))


def find_folder(
    model: str | Path,
    files: Sequence[str],
    whole: Callable[[Path], bool],
    *,
    what: str,
    revision: str | None = None,
) -> Path:
    """A local folder, or that of a hub repository's files (`from_hub`). what: names the model in errors.

    Raises ModelError if it is neither, and InputError for the revision of a local folder.
    """
    folder = Path(model).expanduser()
    if folder.exists():
        if revision is not None:
            raise InputError(
                f"{model} is a local folder, so --revision {revision} does not apply; remove it."
            )
        return folder
    if is_hub_model(str(model)):
        return from_hub(str(model), files, whole, revision=revision)
    close = closest_file(folder)
    hint = f"Did you mean {close}?" if close else "Use a folder, or a Hugging Face OWNER/NAME."
    raise ModelError(f"{model}: no such {what}. {hint}")


def from_hub(
    name: str, files: Sequence[str], whole: Callable[[Path], bool], *, revision: str | None = None
) -> Path:
    """The folder of a hub repository in the cache, downloaded if needed. Raises ModelError."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(*, local: bool, more: Sequence[str] = ()) -> Path:
        patterns = [*files, *more]
        found = snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local)
        return Path(found)

    one = f" {files[0]}" if len(files) == 1 else ""
    command = f"hf download {name}{one}" + (f" --revision {revision}" if revision else "")
    with contextlib.suppress(LocalEntryNotFoundError):
        folder = fetch(local=True)
        if whole(folder):
            return folder
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{name} is not in the cache and HF_HUB_OFFLINE is set. Fetch it: {command}")
    try:
        folder = fetch(local=False)
        for more in (HUB_HALVES, HUB_PICKLES, None) if files is HUB_FILES else ():
            if not whole(folder) and (patterns := _listed_root(name, revision) if more is None else more):
                folder = fetch(local=False, more=patterns)
        return folder
    except ModelError:
        raise
    except Exception as error:
        raise hub_error(error, name, command, revision=revision) from None


# --- cards ---------------------------------------------------------------


def _card(stored: Stored, name: str, native_size: int) -> Card:
    values = stored.card
    psnr = values.get("known_psnr")
    path = Path(name)
    own = name if not os.path.exists(name) else path.stem if path.is_file() else path.resolve().name
    return Card(
        name=str(values.get("name") or own),
        native_size=int(values.get("native_size") or native_size),
        known_psnr=None if psnr is None else float(psnr),
        closed_vocabulary=bool(values.get("closed_vocabulary")),
        **_ranges(stored),
        **_recommended(values, stored.path),
    )


def _ranges(stored: Stored) -> dict[str, Any]:
    """The scales of a distilled model. Raises ModelError if its card does not say them."""
    if not stored.configs["unet"].get("time_cond_proj_dim"):
        return {}
    found = {}
    for name in ("text_cfg_range", "image_cfg_range"):
        try:
            low, high = map(float, stored.card[name])
        except (KeyError, TypeError, ValueError):
            raise ModelError(
                f"{stored.path}: its UNet takes guidance scales as an input, and its ip2p.json has no usable "
                f'{name}, such as [1, 12]. Use a model that "ip2p distill" wrote.'
            ) from None
        found[name] = (low, high)
    return found


def _recommended(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings that a card recommends. Raises ModelError for one out of range."""
    found = {name: values[name] for name in RECOMMENDED if values.get(name) is not None}
    try:
        settings = EditSettings.read(found)
    except InputError as error:
        raise ModelError(
            f"{path}: its ip2p.json cannot be used: {error} Correct it there, or update ip2p."
        ) from None
    return {name: getattr(settings, name) for name in found}


def _square(size: int | list[int] | tuple[int, int] | None) -> int:
    if size is None:
        return 64
    return size if isinstance(size, int) else max(size)
