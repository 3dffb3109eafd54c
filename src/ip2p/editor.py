"""Edit pictures by instruction: load a model once, edit many."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from ip2p.models.bundle import PHOTO_MODEL, Bundle, find_model, load_bundle
from ip2p.models.controlnet import EXAMPLE as CONTROLNET
from ip2p.models.controlnet import (
    Control,
    check_controlnet,
    check_scale,
    control_tensor,
    find_controlnet,
    load_controlnet,
)
from ip2p.models.lora import apply_loras, check_loras
from ip2p.models.memory import (
    Memory,
    MemoryMode,
    bytes_on,
    check_memory,
    choose_memory,
    footprint,
    footprint_of_files,
    free_bytes,
    offload,
)
from ip2p.models.text import Prompt, encode_prompt

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel

Picture = str | Path | bytes | Image.Image
# Called after each step with its number, their count, and the latents so far [batch, 4, h, w].
Callback = Callable[[int, int, Tensor], object]


class Editor:
    """A model, ready to edit. `Editor.load(...)` makes one.

    memory: "low", "auto" or "high", the thrift that an edit takes (`models.memory.choose_memory`).
    device: where the parts work; if they do not lie there, each is brought when it is needed.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        controlnet: ControlNetModel | None = None,
        memory: MemoryMode = "auto",
        device: torch.device | None = None,
    ) -> None:
        check_memory(memory)
        if controlnet is not None:
            check_controlnet(controlnet, bundle)
        self.bundle = bundle
        self.controlnet = controlnet
        self.memory = memory
        home = bundle.unet.device
        self._offloads = device is not None and device.type != home.type
        self.device = device if device is not None and self._offloads else home
        self.schedule = schedule_from_config(bundle.scheduler_config)
        self.model = UNetDenoiser(bundle.unet, self.schedule, bundle.condition_scale)
        # On a CPU a batch saves little, and half-precision kernels round by its size: alone, an image that is
        # made again is equal to the byte.
        self.batch_size = 1 if self.device.type == "cpu" or memory == "low" else 4
        self._said_far = False
        self._footprint = footprint(bundle, controlnet)
        # What works together lies on the device together.
        groups = [bundle.text_encoder, bundle.text_encoder_2], [bundle.unet, controlnet], [bundle.vae]
        self._parts = [[part for part in group if part is not None] for group in groups]
        if self._offloads:
            offload(self._parts, self.device)

    @classmethod
    def load(
        cls,
        model: str | Path = "storybook",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        weights: Literal["ema", "plain"] = "ema",
        vae: str | Path | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
        controlnet: str | Path | None = None,
        memory: MemoryMode = "auto",
    ) -> Editor:
        """Load an editor: `storybook`, a hub name, a diffusers folder or a single file (`load_bundle`).

        revision: of a hub name. weights: which of a single file's two sets. vae: another autoencoder.
        loras: files, each with its weight. controlnet: a ControlNet's folder or hub name. memory: as in
        the class. Raises ModelError, InputError, and ResourceError for more than the device can hold.
        """
        place, number = pick_device(device), pick_dtype(pick_device(device), dtype)
        check_loras(loras)
        check_memory(memory)
        control_folder = None if controlnet is None else find_controlnet(controlnet)
        need = footprint_of_files(find_model(model), number, controlnet=control_folder)
        # The autoencoder's own size is the one that the model was made for.
        plan = choose_memory(need, memory, free_bytes(place), (need.tile, need.tile), device=place.type)
        home = torch.device("cpu") if plan.offload else place
        bundle = load_bundle(model, device=home, dtype=number)
        apply_loras(bundle, loras)
        control = None
        if control_folder is not None:
            control = load_controlnet(control_folder, device=home, dtype=number)
        return cls(bundle, controlnet=control, memory=memory, device=place)

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
    def encode_text(self, text: str, size: tuple[int, int] | None = None) -> Tensor | Prompt:
        """[1, tokens, features], or for SDXL a Prompt, which knows the size (width, height) of the picture.

        A warning names the text cut off.
        """
        native = self.bundle.card.native_size
        prompt = encode_prompt(self.bundle, text, size or (native, native))
        return prompt.hidden if self.bundle.kind == "sd" else prompt

    @torch.inference_mode()
    def encode_image(self, pictures: Tensor) -> Tensor:
        """Pictures [batch, 3, H, W] in [-1, 1] → the latents that condition: the mode, not scaled; fp32.

        Raises ResourceError for a size at which an edit cannot fit.
        """
        vae = self._thrifty_vae(len(pictures), *pictures.shape[-2:])
        # The input image's latents stay unscaled: training saw them so.
        return vae.encode(pictures.to(self.device, vae.dtype)).latent_dist.mode().float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """A sampler's latents [batch, 4, h, w] → pictures [batch, 3, H, W] in about [-1, 1]; fp32."""
        factor = self.bundle.latent_factor
        vae = self._thrifty_vae(1, *(side * factor for side in latents.shape[-2:]))
        return vae.decode((latents / self.bundle.latent_scale).to(vae.dtype)).sample.float()

    def control(self, picture: Image.Image, size: tuple[int, int], scale: float = 1.0) -> Control:
        """A picture for the ControlNet, upright RGB, at the working size (width, height).

        Raises InputError without a ControlNet, or for a scale that is not 0 to 10.
        """
        if self.controlnet is None:
            raise InputError(
                f"A control image needs a ControlNet. Name one, for example --controlnet {CONTROLNET}."
            )
        return Control(self.controlnet, control_tensor(picture, size).to(self.device), check_scale(scale))

    def edit_latents(
        self,
        image_latent: Tensor | None,
        text: Tensor | Prompt,
        null_text: Tensor | Prompt,
        *,
        noise: NoiseStream,
        text_cfg: float = 7.5,
        image_cfg: float = 1.5,
        sampler: str = "euler_ancestral",
        sigmas: Tensor,
        rescale: float = 0.0,
        interval: tuple[float, float] = (0.0, 1.0),
        control: Control | None = None,
    ) -> Iterator[Tensor]:
        """Sample, yielding the latents [batch, 4, h, w] after each step; the last are the result's.

        image_latent: [1 or batch, 4, h, w] from `encode_image`, or None to draw from the text
        alone. text, null_text: [1 or batch, tokens, features] or Prompts of as many rows. `noise()`
        gives the start and then what the sampler asks for. sigmas: falling, with a final zero, as
        `diffusion.schedule` makes them. rescale, interval: see `guided`. control: from `self.control`.
        """
        start = noise() * sigmas[0]
        factor = self.bundle.latent_factor
        plan = self._plan(len(start), *(side * factor for side in start.shape[-2:]))
        denoise = guided(
            replace(self.model, control=control),
            text=text,
            null_text=null_text,
            image=image_latent,
            text_cfg=float(text_cfg),
            image_cfg=float(image_cfg),
            rescale=float(rescale),
            interval=interval,
            in_turn=not plan.passes_at_once,
        )
        sampling = SAMPLERS[sampler](denoise, start, sigmas, noise)
        while True:
            # Entered anew for each step: a generator must not hold the mode open over its caller's code.
            with torch.inference_mode():
                x = next(sampling, None)
            if x is None:
                return
            yield x

    def _plan(self, batch: int, height: int, width: int) -> Memory:
        """How to go about an edit of this size with what is free now. Raises ResourceError."""
        free = free_bytes(self.device)
        if free is not None:
            free += bytes_on(self._parts, self.device)
        return choose_memory(
            self._footprint,
            self.memory,
            free,
            (width, height),
            batch=batch,
            device=self.device.type,
            offload=self._offloads,
        )

    def _thrifty_vae(self, batch: int, height: int, width: int) -> AutoencoderKL:
        plan = self._plan(batch, height, width)
        vae = self.bundle.vae
        vae.use_tiling = plan.vae_tiling
        vae.use_slicing = plan != Memory()  # one picture at a time, with the same result
        return vae

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
