"""Edit pictures by instruction: load a model once, edit many."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor

from ip2p import __version__
from ip2p.base.devices import MAX_SEED, NoiseStream, pick_device, pick_dtype
from ip2p.base.errors import InputError, ModelError, translated_errors
from ip2p.config import (
    MAX_SCALE,
    check_float,
    check_guidance,
    check_int,
    check_masking,
    check_more_guidance,
    check_size,
)
from ip2p.diffusion.denoiser import UNetDenoiser, guided
from ip2p.diffusion.samplers import SAMPLERS, sampler_for
from ip2p.diffusion.schedule import SPACINGS, schedule_from_config
from ip2p.models.bundle import PHOTO_MODEL, Bundle, find_model, load_bundle, resolve_settings
from ip2p.models.controlnet import EXAMPLE as CONTROLNET
from ip2p.models.controlnet import (
    Control,
    check_controlnet,
    control_tensor,
    find_controlnet,
    load_controlnet,
)
from ip2p.models.load import Choice, open_model, part_weights
from ip2p.models.lora import apply_loras, check_loras
from ip2p.models.memory import (
    Memory,
    MemoryMode,
    bytes_on,
    check_memory,
    choose_memory,
    footprint,
    footprint_of_stored,
    free_bytes,
    offload,
)
from ip2p.models.text import Prompt, encode_prompt, join_prompts
from ip2p.pictures import masks
from ip2p.pictures.carry import carry
from ip2p.pictures.images import MAX_PIXELS, fit_size, load_image, resized, signed_psnr, to_pil, to_tensor
from ip2p.pictures.infotext import Settings, format_infotext
from ip2p.pictures.masks import held

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel

Picture = str | Path | bytes | Image.Image
# Called after each step with its number, their count, and the latents so far [batch, channels, h, w].
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
        weights: Choice = "auto",
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
        found = find_model(model, revision=revision)
        shapes = None if control_folder is None else part_weights(control_folder).shapes
        stored = open_model(found, weights=weights)
        need = footprint_of_stored(stored, number, shapes)
        # The autoencoder's own size is the one that the model was made for.
        plan = choose_memory(need, memory, free_bytes(place), (need.tile, need.tile), device=place.type)
        home = torch.device("cpu") if plan.offload else place
        bundle = load_bundle(
            model, device=home, dtype=number, revision=revision, weights=weights, vae=vae, stored=stored
        )
        apply_loras(bundle, loras)
        control = None
        if control_folder is not None:
            control = load_controlnet(control_folder, device=home, dtype=number)
        return cls(bundle, controlnet=control, memory=memory, device=place)

    # --- the whole edit --------------------------------------------------------------------------

    def edit(
        self,
        image: Picture,
        instruction: str,
        *,
        seeds: Sequence[int] = (0,),
        text_cfg: float | None = None,
        image_cfg: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        negative: str = "",
        size: int | tuple[int, int] | None = None,
        fit: Literal["original", "model"] = "original",
        mask: Picture | None = None,
        mask_padding: int = 32,
        feather: float | None = None,
        auto_mask: float | None = None,
        text_cfg_rescale: float = 0.0,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        control_image: Picture | None = None,
        control_scale: float = 1.0,
        batch_size: int | None = None,
        max_pixels: int | None = MAX_PIXELS,
        callback: Callback | None = None,
    ) -> list[Image.Image]:
        """Edit a picture, once for each seed; the results have the picture's own size.

        text_cfg: how strongly to follow the instruction; image_cfg: how strongly to keep the picture
        (equation 3). steps, sampler, spacing: the sampling, with the noise schedule. None takes the model's
        own value (`models.bundle.Card`). negative: what to stay away from. size: the side the model works at
        instead of its native one, or its exact width and height. fit: "original" carries the change to the
        picture's own pixels (`photos.carry`), "model" gives the result at the size at which the model works.

        mask: a picture of the same size, white where the edit may go; nothing else changes by a byte.
        The model sees it with mask_padding pixels around, at its full size. feather: pixels over which the
        edit fades inside the mask, by its size if None. auto_mask: the region is found from the model
        itself, with this threshold from 0 (everything) to 1; 0.5 is a good one.

        text_cfg_rescale, cfg_interval: `diffusion.denoiser.guided` has them. control_image: what the
        ControlNet reads, at control_scale. batch_size: how many seeds run at once, `self.batch_size`
        if None. Each result's `info` has the settings as "parameters", the picture's exif and ICC
        profile, which `images.save_image` writes, and the "mask" if there was one, a picture in "L".
        Raises InputError, or ResourceError out of memory.
        """
        how = _How(
            **self.resolve(
                steps=steps, sampler=sampler, spacing=spacing, text_cfg=text_cfg, image_cfg=image_cfg
            ),
            negative=negative,
            size=size,
            fit=fit,
            mask=mask,
            mask_padding=mask_padding,
            feather=feather,
            auto_mask=auto_mask,
            text_cfg_rescale=text_cfg_rescale,
            cfg_interval=cfg_interval,
            control_image=control_image,
            control_scale=control_scale,
            max_pixels=max_pixels,
        )
        seeds = _checked_seeds(seeds)
        sheet = self._open(image, instruction, how)
        return self._results([sheet] * len(seeds), seeds, how, batch_size, callback)

    def edit_batch(
        self,
        images: Sequence[Picture],
        instructions: str | Sequence[str],
        *,
        seeds: Sequence[int],
        batch_size: int | None = None,
        callback: Callback | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Edit several pictures, each once, with a seed and an instruction each (or one for all).

        Those of one working size go through the network together, all of them if batch_size is None.
        In fp32 each result is what the picture alone would give, but for the rounding of sums. settings:
        those of `edit`, the same for all. Raises as `edit` does.
        """
        how = _How(**self.resolve(**settings))
        seeds = _checked_seeds(seeds)
        texts = [instructions] * len(images) if isinstance(instructions, str) else list(instructions)
        if not len(images) == len(texts) == len(seeds):
            raise InputError(
                f"There are {len(images)} pictures, {len(texts)} instructions and {len(seeds)} seeds. "
                "Give one of each for every picture."
            )
        sheets = [self._open(image, text, how) for image, text in zip(images, texts, strict=True)]
        groups: dict[tuple[int, int], list[int]] = {}
        for number, sheet in enumerate(sheets):
            groups.setdefault(sheet.shown.size, []).append(number)
        results: dict[int, Image.Image] = {}
        for numbers in groups.values():
            some, own = [sheets[k] for k in numbers], [seeds[k] for k in numbers]
            made = self._results(some, own, how, batch_size or len(numbers), callback)
            results |= dict(zip(numbers, made, strict=True))
        return [results[number] for number in range(len(sheets))]

    @torch.inference_mode()
    def _open(self, image: Picture, instruction: str, how: _How) -> _Sheet:
        """The picture, the part of it to edit, and that part as the model sees it."""
        if not instruction.strip():
            raise InputError('The instruction is empty. Say what to change, for example "make it night".')
        picture = load_image(image, max_pixels=how.max_pixels)
        box, part, mask = (0, 0, *picture.size), picture, None
        if how.mask is not None:
            mask = masks.load_mask(how.mask, picture.size, max_pixels=how.max_pixels)
            box = masks.padded(mask, how.mask_padding)
        working = self.working_size((box[2] - box[0], box[3] - box[1]), how.size)
        if mask is not None:
            box = masks.widened(box, working, picture.size)
            part = picture.crop(box)
            mask = masks.cut(mask, box, how.feather_of(part.size))
        # All of it is resized, not cropped to fit: the result lies on the input pixel for pixel.
        shown = resized(part, working)
        control = None
        if how.control_image is not None:
            drawing = load_image(how.control_image, max_pixels=how.max_pixels)
            if mask is not None:
                drawing = resized(drawing, picture.size).crop(box)
            control = self.control(drawing, working, how.control_scale)
        with _memory_error(*working):
            latent = self.encode_image(to_tensor(shown))
            rebuilt = None
            far = self.bundle.card.known_psnr is not None and not self._said_far
            if far or (part is not shown and how.fit == "original"):
                # The condition's latents are not scaled and the decoder's input is.
                rebuilt = self.decode(latent * self.bundle.latent_scale)
                self._say_if_far(shown, rebuilt)
        return _Sheet(
            instruction=instruction,
            picture=picture,
            box=box,
            part=part,
            mask=mask,
            shown=shown,
            rebuilt=None if rebuilt is None else to_pil(_finite(rebuilt)),
            latent=latent,
            control=control,
        )

    @torch.inference_mode()
    def _results(
        self,
        sheets: Sequence[_Sheet],
        seeds: Sequence[int],
        how: _How,
        batch_size: int | None,
        callback: Callback | None,
    ) -> list[Image.Image]:
        """One result for each sheet and seed; the sheets are of one working size."""
        size = sheets[0].shown.size
        batch_size = self.fitting_batch(size) if batch_size is None else batch_size
        check_int("--batch-size", batch_size, 1, 10**6, "--batch-size 4")
        results = []
        with _memory_error(*size):
            null_text = self.encode_text(how.negative, size)
            texts = {sheet.instruction: self.encode_text(sheet.instruction, size) for sheet in sheets}
            for start in range(0, len(sheets), batch_size):
                some, own = sheets[start : start + batch_size], seeds[start : start + batch_size]
                # Several seeds of one picture share its latents and its text.
                rows = some[:1] if all(sheet is some[0] for sheet in some) else some
                latents = torch.cat([sheet.latent for sheet in rows])
                text = join_prompts([texts[sheet.instruction] for sheet in rows])
                regions: Sequence[Image.Image | None] = [sheet.mask for sheet in some]
                for step, x in enumerate(
                    self.edit_latents(
                        latents,
                        text,
                        null_text,
                        noise=NoiseStream(own, latents.shape[1:], self.device),
                        **self._sampling(how),
                        control=some[0].control,
                        hold=self._hold(latents, regions, size),
                    ),
                    1,
                ):
                    if callback is not None:
                        callback(step, how.steps, x)
                if how.auto_mask is not None:
                    said = self._said(latents, text, null_text, own)
                    regions = masks.found(said, x - latents * self.bundle.latent_scale, how.auto_mask, size)
                for sheet, seed, region, row in zip(some, own, regions, x, strict=True):
                    # One at a time: a decoder's largest maps are far larger than the UNet's.
                    edited = to_pil(_finite(self.decode(row[None])))
                    results.append(self._finished(sheet, edited, region, seed, how))
        return results

    def _sampling(self, how: _How) -> dict[str, Any]:
        return {
            "text_cfg": how.text_cfg,
            "image_cfg": how.image_cfg,
            "sampler": how.sampler,
            "sigmas": SPACINGS[how.spacing](self.schedule, how.steps),
            "rescale": how.text_cfg_rescale,
            "interval": how.cfg_interval,
        }

    def _hold(
        self, latents: Tensor, regions: Sequence[Image.Image | None], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor] | None:
        """What the latents of the result are where the masks are black, and 1 where they are free."""
        drawn = [region for region in regions if region is not None]
        if not drawn:
            return None
        if all(region is drawn[0] for region in drawn):
            drawn = drawn[:1]
        free = torch.cat([masks.cells(region, size, self.bundle.latent_factor) for region in drawn])
        return latents * self.bundle.latent_scale, free.to(self.device)

    def _said(
        self, latents: Tensor, text: Tensor | Prompt, null_text: Tensor | Prompt, seeds: Sequence[int]
    ) -> Tensor:
        """What the instruction adds to the model's predictions of x0, [batch, draws, channels, h, w]."""
        noise = NoiseStream(seeds, latents.shape[1:], self.device)
        time = torch.tensor(masks.LEVEL * (len(self.schedule.levels) - 1), dtype=torch.float64)
        sigma = self.schedule.sigma(time).float()
        differences = []
        for _ in range(masks.DRAWS):
            x = latents * self.bundle.latent_scale + sigma * noise()
            told, untold = (
                guided(
                    self.model, text=words, null_text=null_text, image=latents, text_cfg=1.0, image_cfg=1.0
                )(x, sigma)
                for words in (text, null_text)
            )
            differences.append(told - untold)
        return torch.stack(differences, dim=1)

    def _finished(
        self, sheet: _Sheet, edited: Image.Image, region: Image.Image | None, seed: int, how: _How
    ) -> Image.Image:
        """The result of one row: at its size, within its mask, with what belongs to it."""
        original, box = sheet.part, sheet.box
        if how.fit == "model":
            original, box = sheet.shown, (0, 0, *edited.size)
        elif edited.size != original.size:
            edited = carry(original, sheet.rebuilt or sheet.shown, edited)
        result = edited
        info = dict(sheet.picture.info)
        if region is not None:
            region = region.resize(original.size, Image.Resampling.BILINEAR)
            result = masks.paste(original, edited, region)
            if how.fit == "original" and result.size != sheet.picture.size:
                whole = sheet.picture.copy()
                whole.paste(result, box[:2])
                black = Image.new("L", whole.size)
                black.paste(region, box[:2])
                result, region = whole, black
            info["mask"] = region
        settings = Settings(
            instruction=sheet.instruction,
            negative=how.negative,
            steps=how.steps,
            sampler=how.sampler,
            text_cfg=how.text_cfg,
            image_cfg=how.image_cfg,
            seed=seed,
            size=sheet.shown.size,
            model=self.bundle.card.name,
            spacing=how.spacing,
            text_cfg_rescale=how.text_cfg_rescale,
            cfg_interval=how.cfg_interval,
            mask_padding=how.mask_padding if how.mask is not None else Settings.mask_padding,
            feather=how.feather if how.mask is not None else None,
            auto_mask=how.auto_mask,
            fit=how.fit,
            control_scale=how.control_scale if how.control_image is not None else Settings.control_scale,
            version=f"ip2p {__version__}",
        )
        result.info = info | {"parameters": format_infotext(settings)}
        return result

    def resolve(self, **settings: Any) -> dict[str, Any]:
        """Settings of `edit`, with this model's own values where they are None or missing."""
        return resolve_settings(self.bundle.card, settings)

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
        """A sampler's latents [batch, channels, h, w] → pictures [batch, 3, H, W] in about [-1, 1]; fp32."""
        factor = self.bundle.latent_factor
        vae = self._thrifty_vae(1, *(side * factor for side in latents.shape[-2:]))
        return vae.decode((latents / self.bundle.latent_scale).to(vae.dtype)).sample.float()

    def control(self, picture: Image.Image, size: tuple[int, int], scale: float = 1.0) -> Control:
        """A picture for the ControlNet, upright RGB, at the working size (width, height).

        Raises InputError without a ControlNet, or for a scale out of range.
        """
        check_float("--control-scale", scale, 0, MAX_SCALE, "--control-scale 1")
        if self.controlnet is None:
            raise InputError(
                f"A control image needs a ControlNet. Name one, for example --controlnet {CONTROLNET}."
            )
        return Control(self.controlnet, control_tensor(picture, size).to(self.device), scale)

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
        hold: tuple[Tensor, Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Sample, yielding the latents [batch, channels, h, w] after each step; the last are the result's.

        image_latent: [1 or batch, channels, h, w] from `encode_image`, or None to draw from the text alone.
        text, null_text: [1 or batch, tokens, features] or Prompts of as many rows. `noise()` gives the start
        and then what the sampler asks for. sigmas: falling, with a final zero, as `diffusion.schedule` makes
        them. rescale, interval: see `guided`. control: from `self.control`. hold: latents [1 or batch,
        channels, h, w] of what the result is, and where it may become another, 1 or 0 [1 or batch, 1, h, w];
        where not, they are held to the former at every step (`masks.held`).
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
        if hold is not None:
            known, free = hold
            start = start + (1 - free) * known
            denoise = held(denoise, known, free)
        sampling = sampler_for(sampler, self.schedule)(denoise, start, sigmas, noise)
        while True:
            # Entered anew for each step: a generator must not hold the mode open over its caller's code.
            with torch.inference_mode():
                x = next(sampling, None)
            if x is None:
                return
            yield x

    def fitting_batch(self, size: tuple[int, int]) -> int:
        """How many results to make at once at a size: `batch_size`, or fewer where memory is short."""
        width, height = size
        batch = self.batch_size
        while batch > 1:
            with contextlib.suppress(ResourceError):
                if self._plan(batch, height, width) == self._plan(1, height, width):
                    break
            batch //= 2
        return batch

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

    def _say_if_far(self, shown: Image.Image, rebuilt: Tensor) -> None:
        """Warn once when the autoencoder keeps a picture worse than those that it was trained on."""
        known = self.bundle.card.known_psnr
        if known is None or self._said_far:
            return
        error = (rebuilt.clamp(-1, 1).cpu() - to_tensor(shown)).square().mean()
        psnr = signed_psnr(error).item()
        if psnr < known:
            self._said_far = True
            warnings.warn(
                f"This picture is far from what {self.bundle.card.name} knows (it keeps it to {psnr:.1f} dB, "
                f"and its own pages to {known:.1f} or more). For photographs: --model {PHOTO_MODEL}",
                stacklevel=1,
            )


@dataclass(frozen=True, kw_only=True)
class _How:
    """What an edit is told beside the picture, the instruction and the seeds; `Editor.edit` explains it."""

    text_cfg: float
    image_cfg: float
    steps: int
    sampler: str
    spacing: str
    negative: str = ""
    size: int | tuple[int, int] | None = None
    fit: Literal["original", "model"] = "original"
    mask: Picture | None = None
    mask_padding: int = 32
    feather: float | None = None
    auto_mask: float | None = None
    text_cfg_rescale: float = 0.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    control_image: Picture | None = None
    control_scale: float = 1.0
    max_pixels: int | None = MAX_PIXELS

    def __post_init__(self) -> None:
        check_guidance(self.steps, self.text_cfg, self.image_cfg)
        check_more_guidance(self.text_cfg_rescale, self.cfg_interval)
        check_masking(self.mask, self.auto_mask, self.mask_padding, self.feather)
        for name, value, known in (
            ("Sampler", self.sampler, SAMPLERS),
            ("Spacing", self.spacing, SPACINGS),
            ("Fit", self.fit, ("original", "model")),
        ):
            if value not in known:
                raise InputError(f"{name} {value!r} is not known; use one of {', '.join(known)}.")

    def feather_of(self, size: tuple[int, int]) -> float:
        """The feather in pixels of a part of `size`; unless given, what is 4 pixels at 512."""
        return max(size) / 128 if self.feather is None else self.feather


@dataclass(frozen=True, kw_only=True)
class _Sheet:
    """A picture made ready: `part` is what `box` cuts out of it, `shown` the part as the model sees it.

    rebuilt: `shown` through the autoencoder, where it was needed. mask: the part of the one drawn, feathered.
    """

    instruction: str
    picture: Image.Image
    box: masks.Box
    part: Image.Image
    mask: Image.Image | None
    shown: Image.Image
    rebuilt: Image.Image | None
    latent: Tensor
    control: Control | None


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


def _memory_error(width: int, height: int) -> contextlib.AbstractContextManager[None]:
    """Running out of memory becomes a ResourceError that names a smaller size."""
    size = max(width, height) // 2
    return translated_errors(
        memory=f"Out of memory at {width}x{height}. Try --size {size} or --batch-size 1."
    )
