"""Conversion between HTTP and edits: request bodies, pictures, and waiting for jobs."""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
import io
import json
import math
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import anyio
from fastapi.responses import StreamingResponse
from PIL import Image, ImageChops, ImageOps
from pydantic import BaseModel, ValidationError, WithJsonSchema, create_model
from pydantic_core import PydanticUndefined
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from ip2p.pictures.images import flattened, load_image, to_bytes
from ip2p.serve.errors import Refusal, face_of, inner_name
from ip2p.serve.jobs import Job
from ip2p.serve.options import ServeConfig
from ip2p.serve.requests import NOT_TEXT, EditRequest, Limits, is_text, limited_settings, naming
from ip2p.serve.service import Service
from ip2p.settings import EditSettings, Interface, SettingError, explained, interface_body

Body = TypeVar("Body", bound=BaseModel)
T = TypeVar("T")
Format = Literal["png", "jpeg", "webp"]
KINDS: dict[str, Literal["PNG", "JPEG", "WEBP"]] = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
MAX_FIELDS, MAX_FILES = 100, 16  # maximum numbers in a form
DEEPEST = 20  # maximum nesting of lists and objects in a field
QUALITY = 95
RANDOM_SEEDS = 2**32
PICTURE_FIELDS = ("image", "images", "init_images", "mask", "control_image")
PICTURE_SCHEMA = {"type": "string", "format": "picture"}  # in OpenAPI
PictureField = Annotated[bytes | str, WithJsonSchema(PICTURE_SCHEMA)]
OptionalPicture = Annotated[bytes | str | None, WithJsonSchema({"anyOf": [PICTURE_SCHEMA, {"type": "null"}]})]


@dataclass(frozen=True)
class Desk:
    """The service, its config and the limiters that all APIs share.

    threads: limits how many pictures are decoded or encoded at once. opening: limits how many requests hold
    decoded pictures before they enter the queue.
    """

    service: Service
    config: ServeConfig
    threads: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(2))
    opening: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(4))

    async def in_thread(self, work: Callable[..., T], *args: Any, **named: Any) -> T:
        """Run `work` in a thread, so that it does not block the event loop."""
        return await anyio.to_thread.run_sync(functools.partial(work, *args, **named), limiter=self.threads)


# --- bodies --------------------------------------------------------------------------------------


async def read_body(request: Request, kind: type[Body], desk: Desk) -> Body:
    """Parse a request body, a form or JSON, as `kind`. A file in a form becomes bytes.

    A field that is sent several times, as `image` or `image[]`, becomes a list if `kind` declares one. Raises
    SettingError for an invalid body or field, and Refusal for another Content-Type.
    """
    content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A second Request, because the first one would keep the whole body in memory until the response.
    read = Request(request.scope, request.receive)
    if content in ("multipart/form-data", "application/x-www-form-urlencoded"):
        values = await _form_values(read, kind, desk)
    elif content in ("application/json", ""):
        try:
            values = await desk.in_thread(json.loads, await read.body())
        except (ValueError, RecursionError) as error:
            raise SettingError(f"body is not JSON: {error}", field="body") from None
    else:
        raise Refusal(
            f"Content-Type is {content[:80]!r}; send multipart/form-data or application/json.",
            status=415,
            field="Content-Type",
        )
    if not isinstance(values, dict):
        raise SettingError(
            'body is not an object. Send JSON such as {"instruction": "make it snow"}.', field="body"
        )
    for name, value in values.items():
        _check_value(name, value)
    earlier = {name: now for name, now in EditSettings.field_names().items() if now in kind.model_fields}
    try:
        return kind.model_validate({earlier.get(name, name): value for name, value in values.items()})
    except ValidationError as error:
        # The error has the API's name of the field, but other code expects the internal name.
        refused = explained(error, kind)
        refused.field = inner_name(refused.field, face_of(request.url.path))
        raise refused from None


async def _form_values(request: Request, kind: type[BaseModel], desk: Desk) -> dict[str, Any]:
    values: dict[str, Any] = {}
    try:
        form = await request.form(
            max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=desk.config.max_mb * 1_000_000
        )
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            content = await value.read() if isinstance(value, UploadFile) else value
            values.setdefault(name, []).append(content)
        for name, several in values.items():
            info = kind.model_fields.get(name)
            types = "" if info is None else str(info.annotation).lower()
            if len(several) > 1 and "list" not in types and "tuple" not in types:
                raise SettingError(f"{name} was sent more than once. Send it once.", field=name)
            if len(several) == 1 and "list" not in types:
                [values[name]] = several
    except HTTPException as error:
        raise SettingError(f"body cannot be read: {error.detail}", field="body") from None
    finally:
        await request.close()
    return values


def _check_value(name: str, value: object) -> None:
    """Raise SettingError for values that can be parsed from JSON but cannot be sent back."""
    inner = [(name, 0), (value, 0)]
    name = name[:40].encode("ascii", "backslashreplace").decode()
    while inner:
        value, depth = inner.pop()
        if isinstance(value, str) and not is_text(value):
            raise SettingError(f"{name} {NOT_TEXT}", field=name)
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingError(f"{name} contains {value}; send a finite number.", field=name)
        if isinstance(value, list | dict):
            if depth == DEEPEST:
                raise SettingError(f"{name} is nested deeper than {DEEPEST} levels.", field=name)
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            inner += [(part, depth + 1) for part in parts]


def body_within(
    limits: Limits, kind: type[Body], interface: Interface | None, fields: dict[str, Any], **how: Any
) -> type[Body]:
    """Create the body model of an edit: `kind`, more `fields` and all settings, with a server's limits.

    how: more arguments of `interface_body`.
    """
    base = create_model(kind.__name__, __base__=kind, __doc__=kind.__doc__, **fields)
    defaults = {"instruction": PydanticUndefined, **how.pop("defaults", {})}
    return interface_body(base, interface, settings=limited_settings(limits), defaults=defaults, **how)


def request_body(kind: type[BaseModel], *, forms: bool = True) -> dict[str, Any]:
    """The OpenAPI declaration of a request body."""
    schema = kind.model_json_schema()
    types = ["application/json", *(["multipart/form-data"] if forms else [])]
    return {"requestBody": {"required": True, "content": {name: {"schema": schema} for name in types}}}


def let_go(request: Request, body: BaseModel) -> None:
    """Drop a body's pictures, so that the guard stops counting their memory."""
    for name in set(PICTURE_FIELDS) & set(type(body).model_fields):
        setattr(body, name, None)
    request.scope["state"]["let_go"]()


def seeds_of(seed: int | None, count: int, most: int, name: str) -> tuple[int, ...]:
    """`count` seeds counting up from `seed` (None, -1: random). Raises SettingError if `count` is invalid."""
    if not 1 <= count <= most:
        raise SettingError(f"{name} is {count}; it must be 1 to {most}.", field=name)
    first = secrets.randbelow(RANDOM_SEEDS) if seed is None or seed == -1 else seed
    return tuple(first + k for k in range(count))


# --- pictures ------------------------------------------------------------------------------------


class Opened:
    """Decodes the pictures of a request. warnings: warnings about them for the client."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.warnings: list[str] = []

    async def picture(self, value: bytes | str, name: str) -> Image.Image:
        """Decode a field's picture, upright, from bytes, base64 or a data URL. Raises SettingError.

        The mode is RGBA if the picture has transparent areas, else RGB.
        """

        def decode() -> Image.Image:
            data = value if isinstance(value, bytes) else from_base64(value, name)
            with naming(name):
                return load_image(
                    data, max_pixels=self._desk.config.max_pixels, background=None, warn=self.warnings.append
                )

        return await self._desk.in_thread(decode)

    async def mask(self, value: bytes | str) -> Image.Image:
        """Decode the field `mask` to mode "L": white is edited. Transparent areas become black."""
        return flattened(await self.picture(value, "mask"), "black").convert("L")

    async def transparency_mask(self, value: bytes | str) -> Image.Image:
        """Decode OpenAI's `mask`, whose transparent areas are edited, to mode "L": white is edited."""
        layer = await self.picture(value, "mask")
        if layer.mode != "RGBA":
            return Image.new("L", layer.size)
        return ImageChops.invert(layer.getchannel("A"))


async def submitted(
    desk: Desk,
    request: Request,
    body: BaseModel,
    edit_of: Callable[[Opened], Awaitable[EditRequest]],
    *,
    encode: Encoding | None = None,
    keep: bool = False,
    hold: bool = False,
) -> tuple[EditRequest, Job]:
    """Create an edit from a body with `edit_of` and submit it. hold: keep the pictures in the body.

    Reserves a place in the queue first, so that nothing is decoded for a rejected request, then waits for its
    turn to decode. Raises SettingError, Full and Draining.
    """
    client = caller_of(request)
    with desk.service.room(client) as place:
        async with desk.opening:
            edit = await edit_of(Opened(desk))
            submit = functools.partial(desk.service.submit, edit, client=client, place=place)
            job = await desk.in_thread(submit, encode=encode, keep=keep)
    if not hold:
        let_go(request, body)
    return edit, job


def from_base64(text: str, name: str) -> bytes:
    """Decode base64 (URL-safe or not, padded or not) or a data URL. Raises SettingError."""
    if re.match(r"https?:", text, re.IGNORECASE):
        raise SettingError(
            f"{name} is a URL. This server does not download anything; send the picture itself.", field=name
        )
    if text[:5].lower() == "data:":
        kind, comma, text = text.partition(",")
        if not comma or not kind.endswith(";base64"):
            raise SettingError(
                f"{name} is a data URL without base64. Use data:image/png;base64,…", field=name
            )
    try:
        text = "".join(text.split()).replace("-", "+").replace("_", "/")
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise SettingError(
            f"{name} is neither base64 nor a data URL. Send the encoded file.", field=name
        ) from None


def sized(picture: Image.Image, size: tuple[int, int], how: Literal["stretch", "crop", "pad"]) -> Image.Image:
    """Resize a picture: stretch it, crop it around the center, or pad it (a mask, mode "L", with black)."""
    if picture.size == size:
        return picture
    if how == "stretch":
        scaled = picture.resize(size, Image.Resampling.LANCZOS)
    elif how == "crop":
        scaled = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    else:
        inner = ImageOps.contain(picture, size, Image.Resampling.LANCZOS)
        # Pad with a blurred copy of the picture, because a plain color would be edited as an object.
        blurred = Image.Resampling.BOX
        scaled = Image.new("L", size) if picture.mode == "L" else picture.resize(size, blurred)
        scaled.paste(inner, ((size[0] - inner.width) // 2, (size[1] - inner.height) // 2))
    scaled.info = dict(picture.info)
    return scaled


@dataclass(frozen=True)
class Encoding:
    """Encodes results. Call it with a picture to get the file and its suffix."""

    format: Format = "png"
    quality: int = QUALITY

    def __call__(self, image: Image.Image) -> tuple[bytes, str]:
        options = {} if self.format == "png" else {"quality": self.quality}
        return to_bytes(image, KINDS[self.format], **options), f".{self.format}"

    def base64(self, image: Image.Image) -> str:
        return base64_of(self(image)[0])


PNG = Encoding()


def reopened(data: bytes, parameters: str) -> Image.Image:
    """Decode a result's file, and add its settings to `info`, where `to_bytes` expects them."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
    image.info["parameters"] = parameters
    return image


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- jobs ----------------------------------------------------------------------------------------


def caller_of(request: Request) -> str:
    """The client's pseudonym, set by the guard."""
    return str(request.scope["state"]["client"])


async def finished(desk: Desk, request: Request, job: Job) -> Job:
    """Wait until a job is done. Cancels it if the client disconnects. Raises like `check_done`."""
    try:
        await _unless_gone(request, job.until_end())
    finally:
        if job.active:
            desk.service.cancel(job.id)
    return check_done(job)


def check_done(job: Job) -> Job:
    """Return a job that is done. Raises its error if it failed, and Refusal if it was cancelled."""
    if job.state == "cancelled":
        raise Refusal("The edit was cancelled. Send it again.", status=409)
    if job.error is not None:
        raise job.error
    return job


async def _unless_gone(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Wait for `work`. Raises ClientDisconnect if the client disconnects first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def event_stream(
    desk: Desk, job: Job | None, lines: AsyncIterator[tuple[str, Mapping[str, Any]]]
) -> StreamingResponse:
    """Stream named events with JSON data as server-sent events. job: cancelled if the client disconnects."""

    async def sent() -> AsyncIterator[str]:
        try:
            async for name, record in lines:
                yield f"event: {name}\ndata: {json.dumps(record)}\n\n"
        finally:
            if job is not None and job.active:
                desk.service.cancel(job.id)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(sent(), media_type="text/event-stream", headers=headers)
