"""AUTOMATIC1111's `/sdapi/v1`, as far as it edits pictures by instruction, for the clients that speak it."""

from __future__ import annotations

import datetime
import functools
import json
import time
from collections import OrderedDict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticUndefined

from ip2p import __version__
from ip2p.pictures.infotext import SAMPLER_NAMES, SCHEDULE_NAMES, parse_infotext
from ip2p.serve import wire
from ip2p.serve.errors import Refusal, declared_errors
from ip2p.serve.faces.native import OptionalPicture
from ip2p.serve.jobs import Job
from ip2p.serve.requests import EditRequest, Limits, limited_settings
from ip2p.serve.wire import Desk, Opened
from ip2p.settings import (
    MAX_SEED,
    MAX_SIZE,
    MIN_SIZE,
    SettingError,
    interface_body,
    settings_from_body,
    voice_of,
)

CLIENTS = 1000  # whose choice of a model, and the id of whose last edit, is remembered
RESIZE_MODES: tuple[Literal["stretch", "crop", "pad"], ...] = ("stretch", "crop", "pad")
TEXT_CFG, IMAGE_CFG = 7.0, 1.0  # what null means to its clients
PICTURES = ("init_images", "mask", "control_image")
InitImages = Annotated[
    list[str],
    WithJsonSchema({"type": "array", "items": wire.PICTURE_SCHEMA, "minItems": 1, "maxItems": 1}),
]


class Img2Img(BaseModel):
    """Its fields that have a meaning here, and the settings of an edit that it lacks. Others are ignored,
    but for scripts, which would be missed."""

    model_config = ConfigDict(extra="ignore")

    init_images: InitImages = Field(description="one picture, as base64 or data URL")
    mask: OptionalPicture = Field(None, description="white is edited")
    control_image: OptionalPicture = Field(None, description="a picture for the model's ControlNet")
    seed: int | None = Field(
        -1,
        description="the first result's; -1: drawn",
        json_schema_extra={"minimum": -1, "maximum": MAX_SEED},
    )
    sampler_name: str | None = Field(None, description="a name of GET /sdapi/v1/samplers")
    sampler_index: str | None = Field(None, description="the same, in older clients")
    scheduler: str | None = Field(None, description="a name of GET /sdapi/v1/schedulers")
    width: int | None = Field(None, description="of the results; unless given the picture's own")
    height: int | None = Field(None, description="of the results; unless given the picture's own")
    resize_mode: int = Field(0, description="to width and height: 0 stretch, 1 crop, 2 fill")
    inpainting_mask_invert: int | bool = Field(0, description="1: black is edited")
    inpaint_full_res: bool = Field(True, description="the model sees the masked part alone, at its full size")
    inpaint_full_res_padding: int = Field(0, description="pixels around it that the model sees too")
    override_settings: dict[str, Any] | None = Field(None, description="sd_model_checkpoint: the model")
    script_name: str | None = Field(None, description="there are none")
    alwayson_scripts: dict[str, Any] | None = Field(None, description="there are none")
    include_init_images: bool = False
    send_images: bool = True


class Img2ImgAnswer(BaseModel):
    images: list[str]
    parameters: dict[str, Any]
    info: str = Field(description="JSON of what the pictures were made with; its warnings are in it")


class Options(BaseModel):
    model_config = ConfigDict(extra="ignore")

    sd_model_checkpoint: str | None = Field(None, description="a title of GET /sdapi/v1/sd-models")


def img2img_body(limits: Limits) -> type[Img2Img]:
    """The body of an edit: its fields and every setting, within a server's limits."""

    class Bounded(Img2Img):
        batch_size: int | None = Field(1, ge=1, le=limits.count, description="results, times n_iter")
        n_iter: int | None = Field(1, ge=1, le=limits.count, description="results, times batch_size")

    Bounded.__name__, Bounded.__doc__ = "Img2Img", Img2Img.__doc__
    return interface_body(
        Bounded,
        "a1111",
        settings=limited_settings(limits),
        defaults={"instruction": PydanticUndefined, "text_cfg": TEXT_CFG},
        leave_out=("size",),  # the picture's own is what the model sees, scaled by width and height
        nullable=True,
    )


class _Memory:
    """One text for each client: of the clients, the latest CLIENTS."""

    def __init__(self) -> None:
        self._texts: OrderedDict[str, str] = OrderedDict()

    def put(self, client: str, text: str) -> None:
        self._texts[client] = text
        self._texts.move_to_end(client)
        while len(self._texts) > CLIENTS:
            self._texts.popitem(last=False)

    def get(self, client: str, default: str = "") -> str:
        return self._texts.get(client, default)


def router(desk: Desk) -> APIRouter:
    """The routes below `/sdapi/v1`."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["a1111"], responses=declared_errors("a1111"))
    service, kind = desk.service, img2img_body(desk.service.limits)
    chosen, latest = _Memory(), _Memory()  # model; id of the newest edit

    def model_of(client: str) -> str:
        return chosen.get(client, service.models[0])

    def known_model(name: str) -> str:
        if name not in service.models:
            raise SettingError(
                f"sd_model_checkpoint names none of the models here: {', '.join(service.models)}.",
                field="sd_model_checkpoint",
            )
        return name

    @routes.post(
        "/img2img",
        summary="Edit a picture",
        openapi_extra=wire.request_body(kind, forms=False),
    )
    async def img2img(request: Request) -> Img2ImgAnswer:
        client = wire.caller_of(request)
        service.check_room(client)  # before anything is read: a refusal costs nothing
        body: Any = await wire.read_body(request, kind, desk, voice_of("a1111"))
        name = (body.override_settings or {}).get("sd_model_checkpoint")
        model = model_of(client) if name is None else known_model(str(name))
        count = _check_body(body, service.limits.count)
        edit_of = functools.partial(_edit_of, desk, body, model, count)
        edit, job = await wire.submitted(desk, client, edit_of)
        latest.put(client, job.id)
        echo = body.model_dump(exclude=set(PICTURES))
        if body.include_init_images:  # then they are held, and count
            echo |= {field: getattr(body, field) for field in PICTURES}
        else:
            wire.let_go(request, body)
        try:
            await wire.finished(desk, request, job)
        except Refusal:  # interrupted: its clients want what there is, and no error
            if job.state != "cancelled":
                raise
        images = [await desk.by_hand(wire.PNG.base64, result.image) for result in job.results]
        return Img2ImgAnswer(
            images=images if body.send_images else [],
            parameters=echo,
            info=json.dumps(_info(body, edit, job)),
        )

    @routes.get("/options", summary="The model that this client has chosen")
    async def read_options(request: Request) -> dict[str, Any]:
        return {
            "sd_model_checkpoint": model_of(wire.caller_of(request)),
            "samples_format": "png",
            "CLIP_stop_at_last_layers": 1,
        }

    @routes.post(
        "/options",
        summary="Choose a model",
        openapi_extra=wire.request_body(Options, forms=False),
    )
    async def set_options(request: Request) -> dict[str, Any]:
        body = await wire.read_body(request, Options, desk)
        if body.sd_model_checkpoint is not None:
            chosen.put(wire.caller_of(request), known_model(body.sd_model_checkpoint))
        return {}

    @routes.get("/sd-models", summary="The models that are served")
    async def list_models() -> list[dict[str, Any]]:
        empty = dict.fromkeys(("hash", "sha256", "config"))
        names = ("title", "model_name", "filename")
        return [dict.fromkeys(names, name) | empty for name in service.models]

    @routes.get("/samplers", summary="The samplers")
    async def list_samplers() -> list[dict[str, Any]]:
        return [{"name": label, "aliases": [name], "options": {}} for name, label in SAMPLER_NAMES.items()]

    @routes.get("/schedulers", summary="The noise schedules")
    async def list_schedulers() -> list[dict[str, Any]]:
        return [
            {
                "name": label.lower().replace(" ", "_"),
                "label": label,
                "aliases": [name],
                "default_rho": 7.0 if name == "karras" else -1.0,
                "need_inner_model": False,
            }
            for name, label in SCHEDULE_NAMES.items()
        ]

    @routes.get("/scripts", summary="There are none")
    async def list_scripts() -> dict[str, list[str]]:
        return {"txt2img": [], "img2img": []}

    @routes.get("/progress", summary="How this client's newest edit stands")
    async def read_progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
        job = service.job(latest.get(wire.caller_of(request)))
        picture: str | None = None
        if job is not None and job.active and not skip_current_image:
            preview = next((image for image in job.previews if image is not None), None)
            if preview is not None:
                picture = await desk.by_hand(wire.PNG.base64, preview)
        return _progress(job, picture)

    @routes.post("/interrupt", summary="Stop this client's newest edit, within a step")
    async def interrupt(request: Request) -> dict[str, Any]:
        service.cancel(latest.get(wire.caller_of(request)))
        return {}

    return routes


def _check_body(body: Any, most: int) -> int:
    """How many results are asked for. Raises SettingError for what is not done here, before any picture is
    read; at most `most` results are."""
    for name, scripts in (("script_name", body.script_name), ("alwayson_scripts", body.alwayson_scripts)):
        if scripts:
            called = scripts if isinstance(scripts, str) else ", ".join(scripts)
            raise SettingError(f"{name} asks for {called[:80]!r}; there are no scripts here.", field=name)
    if len(body.init_images) != 1:
        raise SettingError(
            f"init_images has {len(body.init_images)} pictures; one is edited at a time. Send one.",
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


async def _edit_of(desk: Desk, body: Any, model: str, count: int, opened: Opened) -> EditRequest:
    """The edit that a body asks for. Raises SettingError and Refusal."""
    limits = desk.service.limits
    sampler, schedule = _sampler(body)
    picture = await opened.picture(body.init_images[0], "init_images")
    mask = None
    if body.mask:
        mask = await opened.mask(body.mask, "mask")
        if mask.size != picture.size:  # as there, whose clients rely on it
            mask = mask.resize(picture.size, Image.Resampling.NEAREST)
        if body.inpainting_mask_invert:
            mask = mask.point(lambda value: 255 - value)
    if body.width is not None or body.height is not None:
        size = (body.width or picture.width, body.height or picture.height)
        _check_size(size, desk.config.max_pixels)
        if not 0 <= body.resize_mode < len(RESIZE_MODES):
            raise SettingError(
                f"resize_mode is {body.resize_mode}; it must be 0, 1 or 2.", field="resize_mode"
            )
        how = RESIZE_MODES[body.resize_mode]
        picture = await desk.by_hand(wire.sized, picture, size, how)
        mask = mask and await desk.by_hand(wire.sized, mask, size, how)
    settings = settings_from_body(
        body,
        "a1111",
        settings=limited_settings(limits),
        text_cfg=TEXT_CFG if body.cfg_scale is None else body.cfg_scale,
        image_cfg=IMAGE_CFG if body.image_cfg_scale is None else body.image_cfg_scale,
        sampler=sampler,
        schedule=schedule,
        seed=0,
        size=None,
        mask=mask,
        # Without it the model sees the whole picture, at its own size.
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
        warnings=tuple(opened.warnings),
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
    """Our names of the sampler and the schedule; older clients write both into one name.

    None is the model's own: no sampler, and no schedule or "Automatic".
    """
    samplers = {label.lower(): name for name, label in SAMPLER_NAMES.items()}
    schedules = {label.lower(): name for name, label in SCHEDULE_NAMES.items()}
    for names in (samplers, schedules):
        names |= {name: name for name in names.values()}
    schedules |= {"uniform": "linspace"}
    sampler = (body.sampler_name or body.sampler_index or "").strip().lower()
    schedule = (body.scheduler or "automatic").strip().lower().replace("_", " ")
    if sampler not in samplers and sampler.endswith(" karras"):
        sampler, schedule = sampler.removesuffix(" karras"), "karras"
    for field, given, names, labels in (
        ("sampler_name", sampler, samplers, SAMPLER_NAMES),
        ("scheduler", schedule, schedules, SCHEDULE_NAMES),
    ):
        if given and given not in names:
            raise SettingError(
                f"{field} is {given[:60]!r}; use one of {', '.join(labels.values())}.", field=field
            )
    return samplers.get(sampler), None if schedule == "automatic" else schedules[schedule]


def _progress(job: Job | None, picture: str | None) -> dict[str, Any]:
    """How an edit stands, in its clients' words."""
    going = job is not None and job.active
    step, steps = (job.step, job.steps) if job is not None and going else (0, 0)
    return {
        "progress": step / steps if steps else 0.0,
        "eta_relative": (job.seconds_left if job is not None and going else 0.0) or 0.0,
        "state": {
            "skipped": False,
            "interrupted": job is not None and job.state == "cancelled",
            "stopping_generation": False,
            "job": "img2img" if going else "",
            "job_count": int(going),
            "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
            "job_no": 0,
            "sampling_step": step,
            "sampling_steps": steps,
        },
        "current_image": picture,
        "textinfo": "waiting" if job is not None and job.state == "waiting" else None,
    }


def _info(body: Any, edit: EditRequest, job: Job) -> dict[str, Any]:
    """What stands beside the pictures as JSON in a string."""
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
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [result.parameters for result in job.results],
        "styles": [],
        "job_timestamp": datetime.datetime.now().strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": settings.mask is not None,
        "interrupted": job.state == "cancelled",
        "warnings": job.warnings,
        "version": f"ip2p {__version__}",
    }
