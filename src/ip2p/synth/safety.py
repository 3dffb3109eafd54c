"""A safety check by an image classifier of transformers, used by `synth filter`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ip2p.base.devices import pick_device
from ip2p.base.errors import ModelError
from ip2p.models.bundle import find_folder
from ip2p.models.load import quiet, unreadable

UNSAFE = re.compile(r"nsfw|unsafe|porn|hentai|sexy|explicit|nudity|gore", re.IGNORECASE)
SAFE = re.compile(r"\b(?:not|non|no)\b", re.IGNORECASE)  # as in "not nsfw"
FILES = ("*.json", "*.safetensors")
MAX_UNSAFE = 0.5  # maximum unsafe probability of a safe picture


class Classifier:
    """A picture is unsafe if the unsafe labels have a total probability above `MAX_UNSAFE`.

    model: a folder or a Hugging Face name. Only safetensors are loaded, and no code from the folder is
    executed. Raises ModelError if the model is not an image classifier or has no unsafe label.
    """

    def __init__(self, model: str, *, device: str = "cpu", batch: int = 32) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

        folder = find_folder(
            model, FILES, lambda found: any(found.glob("*.safetensors")), what="model for --safety"
        )
        try:
            with quiet():
                network = AutoModelForImageClassification.from_pretrained(
                    folder, local_files_only=True, use_safetensors=True
                )
                processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, use_fast=False)
        except Exception as error:  # safetensors and transformers each raise their own
            raise ModelError(unreadable(folder, error)) from None
        labels = list(network.config.id2label.values())
        self.unsafe = {label for label in labels if UNSAFE.search(label) and not SAFE.search(label)}
        if not self.unsafe:
            raise ModelError(
                f"--safety {model} has no label for unsafe pictures. Its labels: {', '.join(labels[:8])}. "
                "Choose a classifier with a label such as nsfw, unsafe or porn."
            )
        self.ask: Any = pipeline(
            "image-classification",
            model=network,
            image_processor=processor,
            device=pick_device(device),
            batch_size=batch,
        )
        self.labels = len(labels)

    def __call__(self, pictures: Sequence[Image.Image]) -> list[bool]:
        """Which of the pictures are safe."""
        if not pictures:
            return []
        found = self.ask(list(pictures), top_k=self.labels, function_to_apply="softmax")
        return [
            sum(one["score"] for one in each if one["label"] in self.unsafe) <= MAX_UNSAFE for each in found
        ]
