"""Our own interface: `/v1/edits` with every option, its progress as events, and jobs to come back to."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from ip2p.config import parse_size
from ip2p.serve import service as services
from ip2p.serve.errors import Refusal
from ip2p.serve.service import FieldError, Job
from ip2p.serve.wire import (
    QUALITY,
    Desk,
    Format,
    arrived,
    base64_of,
    check_done,
    client_of,
    event_stream,
    finished,
    open_mask,
    open_picture,
    read_body,
    settings_of,
    written,
)

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
RANDOM_SEEDS = 2**32


class EditBody(BaseModel):
    """An edit, as JSON or as a form; a form has pictures as files, JSON as base64 or data URLs."""

    model_config = ConfigDict(extra="forbid")

    image: bytes | str = Field(description="the picture: PNG, JPEG, WebP, BMP, TIFF")
    instruction: str = Field(description="what to change, in words")
    model: str | None = Field(
        None, description="a name of GET /v1/models; the first of them if none is given"
    )
    count: int = Field(1, description="how many results")
    seed: int = Field(0, description="the first result's seed, the next ones count up; -1: drawn")
    steps: int = Field(20, description="sampling steps")
    sampler: str = Field("euler_ancestral", description="euler_ancestral, euler or dpmpp_2m")
    spacing: str = Field("linspace", description="how the noise levels lie: linspace or karras")
    text_cfg: float | None = Field(None, description="how strongly to follow the instruction")
    image_cfg: float | None = Field(None, description="how strongly to keep the picture")
    negative: str = Field("", description="what to stay away from")
    mask: bytes | str | None = Field(None, description="a picture of the same size: white is edited")
    mask_padding: int = Field(32, description="pixels around the mask that the model sees too")
    feather: float | None = Field(None, description="pixels over which the edit fades inside the mask")
    auto_mask: float | None = Field(
        None, description="let the model find the region; 0.5 is a good threshold"
    )
    size: int | str | None = Field(None, description="at which the model works: a side, or 576x384")
    fit: str = Field("original", description="original: at the picture's own size; model: at the model's")
    format: Format = Field("png", description="of the results")
    quality: int = Field(QUALITY, ge=1, le=100, description="of JPEG and WebP")
    response: Literal["b64", "url"] = Field(
        "b64", description="results as base64 in the answer, or by address"
    )
    stream: bool = Field(False, description="tell progress as server-sent events")
    previews: int = Field(0, description="with stream: a small picture of the state every so many steps")
    wait: bool = Field(True, description="false: answer at once with the job's id")

    def seeds(self, most: int) -> tuple[int, ...]:
        return seeds_of(self.seed, self.count, most, "count")


def seeds_of(seed: int | None, count: int, most: int, name: str) -> tuple[int, ...]:
    """`count` seeds from `seed` on, drawn for None and -1. Raises FieldError for a count out of range."""
    if not 1 <= count <= most:
        raise FieldError(f"{name} is {count}; it must be 1 to {most}.", field=name)
    first = secrets.randbelow(RANDOM_SEEDS) if seed is None or seed == -1 else seed
    return tuple(first + k for k in range(count))


def router(desk: Desk) -> APIRouter:
    """The routes of `/v1/edits`, `/v1/files` and `/v1/models`."""
    routes = APIRouter(tags=["edits"])
    service = desk.service
    formats: WeakKeyDictionary[Job, tuple[Format, int]] = WeakKeyDictionary()
    kept: WeakKeyDictionary[Job, list[str]] = WeakKeyDictionary()

    async def take(request: Request) -> tuple[EditBody, Job]:
        client = client_of(request)
        service.check_room(client)  # before anything is read: a refusal costs nothing
        await arrived(request, desk)
        with service.room(client) as place:
            body = await read_body(request, EditBody, desk)
            edit = services.Request(
                image=await open_picture(desk, body.image, "image"),
                instruction=body.instruction,
                seeds=body.seeds(service.limits.count),
                steps=body.steps,
                sampler=body.sampler,
                spacing=body.spacing,
                text_cfg=body.text_cfg,
                image_cfg=body.image_cfg,
                negative=body.negative,
                size=size_of(body.size),
                mask=None if body.mask is None else await open_mask(desk, body.mask, "mask", edit="white"),
                auto_mask=body.auto_mask,
                mask_padding=body.mask_padding,
                feather=body.feather,
                fit=body.fit,
                model=body.model,
                previews=body.previews if body.stream else 0,
            )
            job = await desk.by_hand(service.submit, edit, client=client, place=place)
        formats[job] = body.format, body.quality
        return body, job

    async def urls(job: Job) -> list[str]:
        """The addresses of the files of a job's results, written when they are first asked for."""
        assert service.store is not None
        if job not in kept:
            kind, quality = formats.get(job, ("png", QUALITY))
            names = []
            for result in job.results:
                data = await desk.by_hand(written, result.image, kind, quality)
                names.append(await desk.by_hand(service.store.put, data, f".{kind}"))
            kept[job] = names
        return [f"/v1/files/{name}" for name in kept[job]]

    async def record(job: Job, *, whole: bool = False, response: str = "url") -> dict[str, Any]:
        """What is told of a job; `whole`: with its results."""
        told: dict[str, Any] = {
            "id": job.id,
            "state": job.state,
            "model": job.model,
            "position": job.position,
            "step": job.step,
            "steps": job.steps,
            "seconds_left": job.seconds_left,
        }
        if not whole or job.state != "done":
            return told
        kind, quality = formats.get(job, ("png", QUALITY))
        places = await urls(job) if response == "url" else []
        results = []
        for number, result in enumerate(job.results):
            entry: dict[str, Any] = {"seed": result.seed, "format": kind, "settings": settings_of(result)}
            if response == "url":
                entry["url"] = places[number]
            else:
                entry["b64"] = base64_of(await desk.by_hand(written, result.image, kind, quality))
            if job.masks:
                entry["mask"] = base64_of(await desk.by_hand(written, job.masks[number], "png"))
            results.append(entry)
        return {**told, "results": results}

    async def news(job: Job, response: str) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
        async for event in job.aevents():
            told = await record(job)
            if event.kind == "preview" and event.image is not None:
                picture = base64_of(await desk.by_hand(written, event.image, "jpeg", 80))
                yield "preview", {**told, "result": event.number, "b64": picture, "format": "jpeg"}
            elif event.kind == "done":
                yield "done", await record(job, whole=True, response=response)
            elif event.kind == "failed":
                yield "failed", {**told, "error": {"message": " ".join(str(job.error).split())}}
            else:
                yield event.kind, told

    def found(id: str) -> Job:
        job = service.job(id)
        if job is None:
            raise Refusal(
                f"id names no edit that is known here. Edits are forgotten after {service.keep_seconds:g} s.",
                status=404,
                field="id",
            )
        return job

    @routes.post("/v1/edits", openapi_extra=request_body(EditBody), summary="Edit a picture")
    async def create(request: Request) -> Response:
        """Answers with the results, or with events (`stream`, or Accept: text/event-stream), or at once with
        the job's id (`wait` false), or, for Accept: image/*, with the one result's file."""
        accept = request.headers.get("accept", "")
        body, job = await take(request)
        if body.stream or "text/event-stream" in accept:
            return event_stream(desk, job, news(job, body.response))
        if not body.wait:
            place = f"/v1/edits/{job.id}"
            return JSONResponse(
                {**await record(job), "url": place}, status_code=202, headers={"Location": place}
            )
        await finished(desk, request, job)
        if accept.startswith("image/"):
            if body.count != 1:
                raise FieldError("count must be 1 for Accept: image/*; ask for JSON.", field="count")
            return await picture(job, 0, body.format, body.quality)
        return JSONResponse(await record(job, whole=True, response=body.response))

    @routes.get("/v1/edits/{id}", summary="How an edit stands, with its results once it is done")
    async def read(request: Request, id: str) -> Response:
        job = found(id)
        if "text/event-stream" in request.headers.get("accept", ""):
            return event_stream(desk, None, news(job, "url"))
        told = await record(job, whole=True)
        if job.error is not None:
            told["error"] = {"message": " ".join(str(job.error).split())}
        return JSONResponse(told)

    @routes.delete("/v1/edits/{id}", summary="Stop an edit, within a step")
    async def cancel(id: str) -> Response:
        job = found(id)
        service.cancel(job.id)
        return JSONResponse(await record(job))

    @routes.get("/v1/edits/{id}/results/{number}", summary="A result's file")
    async def result(id: str, number: int, format: Format | None = None, quality: int = QUALITY) -> Response:
        job = found(id)
        if job.state != "done":
            check_done(job)
            raise Refusal(
                f"id names an edit that is {job.state}; ask again when it is done.", status=409, field="id"
            )
        if not 0 <= number < len(job.results):
            raise Refusal(
                f"number is {number}; it must be 0 to {len(job.results) - 1}.", status=404, field="number"
            )
        kind, own = formats.get(job, ("png", QUALITY))
        return await picture(
            job, number, format or kind, own if format is None else min(max(quality, 1), 100)
        )

    async def picture(job: Job, number: int, kind: str, quality: int) -> Response:
        data = await desk.by_hand(written, job.results[number].image, kind, quality)
        return file_response(data, kind, f"edit-{job.results[number].seed}.{kind}")

    @routes.get("/v1/files/{name}", summary="A result's file, by the address that an answer gave")
    async def file(name: str) -> Response:
        assert service.store is not None
        data = await desk.by_hand(service.store.read, name)
        if data is None:
            raise Refusal(
                f"name is no file that is kept here. Files go after {service.keep_seconds:g} seconds.",
                status=404,
                field="name",
            )
        kind = name.rpartition(".")[2]
        return file_response(data, kind, f"edit.{kind}")

    @routes.get("/v1/models", summary="The models that are served", tags=["openai"])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_record(name) for name in service.models]}

    @routes.get("/v1/models/{name:path}", summary="A model that is served", tags=["openai"])
    async def model(name: str) -> dict[str, Any]:
        if name not in service.models:
            raise Refusal(unknown_model(service.models), status=404, field="model")
        return model_record(name)

    return routes


def model_record(name: str) -> dict[str, Any]:
    # OpenAI's clients want a time; when a model was made is not known here.
    return {"id": name, "object": "model", "created": 0, "owned_by": "ip2p"}


def unknown_model(models: list[str]) -> str:
    return f"model is none of those served here: {', '.join(models)}."


def file_response(data: bytes, kind: str, name: str) -> Response:
    headers = {"Content-Disposition": f'inline; filename="{name}"', "Cache-Control": "private, no-store"}
    return Response(data, media_type=MEDIA_TYPES[kind], headers=headers)


def size_of(size: int | str | None) -> int | tuple[int, int] | None:
    """What `Editor.edit` takes as size. Raises FieldError."""
    if size is None or isinstance(size, int):
        return size
    try:
        return parse_size(size)
    except ValueError:
        raise FieldError(
            f"size is {size[:40]!r}; write a side, or width and height as 576x384.", field="size"
        ) from None


def request_body(kind: type[BaseModel], *, forms: bool = True) -> dict[str, Any]:
    """What the API's documentation says of a body."""
    schema = kind.model_json_schema()
    types = ["application/json", *(["multipart/form-data"] if forms else [])]
    return {"requestBody": {"required": True, "content": {name: {"schema": schema} for name in types}}}
