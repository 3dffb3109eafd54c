"""Which pictures are safe, asked of a picture classifier of transformers: a hook of `synth filter`."""

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
from ip2p.pictures.images import close_file

UNSAFE = re.compile(r"nsfw|unsafe|porn|hentai|sexy|explicit|nudity|gore", re.IGNORECASE)
SAFE = re.compile(r"\b(?:not|non|no)\b", re.IGNORECASE)  # as in "not nsfw"
FILES = ("*.json", "*.safetensors")
MOST = 0.5  # probability


class Classifier:
    """Calls a picture unsafe when the labels that say so have a probability above `MOST` together.

    model: a folder or a hub's name. Only safetensors are read, and no code of the folder is run. Raises
    ModelError for what is no picture classifier, or has no label that says so.
    """

    def __init__(self, model: str, *, device: str = "cpu", batch: int = 32) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

        folder = Path(model).expanduser()
        if not folder.exists():
            if not is_hub_name(model, folder):
                close = close_file(folder)
                hint = f"Did you mean {close}?" if close else "Name a folder, or a hub's OWNER/NAME."
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
                f"--safety {model} has no label for unsafe pictures, but {', '.join(labels[:8])}; name a "
                "classifier with one that is called nsfw, unsafe or porn."
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
        told = self.ask(list(pictures), top_k=self.labels, function_to_apply="softmax")
        return [sum(one["score"] for one in each if one["label"] in self.unsafe) <= MOST for each in told]
