"""Edit pictures by instruction: load a model once, edit many."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ip2p import __version__
from ip2p.config import check_guidance, check_int, check_size
from ip2p.devices import MAX_SEED, NoiseStream, pick_device, pick_dtype
from ip2p.diffusion.denoiser import UNetDenoiser, guided
from ip2p.diffusion.samplers import SAMPLERS
from ip2p.diffusion.schedule import SPACINGS, schedule_from_config
from ip2p.errors import InputError, ModelError, ResourceError
from ip2p.images import MAX_PIXELS, fit_size, load_image, signed_psnr, to_pil, to_tensor
from ip2p.infotext import Settings, format_infotext
from ip2p.models.bundle import PHOTO_MODEL, Bundle, load_bundle

Picture = str | Path | bytes | Image.Image
# Called after each step with its number, their count, and the latents so far [batch, 4, h, w].
Callback = Callable[[int, int, Tensor], object]


class Editor:
    """A model, ready to edit. `Editor.load(...)` makes one."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.device = bundle.unet.device
        self.schedule = schedule_from_config(bundle.scheduler_config)
        self.model = UNetDenoiser(bundle.unet, self.schedule)
        # On a CPU a batch saves little, and half-precision kernels round by its size: alone, an image that is
        # made again is equal to the byte.
        self.batch_size = 1 if self.device.type == "cpu" else 4
        self._said_far = False

    @classmethod
    def load(
        cls,
        model: str | Path = "storybook",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ) -> Editor:
        """Load `storybook`, a diffusers folder, or a hub name. Raises ModelError, InputError."""
        place = pick_device(device)
        return cls(load_bundle(model, device=place, dtype=pick_dtype(place, dtype)))

    # --- the whole edit --------------------------------------------------------------------------

    @torch.inference_mode()
    def edit(
        self,
        image: Picture,
        instruction: str,
        *,
        text_cfg: float | None = None,
        image_cfg: float | None = None,
        steps: int = 20,
        sampler: str = "euler_ancestral",
        spacing: str = "linspace",
        seeds: Sequence[int] = (0,),
        negative: str = "",
        size: int | tuple[int, int] | None = None,
        batch_size: int | None = None,
        max_pixels: int | None = MAX_PIXELS,
        callback: Callback | None = None,
    ) -> list[Image.Image]:
        """Edit a picture, once for each seed; the results have the picture's own size.

        text_cfg: how strongly to follow the instruction; image_cfg: how strongly to keep the
        picture (equation 3); None takes the model's own value, else 7.5 and 1.5. negative: what to
        stay away from. size: the side the model works at instead of its native one, or its exact
        width and height. batch_size: how many seeds run at once, `self.batch_size` if None. Each
        result's `info` has the settings as "parameters", and the picture's exif and ICC profile;
        `images.save_image` writes them. Raises InputError, or ResourceError out of memory.
        """
        check_guidance(steps, text_cfg, image_cfg)
        text_cfg, image_cfg = self.scales(text_cfg, image_cfg)
        seeds = _checked_seeds(seeds)
        batch_size = self.batch_size if batch_size is None else batch_size
        if not instruction.strip():
            raise InputError('The instruction is empty. Say what to change, for example "make it night".')
        if sampler not in SAMPLERS:
            raise InputError(f"Sampler {sampler!r} is not known; use one of {', '.join(SAMPLERS)}.")
        if spacing not in SPACINGS:
            raise InputError(f"Spacing {spacing!r} is not known; use one of {', '.join(SPACINGS)}.")
        check_int("--batch-size", batch_size, 1, 10**6, "--batch-size 4")
        page = load_image(image, max_pixels=max_pixels)
        width, height = self.working_size(page.size, size)
        # The whole picture is resized, not cropped to fit: the result lies on the input pixel for pixel.
        shown = (
            page if page.size == (width, height) else page.resize((width, height), Image.Resampling.LANCZOS)
        )
        results = []
        with _memory_error(width, height):
            image_latent = self.encode_image(to_tensor(shown))
            self._say_if_far(shown, image_latent)
            text = self.encode_text(instruction)
            null_text = self.encode_text(negative)
            for start in range(0, len(seeds), batch_size):
                some = seeds[start : start + batch_size]
                latents = self.edit_latents(
                    image_latent,
                    text,
                    null_text,
                    noise=NoiseStream(some, image_latent.shape[1:], self.device),
                    text_cfg=text_cfg,
                    image_cfg=image_cfg,
                    sampler=sampler,
                    sigmas=SPACINGS[spacing](self.schedule, steps),
                )
                for step, x in enumerate(latents, 1):
                    if callback is not None:
                        callback(step, steps, x)
                # One at a time: a decoder's largest maps are far larger than the UNet's.
                results += [to_pil(_finite(self.decode(row[None]))) for row in x]
        for number, seed in enumerate(seeds):
            if results[number].size != page.size:
                results[number] = results[number].resize(page.size, Image.Resampling.LANCZOS)
            settings = Settings(
                instruction=instruction,
                negative=negative,
                steps=steps,
                sampler=sampler,
                spacing=spacing,
                text_cfg=text_cfg,
                image_cfg=image_cfg,
                seed=seed,
                size=(width, height),
                model=self.bundle.card.name,
                version=f"ip2p {__version__}",
            )
            results[number].info = {**page.info, "parameters": format_infotext(settings)}
        return results

    def scales(self, text_cfg: float | None, image_cfg: float | None) -> tuple[float, float]:
        """The scales given; for None those that the model's card recommends, else the paper's 7.5 and 1.5."""
        card = self.bundle.card
        return (
            card.text_cfg if text_cfg is None else text_cfg,
            card.image_cfg if image_cfg is None else image_cfg,
        )

    def working_size(
        self, pixels: tuple[int, int], size: int | tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """The width and height at which the model sees a picture of `pixels` (`images.fit_size`).

        Raises InputError for a size that the UNet cannot halve often enough.
        """
        multiple = self.bundle.size_multiple
        if isinstance(size, tuple):
            if any(side < multiple or side % multiple for side in size):
                near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in size)
                raise InputError(
                    f"Size {size[0]}x{size[1]} does not fit this model: sides are multiples of {multiple}. "
                    f"Try {near}."
                )
            return size
        check_size(size)
        return fit_size(*pixels, native=size or self.bundle.card.native_size, multiple=multiple)

    # --- its parts -------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode_text(self, text: str) -> Tensor:
        """[1, tokens, features]: the text encoder's last hidden state. A warning names the text cut off."""
        tokenizer = self.bundle.tokenizer
        limit = tokenizer.model_max_length
        whole = tokenizer(text, return_offsets_mapping=True, verbose=False)
        if len(whole["input_ids"]) > limit:
            # The last place is the end token's.
            cut = text[whole["offset_mapping"][limit - 1][0] :].strip()
            warnings.warn(
                f"The text is longer than {limit} tokens; this part has no effect: {cut!r}", stacklevel=1
            )
        tokens = tokenizer(text, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        return self.bundle.text_encoder(tokens["input_ids"].to(self.device))[0].float()

    @torch.inference_mode()
    def encode_image(self, pictures: Tensor) -> Tensor:
        """Pictures [batch, 3, H, W] in [-1, 1] → the latents that condition: the mode, not scaled; fp32."""
        vae = self.bundle.vae
        # The input image's latents stay unscaled: training saw them so.
        return vae.encode(pictures.to(self.device, vae.dtype)).latent_dist.mode().float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """A sampler's latents [batch, 4, h, w] → pictures [batch, 3, H, W] in about [-1, 1]; fp32."""
        vae = self.bundle.vae
        return vae.decode((latents / self.bundle.latent_scale).to(vae.dtype)).sample.float()

    def edit_latents(
        self,
        image_latent: Tensor | None,
        text: Tensor,
        null_text: Tensor,
        *,
        noise: NoiseStream,
        text_cfg: float = 7.5,
        image_cfg: float = 1.5,
        sampler: str = "euler_ancestral",
        sigmas: Tensor,
    ) -> Iterator[Tensor]:
        """Sample, yielding the latents [batch, 4, h, w] after each step; the last are the result's.

        image_latent: [1 or batch, 4, h, w] from `encode_image`, or None to draw from the text
        alone. text, null_text: [1 or batch, tokens, features]. `noise()` gives the start and then what
        the sampler asks for. sigmas: falling, with a final zero, as `diffusion.schedule` makes them.
        """
        denoise = guided(
            self.model,
            text=text,
            null_text=null_text,
            image=image_latent,
            text_cfg=float(text_cfg),
            image_cfg=float(image_cfg),
        )
        sampling = SAMPLERS[sampler](denoise, noise() * sigmas[0], sigmas, noise)
        while True:
            # Entered anew for each step: a generator must not hold the mode open over its caller's code.
            with torch.inference_mode():
                x = next(sampling, None)
            if x is None:
                return
            yield x

    def _say_if_far(self, shown: Image.Image, image_latent: Tensor) -> None:
        """Warn once when the autoencoder keeps a picture worse than those that it was trained on."""
        known = self.bundle.card.known_psnr
        if known is None or self._said_far:
            return
        # The condition's latents are not scaled and the decoder's input is.
        again = self.decode(image_latent * self.bundle.latent_scale)
        error = (again.clamp(-1, 1).cpu() - to_tensor(shown)).square().mean()
        psnr = signed_psnr(error).item()
        if psnr < known:
            self._said_far = True
            warnings.warn(
                f"This picture is far from what {self.bundle.card.name} knows (it keeps it to {psnr:.1f} dB, "
                f"and its own pages to {known:.1f} or more). For photographs: --model {PHOTO_MODEL}",
                stacklevel=1,
            )


@functools.lru_cache(maxsize=1)
def _loaded(model: str | Path, device: str | torch.device, dtype: str | torch.dtype) -> Editor:
    return Editor.load(model, device=device, dtype=dtype)


def edit(
    image: Picture,
    instruction: str,
    *,
    model: str | Path = "storybook",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    **settings: Any,
) -> list[Image.Image]:
    """Edit a picture in one call; `settings` are those of `Editor.edit`. The last model used stays loaded."""
    return _loaded(model, device, dtype).edit(image, instruction, **settings)


def _checked_seeds(seeds: Sequence[int]) -> list[int]:
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise InputError("No seed was given. Give one for each result, for example seeds=[1, 2].")
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise InputError(f"Seed {seed} is out of range; use 0 to {MAX_SEED}.")
    return seeds


def _finite(pixels: Tensor) -> Tensor:
    # A network that overflows its number format gives a black picture and no error.
    if not pixels.isfinite().all():
        raise ModelError("The model's result is not a number: its values overflow. Use --dtype fp32.")
    return pixels


class _memory_error:
    """Turn running out of memory into a ResourceError that names a smaller size."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
            isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        )
        if full:
            width, height = self.size
            raise ResourceError(
                f"Out of memory at {width}x{height}. Try --size {max(width, height) // 2} or --batch-size 1."
            ) from None
