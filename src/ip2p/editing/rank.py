"""Rank several results by CLIP: change plus similarity (`ip2p edit --count 8 --best 2`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ip2p.base.errors import ModelError
from ip2p.models.bundle import find_model, from_hub, packaged_models
from ip2p.models.clip import Clip, similarities
from ip2p.pictures.images import flattened, to_tensor

CLIP_MODEL = "openai/clip-vit-large-patch14"  # as in the paper
HUB_FILES = ("*.json", "*.txt", "model.safetensors", "model-*-of-*.safetensors")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one result. directional: the cosine of the picture change and the text change.

    image_similarity: the cosine of the two pictures. An unchanged picture scores 0 and 1. A good edit gains
    directional similarity at a small loss of image similarity, so results are ranked by the sum.
    """

    directional: float
    image_similarity: float

    @property
    def total(self) -> float:
        return self.directional + self.image_similarity


def rank_results(
    clip: Clip,
    before: Image.Image,
    results: Sequence[Image.Image],
    *,
    instruction: str,
    caption: str | None = None,
    edited_caption: str | None = None,
) -> list[Scores]:
    """The scores of each result, in the order of `results`.

    The text direction is from `caption` to `edited_caption`. Without captions it is from the empty text to
    the instruction; with only a caption, to the caption followed by the instruction.
    """
    caption = caption or ""
    if edited_caption is None:
        edited_caption = f"{caption}, {instruction}" if caption else instruction
    first = clip.images(clip_pixels(before))
    words_before, words_after = clip.texts([caption, edited_caption]).split(1)
    scores = []
    for result in results:
        found = similarities(first, clip.images(clip_pixels(result)), words_before, words_after)
        scores.append(Scores(directional=found.directional.item(), image_similarity=found.image_image.item()))
    return scores


def image_similarity(clip: Clip, one: Image.Image, other: Image.Image) -> float:
    """The cosine of two pictures' embeddings."""
    return torch.cosine_similarity(clip.images(clip_pixels(one)), clip.images(clip_pixels(other))).item()


def clip_pixels(picture: Image.Image) -> Tensor:
    """[1, 3, h, w] in [0, 1] for `Clip.images`, no larger than an editor's own results."""
    small = flattened(picture).convert("RGB")
    # CLIP's bicubic resize has no antialiasing, so downscale large photographs first.
    small.thumbnail((512, 512), Image.Resampling.LANCZOS)
    return (to_tensor(small) + 1) / 2


def find_clip(clip: str | None, model: str, *, revision: str | None = None) -> Path:
    """The folder of the CLIP `clip`, by default the one that comes with the editor `model`.

    clip: a folder, a hub id, or a packaged model that includes one. Raises ModelError if there is none, with
    the command that downloads one.
    """
    if clip is None:
        folder = find_model(model, revision=revision) / "clip"
        if (folder / "config.json").is_file():
            return folder
        raise ModelError(
            f"{model} does not include a CLIP model. Download one (hf download {CLIP_MODEL}) and add "
            f"--clip {CLIP_MODEL}"
        )
    path = Path(clip).expanduser()
    if path.is_dir():
        return path
    if clip in packaged_models():
        return find_clip(None, clip)
    if clip.count("/") != 1 or path.parent.is_dir():
        raise ModelError(
            f"{clip}: no such folder. Give the folder of a CLIP model, or a hub id like {CLIP_MODEL}."
        )
    return from_hub(clip, HUB_FILES, _is_whole)


def _is_whole(folder: Path) -> bool:
    # A snapshot may contain only other files of the repository.
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
