"""Baselines for editors: SDEdit and text-to-image with the same base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ip2p.base.devices import NoiseStream
from ip2p.base.errors import translated_errors
from ip2p.diffusion.guidance import guided
from ip2p.diffusion.samplers import sampler_for
from ip2p.diffusion.schedule import SPACINGS
from ip2p.models.text import join_prompts
from ip2p.pictures.images import resized, to_pil, to_tensor
from ip2p.settings import EditSettings
from ip2p.synth.pairs import PairMaker, open_painter


class CaptionPainter:
    """Generates from a caption, starting from noise or a noised picture, with any base of `synth pairs`.

    An editor as the base gets a zero image latent, that is, no input picture.
    """

    def __init__(self, base: str | Path, *, device: str = "auto", dtype: str = "auto") -> None:
        # PairMaker supports Stable Diffusion and editors, and fills in missing image channels.
        maker = PairMaker(open_painter(base, device=device, dtype=dtype))
        self.editor, self.network = maker.editor, maker.network

    @torch.inference_mode()
    def draw(
        self,
        pictures: Sequence[Image.Image],
        captions: Sequence[str],
        *,
        seeds: Sequence[int],
        settings: EditSettings,
        strength: float | None,
        batch_size: int = 1,
    ) -> list[Image.Image]:
        """One result per picture, at its size.

        strength: of SDEdit (Meng et al. 2022), the fraction of the steps that run, from 0 to 1. The picture's
        latents get the noise of that level, and sampling starts there. None starts from pure noise. The
        guidance scale is the text scale of the settings.
        """
        editor = self.editor
        chosen = editor.resolved(settings)
        steps = chosen.steps or 0
        sigmas = SPACINGS[chosen.schedule or "linspace"](editor.schedule, steps)
        # As in diffusers' image-to-image pipeline: the last int(steps · strength) steps.
        begin = 0 if strength is None else steps - min(int(steps * strength + 1e-9), steps)
        sizes = [editor.working_size(picture.size, chosen.size) for picture in pictures]
        results: dict[int, Image.Image] = {}
        for size in dict.fromkeys(sizes):
            alike = [k for k, each in enumerate(sizes) if each == size]
            for first in range(0, len(alike), batch_size):
                some = alike[first : first + batch_size]
                shown = torch.cat([to_tensor(resized(pictures[k], size)) for k in some])
                with translated_errors():
                    latents = editor.encode_image(shown) * editor.bundle.latent_scale
                    noise = NoiseStream([seeds[k] for k in some], latents.shape[1:], editor.device)
                    x = noise() * sigmas[begin] + (latents if strength is not None else 0)
                    denoise = guided(
                        self.network,
                        text=join_prompts([editor.encode_text(captions[k], size) for k in some]),
                        null_text=editor.encode_text(chosen.negative, size),
                        image=None,
                        text_cfg=float(chosen.text_cfg or 0),
                        image_cfg=1.0,
                    )
                    sampler = sampler_for(chosen.sampler or "", editor.schedule)
                    for step in sampler(denoise, x, sigmas[begin:], noise):
                        x = step
                    for k, row in zip(some, x, strict=True):
                        results[k] = resized(to_pil(editor.decode(row[None])), pictures[k].size)
        return [results[k] for k in range(len(pictures))]
