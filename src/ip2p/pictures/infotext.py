"""The settings of an edit as A1111 infotext, which is stored in each result and can be read back."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import create_model
from pydantic.fields import FieldInfo

from ip2p.base.errors import InputError
from ip2p.pictures.exif import EXIF, USER_COMMENT
from ip2p.pictures.images import missing_file
from ip2p.settings import (
    EditSettings,
    ModelSettings,
    SettingError,
    Voice,
    flat_types,
    meta_of,
    picture_name,
    setting,
)

# A name, a colon, and a value, which is JSON-quoted if it contains a comma, a colon or a newline.
FIELD = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


class EditRecord(ModelSettings, EditSettings):
    """All settings of an edit; `size` is the working width and height of the model.

    `mask` and `control_image` are file names. others: fields that A1111 and similar tools wrote.
    """

    version: str = setting("", "the version of ip2p")
    others: Mapping[str, str] = setting({}, "fields that ip2p does not know")

    def check_together(self) -> None:
        """Accept every combination: a record is checked when it is used for an edit."""


@functools.cache
def record_class(settings: type[EditSettings]) -> type[EditRecord]:
    """The record class for these settings: `EditRecord` plus the fields that a subclass adds."""
    if issubclass(EditRecord, settings):
        return EditRecord
    return create_model("EditRecord", __base__=(EditRecord, settings))  # type: ignore[arg-type]


SAMPLER_NAMES = meta_of(EditSettings.model_fields["sampler"]).labels
SCHEDULE_NAMES = meta_of(EditSettings.model_fields["schedule"]).labels
# The schedule of A1111's "Automatic" for a sampler; for other samplers it is the model's, "Uniform".
AUTOMATIC = {"dpmpp_2m": "karras", "lcm": "lcm", "tcd": "lcm"}


def read_sampler(sampler: str, schedule: str) -> tuple[str, str | None]:
    """The ip2p names of an A1111 sampler and schedule. Unknown names are returned unchanged.

    Case and "_" versus " " do not matter. Before A1111 1.9, a sampler name could end with the schedule:
    "DPM++ 2M Karras". The schedule is None if it is empty or "Automatic" and the sampler is not in AUTOMATIC.
    """

    def plain(text: str) -> str:
        return text.strip().lower().replace("_", " ").removeprefix("k ")

    def ours(labels: Mapping[str, str]) -> dict[str, str]:
        return {plain(text): name for name, label in labels.items() for text in (name, label)}

    samplers, schedules = ours(SAMPLER_NAMES), ours(SCHEDULE_NAMES)
    first, _, last = plain(sampler).rpartition(" ")
    if plain(sampler) not in samplers and first in samplers and last in schedules:
        sampler, schedule = first, last
    sampler = samplers.get(plain(sampler), sampler)
    if plain(schedule) in ("", "automatic"):
        return sampler, AUTOMATIC.get(sampler)
    return sampler, schedules.get(plain(schedule), schedule)


def format_infotext(record: EditRecord) -> str:
    """The infotext of a record: three lines, or two without a negative prompt.

    Runs of white space in the texts become single spaces, as for the tokenizer. Settings with a label are
    written always or only when changed (`Meta.written`).
    """
    first: dict[str, str] = {}
    changed: dict[str, str] = {}
    for name, found in type(record).model_fields.items():
        label, value = meta_of(found).label, getattr(record, name)
        if not label:
            continue
        if isinstance(value, tuple) and value and isinstance(value[0], str):
            changed |= {f"{label} {k}": text for k, text in enumerate(value, 1)}
        elif meta_of(found).written != "changed":
            first[label] = _written(found, value)
        elif value is not None and (
            value not in (found.default, meta_of(found).fallback)
            or (name == "schedule" and record.sampler in AUTOMATIC)
        ):
            changed[label] = _written(found, value)
    values = first | changed | dict(record.others)
    if record.version:
        values["Version"] = record.version
    lines = [" ".join(record.instruction.split())]
    if record.negative.strip():
        lines.append("Negative prompt: " + " ".join(record.negative.split()))
    lines.append(", ".join(f"{label}: {_quoted(value)}" for label, value in values.items()))
    return "\n".join(lines)


def split_infotext(text: str) -> tuple[str, str, dict[str, str]]:
    """The instruction, the negative prompt and the fields of the last line.

    Raises InputError if the last line has no fields.
    """
    lines = text.strip().split("\n")
    found = {name: _unquoted(value.strip()) for name, value in FIELD.findall(lines[-1])}
    if len(lines) < 2 or "Steps" not in found:
        raise InputError(
            "The settings have no line like 'Steps: 20, Sampler: Euler a, …'. Give a picture made by ip2p."
        )
    start = next((i for i, line in enumerate(lines[:-1]) if i and line.startswith("Negative prompt:")), None)
    negative = "" if start is None else "\n".join(lines[start:-1]).removeprefix("Negative prompt:").strip()
    instruction = "\n".join(lines[: start if start is not None else -1]).strip()
    return instruction, negative, found


def parse_infotext(
    text: str, kind: type[EditRecord] = EditRecord, *, without: Collection[str] = ()
) -> EditRecord:
    """Parse an infotext of `format_infotext` or A1111. Raises InputError if a setting is missing or invalid.

    without: names of settings to skip.
    """
    instruction, negative, found = split_infotext(text)
    sampler, schedule = read_sampler(found.pop("Sampler", ""), found.pop("Schedule type", ""))
    found |= {name: text for name, text in (("Sampler", sampler), ("Schedule type", schedule)) if text}
    values: dict[str, Any] = {"instruction": instruction, "negative": negative}
    for name, field in kind.model_fields.items():
        meta = meta_of(field)
        if not meta.label:
            continue
        if name in without:
            found.pop(meta.label, None)
            continue
        if flat_types(field.annotation) == [tuple[str, ...]]:
            texts: list[str] = []
            while (numbered := f"{meta.label} {len(texts) + 1}") in found:
                texts.append(found.pop(numbered))
            values[name] = tuple(texts)
        elif meta.label in found:
            values[name] = found.pop(meta.label)
        elif meta.written == "required":
            raise InputError(f"The settings lack {meta.label!r}. Give a picture made by ip2p.")
        elif name == "model":
            values[name] = ""
        elif meta.fallback is not None:
            values[name] = meta.fallback
    version = found.pop("Version", "")
    labels = {name: meta_of(field).label or name for name, field in kind.model_fields.items()}
    voice = Voice(
        lambda name: labels.get(name, name), lambda name, value: f"{labels.get(name, name)}: {value}"
    )
    try:
        return kind.read(values | {"version": version, "others": found}, voice)
    except SettingError as error:
        reason = str(error).split(" Try ")[0].rstrip(".")
        raise InputError(f"The settings cannot be read ({reason}). Give a picture made by ip2p.") from None


def labeled_settings() -> list[str]:
    """The names of the settings that an infotext stores."""
    fields = EditRecord.model_fields
    return [name for name in fields if meta_of(fields[name]).label or name in ("instruction", "negative")]


def read_infotext(path: str | Path) -> str | None:
    """The infotext in a PNG, JPEG or WebP file, or None. Raises InputError for any other file."""
    path = Path(path)
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            return infotext_of(image)
    except FileNotFoundError:
        raise missing_file(path) from None
    except Exception as error:  # as in images.load_image: decoders raise anything
        raise InputError(f"{path} cannot be read ({error}). Give a PNG, JPEG or WebP file.") from None


def infotext_of(image: Image.Image) -> str | None:
    """The infotext of an opened file, or None."""
    text = image.info.get("parameters")
    if isinstance(text, str):
        return text
    return decode_comment(image.getexif().get_ifd(EXIF).get(USER_COMMENT))


def decode_comment(comment: bytes | str | None) -> str | None:
    """The text of an EXIF UserComment: an eight-byte encoding name, then the text (either byte order)."""
    if not comment:
        return None
    if isinstance(comment, str):
        return comment
    code, body = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        # Writers disagree on the byte order; big-endian Latin text has zeros at even offsets.
        order = "utf-16-be" if body[0::2].count(0) >= body[1::2].count(0) else "utf-16-le"
        return body.decode(order, "replace")
    if code == b"ASCII\0\0\0":
        return body.decode("utf-8", "replace")
    return comment.decode("utf-8", "replace").strip("\0")


def _written(found: FieldInfo, value: Any) -> str:
    """A value in infotext form: 7.5, 512x512, "0.2 to 0.9", a file name, A1111's name of a sampler."""
    if isinstance(value, tuple):
        whole = all(isinstance(part, int) for part in value)
        return "x".join(map(str, value)) if whole else " to ".join(map(_number, value))
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str):
        return meta_of(found).labels.get(value, value)
    return picture_name(value) or str(value)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value)).encode(errors="replace").decode()  # JSON may hold lone surrogates
    except json.JSONDecodeError:
        return value
