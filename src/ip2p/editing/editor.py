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
from ip2p.diffusion.caching import FeatureCache
from ip2p.diffusion.denoiser import UNetDenoiser
from ip2p.diffusion.guidance import guided
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
from ip2p.settings import MAX_SEED, EditSettings, ModelSettings, SettingError, parse_lora, picture_name

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel
    from typing_extensions import Unpack

    from ip2p.editing.arguments import EditArguments

# Called after each step with its number, their count, and the latents so far [batch, channels, h, w].
Callback = Callable[[int, int, Tensor], object]


class Editor:
    """A loaded model that edits pictures. Create one with `Editor.load(...)`.

    memory: the memory mode "low", "auto" or "high" (`models.memory.choose_memory`). device: where to compute;
    networks on another device are moved there when they are needed. origin: what the model was loaded from,
    for the settings in the results.
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
        # On a CPU a batch saves little, and half-precision rounding depends on the batch size: without
        # batches, repeated edits are identical to the byte.
        self.batch_size = 1 if self.device.type == "cpu" or memory == "low" else 4
        self.warn_once = True  # about pictures unlike the training data: each check decodes once
        self._warned_far = False
        self._footprint = footprint(bundle, controlnet)
        # The networks of a group are on the device at the same time.
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
        """Load an editor: `storybook`, a hub id, a diffusers folder or a single file (`load_bundle`).

        revision: branch, tag or commit of a hub id. weights: which set of a file with EMA and plain weights.
        vae: another autoencoder. parts_from: a model that provides what a UNet-only file lacks. loras: files
        with weights, or "FILE:WEIGHT". controlnet: a ControlNet's folder or hub id. memory: as in the class.
        compile: compile the networks at their first use (`compile_networks`), unless the weights are moved
        between devices to save memory. Raises ModelError, InputError, and ResourceError if the device has too
        little memory.
        """
        place, number = pick_device(device), pick_dtype(pick_device(device), dtype)
        sources = {"model": model, "vae": vae, "parts_from": parts_from, "controlnet": controlnet}
        origin = ModelSettings.read(
            {
                **{name: None if source is None else str(source) for name, source in sources.items()},
                "revision": revision,
                "weights": weights,
                "lora": loras,
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
        # Plan for the training size: the tile size of the autoencoder.
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
        # Not in `__init__`: an editor must not change the memory layout of networks in training.
        if not editor._offloads:
            use_fast_layout(bundle)
        if editor.device.type == "cpu":
            reuse_freed_memory()
        if compile and editor._offloads:
            warnings.warn(
                "The networks are not compiled, because their weights are moved to save memory.", stacklevel=2
            )
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
        """Edit a picture once for each seed. The results have the size of the picture.

        image: a path, the bytes of a file, an open file, a PIL image or an array. instruction: what to
        change. seeds: one result each; default: the seed of the settings. settings and changes: the fields of
        `EditSettings`; changes take precedence, so `edit(page, "make it night", text_cfg=5)` is enough.
        batch_size: how many seeds run at once; default: `self.batch_size`, or less if memory is short.
        max_pixels: refuse a larger picture. callback: called after each step.

        fit="original" applies the change to the picture's own pixels (`pictures.carry`), "model" returns the
        result at the working size. mask: a picture of the same size, white where the edit may change it; all
        other pixels stay identical. The model sees the white area with mask_padding pixels around it.
        auto_mask: detect the region with the model. Transparent parts stay transparent; the model sees them
        on gray. background: put this color behind them first. text_cfg_rescale, cfg_interval, cfg_every: see
        `diffusion.guidance.guided`. cache_every: see `diffusion.caching.FeatureCache`.

        The `info` of each result has the settings as "parameters", the picture's metadata, which `save_image`
        writes, the "mask" if there is one, a picture in mode "L", and "warnings", a list of texts about input
        that the model does not support. Raises InputError, or ResourceError if memory runs out.
        """
        chosen = self.resolved(settings, instruction, changes)
        seeds = check_seeds([chosen.seed] if seeds is None else seeds)
        prepared = self._prepare(image, chosen, max_pixels)
        return EditResults(self._edit_prepared([prepared] * len(seeds), seeds, chosen, batch_size, callback))

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
        """Edit several pictures once each, with a seed for each and one instruction for each or for all.

        Pictures of the same working size run as one batch, of at most batch_size. In fp32 each result equals
        that of the picture alone, up to rounding. settings, changes: as in `edit`, the same for all pictures.
        Raises as `edit` does.
        """
        seeds = check_seeds(seeds)
        texts = [instructions] * len(images) if isinstance(instructions, str) else list(instructions)
        if not len(images) == len(texts) == len(seeds):
            raise InputError(
                f"There are {len(images)} pictures, {len(texts)} instructions and {len(seeds)} seeds. "
                "Give one of each for every picture."
            )
        chosen = self.resolved(settings, "", changes)
        inputs = [
            self._prepare(image, chosen.changed(instruction=text), max_pixels)
            for image, text in zip(images, texts, strict=True)
        ]
        groups: dict[tuple[int, int], list[int]] = {}
        for number, prepared in enumerate(inputs):
            groups.setdefault(prepared.shown.size, []).append(number)
        results: dict[int, Image.Image] = {}
        for numbers in groups.values():
            edited = self._edit_prepared(
                [inputs[k] for k in numbers],
                [seeds[k] for k in numbers],
                chosen,
                batch_size or len(numbers),
                callback,
            )
            results |= dict(zip(numbers, edited, strict=True))
        return EditResults(results[number] for number in range(len(inputs)))

    def resolved(
        self, settings: EditSettings | None = None, instruction: str = "", changes: Mapping[str, Any] = {}
    ) -> EditSettings:
        """The settings with `changes` applied and None replaced by the model's defaults."""
        chosen = (settings or EditSettings()).changed(**changes)
        if instruction and "instruction" not in changes:
            chosen = chosen.changed(instruction=instruction)
        if chosen.schedule is None and chosen.sampler in OWN_SPACING:
            chosen = chosen.changed(schedule=OWN_SPACING[chosen.sampler])
        chosen = chosen.resolved(self.bundle.card)
        if self.model.scales_size is not None:
            self._check_distilled(chosen)
        if self._offloads and chosen.cache_every > 1:
            raise SettingError(
                "cache_every has no effect while weights are moved to save memory. Leave it out, or load the "
                'model with memory "high".',
                field="cache_every",
            )
        return chosen

    def _check_distilled(self, settings: EditSettings) -> None:
        """Raise InputError for what a distilled model has not learned."""
        card = self.bundle.card
        for name, limits in (("text_cfg", card.text_cfg_range), ("image_cfg", card.image_cfg_range)):
            assert limits is not None, "a distilled model's card has both"
            (low, high), scale = limits, getattr(settings, name)
            if not low <= scale <= high:
                raise SettingError(
                    f"{name} is {scale:g}, and {card.name} was distilled for {low:g} to {high:g}. "
                    f"Try {min(max(scale, low), high):g}, or use the model that it was distilled from.",
                    field=name,
                )
        lost = {
            "negative": bool(settings.negative),
            "text_cfg_rescale": settings.text_cfg_rescale != 0,
            "cfg_interval": settings.cfg_interval != (0.0, 1.0) and not card.allows_interval,
            "cfg_every": settings.cfg_every > 1,  # it has one pass a step already
        }
        for name in (name for name, used in lost.items() if used):
            raise SettingError(
                f"{name} has no effect on {card.name}, which is distilled. Leave it out, or use the model "
                "that it was distilled from.",
                field=name,
            )

    @torch.inference_mode()
    def _prepare(self, image: Picture, settings: EditSettings, max_pixels: int | None) -> _PreparedImage:
        """Load the picture, crop the part to edit, resize it to the working size and encode it."""
        if not settings.instruction.strip():
            raise InputError('The instruction is empty. Say what to change, for example "make it night".')
        cutout = load_image(image, max_pixels=max_pixels, background=settings.background)
        picture = flattened(cutout)
        box, part, mask = (0, 0, *picture.size), picture, None
        if settings.mask is not None:
            mask = masks.load_mask(settings.mask, picture.size, max_pixels=max_pixels)
            box = masks.padded_box(mask, settings.mask_padding)
        working = self.working_size((box[2] - box[0], box[3] - box[1]), settings.size)
        if mask is not None:
            box = masks.widened_box(box, working, picture.size)
            part = picture.crop(box)
            feather = max(part.size) / 128 if settings.feather is None else settings.feather
            mask = masks.feathered_part(mask, box, feather)  # by default, 4 pixels at 512
        # The whole part is resized, not cropped, so that the result matches the input pixel for pixel.
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
            messages = self.words_without_effect(settings.instruction)
            compare = self.bundle.card.known_psnr is not None and not (self.warn_once and self._warned_far)
            if compare or (part is not shown and settings.fit == "original"):
                # The image condition uses unscaled latents; `decode` expects scaled ones.
                rebuilt = self.decode(latent * self.bundle.latent_scale)
                messages += self._compare_with_training(shown, rebuilt)
        return _PreparedImage(
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
            warnings=tuple(messages),
        )

    @torch.inference_mode()
    def _edit_prepared(
        self,
        inputs: Sequence[_PreparedImage],
        seeds: Sequence[int],
        settings: EditSettings,
        batch_size: int | None,
        callback: Callback | None,
    ) -> list[Image.Image]:
        """One result for each input and its seed. All inputs have the same working size."""
        size = inputs[0].shown.size
        batch_size = self.fitting_batch(size) if batch_size is None else batch_size
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1. Try batch_size=4.")
        assert settings.steps is not None
        results = []
        with _memory_error(*size):
            null_text = self.encode_text(settings.negative, size)
            texts = {
                prepared.instruction: self.encode_text(prepared.instruction, size) for prepared in inputs
            }
            for start in range(0, len(inputs), batch_size):
                chunk = slice(start, start + batch_size)
                batch, batch_seeds = inputs[chunk], seeds[chunk]
                # Several seeds of one picture share its latents and its text.
                rows = batch[:1] if all(prepared is batch[0] for prepared in batch) else batch
                latents = torch.cat([prepared.latent for prepared in rows])
                text = join_prompts([texts[prepared.instruction] for prepared in rows])
                regions: Sequence[Image.Image | None] = [prepared.mask for prepared in batch]
                sampling = self.edit_latents(
                    latents,
                    text,
                    null_text,
                    noise=NoiseStream(batch_seeds, latents.shape[1:], self.device),
                    settings=settings,
                    control=batch[0].control,
                    hold=self._known_region(latents, regions, size),
                )
                for step, x in enumerate(sampling, 1):
                    if callback is not None:
                        callback(step, settings.steps, x)
                if settings.auto_mask is not None:
                    relevance = self._relevance(latents, text, null_text, batch_seeds)
                    change = x - latents * self.bundle.latent_scale
                    regions = masks.detect_masks(relevance, change, settings.auto_mask, size)
                for prepared, seed, region, row in zip(batch, batch_seeds, regions, x, strict=True):
                    # One at a time: a decoder's largest maps are far larger than the UNet's.
                    edited = to_pil(_finite(self.decode(row[None])))
                    results.append(self._compose(prepared, edited, region, seed, settings))
        return results

    def _known_region(
        self, latents: Tensor, regions: Sequence[Image.Image | None], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor] | None:
        """The latents to keep where the masks are black, and a map that is 1 where latents may change."""
        drawn = [region for region in regions if region is not None]
        if not drawn:
            return None
        if all(region is drawn[0] for region in drawn):
            drawn = drawn[:1]
        free = torch.cat([masks.free_cells(region, size, self.bundle.latent_factor) for region in drawn])
        return latents * self.bundle.latent_scale, free.to(self.device)

    def _relevance(
        self, latents: Tensor, text: Tensor | Prompt, null_text: Tensor | Prompt, seeds: Sequence[int]
    ) -> Tensor:
        """The effect of the instruction on the predicted x0, [batch, draws, channels, h, w]."""
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
            conditional, unconditional = (
                guided(
                    self.model,
                    text=each,
                    null_text=null_text,
                    image=latents,
                    text_cfg=text_cfg,
                    image_cfg=image_cfg,
                )(x, sigma)
                for each in (text, null_text)
            )
            differences.append(conditional - unconditional)
        return torch.stack(differences, dim=1)

    def _compose(
        self,
        prepared: _PreparedImage,
        edited: Image.Image,
        region: Image.Image | None,
        seed: int,
        settings: EditSettings,
    ) -> Image.Image:
        """The final picture of one row: at full size, limited to its mask, with settings and metadata."""
        original, box = prepared.part, prepared.box
        if settings.fit == "model":
            original, box = prepared.shown, (0, 0, *edited.size)
        elif edited.size != original.size:
            edited = carry(original, prepared.rebuilt or prepared.shown, edited)
        result = edited
        info = dict(prepared.picture.info)
        if region is not None:
            region = region.resize(original.size, Image.Resampling.BILINEAR)
            result = masks.paste(original, edited, region)
            if settings.fit == "original" and result.size != prepared.picture.size:
                whole = prepared.picture.copy()
                whole.paste(result, box[:2])
                black = Image.new("L", whole.size)
                black.paste(region, box[:2])
                result, region = whole, black
            info["mask"] = region
        if prepared.cutout is not None:
            cutout = prepared.cutout
            if result.size != cutout.size:
                cutout = resized(cutout.crop(prepared.box), result.size)
            result = with_alpha(result, cutout)
        record_type = record_class(type(settings))
        unused: list[str] = []  # settings of masks and ControlNets are written only if one is used
        if settings.mask is None:
            unused += ["mask_padding", "feather"]
        if settings.control_image is None:
            unused += ["control_scale"]
        record = record_type.read(
            {
                **dict(self.origin),
                **dict(settings),
                "instruction": prepared.instruction,
                "seed": seed,
                "size": prepared.shown.size,
                "model": self.bundle.card.name,
                "mask": picture_name(settings.mask),
                "control_image": picture_name(settings.control_image),
                **{name: record_type.model_fields[name].default for name in unused},
                "version": f"ip2p {__version__}",
            }
        )
        result = EditedImage.of(result)
        result.info = info | {"parameters": format_infotext(record), "warnings": list(prepared.warnings)}
        return result

    def working_size(
        self, pixels: tuple[int, int], size: int | tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """The working width and height of the model for a picture of size `pixels` (`images.fit_size`).

        size: the setting. Raises InputError for sides that are no multiple of the model's downsampling.
        """
        multiple = self.bundle.size_multiple
        if isinstance(size, tuple):
            if any(side < multiple or side % multiple for side in size):
                near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in size)
                raise InputError(
                    f"Size {size[0]}x{size[1]} does not fit this model; sides must be multiples of "
                    f"{multiple}. Try {near}."
                )
            return size
        size = EditSettings(size=size).size
        assert not isinstance(size, tuple)
        return fit_size(*pixels, native=size or self.bundle.card.native_size, multiple=multiple)

    # --- the components -------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode_text(self, text: str, size: tuple[int, int] | None = None) -> Tensor | Prompt:
        """Encode a text as [1, tokens, features], or for SDXL as a Prompt for a picture of `size`.

        Warns of text that is truncated.
        """
        native = self.bundle.card.native_size
        prompt = encode_prompt(self.bundle, text, size or (native, native))
        return prompt.hidden if self.bundle.kind == "sd" else prompt

    @torch.inference_mode()
    def encode_image(self, pictures: Tensor) -> Tensor:
        """Pictures [batch, 3, H, W] in [-1, 1] → latents for the image condition, fp32.

        The latents are the mode of the posterior, unscaled as in training. Raises ResourceError for a size at
        which an edit does not fit in memory.
        """
        vae = self._vae_for(len(pictures), *pictures.shape[-2:])
        return vae.encode(pictures.to(self.device, vae.dtype)).latent_dist.mode().float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [batch, channels, h, w] → pictures [batch, 3, H, W], about in [-1, 1], fp32."""
        factor = self.bundle.latent_factor
        vae = self._vae_for(1, *(side * factor for side in latents.shape[-2:]))
        return vae.decode((latents / self.bundle.latent_scale).to(vae.dtype)).sample.float()

    def control(self, picture: Image.Image, size: tuple[int, int], scale: float = 1.0) -> Control:
        """The ControlNet input for an upright RGB picture, at the working size (width, height).

        Raises InputError if no ControlNet is loaded.
        """
        if self.controlnet is None:
            raise InputError(
                "A control image needs a ControlNet. Load the model with one (controlnet), "
                f"such as {CONTROLNET}."
            )
        return Control(self.controlnet, control_tensor(picture, size).to(self.device), scale)

    def edit_latents(
        self,
        image_latent: Tensor | None,
        text: Tensor | Prompt,
        null_text: Tensor | Prompt,
        *,
        noise: NoiseStream,
        settings: EditSettings | None = None,
        sigmas: Tensor | None = None,
        control: Control | None = None,
        hold: tuple[Tensor, Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Sample, yielding the latents [batch, channels, h, w] after each step; the last ones are the result.

        image_latent: [1 or batch, channels, h, w] from `encode_image`, or None to generate from text alone.
        text, null_text: [1 or batch, tokens, features] or Prompts with as many rows. noise: called for the
        start and then by the sampler. settings: of sampling and guidance; the others have no effect. sigmas:
        replace the noise levels of the settings; decreasing, with a final zero. control: from
        `self.control`. hold: known latents [1 or batch, channels, h, w], and a map [1 or batch, 1, h, w] that
        is 1 where the result may change and 0 where it is kept equal to the known latents
        (`masks.hold_known`).
        """
        settings = self.resolved(settings)
        assert settings.steps is not None and settings.schedule is not None and settings.sampler is not None
        assert settings.text_cfg is not None and settings.image_cfg is not None
        assert settings.cfg_interval is not None
        if sigmas is None:
            sigmas = SPACINGS[settings.schedule](self.schedule, settings.steps)
        start = noise() * sigmas[0]
        factor = self.bundle.latent_factor
        plan = self._plan(len(start), *(side * factor for side in start.shape[-2:]))
        every = settings.cache_every
        cache = FeatureCache(self.bundle.unet, every) if every > 1 else None
        denoise = guided(
            replace(self.model, control=control, cache=cache),
            text=text,
            null_text=null_text,
            image=image_latent,
            text_cfg=settings.text_cfg,
            image_cfg=settings.image_cfg,
            rescale=settings.text_cfg_rescale,
            interval=settings.cfg_interval,
            every=settings.cfg_every,
            in_turn=not plan.passes_at_once,
        )
        if hold is not None:
            known, free = hold
            start = start + (1 - free) * known
            denoise = masks.hold_known(denoise, known, free)
        sampling = sampler_for(settings.sampler, self.schedule)(denoise, start, sigmas, noise)
        while True:
            # Entered for each step: a generator must not keep inference mode on while its caller runs.
            with torch.inference_mode():
                x = next(sampling, None)
            if x is None:
                return
            yield x

    def fitting_batch(self, size: tuple[int, int]) -> int:
        """The batch size for a working size: `batch_size`, or less if memory is short."""
        width, height = size
        batch = self.batch_size
        while batch > 1:
            with contextlib.suppress(ResourceError):
                if self._plan(batch, height, width) == self._plan(1, height, width):
                    break
            batch //= 2
        return batch

    def _plan(self, batch: int, height: int, width: int) -> Memory:
        """The memory plan for an edit of this size, given the free memory. Raises ResourceError."""
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

    def _vae_for(self, batch: int, height: int, width: int) -> AutoencoderKL:
        plan = self._plan(batch, height, width)
        vae = self.bundle.vae
        vae.use_tiling = plan.vae_tiling
        vae.use_slicing = plan != Memory()  # one picture at a time; the result is the same
        return vae

    def words_without_effect(self, text: str) -> list[str]:
        """Warnings for the parts of a text that the model ignores (`models.text`)."""
        return words_without_effect(self.bundle, text)

    def _compare_with_training(self, shown: Image.Image, rebuilt: Tensor) -> list[str]:
        """A message if the autoencoder reconstructs a picture worse than its training data.

        The first one is also issued as a Python warning.
        """
        known = self.bundle.card.known_psnr
        if known is None:
            return []
        error = (rebuilt.clamp(-1, 1).cpu() - to_tensor(shown)).square().mean()
        psnr = signed_psnr(error).item()
        if psnr >= known:
            return []
        message = (
            f"This picture is unlike the training data of {self.bundle.card.name}: the autoencoder "
            f"reconstructs it at {psnr:.1f} dB, and training pictures at {known:.1f} dB or more. For "
            f"photographs, use the model {PHOTO_MODEL}."
        )
        if not self._warned_far:
            self._warned_far = True
            warnings.warn(message, stacklevel=1)
        return [message]


@dataclass(frozen=True, kw_only=True)
class _PreparedImage:
    """A picture prepared for an edit: `box` crops `part` from it, `shown` is `part` at the working size.

    cutout: the picture in RGBA if it has transparent parts. rebuilt: `shown` after the autoencoder, if it is
    needed. mask: the part of the user's mask, feathered.
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
    """Edit a picture in one call, as `Editor.edit` does. The last used model stays loaded."""
    editor = _loaded(model, device, dtype)
    return editor.edit(image, instruction, seeds=seeds, settings=settings, **changes)


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as a list. Raises InputError for no seed, a single number, or a seed out of range."""
    if not isinstance(seeds, Iterable):
        raise InputError(
            f"seeds is {seeds}; it must be a list with one seed per result. Try seeds=[{seeds}]."
        )
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise InputError("There are no seeds. Give one for each result, for example seeds=[1, 2].")
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise InputError(f"Seed {seed} is out of range; use 0 to {MAX_SEED}.")
    return seeds


def _finite(pixels: Tensor) -> Tensor:
    # A network that overflows its number format would give a black picture without an error.
    if not pixels.isfinite().all():
        raise ModelError(
            "The model's output is not finite: its number format overflows. Load the model with dtype fp32."
        )
    return pixels


def _memory_error(width: int, height: int) -> contextlib.AbstractContextManager[None]:
    """Raise an out-of-memory error as a ResourceError that suggests a smaller size."""
    size = max(width, height) // 2
    return translated_errors(
        memory=f"Out of memory at {width}x{height}. Try a smaller size, such as {size}, or a batch size of 1."
    )
