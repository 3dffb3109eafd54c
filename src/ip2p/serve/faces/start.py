"""What a client can request before an edit: a model's card, example pictures, and a file's contents."""

from __future__ import annotations

import io
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ip2p import __version__
from ip2p.base.errors import InputError
from ip2p.editing import grid
from ip2p.models.bundle import packaged_examples
from ip2p.pictures.images import load_image, resized
from ip2p.pictures.infotext import infotext_of, parse_infotext
from ip2p.serve import mark, wire
from ip2p.serve.errors import Refusal, declared_errors
from ip2p.serve.faces import native
from ip2p.serve.requests import naming
from ip2p.serve.wire import Desk, Encoding, Format, PictureField
from ip2p.settings import EditSettings

FORMATS: dict[str, Format] = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}
# Edits of the whole picture, which need no particular content. They suit the model but are not tested on the
# client's picture. The storybook model does these best.
STORYBOOK = (
    *("make it night", "make it snow", "make it sunset", "make it rain", "make it foggy"),
    *("change the background to the beach", "put them on the moon", "put them in the desert"),
    *("make it a pencil drawing", "make it pixel art", "make it a watercolour"),
)
PHOTOS = (
    *("make it night", "make it snow", "make it sunset", "make it rain", "what if it were autumn?"),
    *("change the background to a beach", "put them in the desert", "make it look like a watercolor"),
    *("make it a pencil drawing", "make it look like an oil painting", "make it look like a comic book"),
)


class ModelCard(BaseModel):
    """An available model: its purpose and recommended settings."""

    model: str
    models: list[str] = Field(description="all available models, the default first")
    version: str = Field(description="version of ip2p")
    about: str = Field(description="purpose of the model")
    native_size: int = Field(description="training size of the model: a side in pixels")
    defaults: dict[str, Any] = Field(description="settings recommended for the model")
    grid: dict[str, list[float]] = Field(description="values of text_cfg and image_cfg worth comparing")
    suggestions: list[str] = Field(description="instructions that suit the model and any picture")
    limits: dict[str, int] = Field(
        description="limits of this server: pixels, body_bytes, count, steps, per_client"
    )


class Example(BaseModel):
    """A picture to try an edit on."""

    url: str
    title: str
    instructions: list[str]


class PictureBody(BaseModel):
    """A picture file."""

    model_config = ConfigDict(extra="forbid")

    image: PictureField = Field(description="the picture: PNG, JPEG, WebP, AVIF, BMP, TIFF, GIF or PPM")
    side: int = Field(
        1024, ge=16, le=4096, description="longer side of the preview; small pictures are not enlarged"
    )
    convert: Format | None = Field(
        None, description="return the picture in this format, including its metadata and settings"
    )
    quality: int = Field(wire.QUALITY, ge=1, le=100, description="quality of JPEG and WebP")


class PictureAnswer(BaseModel):
    """Information about a picture file."""

    width: int
    height: int
    format: Format = Field(
        description="format in which results keep the metadata of the file; png if the file's own cannot"
    )
    infotext: str | None = Field(description="settings stored in an edited file, as text")
    settings: dict[str, Any] | None = Field(description="the same settings, by the names of GET /v1/schema")
    warnings: list[str]
    preview: str = Field(description="preview that any browser can show, as a WebP in base64")


def start_router(desk: Desk) -> APIRouter:
    """The routes of `/v1/card`, `/v1/examples` and `/v1/pictures`."""
    routes = APIRouter(tags=["edits"], responses=declared_errors("native"))
    service = desk.service

    @routes.get(
        "/v1/card", summary="A model's purpose, recommended settings, suggestions and the server's limits"
    )
    async def read_card(model: str | None = None) -> ModelCard:
        native.check_model(model, service.models)
        name = model or service.models[0]
        limits = service.limits
        card = await desk.in_thread(service.card, name)
        about = f"photos and other pictures, best near {card.native_size} × {card.native_size} pixels"
        defaults = EditSettings().resolved(card)
        defaults = defaults.changed(steps=min(defaults.steps or 1, limits.steps))
        return ModelCard(
            model=name,
            models=service.models,
            version=__version__,
            about="drawn storybook pages only" if card.closed_vocabulary else about,
            native_size=card.native_size,
            defaults={key: getattr(defaults, key) for key in EditSettings.model_fields if key != "seed"},
            grid={axis: list(grid.default_values(axis, defaults)) for axis in ("text_cfg", "image_cfg")},
            suggestions=list(STORYBOOK if card.closed_vocabulary else PHOTOS),
            limits={
                "pixels": limits.pixels,
                "body_bytes": desk.config.max_mb * 1_000_000,
                "count": limits.count,
                "steps": limits.steps,
                "per_client": limits.per_client,
            },
        )

    @routes.get("/v1/examples", summary="Example pictures with instructions")
    async def read_examples() -> list[Example]:
        return [
            Example(url=f"/v1/examples/{number}.png", title=each.title, instructions=list(each.instructions))
            for number, each in enumerate(packaged_examples())
        ]

    @routes.get(
        "/v1/examples/{number}.png",
        summary="Example file",
        response_class=Response,
        responses={200: {"content": {"image/png": native.FILES["image/png"]}}},
    )
    async def read_example(number: int) -> Response:
        examples = packaged_examples()
        if not 0 <= number < len(examples):
            raise Refusal(f"There is no example {number}. See /v1/examples.", status=404, field="number")
        return FileResponse(examples[number].file)

    @routes.post(
        "/v1/pictures",
        summary="Read a picture's size, settings and preview, or convert it",
        openapi_extra=wire.request_body(PictureBody),
        responses={200: {"model": PictureAnswer, "content": native.FILES}},
    )
    async def read_picture(request: Request) -> Response:
        """The server does not keep the file. With `convert`, it returns a file with the picture's EXIF, color
        profile and settings; a result of this server keeps its AI-edit mark."""
        service.check_room(wire.caller_of(request))
        body = await wire.read_body(request, PictureBody, desk)
        data = body.image if isinstance(body.image, bytes) else wire.from_base64(body.image, "image")
        async with desk.opening:
            return await desk.in_thread(_inspect, data, body, desk.config.max_pixels)

    return routes


def _inspect(data: bytes, body: PictureBody, max_pixels: int) -> Response:
    warnings: list[str] = []
    with naming("image"):
        picture = load_image(data, max_pixels=max_pixels, warn=warnings.append)
    # The infotext, the format, and whether this server marked the file.
    with Image.open(io.BytesIO(data)) as image:
        infotext, kind = infotext_of(image) or None, image.format or ""
        image.load()  # a PNG's XMP may follow its pixels
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
        marked = mark.SOURCE_TYPE.encode() in (xmp.encode() if isinstance(xmp, str) else xmp)
    if body.convert is not None:
        picture.info["parameters"] = infotext
        if marked:
            mark.tag(picture)
        file, suffix = Encoding(body.convert, body.quality)(picture)
        return native.file_response(file, body.convert, f"picture{suffix}")
    settings = None
    if infotext is not None:
        try:
            settings = parse_infotext(infotext).model_dump(mode="json", exclude_unset=True)
        except InputError as error:
            warnings.append(f"The settings in the file cannot be read: {error}")
    share = min(1.0, body.side / max(picture.size))
    width, height = (max(1, round(side * share)) for side in picture.size)
    small = picture.copy() if share == 1 else resized(picture, (width, height))
    small.info = {}
    answer = PictureAnswer(
        width=picture.width,
        height=picture.height,
        format=FORMATS.get(kind, "png"),
        infotext=infotext,
        settings=settings,
        warnings=warnings,
        preview=Encoding("webp", 92).base64(small),
    )
    return JSONResponse(answer.model_dump(mode="json"))
