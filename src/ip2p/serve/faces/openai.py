"""The OpenAI API: `/v1/images/edits`."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from ip2p.pictures.images import flattened
from ip2p.serve import wire
from ip2p.serve.errors import Refusal, declared_errors, error_body
from ip2p.serve.faces.native import EVENTS, check_model
from ip2p.serve.jobs import Job
from ip2p.serve.requests import EditRequest, Limits
from ip2p.serve.wire import PICTURE_SCHEMA, Desk, Encoding, Format, Opened, OptionalPicture
from ip2p.settings import (
    MAX_SEED,
    MAX_SIZE,
    MIN_SIZE,
    EditSettings,
    SettingError,
    parse_size,
    settings_from_body,
)

PATH = "/v1/images/edits"
# There are no tokens, but clients read the counts.
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
# A picture in a JSON body. image_url is a data URL; file_id is rejected.
REFERENCE_SCHEMA = {
    "type": "object",
    "properties": {"image_url": PICTURE_SCHEMA},
    "required": ["image_url"],
    "additionalProperties": False,
}
IMAGE_SCHEMA = {"anyOf": [PICTURE_SCHEMA, {"type": "array", "items": PICTURE_SCHEMA, "maxItems": 1}]}
IMAGES_SCHEMA = {"type": "array", "items": REFERENCE_SCHEMA, "maxItems": 1}
MASK_SCHEMA = {"anyOf": [PICTURE_SCHEMA, REFERENCE_SCHEMA, {"type": "null"}]}
Reference = dict[str, str | None]
# Fields that are only approximated: the values that need no warning, and the setting to use instead.
APPROXIMATED = {
    "quality": (("auto", "standard"), "num_inference_steps sets the quality"),
    "input_fidelity": ((), "image_guidance_scale sets how much of the picture is kept"),
    "complexity": ((), "num_inference_steps sets the computation"),
}


class ImagesEdit(BaseModel):
    """OpenAI's fields, plus the settings of an edit. Unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid")

    image: Annotated[bytes | str | list[bytes | str] | None, WithJsonSchema(IMAGE_SCHEMA)] = Field(
        None, description="the picture to edit; only one"
    )
    images: Annotated[list[Reference] | None, WithJsonSchema(IMAGES_SCHEMA)] = Field(
        None, description="the picture to edit, in a JSON body; only one"
    )
    mask: Annotated[bytes | str | Reference | None, WithJsonSchema(MASK_SCHEMA)] = Field(
        None, description="PNG of the same size: transparent areas are edited"
    )
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description="auto keeps the picture's transparency; transparent needs a picture that has some"
    )
    quality: str | None = Field(None, description="has no effect; use num_inference_steps")
    input_fidelity: str | None = Field(None, description="has no effect; use image_guidance_scale")
    complexity: str | None = Field(None, description="has no effect; use num_inference_steps")
    user: str | None = Field(None, description="has no effect")
    safety_identifier: str | None = Field(None, description="has no effect")
    model: str | None = Field(None, description="a name from GET /v1/models; default: the first")
    size: str | None = Field(
        None, description="size of the results, such as 512x512; auto: the size of the picture"
    )
    response_format: Literal["b64_json", "url"] | None = Field(None, description="default: b64_json")
    output_format: Format | None = Field(None, description="default: png")
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")
    stream: bool | None = Field(None, description="report partial pictures and the results as events")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="with stream: maximum number of partial pictures"
    )
    seed: int | None = Field(
        None,
        description="seed of the first result; default: random",
        json_schema_extra={"minimum": -1, "maximum": MAX_SEED},
    )
    control_image: OptionalPicture = Field(None, description="a picture for the model's ControlNet")


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = None


class ImagesAnswer(BaseModel):
    """OpenAI's response, plus warnings."""

    created: int
    data: list[ImageData]
    usage: dict[str, Any]
    background: str
    output_format: Format
    quality: str
    size: str
    warnings: list[str] = Field(
        description="what was approximated, and warnings about the picture and the instruction"
    )


def images_body(limits: Limits) -> type[ImagesEdit]:
    """Create the body model of an edit: `ImagesEdit` and all settings, with a server's limits."""
    count = Field(None, ge=1, le=limits.count, description="number of results; default: 1")
    # Here, `size` is the size of the results, not the working size.
    return wire.body_within(limits, ImagesEdit, "openai", {"n": (int | None, count)}, nullable=True)


def openai_router(desk: Desk) -> APIRouter:
    """The route of `/v1/images/edits`. `/v1/models` is in `native_router`."""
    routes = APIRouter(tags=["openai"], responses=declared_errors("openai"))
    service, kind = desk.service, images_body(desk.service.limits)

    @routes.post(
        PATH,
        summary="Edit a picture with OpenAI's client",
        openapi_extra=wire.request_body(kind),
        responses={200: {"model": ImagesAnswer, "content": EVENTS}},
    )
    async def edit_images(request: Request) -> Response:
        service.check_room(wire.caller_of(request))  # before the body is read, so that a rejection is cheap
        body: Any = await wire.read_body(request, kind, desk)
        quality = wire.QUALITY if body.output_compression is None else max(1, body.output_compression)
        encoding = Encoding(body.output_format or "png", quality)
        edit_of = functools.partial(_edit_of, desk, body)
        _, job = await wire.submitted(desk, request, body, edit_of, encode=encoding)
        if body.stream:
            return wire.event_stream(desk, job, _events(desk, job, encoding, body.partial_images or 0))
        await wire.finished(desk, request, job)
        data = []
        about = _about(job.results[0].image, encoding)
        if body.response_format == "url":
            for kept in await desk.in_thread(service.keep, job, encoding):
                data.append({"url": str(request.base_url.replace(path=f"/v1/files/{kept.file}"))})
        else:
            for result in job.results:
                data.append({"b64_json": await desk.in_thread(encoding.base64, result.image)})
        answer = {"created": int(time.time()), "data": data, "usage": USAGE, **about}
        return JSONResponse({**answer, "warnings": job.warnings})

    return routes


async def _edit_of(desk: Desk, body: Any, opened: Opened) -> EditRequest:
    """Create the edit that a body describes. Raises SettingError and Refusal."""
    limits = desk.service.limits
    check_model(body.model, desk.service.models)
    warnings = [
        f"{name} has no effect: {words}."
        for name, (usual, words) in APPROXIMATED.items()
        if getattr(body, name) not in (None, *usual)
    ]
    picture = await _picture(body, opened)
    mask = None
    if body.mask is not None:
        mask = await opened.transparency_mask(_content(body.mask, "mask"))
        _check_mask(mask, picture)
    if body.size not in (None, "", "auto"):
        size = _result_size(body.size, desk.config.max_pixels)
        if abs(picture.width * size[1] - picture.height * size[0]) > max(*size, *picture.size):
            warnings.append(
                f"size has a different aspect ratio than the picture, which is cropped to {body.size}."
            )
        picture = await desk.in_thread(wire.sized, picture, size, "crop")
        mask = mask and await desk.in_thread(wire.sized, mask, size, "crop")
    control = body.control_image and await opened.picture(body.control_image, "control_image")
    settings: EditSettings = settings_from_body(
        body, "openai", size=None, seed=0, mask=mask, control_image=control
    )
    partial = (body.partial_images or 0) if body.stream else 0
    steps = settings.resolved().steps or 1
    return EditRequest(
        image=picture,
        settings=settings,
        seeds=wire.seeds_of(body.seed, 1 if body.n is None else body.n, limits.count, "n"),
        model=body.model,
        previews=max(1, steps // (partial + 1)) if partial else 0,
        warnings=(*opened.warnings, *warnings),
    )


async def _picture(body: Any, opened: Opened) -> Image.Image:
    """Decode the only picture of a body and apply its `background`. Raises SettingError."""
    field = "images" if body.images else "image"
    files = [] if body.image is None else body.image if isinstance(body.image, list) else [body.image]
    pictures = [*files, *(body.images or ())]
    if not pictures:
        raise SettingError("image is missing.", field="image")
    if len(pictures) != 1:
        raise SettingError(
            f"{field} has {len(pictures)} pictures; send one. Each request edits one picture.", field=field
        )
    picture = await opened.picture(_content(pictures[0], field), field)
    fault = None
    if body.background == "transparent" and body.output_format == "jpeg":
        fault = "which jpeg does not support. Use output_format png or webp."
    elif body.background == "transparent" and picture.mode != "RGBA":
        fault = (
            "and the picture is opaque. The model cannot add transparency: send a picture with "
            "transparent parts, or omit background."
        )
    if fault is not None:
        raise SettingError(f"background is 'transparent', {fault}", field="background_mode")
    return flattened(picture, "white") if body.background == "opaque" else picture


def _content(value: bytes | str | Reference, field: str) -> bytes | str:
    """The bytes, base64 or data URL of a picture. Raises SettingError for a reference without image_url."""
    if not isinstance(value, dict):
        return value
    if unknown := set(value) - {"image_url"}:
        reason = " (this server stores no files)" if "file_id" in unknown else ""
        raise SettingError(f"{field} has {min(unknown)[:40]}{reason}. Send only image_url.", field=field)
    if not value.get("image_url"):
        raise SettingError(f"{field} has no image_url. Send a data URL.", field=field)
    return str(value["image_url"])


def _check_mask(mask: Image.Image, picture: Image.Image) -> None:
    if mask.size != picture.size:
        raise SettingError(
            f"mask is {mask.width}x{mask.height} pixels and image {picture.width}x{picture.height}; they "
            "must have the same size.",
            field="mask",
        )
    if mask.getbbox() is None:
        raise SettingError(
            "mask has no transparent area, so nothing would change. Make the area to edit transparent.",
            field="mask",
        )


def _result_size(text: str, max_pixels: int) -> tuple[int, int]:
    message = f"size is {text[:40]!r}; use auto, or two sides from {MIN_SIZE} to {MAX_SIZE}, such as 576x384"
    try:
        size = parse_size(text)
    except ValueError:
        raise SettingError(f"{message}.", field="size") from None
    if not isinstance(size, tuple) or size[0] * size[1] > max_pixels:
        raise SettingError(f"{message}, at most {max_pixels:,} pixels.", field="size")
    return size


def _about(image: Image.Image, encoding: Encoding) -> dict[str, Any]:
    return {
        "background": "transparent" if image.mode == "RGBA" and encoding.format != "jpeg" else "opaque",
        "output_format": encoding.format,
        "quality": "auto",
        "size": f"{image.width}x{image.height}",
    }


async def _events(
    desk: Desk, job: Job, encoding: Encoding, partial: int
) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
    """Yield OpenAI's events: partial pictures of the first result, then every result."""
    sent = 0

    async def event(name: str, image: Image.Image, **more: Any) -> tuple[str, dict[str, Any]]:
        data, _ = await desk.in_thread(encoding, image)
        about = {"b64_json": wire.base64_of(data), "created_at": int(time.time()), **_about(image, encoding)}
        return name, {"type": name, **about, **more}

    async for news in job.events():
        if news.kind == "preview" and news.image is not None and not news.number:
            if sent < partial and job.state == "running":
                yield await event("image_edit.partial_image", news.image, partial_image_index=sent)
                sent += 1
        elif news.kind == "done":
            for result in job.results:
                more = {"usage": USAGE, "warnings": job.warnings}
                yield await event("image_edit.completed", result.image, **more)
        elif news.kind == "cancelled":
            yield "error", error_body(Refusal("The edit was cancelled. Send it again.", status=409), PATH)
        elif news.kind == "failed" and job.error is not None:
            yield "error", error_body(job.error, PATH)
