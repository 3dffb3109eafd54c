"""Our own interface: `/v1/edits` with every option, its progress as events, and jobs to come back to."""

from __future__ import annotations

import functools
import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from ip2p.config import parse_size
from ip2p.serve import service as services
from ip2p.serve.errors import Refusal, body_of, refusal_of
from ip2p.serve.service import Encode, FieldError, Job
from ip2p.serve.wire import (
    QUALITY,
    Desk,
    Format,
    base64_of,
    check_done,
    client_of,
    encoded,
    event_stream,
    finished,
    let_go,
    open_mask,
    open_picture,
    placed,
    read_body,
    reopened,
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
    steps: int | None = Field(None, description="sampling steps; unless given the model's own, else 20")
    sampler: str | None = Field(
        None, description="euler_ancestral, euler or dpmpp_2m; unless given the model's own, else the first"
    )
    spacing: str | None = Field(
        None,
        description="linspace, karras or trailing; unless given the model's own, else linspace",
    )
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
    wait: bool = Field(True, description="false: answer at once with the job's id; results by address")

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

    async def take(request: Request) -> tuple[EditBody, Job]:
        client, accept = client_of(request), request.headers.get("accept", "")
        service.check_room(client)  # before anything is read: a refusal costs nothing
        body = await read_body(request, EditBody, desk)
        body.stream = body.stream or "text/event-stream" in accept
        if accept.startswith("image/") and not body.stream and body.wait and body.count != 1:
            raise FieldError("count must be 1 for Accept: image/*; ask for JSON.", field="count")
        encode = None
        if not body.stream and not body.wait:
            encode = functools.partial(encoded, kind=body.format, quality=body.quality)
        async with placed(desk, client, {"image": body.image, "mask": body.mask}) as (given, place):
            image, mask = given["image"], given["mask"]
            assert image is not None
            edit = services.Request(
                image=await open_picture(desk, image, "image"),
                instruction=body.instruction,
                seeds=body.seeds(service.limits.count),
                steps=body.steps,
                sampler=body.sampler,
                spacing=body.spacing,
                text_cfg=body.text_cfg,
                image_cfg=body.image_cfg,
                negative=body.negative,
                size=size_of(body.size),
                mask=None if mask is None else await open_mask(desk, mask, "mask", edit="white"),
                auto_mask=body.auto_mask,
                mask_padding=body.mask_padding,
                feather=body.feather,
                fit=body.fit,
                model=body.model,
                previews=body.previews if body.stream else 0,
            )
            job = await desk.by_hand(service.submit, edit, client=client, place=place, encode=encode)
        formats[job] = body.format, body.quality
        body.image, body.mask = b"", None
        let_go(request)
        return body, job

    def encode_of(job: Job) -> Encode:
        kind, quality = formats.get(job, ("png", QUALITY))
        return functools.partial(encoded, kind=kind, quality=quality)

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
        kind, _ = formats.get(job, ("png", QUALITY))
        results: list[dict[str, Any]] = []
        made, masks = job.results, job.masks  # before it is looked whether they were put away
        if response == "b64" and made:
            for number, result in enumerate(made):
                data, _ = await desk.by_hand(encode_of(job), result.image)
                entry = {"seed": result.seed, "format": kind, "settings": settings_of(result)}
                entry["b64"] = base64_of(data)
                if masks:
                    entry["mask"] = base64_of(await desk.by_hand(written, masks[number], "png"))
                results.append(entry)
            return {**told, "results": results}
        assert service.store is not None
        for kept in await desk.by_hand(service.keep, job, encode_of(job)):
            entry = {"seed": kept.seed, "format": kind, "settings": kept.parameters}
            if response == "url":
                entry["url"] = f"/v1/files/{kept.file}"
            else:
                entry["b64"] = base64_of(await stored(kept.file))
            mask = None if kept.mask is None else await desk.by_hand(service.store.read, kept.mask)
            if mask is not None:
                entry["mask"] = base64_of(mask)
            results.append(entry)
        return {**told, "results": results}

    async def stored(name: str) -> bytes:
        """A file of the store. Raises Refusal for one that is there no more, or never was."""
        assert service.store is not None
        data = await desk.by_hand(service.store.read, name)
        if data is not None:
            return data
        if service.store.went_early(name):
            raise Refusal(
                "name is a file that went early, to make room for newer ones. Send the edit again.",
                status=410,
                field="name",
            )
        raise Refusal(
            f"name is no file that is kept here. Files go after {service.keep_seconds:g} seconds.",
            status=404,
            field="name",
        )

    def fault(job: Job, path: str) -> dict[str, Any]:
        assert job.error is not None
        return body_of(path, refusal_of(job.error, path))

    async def news(job: Job, response: str, path: str) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
        async for event in job.aevents():
            told = await record(job)
            if event.kind == "preview" and event.image is not None:
                picture = base64_of(await desk.by_hand(written, event.image, "jpeg", 80))
                yield "preview", {**told, "result": event.number, "b64": picture, "format": "jpeg"}
            elif event.kind == "done":
                yield "done", await record(job, whole=True, response=response)
            elif event.kind == "failed":
                yield "failed", {**told, **fault(job, path)}
            else:
                yield event.kind, told

    def found(id: str) -> Job:
        job = service.job(id)
        if job is None and service.went_early(id):
            raise Refusal(
                "id names an edit that went early, to make room for newer ones. Send it again; with "
                "wait=false its results are kept on disk, where there is more room.",
                status=410,
                field="id",
            )
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
        body, job = await take(request)
        if body.stream:
            return event_stream(desk, job, news(job, body.response, request.url.path))
        if not body.wait:
            place = f"/v1/edits/{job.id}"
            return JSONResponse(
                {**await record(job), "url": place}, status_code=202, headers={"Location": place}
            )
        await finished(desk, request, job)
        if request.headers.get("accept", "").startswith("image/"):
            return await picture(job, 0)
        return JSONResponse(await record(job, whole=True, response=body.response))

    @routes.get("/v1/edits/{id}", summary="How an edit stands, with its results once it is done")
    async def read(request: Request, id: str) -> Response:
        job = found(id)
        if "text/event-stream" in request.headers.get("accept", ""):
            return event_stream(desk, None, news(job, "url", request.url.path))
        told = await record(job, whole=True)
        if job.error is not None:
            told |= fault(job, request.url.path)
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
        if not 0 <= number < job.count:
            raise Refusal(f"number is {number}; it must be 0 to {job.count - 1}.", status=404, field="number")
        return await picture(job, number, format, min(max(quality, 1), 100))

    async def picture(
        job: Job, number: int, format: Format | None = None, quality: int = QUALITY
    ) -> Response:
        """A result's file, in its own format or in another."""
        kind, own = formats.get(job, ("png", QUALITY))
        made = job.results  # before it is looked whether they were put away
        if made:
            image, seed = made[number].image, made[number].seed
        else:
            assert job.kept is not None
            kept = job.kept[number]
            data, seed = await stored(kept.file), kept.seed
            if format is None:
                return file_response(data, kind, f"edit-{seed}.{kind}")
            image = await desk.by_hand(reopened, data, kept.parameters)
        data = await desk.by_hand(written, image, format or kind, own if format is None else quality)
        return file_response(data, format or kind, f"edit-{seed}.{format or kind}")

    @routes.get("/v1/files/{name}", summary="A result's file, by the address that an answer gave")
    async def file(name: str) -> Response:
        kind = name.rpartition(".")[2]
        return file_response(await stored(name), kind, f"edit.{kind}")

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
