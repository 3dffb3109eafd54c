"""An editor's networks from a diffusers folder, a hub name, or `storybook`, the model in the package."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ip2p.errors import ModelError
from ip2p.images import nearest

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PACKAGED = Path(__file__).parent
PHOTO_MODEL = "timbrooks/instruct-pix2pix"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# Weights that are pickles: opening one can run code, so none is opened.
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
HUB_FILES = [
    *("model_index.json", "ip2p.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt"),
    *("unet/config.json", "vae/config.json", "text_encoder/config.json"),
    # The full-precision weights, whole or in shards, and not the fp16 or non-EMA twins beside them.
    *("*/diffusion_pytorch_model.safetensors", "*/diffusion_pytorch_model-*-of-*.safetensors"),
    *(
        "text_encoder/model.safetensors",
        "text_encoder/model-*-of-*.safetensors",
        "*/*.safetensors.index.json",
    ),
]


@dataclass(frozen=True)
class Card:
    """What a model says of itself in `ip2p.json`; every field may be missing there.

    native_size: the side in pixels that it was trained at. known_psnr: below this reconstruction
    PSNR in dB of its autoencoder, a picture is far from what it knows. text_cfg, image_cfg: the
    scales to use unless others are asked for (the paper's, if the model names none).
    """

    name: str
    native_size: int
    known_psnr: float | None = None
    text_cfg: float = 7.5
    image_cfg: float = 1.5


@dataclass(frozen=True)
class Bundle:
    """The parts of an editor, in eval mode and without gradients.

    latent_scale multiplies target latents, not those of the input image. latent_factor is pixels a
    latent cell; size_multiple is what the pixel sizes must be a multiple of.
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


def load_bundle(
    model: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Bundle:
    """Load a model folder in the layout of StableDiffusionInstructPix2PixPipeline.

    `model`: `storybook`, a folder, or a hub name such as timbrooks/instruct-pix2pix. Only
    safetensors are read, and only into classes named here: nothing in the folder is run. The UNet
    and the text encoder take `dtype`; the autoencoder takes it if it is fp16 and fp32 otherwise,
    since bf16 keeps too few bits for pixels. Raises ModelError.
    """
    folder = find_model(model)
    configs = _checked_configs(folder)
    # Imported here: these take seconds, and a bad folder should say so at once.
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    vae_dtype = dtype if dtype == torch.float16 else torch.float32
    unet = _load_part(UNet2DConditionModel, folder, "unet", dtype).to(device)
    vae = _load_part(AutoencoderKL, folder, "vae", vae_dtype).to(device)
    text_encoder = _load_part(CLIPTextModel, folder, "text_encoder", dtype).to(device)
    try:
        with _quiet():
            tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:
        raise ModelError(_unreadable(folder / "tokenizer", error)) from None
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    halvings = len(unet.config.block_out_channels) - 1
    return Bundle(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler_config=configs["scheduler"],
        latent_scale=vae.config.scaling_factor,
        latent_factor=factor,
        size_multiple=max(8, factor * 2**halvings),
        card=_read_card(folder, str(model), native_size=_square(unet.config.sample_size) * factor),
        folder=folder,
    )


# --- finding -----------------------------------------------------------------------------------


def find_model(model: str | Path) -> Path:
    """The folder of a model: the packaged one, a local one, or a hub one fetched into the cache."""
    name = str(model)
    if not name.strip():
        raise ModelError(
            "The model's name is empty. Use storybook, a folder, or a hub name like " + PHOTO_MODEL + "."
        )
    path = Path(name).expanduser()
    if path.is_file() or (path.suffix in PICKLES and not path.is_dir()):
        raise ModelError(_single_file(path))
    if path.is_dir():
        return path
    packaged = packaged_models()
    if name in packaged:
        return PACKAGED / name
    if name == "storybook":
        raise ModelError(
            "The storybook model is not in this installation. Make it: ip2p storybook build --preset smoke"
        )
    local = name.startswith((".", "~", "/", "\\")) or name.count("/") != 1 or path.parent.is_dir()
    if local or not re.fullmatch(r"[\w.\-]+/[\w.\-]+", name):
        raise ModelError(f"{name}: no such model folder. {_closest(path, packaged)}")
    return _from_hub(name)


def packaged_models() -> list[str]:
    """The names of the models inside the package."""
    return sorted(entry.parent.name for entry in PACKAGED.glob("*/model_index.json"))


def _closest(path: Path, packaged: list[str]) -> str:
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, beside)
    if path.parent == Path(".") and nearest(path.name, packaged):
        close = nearest(path.name, packaged)
    if close:
        return f"Did you mean {path.parent / close}?"
    return f"Use storybook, a folder in the diffusers format, or a hub name like {PHOTO_MODEL}."


def _single_file(path: Path) -> str:
    if path.suffix in PICKLES:
        return (
            f"{path} is a pickle, which can run code when it is opened, so it was not opened. "
            f"Use a diffusers folder with .safetensors weights, such as {PHOTO_MODEL}."
        )
    return (
        f"{path} is a file; a model is a folder in the diffusers format. Name the one with model_index.json."
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    def fetch(*, local: bool) -> Path:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=local))

    with contextlib.suppress(LocalEntryNotFoundError):
        folder = fetch(local=True)
        # A snapshot may hold other files of the repository than an editor's.
        if all((folder / part).is_dir() for part in PARTS):
            return folder
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{name} is not in the cache and HF_HUB_OFFLINE is set. Fetch it: hf download {name}"
        )
    try:
        return fetch(local=False)
    except GatedRepoError:
        raise ModelError(
            f"{name} asks for an agreement. Accept it on its page, then: HF_TOKEN=... hf download {name}"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(f"{name} is neither a folder here nor a model on the hub. Check the name.") from None
    except Exception as error:  # the hub's client raises its own, its transport's, and OSError
        raise ModelError(
            f"{name} is not in the cache and the hub cannot be reached ({type(error).__name__}). "
            f"Where there is a network: hf download {name}"
        ) from None


# --- reading -----------------------------------------------------------------------------------


def _checked_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON of every part, after all that can be told before weights are read."""
    index = _read_json(folder / "model_index.json")
    kind = index.get("_class_name", "")
    if "XL" in str(kind):
        raise ModelError(
            f"{folder} is an SDXL model ({kind}), which this version cannot run. Use {PHOTO_MODEL}."
        )
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(missing)}; an editor is a folder with {', '.join(PARTS)}. "
            "Save it with diffusers' save_pretrained."
        )
    names = {"scheduler": "scheduler_config.json", "tokenizer": ""}
    configs = {
        part: _read_json(folder / part / names.get(part, "config.json"))
        for part in PARTS
        if part != "tokenizer"
    }
    channels = configs["unet"].get("in_channels")
    latent = configs["vae"].get("latent_channels", 4)
    if channels != 2 * latent:
        raise ModelError(
            f"This UNet takes {channels} channels; an editor needs {2 * latent}. "
            f"Train one: ip2p train --base {folder}"
        )
    return configs


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path} is missing; a model is a folder in the diffusers format. Check the path."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(_unreadable(path, error)) from None
    if not isinstance(value, dict):
        raise ModelError(_unreadable(path, ValueError("not a JSON object")))
    return value


def _read_card(folder: Path, name: str, native_size: int) -> Card:
    said = _read_json(folder / "ip2p.json") if (folder / "ip2p.json").exists() else {}
    psnr = said.get("known_psnr")
    return Card(
        name=str(said.get("name") or (name if not os.path.isdir(name) else Path(name).resolve().name)),
        native_size=int(said.get("native_size") or native_size),
        known_psnr=None if psnr is None else float(psnr),
        **{k: float(said[k]) for k in ("text_cfg", "image_cfg") if said.get(k) is not None},
    )


def _load_part(kind: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
    weights = [path for path in (folder / part).iterdir() if path.suffix == ".safetensors"]
    if not weights:
        pickles = [path.name for path in (folder / part).iterdir() if path.suffix in PICKLES]
        if pickles:
            raise ModelError(_single_file(folder / part / pickles[0]))
        raise ModelError(f"{folder / part} has no .safetensors weights. Fetch or save the model again.")
    try:
        with _quiet():
            model, report = kind.from_pretrained(
                folder / part,
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # safetensors, diffusers and transformers each raise their own
        raise ModelError(_unreadable(folder / part, error)) from None
    # A loader fills what is missing with noise and only warns; pictures of noise would be the result.
    absent = [*report["missing_keys"], *(str(key) for key in report.get("mismatched_keys", ()))]
    if absent:
        raise ModelError(
            f"{folder / part} lacks {len(absent)} weights, {absent[0]} first. Fetch or save it again."
        )
    return model.eval().requires_grad_(False)


def _unreadable(path: Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"{path} cannot be read ({reason}). Fetch or save the model again."


def _square(size: int | list[int] | tuple[int, int] | None) -> int:
    if size is None:
        return 64
    return size if isinstance(size, int) else max(size)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
