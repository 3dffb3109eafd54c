"""Requests for edits, their limits, and the check of a request against them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from PIL import Image
from pydantic import AfterValidator, Field, WithJsonSchema, create_model

from ip2p.base.errors import InputError
from ip2p.pictures import masks
from ip2p.pictures.images import load_image
from ip2p.settings import MAX_SEED, EditSettings, SettingError, meta_of, picture_name

NOT_TEXT = "contains half of a character (a lone surrogate). Send valid Unicode."


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request and of the number of requests. `Service.submit` enforces them."""

    pixels: int = 16_000_000  # of a picture
    working_pixels: int | None = (
        None  # of the working size; None: 4 times the model's native size, at least 1024²
    )
    steps: int = 150
    count: int = 8  # results of one request
    words: int = 2000  # characters of the instruction, and of the negative prompt
    queue: int = 64  # waiting requests of all clients
    per_client: int = 16  # waiting and running requests of one client
    waiting_pixels: int = 256_000_000  # of all waiting pictures: 3 bytes of memory each


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One edit.

    image: upright RGB; the results keep the EXIF and color profile in its `info`. settings: the mask (mode
    "L", the size of the picture) and the control image are pictures. seeds: one for each result; they replace
    the seed of the settings. model: a name in `Service.models`; None: the first. previews: number of steps
    between previews; 0: none. warnings: about the pictures, for the client.
    """

    image: Image.Image
    settings: EditSettings
    seeds: tuple[int, ...] = (0,)
    model: str | None = None
    previews: int = 0
    warnings: tuple[str, ...] = ()


@functools.lru_cache(maxsize=16)
def limited_settings(limits: Limits) -> type[EditSettings]:
    """`EditSettings` with a server's limits."""
    found = EditSettings.model_fields["steps"]
    steps = Field(
        found.default,
        ge=1,
        le=limits.steps,
        description=found.description,
        json_schema_extra=meta_of(found),  # type: ignore[arg-type]
    )
    fields: dict[str, Any] = {"steps": (int | None, steps)}
    for name, least in (("instruction", 1), ("negative", 0)):
        schema: dict[str, Any] = {"type": "string", "minLength": least, "maxLength": limits.words}
        if least:
            schema["pattern"] = r"\S"
        kind = Annotated[str, AfterValidator(_word_check(limits.words, least)), WithJsonSchema(schema)]
        fields[name] = (kind, EditSettings.model_fields[name])
    return create_model("EditSettings", __base__=EditSettings, __doc__=EditSettings.__doc__, **fields)


def _word_check(most: int, least: int) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not is_text(text):
            raise ValueError(f"it {NOT_TEXT}")
        if len(text) > most:
            raise ValueError(f"it has {len(text):,} characters; the limit is {most:,}")
        if least and not text.strip():
            raise ValueError('it is empty; say what to change, as in "make it night"')
        return text

    return check


def is_text(text: str) -> bool:
    """Whether a text is valid Unicode. JSON can contain lone surrogates, which no file can store."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_request(request: EditRequest, limits: Limits, models: list[str]) -> EditRequest:
    """The request with its pictures in the editor's form and its settings checked. Raises SettingError."""
    width, height = request.image.size
    if width * height > limits.pixels:
        raise SettingError(
            f"image is {width}x{height} ({width * height:,} pixels); the limit is {limits.pixels:,}.",
            field="image",
        )
    if not 1 <= len(request.seeds) <= limits.count:
        raise SettingError(
            f"seeds has {len(request.seeds)} values, one per result; it must have 1 to {limits.count}.",
            field="seeds",
        )
    ranges = [("seeds", seed, MAX_SEED) for seed in request.seeds]
    for name, value, most in (*ranges, ("previews", request.previews, limits.steps)):
        if not 0 <= value <= most:
            raise SettingError(f"{name} is {value}; it must be 0 to {most}.", field=name)
    if request.model is not None and request.model not in models:
        shown = request.model[:60] + "…" * (len(request.model) > 60)
        raise SettingError(f"model is {shown!r}; use one of {', '.join(models)}.", field="model")
    with naming("image"):
        image = load_image(request.image, max_pixels=None)
    read = dict(limited_settings(limits).read(dict(request.settings)))
    if read["mask"] is not None:
        with naming("mask"):
            mask = masks.load_mask(read["mask"], image.size, max_pixels=None)
            mask.filename = picture_name(read["mask"]) or "mask"  # type: ignore[attr-defined]  # for infotext
            read["mask"] = mask
    settings = EditSettings.model_construct(**read)
    return dataclasses.replace(request, image=image, settings=settings)


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """Add the name of a field to InputErrors in the block."""
    try:
        yield
    except SettingError:
        raise
    except InputError as error:
        raise SettingError(f"{field}: {error}", field=field) from None
