"""OpenAI's `/v1/images/edits`, for the clients that speak it."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from ip2p.config import MAX_SIZE, MIN_SIZE
from ip2p.serve import service as services
from ip2p.serve.errors import Refusal, body_of, refusal_of
from ip2p.serve.native import request_body, seeds_of, size_of, unknown_model
from ip2p.serve.service import FieldError, Job
from ip2p.serve.wire import (
    QUALITY,
    Desk,
    Format,
    Pictures,
    base64_of,
    client_of,
    encoded,
    event_stream,
    finished,
    let_go,
    open_mask,
    open_picture,
    placed,
    read_body,
    sized,
    written,
)

PATH = "/v1/images/edits"
# There are no tokens here; its clients read the numbers all the same.
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


class ImagesEdit(BaseModel):
    """OpenAI's fields and, as further fields of a body, the settings of the model. Others are ignored."""

    model_config = ConfigDict(extra="ignore")

    image: bytes | str | list[bytes | str] = Field(description="the picture; one alone")
    prompt: str = Field(description="what to change, in words")
    mask: bytes | str | None = Field(None, description="PNG of the same size: what is transparent is edited")
    model: str | None = Field(
        None, description="a name of GET /v1/models; the first of them if none is given"
    )
    n: int | None = Field(None, description="how many results; 1 unless given")
    size: str | None = Field(None, description="of the results, as 512x512; auto: the picture's own")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json unless given")
    output_format: Format | None = Field(None, description="png unless given")
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")
    stream: bool | None = Field(None, description="tell partial pictures and the results as events")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="with stream: at most so many before the end"
    )
    seed: int | None = Field(None, description="the first result's seed; drawn unless given")
    num_inference_steps: int | None = Field(
        None, description="sampling steps; unless given the model's own, else 20"
    )
    guidance_scale: float | None = Field(None, description="how strongly to follow the prompt")
    image_guidance_scale: float | None = Field(None, description="how strongly to keep the picture")
    negative_prompt: str | None = Field(None, description="what to stay away from")


def router(desk: Desk) -> APIRouter:
    """The route of `/v1/images/edits`; `/v1/models` is the native one."""
    routes = APIRouter(tags=["openai"])
    service = desk.service

    @routes.post(
        PATH, openapi_extra=request_body(ImagesEdit), summary="Edit a picture, as OpenAI's clients ask"
    )
    async def edits(request: Request) -> Response:
        client = client_of(request)
        service.check_room(client)  # before anything is read: a refusal costs nothing
        body = await read_body(request, ImagesEdit, desk)
        job = await submitted(client, body)
        body.image, body.mask = b"", None
        let_go(request)
        if body.stream:
            return event_stream(desk, job, _events(desk, job, body))
        await finished(desk, request, job)
        kind, quality = body.output_format or "png", _quality(body)
        about, data = _about(job, body), []
        if body.response_format == "url":
            encode = functools.partial(encoded, kind=kind, quality=quality)
            for kept in await desk.by_hand(service.keep, job, encode):
                data.append({"url": str(request.base_url.replace(path=f"/v1/files/{kept.file}"))})
        else:
            for result in job.results:
                file = await desk.by_hand(written, result.image, kind, quality)
                data.append({"b64_json": base64_of(file)})
        return JSONResponse({"created": int(time.time()), "data": data, "usage": USAGE, **about})

    async def submitted(client: str, body: ImagesEdit) -> Job:
        pictures = body.image if isinstance(body.image, list) else [body.image]
        if len(pictures) != 1:
            raise FieldError(
                f"image came {len(pictures)} times; this model edits one picture at a time. Send one.",
                field="image",
            )
        async with placed(desk, client, {"image": pictures[0], "mask": body.mask}) as (given, place):
            edit = await _edit_of(desk, body, given)
            return await desk.by_hand(service.submit, edit, client=client, place=place)

    return routes


async def _edit_of(desk: Desk, body: ImagesEdit, given: Pictures) -> services.Request:
    """What the service is asked for, with the pictures that were given. Raises FieldError and Refusal."""
    service = desk.service
    if body.model is not None and body.model not in service.models:
        raise Refusal(unknown_model(service.models), status=404, field="model")
    assert given["image"] is not None
    picture = await open_picture(desk, given["image"], "image")
    mask = None
    if given["mask"] is not None:
        mask = await open_mask(desk, given["mask"], "mask", edit="transparent")
        if mask.size != picture.size:
            raise FieldError(
                f"mask is {mask.width}x{mask.height} pixels and image {picture.width}x{picture.height}; they "
                "must be of one size.",
                field="mask",
            )
        if mask.getbbox() is None:
            raise FieldError(
                "mask has nothing transparent, so nothing would change. Make it transparent where to edit.",
                field="mask",
            )
    if body.size not in (None, "", "auto"):
        size = _result_size(body.size, desk.config.max_pixels)
        picture = await desk.by_hand(sized, picture, size, "crop")
        mask = mask and await desk.by_hand(sized, mask, size, "crop")
    steps = body.num_inference_steps
    partial = (body.partial_images or 0) if body.stream else 0
    return services.Request(
        image=picture,
        instruction=body.prompt,
        seeds=seeds_of(body.seed, 1 if body.n is None else body.n, service.limits.count, "n"),
        steps=steps,
        text_cfg=body.guidance_scale,
        image_cfg=body.image_guidance_scale,
        negative=body.negative_prompt or "",
        mask=mask,
        model=body.model,
        previews=max(1, (steps or service.expected_steps(body.model)) // (partial + 1)) if partial else 0,
    )


def _result_size(text: str | None, max_pixels: int) -> tuple[int, int]:
    size = size_of(text)
    if not isinstance(size, tuple):
        raise FieldError(f"size is {text!r}; write auto, or width and height as 512x512.", field="size")
    width, height = size
    if not all(MIN_SIZE <= side <= MAX_SIZE for side in size) or width * height > max_pixels:
        raise FieldError(
            f"size is {width}x{height}; sides must be {MIN_SIZE} to {MAX_SIZE}, and {max_pixels:,} pixels in "
            "all at most.",
            field="size",
        )
    return size


def _quality(body: ImagesEdit) -> int:
    return QUALITY if body.output_compression is None else max(1, body.output_compression)


def _about(job: Job, body: ImagesEdit) -> dict[str, Any]:
    width, height = job.results[0].image.size if job.results else job.size
    return {
        "background": "opaque",
        "output_format": body.output_format or "png",
        "quality": "auto",
        "size": f"{width}x{height}",
    }


async def _events(desk: Desk, job: Job, body: ImagesEdit) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
    """OpenAI's events: of one result the partial pictures, and at the end every result."""
    kind, quality = body.output_format or "png", _quality(body)
    told = 0

    def event(name: str, data: bytes, **more: Any) -> tuple[str, dict[str, Any]]:
        about = {"b64_json": base64_of(data), "created_at": int(time.time()), **_about(job, body)}
        return name, {"type": name, **about, **more}

    async for news in job.aevents():
        if news.kind == "preview" and news.image is not None and not news.number:
            if told < (body.partial_images or 0) and job.state == "running":
                data = await desk.by_hand(written, news.image, kind, quality)
                yield event("image_edit.partial_image", data, partial_image_index=told)
                told += 1
        elif news.kind == "done":
            for result in job.results:
                data = await desk.by_hand(written, result.image, kind, quality)
                yield event("image_edit.completed", data, usage=USAGE)
        elif news.kind == "cancelled":
            yield "error", body_of(PATH, Refusal("The edit was cancelled. Send it again.", status=409))
        elif news.kind == "failed" and job.error is not None:
            yield "error", body_of(PATH, refusal_of(job.error, PATH))
