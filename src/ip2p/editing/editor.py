"""Edit pictures by instruction: load a model once, edit many."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ip2p import __version__
from ip2p.base.devices import NoiseStream, pick_device, pick_dtype, reuse_freed_memory
from ip2p.base.errors import InputError, ModelError, ResourceError, translated_errors
from ip2p.diffusion.denoiser import UNetDenoiser, guided
from ip2p.diffusion.samplers import OWN_SPACING, sampler_for
from ip2p.diffusion.schedule import SPACINGS, schedule_from_config
from ip2p.editing.results import EditResults
from ip2p.models.bundle import PHOTO_MODEL, Bundle, find_model, load_bundle, open_parts
from ip2p.models.compiled import compile_networks, use_fast_layout
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
from ip2p.models.text import Prompt, encode_prompt, join_prompts, words_without_effect
from ip2p.pictures import masks
from ip2p.pictures.carry import carry
from ip2p.pictures.images import (
    MAX_PIXELS,
    EditedImage,
    Picture,
    fit_size,
    flattened,
    load_image,
    resized,
    signed_psnr,
    to_pil,
    to_tensor,
    with_alpha,
)
from ip2p.pictures.infotext import format_infotext, record_class
from ip2p.pictures.masks import held
from ip2p.settings import MAX_SEED, EditSettings, ModelSettings, SettingError, parse_lora, picture_name

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel
    from typing_extensions import Unpack

    from ip2p.editing.arguments import EditArguments

# Called after each step with its number, their count, and the latents so far [batch, channels, h, w].
Callback = Callable[[int, int, Tensor], object]


class Editor:
    """A model, ready to edit. `Editor.load(...)` makes one.

    memory: "low", "auto" or "high", the thrift that an edit takes (`models.memory.choose_memory`).
    device: where the parts work; if they do not lie there, each is brought when it is needed. origin: what
    the model was loaded from, for the settings in the results.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        controlnet: ControlNetModel | None = None,
        memory: MemoryMode = "auto",
        device: torch.device | None = None,
        origin: ModelSettings | None = None,
    ) -> None:
        check_memory(memory)
        if controlnet is not None:
            check_controlnet(controlnet, bundle)
        self.bundle = bundle
        self.controlnet = controlnet
        self.memory = memory
        self.origin = origin or ModelSettings()
        home = bundle.unet.device
        self._offloads = device is not None and device.type != home.type
        self.device = device if device is not None and self._offloads else home
        self.schedule = schedule_from_config(bundle.scheduler_config)
        self.model = UNetDenoiser(
            bundle.unet,
            self.schedule,
            bundle.condition_scale,
            scales_size=bundle.unet.config.time_cond_proj_dim,
        )
        # On a CPU a batch saves little, and half-precision kernels round by its size: alone, an image that is
        # made again is equal to the byte.
        self.batch_size = 1 if self.device.type == "cpu" or memory == "low" else 4
        self.warn_once = True  # of pictures that are far from what the model knows: to look costs a decoding
        self._said_far = False
        self._footprint = footprint(bundle, controlnet)
        # What works together lies on the device together.
        groups = [bundle.text_encoder, bundle.text_encoder_2], [bundle.unet, controlnet], [bundle.vae]
        self._parts = [[part for part in group if part is not None] for group in groups]
        if self._offloads:
            offload(self._parts, self.device)

    def __repr__(self) -> str:
        card = self.bundle.card
        kind = "SDXL" if self.bundle.kind == "sdxl" else "Stable Diffusion"
        number = str(self.bundle.unet.dtype).removeprefix("torch.")
        return (
            f"<Editor {card.name}: {kind}, {card.native_size} pixels, text_cfg={card.text_cfg:g}, "
            f"image_cfg={card.image_cfg:g}, {number} on {self.device}>"
        )

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
        parts_from: str | Path | None = None,
        loras: Sequence[str | tuple[str | Path, float]] = (),
        controlnet: str | Path | None = None,
        memory: MemoryMode = "auto",
        compile: bool = False,
    ) -> Editor:
        """Load an editor: `storybook`, a hub name, a diffusers folder or a single file (`load_bundle`).

        revision: of a hub name. weights: which of a single file's two sets. vae: another autoencoder.
        parts_from: a model that brings what a file of a UNet alone lacks.
        loras: files, each with its weight, or "FILE:WEIGHT". controlnet: a ControlNet's folder or hub name.
        memory: as in the class. compile: compile the networks at their first use (`compile_networks`); not
        with weights that are moved to save memory. Raises ModelError, InputError, and ResourceError for more
        than the device can hold.
        """
        place, number = pick_device(device), pick_dtype(pick_device(device), dtype)
        origin = ModelSettings.read(
            {
                "model": str(model),
                "revision": revision,
                "weights": weights,
                "vae": None if vae is None else str(vae),
                "parts_from": None if parts_from is None else str(parts_from),
                "lora": loras,
                "controlnet": None if controlnet is None else str(controlnet),
                "memory": memory,
                "compile": compile,
            }
        )
        weighted = [parse_lora(lora) if isinstance(lora, str) else lora for lora in loras]
        check_loras(weighted)
        control_folder = None if controlnet is None else find_controlnet(controlnet)
        found = find_model(model, revision=revision)
        shapes = None if control_folder is None else part_weights(control_folder).shapes
        stored = open_model(found, weights=weights, parts=open_parts(parts_from))
        need = footprint_of_stored(stored, number, shapes)
        # The autoencoder's own size is the one that the model was made for.
        plan = choose_memory(need, memory, free_bytes(place), (need.tile, need.tile), device=place.type)
        home = torch.device("cpu") if plan.offload else place
        bundle = load_bundle(
            model, device=home, dtype=number, revision=revision, weights=weights, vae=vae, stored=stored
        )
        apply_loras(bundle, weighted)
        control = None
        if control_folder is not None:
            control = load_controlnet(control_folder, device=home, dtype=number)
        editor = cls(bundle, controlnet=control, memory=memory, device=place, origin=origin)
        # Not in `__init__`: an editor around networks in training must leave their layout alone.
        if not editor._offloads:
            use_fast_layout(bundle)
        if editor.device.type == "cpu":
            reuse_freed_memory()
        if compile and editor._offloads:
            warnings.warn("Nothing is compiled, since the weights are moved to save memory.", stacklevel=2)
        elif compile:
            compile_networks(bundle)
        return editor

    # --- the whole edit --------------------------------------------------------------------------

    def edit(
        self,
        image: Picture,
        instruction: str = "",
        *,
        seeds: Sequence[int] | None = None,
        settings: EditSettings | None = None,
        batch_size: int | None = None,
        max_pixels: int | None = MAX_PIXELS,
        callback: Callback | None = None,
        **changes: Unpack[EditArguments],
    ) -> EditResults:
        """Edit a picture, once for each seed; the results have the picture's own size.

        image: a path, the bytes of a file, an open file, a PIL image or an array. instruction: what to
        change, in words. seeds: one result each; the settings' seed if None. settings and changes: what
        `EditSettings` has; changes come last, so `edit(page, "make it night", text_cfg=5)` is enough.
        batch_size: how many seeds run at once, `self.batch_size` if None. max_pixels: refuse a larger
        picture.

        fit="original" carries the change to the picture's own pixels (`pictures.carry`), "model" gives the
        result at the working size. mask: a picture of the same size, white where the edit may go; nothing
        else changes by a byte. The model sees it with mask_padding pixels around, at its full size.
        auto_mask: the region is found from the model itself. A picture with transparent parts gives results
        with the same; the model sees it on gray. background: lay it on this color first. text_cfg_rescale,
        cfg_interval: `diffusion.denoiser.guided` has them.

        Each result's `info` has the settings as "parameters", the picture's exif and ICC profile, which
        `save_image` writes, the "mask" if there was one, a picture in "L", and "warnings", a list of texts:
        what is outside of what the model knows. Raises InputError, or ResourceError out of memory.
        """
        chosen = self.resolved(settings, instruction, changes)
        seeds = check_seeds([chosen.seed] if seeds is None else seeds)
        sheet = self._open(image, chosen, max_pixels)
        return EditResults(self._results([sheet] * len(seeds), seeds, chosen, batch_size, callback))

    def edit_batch(
        self,
        images: Sequence[Picture],
        instructions: str | Sequence[str],
        *,
        seeds: Sequence[int],
        settings: EditSettings | None = None,
        batch_size: int | None = None,
        max_pixels: int | None = MAX_PIXELS,
        callback: Callback | None = None,
        **changes: Unpack[EditArguments],
    ) -> EditResults:
        """Edit several pictures, each once, with a seed and an instruction each (or one for all).

        Those of one working size go through the network together, all of them if batch_size is None.
        In fp32 each result is what the picture alone would give, but for the rounding of sums. settings,
        changes: those of `edit`, the same for all. Raises as `edit` does.
        """
        seeds = check_seeds(seeds)
        texts = [instructions] * len(images) if isinstance(instructions, str) else list(instructions)
        if not len(images) == len(texts) == len(seeds):
            raise InputError(
                f"There are {len(images)} pictures, {len(texts)} instructions and {len(seeds)} seeds. "
                "Give one of each for every picture."
            )
        chosen = self.resolved(settings, "", changes)
        sheets = [
            self._open(image, chosen.changed(instruction=text), max_pixels)
            for image, text in zip(images, texts, strict=True)
        ]
        groups: dict[tuple[int, int], list[int]] = {}
        for number, sheet in enumerate(sheets):
            groups.setdefault(sheet.shown.size, []).append(number)
        results: dict[int, Image.Image] = {}
        for numbers in groups.values():
            some, own = [sheets[k] for k in numbers], [seeds[k] for k in numbers]
            made = self._results(some, own, chosen, batch_size or len(numbers), callback)
            results |= dict(zip(numbers, made, strict=True))
        return EditResults(results[number] for number in range(len(sheets)))

    def resolved(
        self, settings: EditSettings | None = None, instruction: str = "", changes: Mapping[str, Any] = {}
    ) -> EditSettings:
        """The settings with `changes`, and the model's own values in place of None."""
        settings = settings or EditSettings()
        given = {"instruction": instruction, **changes} if instruction else dict(changes)
        asked = settings.changed(**given)
        if asked.schedule is None and asked.sampler in OWN_SPACING:
            asked = asked.changed(schedule=OWN_SPACING[asked.sampler])
        chosen = asked.resolved(self.bundle.card)
        if self.model.scales_size is not None:
            self._check_distilled(chosen)
        return chosen

    def _check_distilled(self, settings: EditSettings) -> None:
        """Raise InputError for what a distilled model has not learned."""
        card = self.bundle.card
        inside = True
        for name, limits in (("text_cfg", card.text_cfg_range), ("image_cfg", card.image_cfg_range)):
            assert limits is not None, "a distilled model's card has both"
            (low, high), scale = limits, getattr(settings, name)
            inside = inside and low <= 1 <= high
            if not low <= scale <= high:
                raise SettingError(
                    f"{name} is {scale:g}, and {card.name} was distilled for {low:g} to {high:g}. "
                    f"Try {min(max(scale, low), high):g}, or use the model that it was distilled from.",
                    field=name,
                )
        lost = {
            "negative": bool(settings.negative),
            "text_cfg_rescale": settings.text_cfg_rescale != 0,
            # Outside of the interval both scales are 1.
            "cfg_interval": settings.cfg_interval != (0.0, 1.0) and not inside,
        }
        for name in (name for name, used in lost.items() if used):
            raise SettingError(
                f"{name} has no effect on {card.name}, which is distilled. Leave it out, or use the model "
                "that it was distilled from.",
                field=name,
            )

    @torch.inference_mode()
    def _open(self, image: Picture, settings: EditSettings, max_pixels: int | None) -> _Sheet:
        """The picture, the part of it to edit, and that part as the model sees it."""
        if not settings.instruction.strip():
            raise InputError('The instruction is empty. Say what to change, for example "make it night".')
        cutout = load_image(image, max_pixels=max_pixels, background=settings.background)
        picture = flattened(cutout)
        box, part, mask = (0, 0, *picture.size), picture, None
        if settings.mask is not None:
            mask = masks.load_mask(settings.mask, picture.size, max_pixels=max_pixels)
            box = masks.padded(mask, settings.mask_padding)
        working = self.working_size((box[2] - box[0], box[3] - box[1]), settings.size)
        if mask is not None:
            box = masks.widened(box, working, picture.size)
            part = picture.crop(box)
            mask = masks.cut(mask, box, feather_of(settings, part.size))
        # All of it is resized, not cropped to fit: the result lies on the input pixel for pixel.
        shown = resized(part, working)
        control = None
        if settings.control_image is not None:
            drawing = load_image(settings.control_image, max_pixels=max_pixels, background="white")
            if mask is not None:
                drawing = resized(drawing, picture.size).crop(box)
            control = self.control(drawing, working, settings.control_scale)
        with _memory_error(*working):
            latent = self.encode_image(to_tensor(shown))
            rebuilt = None
            said = self.words_without_effect(settings.instruction)
            look = self.bundle.card.known_psnr is not None and not (self.warn_once and self._said_far)
            if look or (part is not shown and settings.fit == "original"):
                # The condition's latents are not scaled and the decoder's input is.
                rebuilt = self.decode(latent * self.bundle.latent_scale)
                said += self._far_from_known(shown, rebuilt)
        return _Sheet(
            instruction=settings.instruction,
            picture=picture,
            cutout=cutout if cutout.mode == "RGBA" else None,
            box=box,
            part=part,
            mask=mask,
            shown=shown,
            rebuilt=None if rebuilt is None else to_pil(_finite(rebuilt)),
            latent=latent,
            control=control,
            warnings=tuple(said),
        )

    @torch.inference_mode()
    def _results(
        self,
        sheets: Sequence[_Sheet],
        seeds: Sequence[int],
        settings: EditSettings,
        batch_size: int | None,
        callback: Callback | None,
    ) -> list[Image.Image]:
        """One result for each sheet and seed; the sheets are of one working size."""
        size = sheets[0].shown.size
        batch_size = self.fitting_batch(size) if batch_size is None else batch_size
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1. Try batch_size=4.")
        steps = settings.steps or 0
        results = []
        with _memory_error(*size):
            null_text = self.encode_text(settings.negative, size)
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
                        **self._sampling(settings),
                        control=some[0].control,
                        hold=self._hold(latents, regions, size),
                    ),
                    1,
                ):
                    if callback is not None:
                        callback(step, steps, x)
                if settings.auto_mask is not None:
                    said = self._said(latents, text, null_text, own)
                    regions = masks.found(
                        said, x - latents * self.bundle.latent_scale, settings.auto_mask, size
                    )
                for sheet, seed, region, row in zip(some, own, regions, x, strict=True):
                    # One at a time: a decoder's largest maps are far larger than the UNet's.
                    edited = to_pil(_finite(self.decode(row[None])))
                    results.append(self._finished(sheet, edited, region, seed, settings))
        return results

    def _sampling(self, settings: EditSettings) -> dict[str, Any]:
        assert settings.schedule is not None and settings.steps is not None
        return {
            "text_cfg": settings.text_cfg,
            "image_cfg": settings.image_cfg,
            "sampler": settings.sampler,
            "sigmas": SPACINGS[settings.schedule](self.schedule, settings.steps),
            "rescale": settings.text_cfg_rescale,
            "interval": settings.cfg_interval,
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
        card = self.bundle.card
        text_cfg, image_cfg = (
            min(max(1.0, low), high)
            for low, high in (card.text_cfg_range or (1, 1), card.image_cfg_range or (1, 1))
        )
        noise = NoiseStream(seeds, latents.shape[1:], self.device)
        time = torch.tensor(masks.LEVEL * (len(self.schedule.levels) - 1), dtype=torch.float64)
        sigma = self.schedule.sigma(time).float()
        differences = []
        for _ in range(masks.DRAWS):
            x = latents * self.bundle.latent_scale + sigma * noise()
            told, untold = (
                guided(
                    self.model,
                    text=words,
                    null_text=null_text,
                    image=latents,
                    text_cfg=text_cfg,
                    image_cfg=image_cfg,
                )(x, sigma)
                for words in (text, null_text)
            )
            differences.append(told - untold)
        return torch.stack(differences, dim=1)

    def _finished(
        self,
        sheet: _Sheet,
        edited: Image.Image,
        region: Image.Image | None,
        seed: int,
        settings: EditSettings,
    ) -> Image.Image:
        """The result of one row: at its size, within its mask, with what belongs to it."""
        original, box = sheet.part, sheet.box
        if settings.fit == "model":
            original, box = sheet.shown, (0, 0, *edited.size)
        elif edited.size != original.size:
            edited = carry(original, sheet.rebuilt or sheet.shown, edited)
        result = edited
        info = dict(sheet.picture.info)
        if region is not None:
            region = region.resize(original.size, Image.Resampling.BILINEAR)
            result = masks.paste(original, edited, region)
            if settings.fit == "original" and result.size != sheet.picture.size:
                whole = sheet.picture.copy()
                whole.paste(result, box[:2])
                black = Image.new("L", whole.size)
                black.paste(region, box[:2])
                result, region = whole, black
            info["mask"] = region
        if sheet.cutout is not None:
            cutout = sheet.cutout
            if result.size != cutout.size:
                cutout = resized(cutout.crop(sheet.box), result.size)
            result = with_alpha(result, cutout)
        record = record_class(type(settings)).read(
            {
                **dict(self.origin),
                **dict(settings),
                "instruction": sheet.instruction,
                "seed": seed,
                "size": sheet.shown.size,
                "model": self.bundle.card.name,
                "mask": picture_name(settings.mask),
                "control_image": picture_name(settings.control_image),
                # What belongs to a mask or a ControlNet is written only with one.
                **({} if settings.mask is not None else {"mask_padding": 32, "feather": None}),
                **({} if settings.control_image is not None else {"control_scale": 1.0}),
                "version": f"ip2p {__version__}",
            }
        )
        result = EditedImage.of(result)
        result.info = info | {"parameters": format_infotext(record), "warnings": list(sheet.warnings)}
        return result

    def scales(self, text_cfg: float | None, image_cfg: float | None) -> tuple[float, float]:
        """The scales given; for None those that the model's card recommends, else the paper's 7.5 and 1.5."""
        chosen = self.resolved(EditSettings(text_cfg=text_cfg, image_cfg=image_cfg))
        assert chosen.text_cfg is not None and chosen.image_cfg is not None
        return chosen.text_cfg, chosen.image_cfg

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
        size = EditSettings(size=size).size
        assert not isinstance(size, tuple)
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

        Raises InputError without a ControlNet.
        """
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

    def words_without_effect(self, text: str) -> list[str]:
        """A warning for what the model does not read of a text (`models.text`)."""
        return words_without_effect(self.bundle, text)

    def _far_from_known(self, shown: Image.Image, rebuilt: Tensor) -> list[str]:
        """A warning when the autoencoder keeps a picture worse than those that it was trained on.

        The first is Python's warning too.
        """
        known = self.bundle.card.known_psnr
        if known is None:
            return []
        error = (rebuilt.clamp(-1, 1).cpu() - to_tensor(shown)).square().mean()
        psnr = signed_psnr(error).item()
        if psnr >= known:
            return []
        words = (
            f"This picture is far from what {self.bundle.card.name} knows (it keeps it to {psnr:.1f} dB, "
            f"and its own pages to {known:.1f} or more). For photographs: --model {PHOTO_MODEL}"
        )
        if not self._said_far:
            self._said_far = True
            warnings.warn(words, stacklevel=1)
        return [words]


def feather_of(settings: EditSettings, size: tuple[int, int]) -> float:
    """The feather in pixels for a part of `size`; unless given, what is 4 pixels at 512."""
    return max(size) / 128 if settings.feather is None else settings.feather


@dataclass(frozen=True, kw_only=True)
class _Sheet:
    """A picture made ready: `part` is what `box` cuts out of it, `shown` the part as the model sees it.

    cutout: the picture in RGBA if it has transparent parts. rebuilt: `shown` through the autoencoder, where
    it was needed. mask: the part of the one drawn, feathered.
    """

    instruction: str
    picture: Image.Image
    cutout: Image.Image | None
    box: masks.Box
    part: Image.Image
    mask: Image.Image | None
    shown: Image.Image
    rebuilt: Image.Image | None
    latent: Tensor
    control: Control | None
    warnings: tuple[str, ...] = ()


@functools.lru_cache(maxsize=1)
def _loaded(model: str | Path, device: str | torch.device, dtype: str | torch.dtype) -> Editor:
    return Editor.load(model, device=device, dtype=dtype)


def edit(
    image: Picture,
    instruction: str = "",
    *,
    model: str | Path = "storybook",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    seeds: Sequence[int] | None = None,
    settings: EditSettings | None = None,
    **changes: Unpack[EditArguments],
) -> EditResults:
    """Edit a picture in one call, as `Editor.edit` does. The last model used stays loaded."""
    editor = _loaded(model, device, dtype)
    return editor.edit(image, instruction, seeds=seeds, settings=settings, **changes)


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as a list. Raises InputError for none, a single number, or one out of range."""
    if not isinstance(seeds, Iterable):
        raise InputError(
            f"seeds is {seeds}; it must be a list with one seed per result. Try seeds=[{seeds}]."
        )
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
