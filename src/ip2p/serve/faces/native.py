"""The native API: `/v1/edits` with all settings, progress as events, and jobs that clients can poll."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from ip2p.serve import wire
from ip2p.serve.errors import Refusal, declared_errors, error_body
from ip2p.serve.jobs import Job, State
from ip2p.serve.requests import EditRequest, Limits
from ip2p.serve.wire import Desk, Encoding, Format, Opened, OptionalPicture, PictureField
from ip2p.settings import MAX_SEED, SettingError, settings_from_body

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
FILES: dict[str, Any] = {
    kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()
}
EVENTS: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
PREVIEWS = "with stream: number of steps between previews; 0: none"
Quality = Annotated[int, Query(ge=1, le=100, description="quality of JPEG and WebP")]
Delivery = Literal["b64", "url"]


class EditBody(BaseModel):
    """An edit, as JSON or a form. Pictures are files in a form, and base64 or data URLs in JSON."""

    model_config = ConfigDict(extra="forbid")

    image: PictureField = Field(description="the picture to edit: PNG, JPEG, WebP, AVIF, BMP or TIFF")
    model: str | None = Field(None, description="a name from GET /v1/models; default: the first")
    seed: int = Field(
        0,
        description="seed of the first result; the next ones count up; -1: random",
        json_schema_extra={"minimum": -1, "maximum": MAX_SEED},
    )
    mask: OptionalPicture = Field(None, description="mask of the same size: white is edited")
    control_image: OptionalPicture = Field(None, description="a picture for the model's ControlNet")
    format: Format = Field("png", description="format of the results")
    quality: int = Field(wire.QUALITY, ge=1, le=100, description="quality of JPEG and WebP")
    response: Delivery = Field("b64", description="results as base64 or as URLs")
    stream: bool = Field(False, description="report progress as server-sent events")
    previews: int = Field(0, description=PREVIEWS)
    wait: bool = Field(True, description="false: return the id immediately; results as URLs")


class EditResult(BaseModel):
    """A finished picture, as base64 or as a URL."""

    seed: int
    format: Format
    settings: str = Field(description="infotext, also stored in the file")
    b64: str | None = None
    url: str | None = None
    mask: str | None = Field(default=None, description="region found by auto_mask, as a PNG in base64")


class EditAnswer(BaseModel):
    """Status of an edit, with its results when done."""

    id: str
    state: State
    model: str
    position: int = Field(description="number of requests ahead")
    step: int
    steps: int = Field(description="total number of steps for all results")
    seconds_left: float | None
    warnings: list[str] = Field(description="warnings about the picture, the instruction and the results")
    url: str | None = Field(None, description="URL to poll")
    results: list[EditResult] | None = None
    error: dict[str, Any] | None = Field(None, description="why the edit failed")


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0  # required by OpenAI clients; the real time is unknown
    owned_by: str = "ip2p"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


def edit_body(limits: Limits) -> type[EditBody]:
    """Create the body model of an edit: all settings, with a server's limits."""
    fields = {
        "count": (int, Field(1, ge=1, le=limits.count, description="number of results")),
        "previews": (int, Field(0, ge=0, le=limits.steps, description=PREVIEWS)),
    }
    return wire.body_within(limits, EditBody, None, fields)


def native_router(desk: Desk) -> APIRouter:
    """The routes of `/v1/edits`, `/v1/files`, `/v1/schema` and `/v1/models`."""
    routes = APIRouter(tags=["edits"], responses=declared_errors("native"))
    service, kind = desk.service, edit_body(desk.service.limits)
    answers = _Answers(desk)

    @routes.post(
        "/v1/edits",
        summary="Edit a picture",
        openapi_extra=wire.request_body(kind),
        responses={
            200: {"model": EditAnswer, "content": FILES | EVENTS},
            202: {"model": EditAnswer, "description": "Accepted; poll `url`"},
        },
    )
    async def create_edit(request: Request) -> Response:
        """Returns the results. With `stream` (or Accept: text/event-stream), it returns events; with `wait`
        false, it returns the id immediately; with Accept: image/*, it returns the file of the only result."""
        accept = request.headers.get("accept", "")
        service.check_room(wire.caller_of(request))  # before the body is read, so that a rejection is cheap
        body: Any = await wire.read_body(request, kind, desk)
        body.stream = body.stream or "text/event-stream" in accept
        if accept.startswith("image/") and not body.stream and body.wait and body.count != 1:
            raise SettingError("count must be 1 for Accept: image/*; ask for JSON.", field="count")

        async def edit_of(opened: Opened) -> EditRequest:
            control = body.control_image and await opened.picture(body.control_image, "control_image")
            image = await opened.picture(body.image, "image")
            mask = body.mask and await opened.mask(body.mask)
            return EditRequest(
                image=image,
                settings=settings_from_body(body, seed=0, mask=mask, control_image=control),
                seeds=wire.seeds_of(body.seed, body.count, service.limits.count, "count"),
                model=body.model,
                previews=body.previews if body.stream else 0,
                warnings=tuple(opened.warnings),
            )

        encoding, keep = Encoding(body.format, body.quality), not body.stream and not body.wait
        _, job = await wire.submitted(desk, request, body, edit_of, encode=encoding, keep=keep)
        if body.stream:
            return wire.event_stream(desk, job, answers.events(job, body.response, request.url.path))
        if not body.wait:
            url = f"/v1/edits/{job.id}"
            return _json(answers.state(job, url=url), status_code=202, headers={"Location": url})
        await wire.finished(desk, request, job)
        if accept.startswith("image/"):
            return await answers.file(job, 0)
        return _json(await answers.with_results(job, body.response))

    @routes.get(
        "/v1/edits/{id}",
        summary="Status of an edit, with its results when done",
        responses={200: {"model": EditAnswer, "content": EVENTS}},
    )
    async def read_edit(request: Request, id: str) -> Response:
        job = answers.find(id)
        if "text/event-stream" in request.headers.get("accept", ""):
            return wire.event_stream(desk, None, answers.events(job, "url", request.url.path))
        answer = await answers.with_results(job, "url")
        if job.error is not None:
            answer = answer.model_copy(update=error_body(job.error, request.url.path))
        return _json(answer)

    @routes.delete(
        "/v1/edits/{id}", summary="Cancel an edit within a step", responses={200: {"model": EditAnswer}}
    )
    async def cancel_edit(id: str) -> Response:
        job = answers.find(id)
        service.cancel(job.id)
        return _json(answers.state(job))

    @routes.get(
        "/v1/edits/{id}/results/{number}",
        summary="Result file",
        response_class=Response,
        responses={200: {"content": FILES}},
    )
    async def read_result(
        id: str, number: int, format: Format | None = None, quality: Quality = wire.QUALITY
    ) -> Response:
        job = answers.find(id)
        if job.state != "done":
            wire.check_done(job)
            raise Refusal(f"The edit is {job.state}. Try again when it is done.", status=409, field="id")
        if not 0 <= number < job.count:
            raise Refusal(f"number is {number}; it must be 0 to {job.count - 1}.", status=404, field="number")
        return await answers.file(job, number, format, quality)

    @routes.get(
        "/v1/files/{name}",
        summary="Result file, by a URL from an earlier response",
        response_class=Response,
        responses={200: {"content": FILES}},
    )
    async def read_file(name: str) -> Response:
        suffix = name.rpartition(".")[2]
        return file_response(await answers.stored(name), suffix, f"edit.{suffix}")

    @routes.get("/v1/schema", summary="Settings of an edit, with ranges, groups and help texts")
    async def read_schema() -> dict[str, Any]:
        return kind.model_json_schema()

    openai = APIRouter(tags=["openai"], responses=declared_errors("openai"))

    @openai.get("/v1/models", summary="Available models")
    async def list_models() -> ModelList:
        return ModelList(data=[ModelEntry(id=name) for name in service.models])

    @openai.get("/v1/models/{name:path}", summary="Information about a model")
    async def read_model(name: str) -> ModelEntry:
        check_model(name, service.models)
        return ModelEntry(id=name)

    routes.include_router(openai)
    return routes


class _Answers:
    """Responses about jobs and their files."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.service = desk, desk.service

    def find(self, id: str) -> Job:
        """The job with an id. Raises Refusal if it is unknown or was dropped."""
        job = self.service.job(id)
        if job is not None:
            return job
        hint = "Send it again; with wait=false its results are kept on disk, where there is more room."
        raise self._missing("id", "edit", self.service.jobs.shelf.dropped_early(id), hint)

    def _missing(self, field: str, what: str, early: bool, hint: str) -> Refusal:
        if early:
            message = f"{field} names a {what} that was removed early to make room for newer ones. {hint}"
            return Refusal(message, status=410, field=field)
        message = f"{field} is not a stored {what}; each is removed after"
        message = f"{message} {self.service.keep_seconds:g} seconds. Send the edit again."
        return Refusal(message, status=404, field=field)

    def state(self, job: Job, **more: Any) -> EditAnswer:
        names = ("id", "state", "model", "position", "step", "steps", "seconds_left", "warnings")
        return EditAnswer(**{name: getattr(job, name) for name in names}, **more)

    async def with_results(self, job: Job, response: Delivery) -> EditAnswer:
        """The state of a job, with its results if it is done."""
        answer = self.state(job)
        if answer.state != "done":
            return answer
        in_thread, encoding, store = self.desk.in_thread, _encoding_of(job), self.service.store
        results: list[EditResult] = []
        made = job.results  # read before `kept`, which replaces them
        if response == "b64" and made:
            for result in made:
                entry = EditResult(seed=result.seed, format=encoding.format, settings=result.parameters)
                entry.b64 = await in_thread(encoding.base64, result.image)
                if result.mask is not None:
                    entry.mask = await in_thread(wire.PNG.base64, result.mask)
                results.append(entry)
        else:
            for kept in await in_thread(self.service.keep, job, encoding):
                entry = EditResult(seed=kept.seed, format=encoding.format, settings=kept.parameters)
                if response == "url":
                    entry.url = f"/v1/files/{kept.file}"
                else:
                    entry.b64 = wire.base64_of(await self.stored(kept.file))
                if kept.mask and store and (mask := await in_thread(store.read, kept.mask)):
                    entry.mask = wire.base64_of(mask)
                results.append(entry)
        return answer.model_copy(update={"results": results})

    async def events(
        self, job: Job, response: Delivery, path: str
    ) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
        """Yield the events of a job until its end, as names and JSON data."""
        async for event in job.events():
            record = _record(self.state(job))
            if event.image is not None:
                picture = await self.desk.in_thread(Encoding("jpeg", 80).base64, event.image)
                record |= {"result": event.number, "b64": picture, "format": "jpeg"}
            elif event.kind == "done":
                record = _record(await self.with_results(job, response))
            elif event.kind == "failed" and job.error is not None:
                record |= error_body(job.error, path)
            yield event.kind, record

    async def stored(self, name: str) -> bytes:
        """The contents of a stored file. Raises Refusal if it was removed or never existed."""
        store = self.service.store
        assert store is not None
        data = await self.desk.in_thread(store.read, name)
        if data is None:
            raise self._missing("name", "file", store.shelf.dropped_early(name), "Send the edit again.")
        return data

    async def file(
        self, job: Job, number: int, format: Format | None = None, quality: int = wire.QUALITY
    ) -> Response:
        """The file of one result of a finished job, by default in the job's format."""
        default, made, in_thread = _encoding_of(job), job.results, self.desk.in_thread
        encoding = default if format is None else Encoding(format, quality)
        if made:
            seed = made[number].seed
            data, _ = await in_thread(encoding, made[number].image)
        else:
            kept = (await in_thread(self.service.keep, job, default))[number]
            seed, data = kept.seed, await self.stored(kept.file)
            if encoding.format != default.format:
                data, _ = await in_thread(lambda: encoding(wire.reopened(data, kept.parameters)))
        return file_response(data, encoding.format, f"edit-{seed}.{encoding.format}")


def check_model(name: str | None, models: list[str]) -> None:
    """Raise Refusal if `name` is not None and not one of the models."""
    if name is not None and name not in models:
        raise Refusal(f"model is not available; use one of {', '.join(models)}.", status=404, field="model")


def _encoding_of(job: Job) -> Encoding:
    return job.encode if isinstance(job.encode, Encoding) else wire.PNG


def _record(answer: EditAnswer) -> dict[str, Any]:
    return answer.model_dump(mode="json", exclude_unset=True)


def _json(answer: EditAnswer, **how: Any) -> JSONResponse:
    return JSONResponse(_record(answer), **how)


def file_response(data: bytes, kind: str, name: str) -> Response:
    headers = {"Content-Disposition": f'inline; filename="{name}"', "Cache-Control": "private, no-store"}
    return Response(data, media_type=MEDIA_TYPES[kind], headers=headers)
