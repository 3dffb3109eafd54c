"""The AUTOMATIC1111 API: the part of `/sdapi/v1` that clients need for edits by instruction."""

from __future__ import annotations

import functools
import io
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from PIL import Image, ImageChops
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from ip2p import __version__
from ip2p.base.errors import InputError
from ip2p.pictures.infotext import (
    AUTOMATIC,
    SAMPLER_NAMES,
    SCHEDULE_NAMES,
    infotext_of,
    parse_infotext,
    read_sampler,
    split_infotext,
)
from ip2p.serve import wire
from ip2p.serve.errors import Refusal, declared_errors
from ip2p.serve.jobs import Job
from ip2p.serve.requests import EditRequest, Limits
from ip2p.serve.wire import PICTURE_SCHEMA, Desk, Opened, OptionalPicture
from ip2p.settings import MAX_SEED, MAX_SIZE, MIN_SIZE, EditSettings, SettingError, settings_from_body

CLIENTS = 1000  # maximum number of clients whose model and latest edit are remembered
RESIZE_MODES: tuple[Literal["stretch", "crop", "pad"], ...] = ("stretch", "crop", "pad")
TEXT_CFG, IMAGE_CFG = 7.0, 1.0  # what null means in A1111
PICTURES = ("init_images", "mask", "control_image")
IMAGES_SCHEMA = {"type": "array", "items": PICTURE_SCHEMA, "minItems": 1, "maxItems": 1}
# Fields that change the picture neither here nor in A1111.
HARMLESS = {
    "do_not_save_samples",
    "do_not_save_grid",
    "force_task_id",
    "override_settings_restore_afterwards",
    "save_images",
    "script_args",  # of `script_name`, which is rejected
    "subseed",  # only has an effect with subseed_strength
}
# Values of other fields and options that need no warning, because they change nothing here. OFF lists those
# of all others.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "denoising_strength": (1,),
    "eta": (1,),
    "initial_noise_multiplier": (1,),
    "inpainting_fill": (1,),  # keeps the original content of the masked region
    "mask_blur_x": (4,),
    "mask_blur_y": (4,),
    "mask_round": (True,),
    "s_noise": (1,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "CLIP_stop_at_last_layers": (1,),
    "samples_format": ("png",),
    "sd_vae": ("Automatic", "None"),
}
OFF: tuple[Any, ...] = (0, False, "", [], {})
# Lists that clients request at startup. The responses never change.
LISTS: dict[str, Any] = {
    "samplers": [
        {
            "name": label,
            "aliases": [name, f"k_{name}"],
            "options": {"scheduler": AUTOMATIC[name]} if name in AUTOMATIC else {},
        }
        for name, label in SAMPLER_NAMES.items()
    ],
    "schedulers": [
        {
            "name": label.lower().replace(" ", "_"),
            "label": label,
            "aliases": [name],
            "default_rho": 7.0 if name == "karras" else -1.0,
            "need_inner_model": False,
        }
        for name, label in {"automatic": "Automatic", **SCHEDULE_NAMES}.items()
    ],
    "scripts": {"txt2img": [], "img2img": []},
    "upscalers": [dict.fromkeys(("model_name", "model_path", "model_url")) | {"name": "None", "scale": 1}],
    "latent-upscale-modes": [],
    "loras": [],
    "sd-vae": [],
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "embeddings": {"loaded": {}, "skipped": {}},
    "script-info": [],
    "extensions": [],
    "cmd-flags": {"api": True},
}


class Img2Img(BaseModel):
    """The supported fields of A1111, plus the settings of an edit that it lacks. `info.warnings` lists other
    fields that would change the picture. Scripts are rejected."""

    model_config = ConfigDict(extra="allow")

    init_images: Annotated[list[str], WithJsonSchema(IMAGES_SCHEMA)] = Field(
        description="one picture, as base64 or a data URL"
    )
    mask: OptionalPicture = Field(None, description="white is edited")
    control_image: OptionalPicture = Field(None, description="a picture for the model's ControlNet")
    seed: int | None = Field(
        -1,
        description="seed of the first result; -1: random",
        json_schema_extra={"minimum": -1, "maximum": MAX_SEED},
    )
    sampler_name: str | None = Field(None, description="a name from GET /sdapi/v1/samplers")
    sampler_index: str | None = Field(None, description="the same, for older clients")
    scheduler: str | None = Field(None, description="a name from GET /sdapi/v1/schedulers")
    width: int | None = Field(None, description="width of the results; default: that of the picture")
    height: int | None = Field(None, description="height of the results; default: that of the picture")
    resize_mode: int = Field(0, description="how to fit width and height: 0 stretch, 1 crop, 2 fill")
    inpainting_mask_invert: int | bool = Field(0, description="1: black is edited")
    inpaint_full_res: bool = Field(True, description="the model sees only the masked part, at its full size")
    inpaint_full_res_padding: int = Field(0, description="pixels around the mask to show the model")
    override_settings: dict[str, Any] | None = Field(None, description="sd_model_checkpoint: the model")
    script_name: str | None = Field(None, description="rejected: scripts are not supported")
    alwayson_scripts: dict[str, Any] | None = Field(None, description="rejected unless disabled or empty")
    include_init_images: bool = False
    send_images: bool = True


class Img2ImgAnswer(BaseModel):
    images: list[str]
    parameters: dict[str, Any]
    info: str = Field(description="settings as JSON, with a list of warnings")


class PngInfo(BaseModel):
    image: Annotated[str, WithJsonSchema(PICTURE_SCHEMA)] = Field(description="a PNG, JPEG or WebP file")


class PngInfoAnswer(BaseModel):
    info: str = Field(description="infotext of the file, or an empty string")
    items: dict[str, str] = Field(description="other text entries of the file")
    parameters: dict[str, str] = Field(description="fields of the infotext")


class Options(BaseModel):
    model_config = ConfigDict(extra="allow")

    sd_model_checkpoint: str | None = Field(None, description="a title from GET /sdapi/v1/sd-models")


def img2img_body(limits: Limits) -> type[Img2Img]:
    """Create the body model of an edit: `Img2Img` and all settings, with a server's limits."""
    fields = {
        name: (
            int | None,
            Field(1, ge=1, le=limits.count, description=f"number of results is this times {other}"),
        )
        for name, other in (("batch_size", "n_iter"), ("n_iter", "batch_size"))
    }
    # No `size`: width and height resize the picture, and the working size keeps its default.
    how = {"defaults": {"text_cfg": TEXT_CFG}, "leave_out": ("size",), "nullable": True}
    return wire.body_within(limits, Img2Img, "a1111", fields, **how)


def a1111_router(desk: Desk) -> APIRouter:
    """The routes under `/sdapi/v1`."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["a1111"], responses=declared_errors("a1111"))
    service, kind = desk.service, img2img_body(desk.service.limits)
    # By client: the name of the selected model, and the id of the latest edit.
    chosen, latest = OrderedDict[str, str](), OrderedDict[str, str]()

    def remember(memory: OrderedDict[str, str], client: str, text: str) -> None:
        memory[client] = text
        memory.move_to_end(client)
        if len(memory) > CLIENTS:
            memory.popitem(last=False)

    def model_of(client: str) -> str:
        return chosen.get(client, service.models[0])

    def latest_of(request: Request) -> str:
        return latest.get(wire.caller_of(request), "")

    def known_model(name: str) -> str:
        if name not in service.models:
            raise SettingError(
                f"sd_model_checkpoint is not an available model. Use one of {', '.join(service.models)}.",
                field="sd_model_checkpoint",
            )
        return name

    @routes.post("/img2img", summary="Edit a picture", openapi_extra=wire.request_body(kind, forms=False))
    async def img2img(request: Request) -> Img2ImgAnswer:
        client = wire.caller_of(request)
        service.check_room(client)  # before the body is read, so that a rejection is cheap
        body: Any = await wire.read_body(request, kind, desk)
        name = (body.override_settings or {}).get("sd_model_checkpoint")
        model = model_of(client) if name is None else known_model(str(name))
        count = _check_body(body, service.limits.count)
        ignored = _ignored(_unknown_fields(body))
        edit_of = functools.partial(_edit_of, desk, body, model, count, ignored)
        # Pictures to be echoed stay in memory and count against the limit.
        hold = body.include_init_images
        edit, job = await wire.submitted(desk, request, body, edit_of, hold=hold)
        remember(latest, client, job.id)
        try:
            await wire.finished(desk, request, job)
        except Refusal:  # interrupted: clients expect the finished results, not an error
            if job.state != "cancelled":
                raise
        images = [await desk.in_thread(wire.PNG.base64, result.image) for result in job.results]
        return Img2ImgAnswer(
            images=images if body.send_images else [],
            parameters=body.model_dump(exclude=None if hold else set(PICTURES)),
            info=json.dumps(_info(body, edit, job)),
        )

    @routes.post(
        "/png-info",
        summary="Read the settings in a picture's file",
        openapi_extra=wire.request_body(PngInfo, forms=False),
    )
    async def read_png_info(request: Request) -> PngInfoAnswer:
        body = await wire.read_body(request, PngInfo, desk)
        return await desk.in_thread(_png_info, body.image)

    @routes.get("/options", summary="The model selected by this client")
    async def read_options(request: Request) -> dict[str, Any]:
        names = ("CLIP_stop_at_last_layers", "samples_format", "sd_vae")
        fixed = {name: NEUTRAL_VALUES[name][0] for name in names}
        return {"sd_model_checkpoint": model_of(wire.caller_of(request)), **fixed}

    @routes.post("/options", summary="Select a model", openapi_extra=wire.request_body(Options, forms=False))
    async def set_options(request: Request) -> dict[str, Any]:
        body = await wire.read_body(request, Options, desk)
        if body.sd_model_checkpoint is not None:
            remember(chosen, wire.caller_of(request), known_model(body.sd_model_checkpoint))
        warnings = _ignored(body.model_extra or {})
        return {"warnings": warnings} if warnings else {}

    @routes.get("/memory", summary="Free and used memory, in bytes")
    async def read_memory() -> dict[str, dict[str, Any]]:
        return _memory()

    def always(answer: Any) -> Callable[[], Any]:
        return lambda: answer

    empty = dict.fromkeys(("hash", "sha256", "config"))
    names = ("title", "model_name", "filename")
    models = [dict.fromkeys(names, name) | empty for name in service.models]
    for path, answer in (LISTS | {"sd-models": models}).items():
        summary = f"List {path}, as A1111 does"
        routes.add_api_route(f"/{path}", always(answer), summary=summary, name=f"list {path}")

    @routes.post("/refresh-checkpoints", summary="Does nothing: the list of models is fixed at startup")
    async def refresh_checkpoints() -> dict[str, Any]:
        return {}

    @routes.get("/progress", summary="Progress of this client's latest edit")
    async def read_progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
        job = service.job(latest_of(request))
        picture: str | None = None
        if job is not None and job.active and not skip_current_image:
            preview = next((image for image in job.previews if image is not None), None)
            if preview is not None:
                picture = await desk.in_thread(wire.PNG.base64, preview)
        return _progress(job, picture)

    # All results are sampled together, so a single one cannot be skipped.
    @routes.post("/skip", summary="The same as interrupt")
    @routes.post("/interrupt", summary="Stop this client's latest edit within a step")
    async def interrupt(request: Request) -> dict[str, Any]:
        service.cancel(latest_of(request))
        return {}

    return routes


def _check_body(body: Any, most: int) -> int:
    """Return the number of results. Raises SettingError for unsupported requests, before decoding."""
    scripts = {name: value for name, value in (body.alwayson_scripts or {}).items() if not _is_off(value)}
    chosen = (body.script_name or "").strip()
    for field, name in (
        ("script_name", "" if chosen.lower() == "none" else chosen),
        ("alwayson_scripts", ", ".join(scripts)),
    ):
        if name:
            raise SettingError(
                f"{field} is {name[:80]!r}. Scripts are not supported; leave it out.", field=field
            )
    if len(body.init_images) != 1:
        raise SettingError(
            f"init_images has {len(body.init_images)} pictures; send one. Each request edits one picture.",
            field="init_images",
        )
    batches, each = body.n_iter or 1, body.batch_size or 1
    if batches * each > most:
        raise SettingError(
            f"n_iter times batch_size is {batches} times {each}, {batches * each} results; it must be 1 to "
            f"{most}.",
            field="batch_size",
        )
    return int(batches * each)


def _is_off(script: Any) -> bool:
    """Whether an always-on script is off: no arguments, a false first one, or only disabled units."""
    units = script.get("args") if isinstance(script, dict) else script
    if not units or not isinstance(units, list):
        return not units
    return units[0] is False or all(
        not unit or (isinstance(unit, dict) and unit.get("enabled") is False) for unit in units
    )


def _unknown_fields(body: Any) -> dict[str, Any]:
    """The fields and options that `Img2Img` lacks.

    The fields are removed from the body, since they may be as large as pictures.
    """
    fields = dict(body.model_extra)
    body.model_extra.clear()
    if not body.mask:
        fields.pop("inpainting_fill", None)
    options = dict(body.override_settings or {})
    options.pop("sd_model_checkpoint", None)
    return fields | options


def _ignored(fields: Mapping[str, Any]) -> list[str]:
    """A warning that lists fields that would change the picture in A1111 but have no effect here."""
    named = [
        name[:60]
        for name, value in fields.items()
        if name not in HARMLESS and value not in (None, *NEUTRAL_VALUES.get(name, OFF))
    ]
    return [f"These fields have no effect here: {', '.join(named[:30])}."] if named else []


async def _edit_of(
    desk: Desk, body: Any, model: str, count: int, ignored: list[str], opened: Opened
) -> EditRequest:
    """Create the edit that a body describes. Raises SettingError and Refusal."""
    limits = desk.service.limits
    sampler, schedule = _sampler(body)
    picture = await opened.picture(body.init_images[0], "init_images")
    mask = None
    if body.mask:
        mask = await opened.mask(body.mask)
        if mask.size != picture.size:  # A1111 scales it too
            mask = mask.resize(picture.size, Image.Resampling.NEAREST)
        if body.inpainting_mask_invert:
            mask = ImageChops.invert(mask)
    if body.width is not None or body.height is not None:
        size = (body.width or picture.width, body.height or picture.height)
        _check_size(size, desk.config.max_pixels)
        if not 0 <= body.resize_mode < len(RESIZE_MODES):
            raise SettingError(
                f"resize_mode is {body.resize_mode}; it must be 0, 1 or 2.", field="resize_mode"
            )
        how = RESIZE_MODES[body.resize_mode]
        picture = await desk.in_thread(wire.sized, picture, size, how)
        mask = mask and await desk.in_thread(wire.sized, mask, size, how)
    settings: EditSettings = settings_from_body(
        body,
        "a1111",
        text_cfg=TEXT_CFG if body.cfg_scale is None else body.cfg_scale,
        image_cfg=IMAGE_CFG if body.image_cfg_scale is None else body.image_cfg_scale,
        sampler=sampler,
        schedule=schedule,
        seed=0,
        size=None,
        mask=mask,
        # Without inpaint_full_res the model sees the whole picture.
        mask_padding=body.inpaint_full_res_padding if body.inpaint_full_res else MAX_SIZE,
        feather=None if mask is None else body.mask_blur,
        control_image=body.control_image and await opened.picture(body.control_image, "control_image"),
    )
    return EditRequest(
        image=picture,
        settings=settings,
        seeds=wire.seeds_of(body.seed, count, limits.count, "batch_size"),
        model=model,
        previews=min(5, limits.steps),
        warnings=(*opened.warnings, *ignored),
    )


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    for name, side in zip(("width", "height"), size, strict=True):
        if not MIN_SIZE <= side <= MAX_SIZE:
            raise SettingError(f"{name} is {side}; it must be {MIN_SIZE} to {MAX_SIZE}.", field=name)
    if size[0] * size[1] > max_pixels:
        raise SettingError(
            f"width times height is {size[0] * size[1]:,}; the limit is {max_pixels:,} pixels.", field="width"
        )


def _sampler(body: Any) -> tuple[str | None, str | None]:
    """The sampler and the schedule by our names; None: the model's default. Raises SettingError."""
    sampler, schedule = read_sampler(body.sampler_name or body.sampler_index or "", body.scheduler or "")
    for field, found, labels in (
        ("sampler_name", sampler, SAMPLER_NAMES),
        ("scheduler", schedule, SCHEDULE_NAMES),
    ):
        if found and found not in labels:
            raise SettingError(
                f"{field} is {found[:60]!r}; use one of {', '.join(labels.values())}.", field=field
            )
    return sampler or None, schedule


def _png_info(picture: str) -> PngInfoAnswer:
    """Read the settings in a file. Raises SettingError if it is not PNG, JPEG or WebP."""
    data = wire.from_base64(picture, "image")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:  # reads no pixels
            text = infotext_of(opened) or ""
            items = {str(name): value for name, value in opened.info.items() if isinstance(value, str)}
    except Exception:  # Pillow's decoders raise many types
        raise SettingError("image is not a PNG, JPEG or WebP file. Send one.", field="image") from None
    items.pop("parameters", None)
    try:
        instruction, negative, fields = split_infotext(text)
    except InputError:
        return PngInfoAnswer(info=text, items=items, parameters={})
    parameters = {"Prompt": instruction, "Negative prompt": negative, **fields}
    return PngInfoAnswer(info=text, items=items, parameters=parameters)


def _memory() -> dict[str, dict[str, Any]]:
    """Free and used bytes of the machine and of the first CUDA device, as A1111 reports them."""
    import torch

    from ip2p.models.memory import free_ram

    def record(free: int, total: int) -> dict[str, int]:
        return {"free": free, "used": total - free, "total": total}

    unknown, free = {"error": "unavailable"}, free_ram()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if free is not None else 0
    cuda = {"system": record(*torch.cuda.mem_get_info())} if torch.cuda.is_available() else unknown
    return {"ram": unknown if free is None else record(free, total), "cuda": cuda}


def _progress(job: Job | None, picture: str | None) -> dict[str, Any]:
    """The progress of an edit, as A1111 reports it."""
    going = job if job is not None and job.active else None
    step, steps = (going.step, going.steps) if going else (0, 0)
    return {
        "progress": step / steps if steps else 0.0,
        "eta_relative": (going.seconds_left if going else None) or 0.0,
        "state": {
            "skipped": False,
            "interrupted": job is not None and job.state == "cancelled",
            "stopping_generation": False,
            "job": "img2img" if going else "",
            "job_count": int(going is not None),
            "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
            "job_no": 0,
            "sampling_step": step,
            "sampling_steps": steps,
        },
        "current_image": picture,
        "textinfo": "waiting" if job is not None and job.state == "waiting" else None,
    }


def _info(body: Any, edit: EditRequest, job: Job) -> dict[str, Any]:
    """The `info` of a response in A1111's format, plus our warnings."""
    made = parse_infotext(job.results[0].parameters) if job.results else edit.settings.resolved()
    settings, seeds = edit.settings, list(edit.seeds)
    return {
        "prompt": settings.instruction,
        "all_prompts": [settings.instruction] * len(seeds),
        "negative_prompt": settings.negative,
        "all_negative_prompts": [settings.negative] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * len(seeds),
        "subseed_strength": 0,
        "width": edit.image.width,
        "height": edit.image.height,
        "sampler_name": SAMPLER_NAMES[str(made.sampler)],
        "cfg_scale": settings.text_cfg,
        "image_cfg_scale": settings.image_cfg,
        "steps": made.steps,
        "batch_size": body.batch_size or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": job.model,
        "sd_model_hash": None,
        "denoising_strength": None,
        "extra_generation_params": {"Schedule type": SCHEDULE_NAMES[str(made.schedule)]},
        "index_of_first_image": 0,
        "infotexts": [result.parameters for result in job.results],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": settings.mask is not None,
        "interrupted": job.state == "cancelled",
        "warnings": job.warnings,
        "version": f"ip2p {__version__}",
    }
