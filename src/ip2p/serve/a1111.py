"""AUTOMATIC1111's `/sdapi/v1`, as far as it edits pictures by instruction, for the clients that speak it."""

from __future__ import annotations

import datetime
import json
import time
from collections import OrderedDict
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ip2p import __version__
from ip2p.config import MAX_SIZE, MIN_SIZE
from ip2p.pictures.infotext import SAMPLER_NAMES, SCHEDULE_NAMES
from ip2p.serve import service as services
from ip2p.serve.errors import Refusal
from ip2p.serve.native import request_body, seeds_of
from ip2p.serve.service import FieldError, Job
from ip2p.serve.wire import (
    Desk,
    Pictures,
    base64_of,
    client_of,
    finished,
    let_go,
    open_mask,
    open_picture,
    placed,
    read_body,
    settings_of,
    sized,
    written,
)

CLIENTS = 1000  # whose choice of a model, and the id of whose last edit, is remembered
RESIZE_MODES: tuple[Literal["stretch", "crop", "pad"], ...] = ("stretch", "crop", "pad")


class Img2Img(BaseModel):
    """Its fields that have a meaning here. Others are ignored, but for scripts, which would be missed."""

    model_config = ConfigDict(extra="ignore")

    init_images: list[str] = Field(description="one picture, as base64 or data URL")
    prompt: str = Field("", description="what to change, in words")
    negative_prompt: str | None = Field(None, description="what to stay away from")
    cfg_scale: float | None = Field(7.0, description="how strongly to follow the prompt")
    image_cfg_scale: float | None = Field(None, description="how strongly to keep the picture; null is 1.0")
    steps: int | None = Field(None, description="sampling steps; unless given the model's own, else 20")
    seed: int | None = Field(-1, description="the first result's; -1: drawn")
    batch_size: int | None = Field(1, description="results, times n_iter")
    n_iter: int | None = Field(1, description="results, times batch_size")
    sampler_name: str | None = Field(None, description="a name of GET /sdapi/v1/samplers")
    sampler_index: str | None = Field(None, description="the same, in older clients")
    scheduler: str | None = Field(None, description="a name of GET /sdapi/v1/schedulers")
    width: int | None = Field(None, description="of the results; unless given the picture's own")
    height: int | None = Field(None, description="of the results; unless given the picture's own")
    resize_mode: int = Field(0, description="to width and height: 0 stretch, 1 crop, 2 fill")
    mask: str | None = Field(None, description="white is edited")
    mask_blur: float | None = Field(None, description="pixels over which the edit fades inside the mask")
    inpainting_mask_invert: int | bool = Field(0, description="1: black is edited")
    inpaint_full_res: bool = Field(True, description="the model sees the masked part alone, at its full size")
    inpaint_full_res_padding: int = Field(0, description="pixels around it that the model sees too")
    override_settings: dict[str, Any] | None = Field(None, description="sd_model_checkpoint: the model")
    script_name: str | None = Field(None, description="there are none")
    alwayson_scripts: dict[str, Any] | None = Field(None, description="there are none")
    include_init_images: bool = False
    send_images: bool = True


class Options(BaseModel):
    model_config = ConfigDict(extra="ignore")

    sd_model_checkpoint: str | None = None


def router(desk: Desk) -> APIRouter:
    """The routes below `/sdapi/v1`."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["a1111"])
    service = desk.service
    chosen: OrderedDict[str, str] = OrderedDict()  # model by client
    latest: OrderedDict[str, str] = OrderedDict()  # the newest edit's id by client

    def remember(table: OrderedDict[str, str], client: str, value: str) -> None:
        table[client] = value
        table.move_to_end(client)
        while len(table) > CLIENTS:
            table.popitem(last=False)

    def model_of(client: str) -> str:
        return chosen.get(client, service.models[0])

    def known_model(name: str, field: str) -> str:
        if name not in service.models:
            raise FieldError(
                f"{field} names none of the models here: {', '.join(service.models)}.", field=field
            )
        return name

    @routes.post("/img2img", openapi_extra=request_body(Img2Img, forms=False), summary="Edit a picture")
    async def img2img(request: Request) -> JSONResponse:
        client = client_of(request)
        service.check_room(client)  # before anything is read: a refusal costs nothing
        body = await read_body(request, Img2Img, desk)
        name = (body.override_settings or {}).get("sd_model_checkpoint")
        model = model_of(client) if name is None else known_model(str(name), "sd_model_checkpoint")
        _check_body(body, service.limits.count)
        pictures = {"init_images": body.init_images[0], "mask": body.mask}
        async with placed(desk, client, pictures) as (given, place):
            edit = await _edit_of(desk, body, given, model)
            job = await desk.by_hand(service.submit, edit, client=client, place=place)
        del given, pictures
        remember(latest, client, job.id)
        shown = body.model_dump(exclude={"init_images", "mask"})
        if body.include_init_images:  # then they are held, and count
            shown |= {"init_images": body.init_images, "mask": body.mask}
        else:
            body.init_images, body.mask = [], None
            let_go(request)
        try:
            await finished(desk, request, job)
        except Refusal:  # interrupted: its clients want what there is, and no error
            if job.state != "cancelled":
                raise
        made = [base64_of(await desk.by_hand(written, result.image, "png")) for result in job.results]
        return JSONResponse(
            {
                "images": made if body.send_images else [],
                "parameters": shown,
                "info": json.dumps(_info(body, edit, job, model)),
            }
        )

    @routes.get("/options", summary="The model that this client has chosen")
    async def options(request: Request) -> dict[str, Any]:
        return {
            "sd_model_checkpoint": model_of(client_of(request)),
            "samples_format": "png",
            "CLIP_stop_at_last_layers": 1,
        }

    @routes.post("/options", openapi_extra=request_body(Options, forms=False), summary="Choose a model")
    async def set_options(request: Request) -> dict[str, Any]:
        body = await read_body(request, Options, desk)
        if body.sd_model_checkpoint is not None:
            name = known_model(body.sd_model_checkpoint, "sd_model_checkpoint")
            remember(chosen, client_of(request), name)
        return {}

    @routes.get("/sd-models", summary="The models that are served")
    async def models() -> list[dict[str, Any]]:
        return [
            {
                "title": name,
                "model_name": name,
                "hash": None,
                "sha256": None,
                "filename": name,
                "config": None,
            }
            for name in service.models
        ]

    @routes.get("/samplers", summary="How the noise is taken away")
    async def samplers() -> list[dict[str, Any]]:
        return [{"name": label, "aliases": [name], "options": {}} for name, label in SAMPLER_NAMES.items()]

    @routes.get("/schedulers", summary="How the noise levels lie")
    async def schedulers() -> list[dict[str, Any]]:
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
    async def scripts() -> dict[str, list[str]]:
        return {"txt2img": [], "img2img": []}

    @routes.get("/progress", summary="How this client's newest edit stands")
    async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
        job = service.job(latest.get(client_of(request), ""))
        going = job is not None and job.state in ("waiting", "running")
        picture = None
        if job is not None and going and not skip_current_image:
            preview = next((image for image in job.previews if image is not None), None)
            if preview is not None:
                picture = base64_of(await desk.by_hand(written, preview, "png"))
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

    @routes.post("/interrupt", summary="Stop this client's newest edit, within a step")
    async def interrupt(request: Request) -> dict[str, Any]:
        job = service.job(latest.get(client_of(request), ""))
        if job is not None:
            service.cancel(job.id)
        return {}

    return routes


def _check_body(body: Img2Img, most: int) -> None:
    """Raise FieldError for what is not done here, before any picture is read; `most` results are."""
    for name, scripts in (("script_name", body.script_name), ("alwayson_scripts", body.alwayson_scripts)):
        if scripts:
            called = scripts if isinstance(scripts, str) else ", ".join(scripts)
            raise FieldError(f"{name} asks for {called[:80]!r}; there are no scripts here.", field=name)
    if len(body.init_images) != 1:
        raise FieldError(
            f"init_images has {len(body.init_images)} pictures; one is edited at a time. Send one.",
            field="init_images",
        )
    batches, each = _batches(body)
    for name, number in (("n_iter", batches), ("batch_size", each)):
        if not 1 <= number <= most:
            raise FieldError(f"{name} is {number}; it must be 1 to {most}.", field=name)
    if batches * each > most:
        raise FieldError(
            f"n_iter times batch_size is {batches} times {each}, {batches * each} results; it must be 1 to "
            f"{most}.",
            field="batch_size",
        )


def _batches(body: Img2Img) -> tuple[int, int]:
    return 1 if body.n_iter is None else body.n_iter, 1 if body.batch_size is None else body.batch_size


async def _edit_of(desk: Desk, body: Img2Img, given: Pictures, model: str) -> services.Request:
    """What the service is asked for, with the pictures that were given. Raises FieldError and Refusal."""
    batches, each = _batches(body)
    sampler, spacing = _sampler(body)
    assert given["init_images"] is not None
    picture = await open_picture(desk, given["init_images"], "init_images")
    mask = None
    if given["mask"]:
        mask = await open_mask(desk, given["mask"], "mask", edit="white")
        if mask.size != picture.size:  # as there, whose clients rely on it
            mask = mask.resize(picture.size, Image.Resampling.NEAREST)
        if body.inpainting_mask_invert:
            mask = mask.point(lambda value: 255 - value)
    size = (body.width or picture.width, body.height or picture.height)
    if body.width is not None or body.height is not None:
        _check_size(size, desk.config.max_pixels)
        if not 0 <= body.resize_mode < len(RESIZE_MODES):
            raise FieldError(f"resize_mode is {body.resize_mode}; it must be 0, 1 or 2.", field="resize_mode")
        how = RESIZE_MODES[body.resize_mode]
        picture = await desk.by_hand(sized, picture, size, how)
        mask = mask and await desk.by_hand(sized, mask, size, how)
    return services.Request(
        image=picture,
        instruction=body.prompt,
        seeds=seeds_of(body.seed, batches * each, desk.service.limits.count, "batch_size"),
        steps=body.steps,
        sampler=sampler,
        spacing=spacing,
        text_cfg=7.0 if body.cfg_scale is None else body.cfg_scale,
        image_cfg=1.0 if body.image_cfg_scale is None else body.image_cfg_scale,
        negative=body.negative_prompt or "",
        mask=mask,
        # Without it the model sees the whole picture, at its own size.
        mask_padding=body.inpaint_full_res_padding if body.inpaint_full_res else MAX_SIZE,
        feather=None if mask is None else body.mask_blur,
        model=model,
        previews=5,
    )


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    for name, side in zip(("width", "height"), size, strict=True):
        if not MIN_SIZE <= side <= MAX_SIZE:
            raise FieldError(f"{name} is {side}; it must be {MIN_SIZE} to {MAX_SIZE}.", field=name)
    if size[0] * size[1] > max_pixels:
        raise FieldError(
            f"width times height is {size[0] * size[1]:,}; the limit is {max_pixels:,} pixels.", field="width"
        )


def _sampler(body: Img2Img) -> tuple[str | None, str | None]:
    """Our names of the sampler and the spacing, of which older clients write both into one name.

    None is the model's own: no sampler, and no schedule or "Automatic".
    """
    samplers = {label.lower(): name for name, label in SAMPLER_NAMES.items()}
    samplers |= {name: name for name in SAMPLER_NAMES}
    spacings = {label.lower(): name for name, label in SCHEDULE_NAMES.items()}
    spacings |= {name: name for name in SCHEDULE_NAMES} | {"uniform": "linspace"}
    wanted = (body.sampler_name or body.sampler_index or "").strip().lower()
    spacing = (body.scheduler or "automatic").strip().lower().replace("_", " ")
    if wanted not in samplers and wanted.endswith(" karras"):
        wanted, spacing = wanted.removesuffix(" karras"), "karras"
    if wanted and wanted not in samplers:
        raise FieldError(
            f"sampler_name is {wanted[:60]!r}; use one of {', '.join(SAMPLER_NAMES.values())}.",
            field="sampler_name",
        )
    if spacing not in spacings:
        raise FieldError(
            f"scheduler is {spacing[:60]!r}; use one of {', '.join(SCHEDULE_NAMES.values())}.",
            field="scheduler",
        )
    return samplers.get(wanted), None if spacing == "automatic" else spacings[spacing]


def _info(body: Img2Img, edit: services.Request, job: Job, model: str) -> dict[str, Any]:
    """What stands beside the pictures as JSON in a string."""
    width, height = edit.image.size
    seeds = list(edit.seeds)
    made = job.results[0].settings if job.results else None
    return {
        "prompt": edit.instruction,
        "all_prompts": [edit.instruction] * len(seeds),
        "negative_prompt": edit.negative,
        "all_negative_prompts": [edit.negative] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * len(seeds),
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": SAMPLER_NAMES.get(made.sampler if made else edit.sampler or ""),
        "cfg_scale": edit.text_cfg,
        "image_cfg_scale": edit.image_cfg,
        "steps": made.steps if made else edit.steps,
        "batch_size": body.batch_size or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model,
        "sd_model_hash": None,
        "denoising_strength": None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [settings_of(result) for result in job.results],
        "styles": [],
        "job_timestamp": datetime.datetime.now().strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": edit.mask is not None,
        "interrupted": job.state == "cancelled",
        "version": f"ip2p {__version__}",
    }
