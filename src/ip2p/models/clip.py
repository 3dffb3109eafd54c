"""CLIP as a judge: embeddings of pictures and texts, and the four similarities of the paper."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ip2p.base.errors import ModelError
from ip2p.models.load import quiet, unreadable

Pictures = Float[Tensor, "batch 3 height width"]
Embedding = Float[Tensor, "batch features"]
Similarity = Float[Tensor, "batch"]
# Mean and standard deviation of each colour in OpenAI's training data.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Similarities(NamedTuple):
    """Cosines, [batch] each, of pictures before and after an edit with the captions of both.

    The paper's filter keeps a pair with image_image ≥ 0.75 (its code: 0.70), both text_image ≥ 0.2
    and directional ≥ 0.2.
    """

    image_image: Similarity
    text_image_before: Similarity
    text_image_after: Similarity
    directional: Similarity


class Clip:
    """A transformers CLIPModel with its tokenizer. Embeddings have unit length."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.size: int = model.config.vision_config.image_size
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Clip":
        """Load a CLIPModel folder in fp32, with the tokenizer in it or in the folder `tokenizer` beside it.

        Reads safetensors, else a `.bin` (tensors only). Raises ModelError for any other folder.
        """
        from transformers import CLIPModel, CLIPTokenizer

        folder = Path(folder)
        words = folder if (folder / "tokenizer_config.json").exists() else folder.parent / "tokenizer"
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder} is not a CLIP model: config.json is missing. Name the folder that holds it."
            )
        # Without this, transformers would load a pickle beside safetensors in some layouts.
        only = True if any(folder.glob("model*.safetensors")) else None
        try:
            with quiet():
                model = CLIPModel.from_pretrained(
                    folder, use_safetensors=only, weights_only=True, local_files_only=True
                )
                tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True)
        except Exception as error:  # safetensors and transformers each raise their own
            raise ModelError(unreadable(folder, error)) from None
        return cls(model.to(device), tokenizer)

    @torch.inference_mode()
    def images(self, pictures: Pictures) -> Embedding:
        """Embed pictures in [0, 1], resized to the model's square (bicubic, no antialias: the paper's code).

        Raises ValueError for values outside [0, 1]: with [-1, 1], CLIP would silently give wrong embeddings.
        """
        if pictures.min() < 0 or pictures.max() > 1:
            low, high = pictures.min().item(), pictures.max().item()
            raise ValueError(f"CLIP takes pictures in [0, 1]; these reach from {low:.3g} to {high:.3g}")
        pictures = pictures.to(self.device)
        square = F.interpolate(pictures.float(), (self.size, self.size), mode="bicubic", align_corners=False)
        mean, std = (square.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        found = self.model.get_image_features(pixel_values=(square - mean) / std)
        return F.normalize(pooled_features(found), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Embedding:
        """Embed texts, truncated to the model's maximum number of tokens."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        features = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return F.normalize(pooled_features(features), dim=-1)

    def similarities(
        self, before: Pictures, after: Pictures, texts_before: list[str], texts_after: list[str]
    ) -> Similarities:
        """The four similarities of each pair of pictures [batch, 3, h, w] in [0, 1] and its two captions."""
        return similarities(
            self.images(before), self.images(after), self.texts(texts_before), self.texts(texts_after)
        )


def similarities(
    image_before: Embedding, image_after: Embedding, text_before: Embedding, text_after: Embedding
) -> Similarities:
    """The four similarities from embeddings; directional is the cosine of the two changes (section 3.1.2)."""
    return Similarities(
        image_image=F.cosine_similarity(image_before, image_after),
        text_image_before=F.cosine_similarity(image_before, text_before),
        text_image_after=F.cosine_similarity(image_after, text_after),
        directional=F.cosine_similarity(image_after - image_before, text_after - text_before),
    )


def pooled_features(features: Any) -> Tensor:
    """The projected embedding [batch, features] that `get_image_features` or `get_text_features` gave."""
    # transformers 5 wraps the projected embedding in an output; before, it was the embedding itself.
    return features if isinstance(features, Tensor) else features.pooler_output
