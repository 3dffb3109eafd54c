"""OpenAI's `/v1/images/edits`, for the clients that speak it."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticUndefined

from ip2p.serve import wire
from ip2p.serve.errors import Refusal, body_of, declared_errors, refusal_of
from ip2p.serve.faces.native import EVENTS, OptionalPicture, check_model
from ip2p.serve.jobs import Job
from ip2p.serve.requests import EditRequest, Limits, limited_settings
from ip2p.serve.wire import Desk, Encoding, Format, Opened
from ip2p.settings import (
    MAX_SEED,
    MAX_SIZE,
    MIN_SIZE,
    SettingError,
    interface_body,
    parse_size,
    settings_from_body,
    voice_of,
)

PATH = "/v1/images/edits"
# There are no tokens here; its clients read the numbers all the same.
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
IMAGE_SCHEMA = {
    "anyOf": [wire.PICTURE_SCHEMA, {"type": "array", "items": wire.PICTURE_SCHEMA, "maxItems": 1}]
}


class ImagesEdit(BaseModel):
    """OpenAI's fields and, as further fields of a body, the settings of an edit. Others are ignored."""

    model_config = ConfigDict(extra="ignore")

    image: Annotated[bytes | str | list[bytes | str], WithJsonSchema(IMAGE_SCHEMA)] = Field(
        description="the picture; one alone"
    )
    mask: OptionalPicture = Field(None, description="PNG of the same size: what is transparent is edited")
    model: str | None = Field(
        None, description="a name of GET /v1/models; the first of them if none is given"
    )
    size: str | None = Field(None, description="of the results, as 512x512; auto: the picture's own")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json unless given")
    output_format: Format | None = Field(None, description="png unless given")
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")
    stream: bool | None = Field(None, description="report partial pictures and the results as events")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="with stream: at most so many before the end"
    )
    seed: int | None = Field(
        None,
        description="the first result's seed; drawn unless given",
        json_schema_extra={"minimum": -1, "maximum": MAX_SEED},
    )
    control_image: OptionalPicture = Field(None, description="a picture for the model's ControlNet")


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = None


class ImagesAnswer(BaseModel):
    """OpenAI's answer, and warnings beside it."""

    created: int
    data: list[ImageData]
    usage: dict[str, Any]
    background: str
    output_format: Format
    quality: str
    size: str
    warnings: list[str] = Field(description="what to know about the picture, the words and the results")


def images_body(limits: Limits) -> type[ImagesEdit]:
    """The body of an edit: OpenAI's fields and every setting, within a server's limits."""

    class Bounded(ImagesEdit):
        n: int | None = Field(None, ge=1, le=limits.count, description="how many results; 1 unless given")

    Bounded.__name__, Bounded.__doc__ = "ImagesEdit", ImagesEdit.__doc__
    required = {"instruction": PydanticUndefined}
    # Its `size` is that of the results.
    return interface_body(
        Bounded, "openai", settings=limited_settings(limits), defaults=required, nullable=True
    )


def router(desk: Desk) -> APIRouter:
    """The route of `/v1/images/edits`; `/v1/models` is the native one."""
    routes = APIRouter(tags=["openai"], responses=declared_errors("openai"))
    service, kind = desk.service, images_body(desk.service.limits)

    @routes.post(
        PATH,
        summary="Edit a picture, as OpenAI's clients ask",
        openapi_extra=wire.request_body(kind),
        response_model=None,
        responses={200: {"model": ImagesAnswer, "content": EVENTS}},
    )
    async def edit_images(request: Request) -> Response:
        client = wire.caller_of(request)
        service.check_room(client)  # before anything is read: a refusal costs nothing
        body: Any = await wire.read_body(request, kind, desk, voice_of("openai"))
        encoding = Encoding(body.output_format or "png", _quality(body))
        edit_of = functools.partial(_edit_of, desk, body)
        _, job = await wire.submitted(desk, client, edit_of, encode=encoding)
        wire.let_go(request, body)
        if body.stream:
            return wire.event_stream(desk, job, _events(desk, job, encoding, body.partial_images or 0))
        await wire.finished(desk, request, job)
        data = []
        about = _about(job, encoding)
        if body.response_format == "url":
            for kept in await desk.by_hand(service.keep, job, encoding):
                data.append({"url": str(request.base_url.replace(path=f"/v1/files/{kept.file}"))})
        else:
            for result in job.results:
                data.append({"b64_json": await desk.by_hand(encoding.base64, result.image)})
        answer = {"created": int(time.time()), "data": data, "usage": USAGE, **about}
        return JSONResponse({**answer, "warnings": job.warnings})

    return routes


async def _edit_of(desk: Desk, body: Any, opened: Opened) -> EditRequest:
    """The edit that a body asks for. Raises SettingError and Refusal."""
    limits = desk.service.limits
    check_model(body.model, desk.service.models)
    pictures = body.image if isinstance(body.image, list) else [body.image]
    if len(pictures) != 1:
        raise SettingError(
            f"image came {len(pictures)} times; this model edits one picture at a time. Send one.",
            field="image",
        )
    picture = await opened.picture(pictures[0], "image")
    mask = None if body.mask is None else await opened.mask(body.mask, "mask", edit="transparent")
    if mask is not None:
        _check_mask(mask, picture)
    if body.size not in (None, "", "auto"):
        size = _result_size(body.size, desk.config.max_pixels)
        picture = await desk.by_hand(wire.sized, picture, size, "crop")
        mask = mask and await desk.by_hand(wire.sized, mask, size, "crop")
    control = body.control_image and await opened.picture(body.control_image, "control_image")
    settings = settings_from_body(
        body,
        "openai",
        settings=limited_settings(limits),
        size=None,
        seed=0,
        mask=mask,
        control_image=control,
    )
    partial = (body.partial_images or 0) if body.stream else 0
    steps = settings.resolved().steps or 1
    return EditRequest(
        image=picture,
        settings=settings,
        seeds=wire.seeds_of(body.seed, 1 if body.n is None else body.n, limits.count, "n"),
        model=body.model,
        previews=max(1, steps // (partial + 1)) if partial else 0,
        warnings=tuple(opened.warnings),
    )


def _check_mask(mask: Image.Image, picture: Image.Image) -> None:
    if mask.size != picture.size:
        raise SettingError(
            f"mask is {mask.width}x{mask.height} pixels and image {picture.width}x{picture.height}; they "
            "must be of one size.",
            field="mask",
        )
    if mask.getbbox() is None:
        raise SettingError(
            "mask has nothing transparent, so nothing would change. Make it transparent where to edit.",
            field="mask",
        )


def _result_size(text: str, max_pixels: int) -> tuple[int, int]:
    words = f"size is {text[:40]!r}; write auto, or sides of {MIN_SIZE} to {MAX_SIZE} as in 576x384"
    try:
        size = parse_size(text)
    except ValueError:
        raise SettingError(f"{words}.", field="size") from None
    if not isinstance(size, tuple) or size[0] * size[1] > max_pixels:
        raise SettingError(f"{words}, and {max_pixels:,} pixels in all at most.", field="size")
    return size


def _quality(body: Any) -> int:
    return wire.QUALITY if body.output_compression is None else max(1, body.output_compression)


def _about(job: Job, encoding: Encoding) -> dict[str, Any]:
    width, height = job.results[0].image.size if job.results else job.size
    return {
        "background": "opaque",
        "output_format": encoding.format,
        "quality": "auto",
        "size": f"{width}x{height}",
    }


async def _events(
    desk: Desk, job: Job, encoding: Encoding, partial: int
) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
    """OpenAI's events: of one result the partial pictures, and at the end every result."""
    sent = 0

    async def event(name: str, image: Image.Image, **more: Any) -> tuple[str, dict[str, Any]]:
        data, _ = await desk.by_hand(encoding, image)
        about = {"b64_json": wire.base64_of(data), "created_at": int(time.time()), **_about(job, encoding)}
        return name, {"type": name, **about, **more}

    async for news in job.aevents():
        if news.kind == "preview" and news.image is not None and not news.number:
            if sent < partial and job.state == "running":
                yield await event("image_edit.partial_image", news.image, partial_image_index=sent)
                sent += 1
        elif news.kind == "done":
            for result in job.results:
                more = {"usage": USAGE, "warnings": job.warnings}
                yield await event("image_edit.completed", result.image, **more)
        elif news.kind == "cancelled":
            yield "error", body_of(PATH, Refusal("The edit was cancelled. Send it again.", status=409))
        elif news.kind == "failed" and job.error is not None:
            yield "error", body_of(PATH, refusal_of(job.error, PATH))
