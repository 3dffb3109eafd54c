"""A safety check with an image classifier of transformers: a hook of `synth filter`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ip2p.base.devices import pick_device
from ip2p.base.errors import ModelError
from ip2p.models.bundle import from_hub, is_hub_name
from ip2p.models.load import quiet, unreadable
from ip2p.pictures.images import closest_file

UNSAFE = re.compile(r"nsfw|unsafe|porn|hentai|sexy|explicit|nudity|gore", re.IGNORECASE)
SAFE = re.compile(r"\b(?:not|non|no)\b", re.IGNORECASE)  # as in "not nsfw"
FILES = ("*.json", "*.safetensors")
MOST = 0.5  # maximum probability of a safe picture


class Classifier:
    """A picture is unsafe if the unsafe labels have a total probability above `MOST`.

    model: a folder or a Hugging Face name. Only safetensors are loaded, and no code from the folder is
    executed. Raises ModelError if the model is not an image classifier or has no unsafe label.
    """

    def __init__(self, model: str, *, device: str = "cpu", batch: int = 32) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

        folder = Path(model).expanduser()
        if not folder.exists():
            if not is_hub_name(model, folder):
                close = closest_file(folder)
                hint = f"Did you mean {close}?" if close else "Use a folder, or a Hugging Face OWNER/NAME."
                raise ModelError(f"--safety {model}: no such model. {hint}")
            folder = from_hub(model, FILES, lambda found: any(found.glob("*.safetensors")))
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
        return [sum(one["score"] for one in each if one["label"] in self.unsafe) <= MOST for each in found]
