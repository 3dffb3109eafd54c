"""Recognizes models of other families, by pipeline or weights, and names the tools that open them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

EDITORS = "ip2p opens SD 1.x, SD 2.x and SDXL editors, such as timbrooks/instruct-pix2pix."


@dataclass(frozen=True)
class Family:
    """A family of models that ip2p does not open. pipeline: diffusers' class that opens it."""

    name: str
    pipeline: str

    def refusal(self) -> str:
        """A line that names the family and what opens it."""
        return f"This is a {self.name} model. diffusers' {self.pipeline} and ComfyUI open it; {EDITORS}"


# Prefixes of diffusers' pipeline names; the first match counts.
PIPELINES = {
    "FluxKontext": Family("FLUX.1 Kontext", "FluxKontextPipeline"),
    "Flux2": Family("FLUX.2", "Flux2Pipeline"),
    "Flux": Family("FLUX", "FluxPipeline"),
    "StableDiffusion3": Family("Stable Diffusion 3", "StableDiffusion3Pipeline"),
    "QwenImage": Family("Qwen-Image", "QwenImagePipeline"),
    "StableCascade": Family("Stable Cascade", "StableCascadeCombinedPipeline"),
    "PixArt": Family("PixArt", "PixArtAlphaPipeline"),
    "Kandinsky": Family("Kandinsky", "AutoPipelineForImage2Image"),
}
# Names of weights, after the prefixes that files put before them.
WEIGHTS = {
    r"double_blocks\.0\.img_attn\.": Family(
        "FLUX (or FLUX.1 Kontext)", "FluxKontextPipeline or FluxPipeline"
    ),
    r"joint_blocks\.0\.": Family("Stable Diffusion 3", "StableDiffusion3Pipeline"),
}
PREFIXES = r"(?:model\.diffusion_model\.|diffusion_model\.|transformer\.|module\.)?"


def of_pipeline(name: str) -> Family | None:
    """The family of a diffusers pipeline class; None if ip2p may open it."""
    return next((family for start, family in PIPELINES.items() if name.startswith(start)), None)


def of_weights(names: Iterable[str]) -> Family | None:
    """The family of a single file by the names of its weights; None if ip2p may open it."""
    patterns = {re.compile(PREFIXES + pattern): family for pattern, family in WEIGHTS.items()}
    for name in names:
        for pattern, family in patterns.items():
            if pattern.match(name):
                return family
    return None


# Stable Diffusion UNets with other inputs than an editor's, by channels: purpose, and what opens them.
UNETS = {
    5: ("an SD 2 depth-to-image model", "diffusers' StableDiffusionDepth2ImgPipeline"),
    7: ("the SD upscaler", "diffusers' StableDiffusionUpscalePipeline"),
    9: (
        "an inpainting model",
        "diffusers' StableDiffusionInpaintPipeline, ComfyUI and AUTOMATIC1111's web UI",
    ),
}


def unet_refusal(channels: int, needed: int) -> str | None:
    """A line for a UNet whose number of channels shows another purpose, else None."""
    if channels not in UNETS:
        return None
    what, opener = UNETS[channels]
    return (
        f"Its UNet takes {channels} channels: it is {what}, which follows no instructions. {opener} open it. "
        f"An editor takes {needed}; {EDITORS}"
    )
