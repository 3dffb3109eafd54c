"""The networks that metrics use: CLIP, DINO and DINOv2, each at a pinned revision.

Each has its own preprocessing, which affects similarities more than a new revision would (docs/evaluate.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ip2p.base.errors import InputError, ModelError
from ip2p.editing.rank import CLIP_MODEL, find_clip
from ip2p.models.bundle import from_hub, packaged_models
from ip2p.models.clip import MEAN, STD, Clip, pooled_features
from ip2p.models.load import quiet, unreadable
from ip2p.pictures.images import to_pil, to_tensor

Picture = Float[Tensor, "3 height width"]  # in [0, 1]
Features = Float[Tensor, "features"]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LONGEST = 480 / 224  # maximum aspect ratio of PIE-Bench's resize
BATCH = 16  # pictures per batch
CLIP_SIDE = 512  # larger pictures are scaled down first, because CLIP's bicubic has no antialiasing


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """A network and its preprocessing.

    fit: "squeeze" resizes to a square with bicubic without antialiasing (the paper's code). "crop" resizes
    the shorter side to `short` with Pillow's antialiased bicubic and crops the central `side` pixels, so
    borders are ignored. "short" resizes the shorter side to `short` with antialiased bilinear and crops
    nothing (PIE-Bench). weights: the file in its repository.
    """

    name: str
    revision: str | None
    weights: str
    fit: Literal["squeeze", "crop", "short"]
    about: str
    side: int = 224
    short: int = 224


ENCODERS = {
    "clip": EncoderSpec(
        name=CLIP_MODEL,
        revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
        weights="model.safetensors",
        fit="squeeze",
        about="CLIP ViT-L/14, as in the paper",
    ),
    "clip_b32": EncoderSpec(
        name="openai/clip-vit-base-patch32",
        revision="3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
        weights="pytorch_model.bin",
        fit="crop",
        about="CLIP ViT-B/32, as in MagicBrush",
    ),
    "dino": EncoderSpec(
        name="facebook/dino-vits16",
        revision="abe3b354cb6a9b6f146096b14a4a9d7eecbcb4bd",
        weights="pytorch_model.bin",
        fit="crop",
        short=256,
        about="DINO ViT-S/16, as in MagicBrush",
    ),
    "dinov2": EncoderSpec(
        name="facebook/dinov2-base",
        revision="f9e44c814b77203eaa57a6bdbbd535f21ede1415",
        weights="model.safetensors",
        fit="crop",
        short=256,
        about="DINOv2 ViT-B/14",
    ),
    "structure": EncoderSpec(
        # Not pinned; --structure NAME@REVISION selects a revision.
        name="facebook/dino-vitb8",
        revision=None,
        weights="pytorch_model.bin",
        fit="short",
        about="DINO ViT-B/8, as in PIE-Bench",
    ),
}


def find_encoder(slot: str, name: str | None = None) -> Path:
    """The folder of an encoder. name: a folder, a Hub id, ID@REVISION, or "storybook" for its CLIP.

    None selects the one in `ENCODERS`. Raises ModelError with the download command for a missing one.
    """
    spec = ENCODERS[slot]
    if name is None:
        name, revision, weights = spec.name, spec.revision, spec.weights
    else:
        name, _, after = name.partition("@")
        revision, weights = after or None, "model.safetensors"
        if name == spec.name:
            weights = spec.weights
    if Path(name).expanduser().is_dir() or name in packaged_models():
        return find_clip(name, name)
    if name.count("/") != 1:
        raise ModelError(
            f"the folder {name} does not exist; choose another, or a model id such as {spec.name}."
        )
    return from_hub(
        name,
        ("*.json", "*.txt", weights),
        lambda folder: (folder / "config.json").is_file() and (folder / weights).is_file(),
        revision=revision,
    )


def load_vit(folder: Path, device: torch.device | str = "cpu") -> Any:
    """A ViT or DINOv2 model of transformers in fp32, without a pooling layer. Raises ModelError."""
    from transformers import AutoConfig, AutoModel

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            more = {"add_pooling_layer": False} if config.model_type == "vit" else {}
            model = AutoModel.from_pretrained(folder, local_files_only=True, **more)
    except Exception as error:  # safetensors and transformers have their own exceptions
        raise ModelError(unreadable(folder, error)) from None
    return model.float().eval().requires_grad_(False).to(device)


class Encoders:
    """Loads encoders on first use and embeds each picture and text once, until `forget`.

    names: folders or Hub ids that replace the pinned ones, by slot. signed: feed CLIP pictures in [-1, 1],
    unclamped, as the paper's script does although its CLIP expects [0, 1] (`--as-code`).
    """

    def __init__(
        self,
        names: Mapping[str, str] = {},
        *,
        device: torch.device | str = "cpu",
        signed: bool = False,
    ) -> None:
        self.names, self.device, self.signed = dict(names), device, signed
        self._models: dict[str, Any] = {}
        # The value includes the picture, so that its id remains valid.
        self._seen: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._texts: dict[tuple[str, str], Tensor] = {}

    def forget(self) -> None:
        """Drop all embeddings."""
        self._seen.clear()
        self._texts.clear()

    def model(self, slot: str) -> Any:
        """The network of a slot: a `Clip`, or a transformers ViT. Raises ModelError."""
        if slot not in self._models:
            folder = find_encoder(slot, self.names.get(slot))
            load: Any = Clip.load if slot.startswith("clip") else load_vit
            self._models[slot] = load(folder, self.device)
        return self._models[slot]

    def embed(self, slot: str, pictures: Sequence[Picture]) -> None:
        """Embed several pictures in batches, for later calls of `image`."""
        todo = [p for p in {id(p): p for p in pictures}.values() if (slot, id(p)) not in self._seen]
        shapes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for picture in todo:
            ready = self.prepared(slot, picture)
            shapes.setdefault(tuple(ready.shape), []).append((picture, ready))
        for alike in shapes.values():
            for start in range(0, len(alike), BATCH):
                some = alike[start : start + BATCH]
                found = self._embedded(slot, torch.stack([ready for _, ready in some]))
                for (picture, _), row in zip(some, found, strict=True):
                    self._seen[slot, id(picture)] = picture, row

    def image(self, slot: str, picture: Picture) -> Features:
        """The embedding of a picture in [0, 1], of unit length."""
        if (slot, id(picture)) not in self._seen:
            self.embed(slot, [picture])
        return self._seen[slot, id(picture)][1]

    def text(self, slot: str, text: str) -> Features:
        """A CLIP's embedding of a text, of unit length; the text is truncated to 77 tokens."""
        if (slot, text) not in self._texts:
            self._texts[slot, text] = self.model(slot).texts([text])[0]
        return self._texts[slot, text]

    def prepared(self, slot: str, picture: Picture) -> Picture:
        """The network's input for a picture in [0, 1], normalized: [3, side, side] or [3, h, w]."""
        spec, model = ENCODERS[slot], self.model(slot)
        clip = isinstance(model, Clip)
        side = model.size if clip else min(spec.side, model.config.image_size)
        short = round(spec.short * side / spec.side)
        if clip and spec.fit == "squeeze":
            picture = picture * 2 - 1 if self.signed else _small(picture)
            square = F.interpolate(picture[None], (side, side), mode="bicubic", align_corners=False)[0]
        elif spec.fit == "short":
            low, high = sorted(picture.shape[-2:])
            scale = min(short / low, short * LONGEST / high)
            size = tuple(max(1, int(edge * scale)) for edge in picture.shape[-2:])
            square = F.interpolate(picture[None], size, mode="bilinear", align_corners=False, antialias=True)[
                0
            ]
        else:
            image = to_pil(picture * 2 - 1)
            scale = short / min(image.size)
            size = tuple(max(short, int(edge * scale)) for edge in image.size)
            image = image.resize(size, Image.Resampling.BICUBIC)  # type: ignore[arg-type]
            left, top = (round((edge - side) / 2) for edge in image.size)
            image = image.crop((left, top, left + side, top + side))
            square = (to_tensor(image)[0] + 1) / 2
        return normalized(square, *((MEAN, STD) if clip else IMAGENET))

    @torch.inference_mode()
    def _embedded(self, slot: str, ready: Tensor) -> Tensor:
        model, ready = self.model(slot), ready.to(self.device)
        if isinstance(model, Clip):
            found = pooled_features(model.model.get_image_features(pixel_values=ready))
        elif slot == "structure":
            raise InputError("the structure encoder has no embedding of a whole picture; use `keys`.")
        else:
            found = model(ready, **_any_size(model)).last_hidden_state[:, 0]  # the class token
        return F.normalize(found.float(), dim=-1).cpu()

    @torch.inference_mode()
    def keys(self, ready: Picture) -> Float[Tensor, "tokens width"]:
        """The keys of the structure encoder's last attention layer, all heads, for a normalized picture."""
        model = self.model("structure")
        kept: list[Tensor] = []
        layers = model.layers if hasattr(model, "layers") else model.encoder.layer
        hook = layers[-1].attention.k_proj.register_forward_hook(lambda *found: kept.append(found[-1]))
        try:
            model(ready[None].to(self.device), **_any_size(model))
        finally:
            hook.remove()
        return kept[0][0].float().cpu()


def normalized(picture: Picture, mean: Sequence[float], std: Sequence[float]) -> Picture:
    """(picture - mean) / std per color channel."""
    low, spread = (picture.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (picture - low) / spread


def _small(picture: Picture) -> Picture:
    if max(picture.shape[-2:]) <= CLIP_SIDE:
        return picture
    image = to_pil(picture * 2 - 1)
    image.thumbnail((CLIP_SIDE, CLIP_SIDE), Image.Resampling.LANCZOS)
    return (to_tensor(image)[0] + 1) / 2


def _any_size(model: Any) -> dict[str, bool]:
    return {"interpolate_pos_encoding": True} if model.config.model_type == "vit" else {}
