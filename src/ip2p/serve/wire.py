"""Between requests and edits: bodies, pictures in and out, and waiting for a job while its client waits."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import functools
import io
import json
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import anyio
from fastapi.responses import StreamingResponse
from PIL import Image, ImageOps
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from ip2p.base.errors import InputError
from ip2p.pictures.images import load_image, nearest, to_bytes
from ip2p.serve.errors import Refusal
from ip2p.serve.options import ServeConfig
from ip2p.serve.service import NO_TEXT, FieldError, Job, Service, is_text

if TYPE_CHECKING:
    from ip2p.serve import service as services

Body = TypeVar("Body", bound=BaseModel)
T = TypeVar("T")
Format = Literal["png", "jpeg", "webp"]
KINDS: dict[str, Literal["PNG", "JPEG", "WEBP"]] = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
# Fields of a form that is no file: a picture may come in one as base64.
MAX_FIELDS, MAX_FILES = 100, 16
DEEPEST = 20  # lists and objects within each other in a field
FETCHES, FETCHES_EACH = 8, 2  # requests whose pictures are fetched at once: of all callers, of one
QUALITY = 95


@dataclass(frozen=True)
class Desk:
    """What every interface works with.

    hands: bounds how many pictures are decoded or encoded at once. opening: how many requests have pictures
    that are decoded and do not yet count in the queue. fetching: the requests that fetch, by their client.
    """

    service: Service
    config: ServeConfig
    hands: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(2))
    opening: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(4))
    fetching: Counter[str] = field(default_factory=Counter)

    async def by_hand(self, work: Callable[..., T], *args: Any, **named: Any) -> T:
        """Run it in a thread, so that the server answers others meanwhile."""
        return await anyio.to_thread.run_sync(functools.partial(work, *args, **named), limiter=self.hands)


# --- bodies --------------------------------------------------------------------------------------


def _content(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(request: Request, kind: type[Body], desk: Desk) -> Body:
    """The body of a request, a form or JSON, as `kind`; what is a file in a form comes as its bytes.

    Of a field that came several times, as `image` or as `image[]`, there is a list if `kind` has one.
    Raises FieldError for a field that cannot be read, and Refusal for another type of body.
    """
    content = _content(request)
    # A request of its own: the one that is answered would hold the whole body until then.
    read = Request(request.scope, request.receive)
    if content in ("multipart/form-data", "application/x-www-form-urlencoded"):
        values = await _form_values(read, kind, desk)
    elif content in ("application/json", ""):
        try:
            values = await desk.by_hand(json.loads, await read.body())
        except (ValueError, RecursionError) as error:
            raise FieldError(f"body is not JSON: {error}", field="body") from None
    else:
        raise Refusal(
            f"Content-Type is {content[:80]!r}; send multipart/form-data or application/json.",
            status=415,
            field="Content-Type",
        )
    if not isinstance(values, dict):
        raise FieldError(
            'body is no object. Send JSON such as {"instruction": "make it snow"}.', field="body"
        )
    for name, value in values.items():
        _check_value(name, value)
    return validated(kind, values)


async def _form_values(request: Request, kind: type[BaseModel], desk: Desk) -> dict[str, Any]:
    values: dict[str, Any] = {}
    try:
        form = await request.form(
            max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=desk.config.max_mb * 1_000_000
        )
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            content = await value.read() if isinstance(value, UploadFile) else value
            info = kind.model_fields.get(name)
            if info is not None and "list" in str(info.annotation).lower():
                values.setdefault(name, []).append(content)
            elif name in values:
                raise FieldError(f"{name} came twice. Send it once.", field=name)
            else:
                values[name] = content
    except HTTPException as error:
        raise FieldError(f"body cannot be read: {error.detail}", field="body") from None
    finally:
        await request.close()
    return values


def _check_value(name: str, value: object) -> None:
    """Raise FieldError for what JSON can say and no answer can repeat."""
    inner = [(name, 0), (value, 0)]
    name = name[:40].encode("ascii", "backslashreplace").decode()
    while inner:
        value, depth = inner.pop()
        if isinstance(value, str) and not is_text(value):
            raise FieldError(f"{name} {NO_TEXT}", field=name)
        if isinstance(value, float) and not math.isfinite(value):
            raise FieldError(f"{name} holds {value}; send a finite number.", field=name)
        if isinstance(value, list | dict):
            if depth == DEEPEST:
                raise FieldError(f"{name} is nested deeper than {DEEPEST}. Send a flatter one.", field=name)
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            inner += [(part, depth + 1) for part in parts]


def let_go(request: Request) -> None:
    """Tell the guard that nothing holds the request's body any more: others may send theirs."""
    request.scope["state"]["let_go"]()


def validated(kind: type[Body], values: Mapping[str, Any]) -> Body:
    """The values as `kind`. Raises FieldError for the first that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "body"
        if first["type"] == "extra_forbidden":
            near = nearest(name, list(kind.model_fields))
            hint = f"Did you mean {near}?" if near else f"Known: {', '.join(kind.model_fields)}."
            name = name if len(name) <= 40 else name[:37] + "..."
            raise FieldError(f"{name!a} is no field of this request. {hint}", field=name) from None
        if first["type"] == "missing":
            raise FieldError(f"{name} is missing. Send it.", field=name) from None
        raise FieldError(f"{name} cannot be used: {first['msg']}.", field=name) from None


# --- pictures ------------------------------------------------------------------------------------


Pictures = Mapping[str, bytes | str | None]  # by their fields' names: a file's bytes, base64, or an address


@contextlib.asynccontextmanager
async def placed(
    desk: Desk, client: str, pictures: Pictures
) -> AsyncIterator[tuple[Pictures, services.Place]]:
    """The pictures of fields, fetched, and a place in the queue to open and submit them with.

    First what is fetched, since who answers slowly would keep others out of the queue; then the place, so
    that nothing is decoded for what is refused; then a turn among those that decode. Raises FieldError, and
    Refusal for what is not fetched or has no room.
    """
    async with _fetched(desk, client, pictures) as given:
        with desk.service.room(client) as place:
            async with desk.opening:
                yield given, place


@contextlib.asynccontextmanager
async def _fetched(desk: Desk, client: str, pictures: Pictures) -> AsyncIterator[Pictures]:
    """The pictures, with what lies there in the place of each address.

    What was fetched counts against the limit while the block runs.
    """
    found = dict(pictures)
    addresses = {
        name: value for name, value in found.items() if isinstance(value, str) and _is_address(value)
    }
    if not addresses:
        yield found
        return
    if not desk.config.urls:
        name = next(iter(addresses))
        raise FieldError(
            f"{name} is an address, and this server fetches none (--urls). Send the picture itself.",
            field=name,
        )
    own = desk.fetching[client] >= FETCHES_EACH
    if own or desk.fetching.total() >= FETCHES:
        whose = f"{FETCHES_EACH} of your requests" if own else f"{FETCHES} requests"
        raise Refusal(
            f"The pictures of {whose} are being fetched, which is the limit. Ask again in 5 seconds.",
            status=429 if own else 503,
            headers={"Retry-After": "5"},
        )
    from ip2p.serve.fetch import fetch

    desk.fetching[client] += 1
    try:
        for name, value in addresses.items():
            found[name] = await fetch(value, name=name, most=desk.config.max_mb * 1_000_000)
        yield found
    finally:
        desk.fetching[client] -= 1
        if not desk.fetching[client]:
            del desk.fetching[client]


def _is_address(text: str) -> bool:
    return re.match(r"https?:", text, re.IGNORECASE) is not None


async def open_picture(desk: Desk, value: bytes | str, name: str) -> Image.Image:
    """The picture of a field, upright RGB: a file's bytes, base64 or a data URL (`placed` gives bytes).

    Raises FieldError, which names the field.
    """
    data = await picture_data(desk, value, name)
    return await desk.by_hand(_loaded, data, name, desk.config.max_pixels, "white")


async def open_mask(
    desk: Desk, value: bytes | str, name: str, *, edit: Literal["white", "transparent"]
) -> Image.Image:
    """The mask of a field in "L", white where the edit may go.

    edit: what says so in the file: white (what is transparent there is black), or OpenAI's transparency.
    """
    data = await picture_data(desk, value, name)
    on_black = await desk.by_hand(_loaded, data, name, desk.config.max_pixels, "black")
    if edit == "white":
        return on_black.convert("L")
    on_white = await desk.by_hand(_loaded, data, name, desk.config.max_pixels, "white")
    return _transparency(on_white, on_black)


def _transparency(on_white: Image.Image, on_black: Image.Image) -> Image.Image:
    """255 where a picture is transparent, from how it looks on white and on black: white shows through."""
    from PIL import ImageChops

    return ImageChops.subtract(on_white, on_black).getchannel("G")


async def picture_data(desk: Desk, value: bytes | str, name: str) -> bytes:
    if isinstance(value, bytes):
        return value
    return await desk.by_hand(from_base64, value, name)


def from_base64(text: str, name: str) -> bytes:
    """The bytes of base64, or of a data URL. Raises FieldError."""
    if text[:5].lower() == "data:":
        kind, comma, text = text.partition(",")
        if not comma or not kind.endswith(";base64"):
            raise FieldError(
                f"{name} is a data URL without base64. Write data:image/png;base64,…", field=name
            )
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise FieldError(
            f"{name} is neither base64 nor a data URL. Encode the picture's file.", field=name
        ) from None


def _loaded(data: bytes, name: str, max_pixels: int, background: Literal["white", "black"]) -> Image.Image:
    try:
        return load_image(data, max_pixels=max_pixels, background=background)
    except InputError as error:
        raise FieldError(f"{name}: {error}", field=name) from None


def sized(picture: Image.Image, size: tuple[int, int], how: Literal["stretch", "crop", "pad"]) -> Image.Image:
    """The picture at `size`: stretched, cut about its middle, or with more around it (a mask, "L": black)."""
    if picture.size == size:
        return picture
    if how == "stretch":
        scaled = picture.resize(size, Image.Resampling.LANCZOS)
    elif how == "crop":
        scaled = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    else:
        inner = ImageOps.contain(picture, size, Image.Resampling.LANCZOS)
        # What is beyond the border is a blurred stretch of all: a plain colour would be edited as a thing.
        stretched = Image.Resampling.BOX
        scaled = Image.new("L", size) if picture.mode == "L" else picture.resize(size, stretched)
        scaled.paste(inner, ((size[0] - inner.width) // 2, (size[1] - inner.height) // 2))
    scaled.info = dict(picture.info)
    return scaled


def written(image: Image.Image, kind: str, quality: int | None = None) -> bytes:
    """A picture's file: made anew from its pixels, with the settings in it."""
    options = {} if quality is None or kind == "png" else {"quality": quality}
    return to_bytes(image, KINDS[kind], **options)


def encoded(image: Image.Image, kind: str, quality: int | None = None) -> tuple[bytes, str]:
    """A picture's file and its ending, as `Service.keep` asks for them."""
    return written(image, kind, quality), f".{kind}"


def reopened(data: bytes, parameters: str) -> Image.Image:
    """A result from its file, with its settings where `written` looks for them."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
    image.info["parameters"] = parameters
    return image


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- jobs ----------------------------------------------------------------------------------------


def client_of(request: Request) -> str:
    """The caller's name, as the guard has given it."""
    return str(request.scope["state"]["client"])


async def finished(desk: Desk, request: Request, job: Job) -> Job:
    """The job, once it is done. Cancelled when its client goes; raises what it ended in."""
    try:
        await _unless_gone(request, job.aend())
    finally:
        if job.state in ("waiting", "running"):
            desk.service.cancel(job.id)
    return check_done(job)


def check_done(job: Job) -> Job:
    """The job that is done. Raises the error of one that failed, Refusal for a cancelled one."""
    if job.state == "cancelled":
        raise Refusal("The edit was cancelled. Send it again.", status=409)
    if job.error is not None:
        raise job.error
    return job


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; ClientDisconnect when the client goes before."""
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        for task in (doing, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event_stream(
    desk: Desk, job: Job | None, lines: AsyncIterator[tuple[str, Mapping[str, Any]]]
) -> StreamingResponse:
    """Named events with JSON as server-sent events. `job` is cancelled when their reader goes, if given."""

    async def told() -> AsyncIterator[str]:
        try:
            async for name, record in lines:
                yield f"event: {name}\ndata: {json.dumps(record)}\n\n"
        finally:
            if job is not None and job.state in ("waiting", "running"):
                desk.service.cancel(job.id)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(told(), media_type="text/event-stream", headers=headers)


def settings_of(result: services.Result) -> str:
    """The infotext of a result."""
    return str(result.image.info.get("parameters", ""))
