"""The settings of an edit as A1111's infotext, which pictures carry and from which they are made again."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ip2p.base.errors import InputError
from ip2p.pictures.images import EXIF_IFD, USER_COMMENT, missing_file

SAMPLER_NAMES = {"euler_ancestral": "Euler a", "euler": "Euler", "dpmpp_2m": "DPM++ 2M"}
# A1111's "SGM Uniform" takes the times of trailing before they are rounded.
SCHEDULE_NAMES = {"linspace": "Automatic", "karras": "Karras", "trailing": "SGM Uniform"}
# A name, a colon, and a value that is JSON-quoted where it holds a comma, a colon or a newline.
FIELD = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that an edit was made with; `size` is the width and height at which the model worked.

    What is at its default here is not written. mask and control_image are the files' names; mask_padding
    and feather belong to a mask, control_scale to a ControlNet.
    """

    instruction: str
    negative: str = ""
    steps: int
    sampler: str
    text_cfg: float
    image_cfg: float
    seed: int
    size: tuple[int, int]
    model: str
    spacing: str = "linspace"
    text_cfg_rescale: float = 0.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    mask: str | None = None
    mask_padding: int = 32
    feather: float | None = None
    auto_mask: float | None = None
    fit: str = "original"
    revision: str | None = None
    weights: str = "ema"
    vae: str | None = None
    loras: tuple[str, ...] = ()  # FILE:WEIGHT, in the order in which they were added
    controlnet: str | None = None
    control_image: str | None = None
    control_scale: float = 1.0
    version: str = ""
    others: Mapping[str, str] = field(default_factory=dict)


def format_infotext(settings: Settings) -> str:
    """The three lines of A1111 (two without a negative prompt).

    White space in the texts becomes single blanks: the tokenizer reads it so, and the lines stay lines.
    """
    values = {
        "Steps": str(settings.steps),
        "Sampler": SAMPLER_NAMES.get(settings.sampler, settings.sampler),
        "CFG scale": _number(settings.text_cfg),
        "Image CFG scale": _number(settings.image_cfg),
        "Seed": str(settings.seed),
        "Size": f"{settings.size[0]}x{settings.size[1]}",
        "Model": settings.model,
    }
    if settings.spacing != "linspace":
        values["Schedule type"] = SCHEDULE_NAMES.get(settings.spacing, settings.spacing)
    for name, (label, write, _) in MORE.items():
        value = getattr(settings, name)
        if value != getattr(Settings, name):
            values[label] = write(value)
    values |= {f"LoRA {k}": lora for k, lora in enumerate(settings.loras, 1)}
    values |= dict(settings.others)
    if settings.version:
        values["Version"] = settings.version
    lines = [" ".join(settings.instruction.split())]
    if settings.negative.strip():
        lines.append("Negative prompt: " + " ".join(settings.negative.split()))
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in values.items()))
    return "\n".join(lines)


def parse_infotext(text: str) -> Settings:
    """Read what `format_infotext` or A1111 wrote. Raises InputError where a setting is missing or bad."""
    lines = text.strip().split("\n")
    found = {name: _unquoted(value.strip()) for name, value in FIELD.findall(lines[-1])}
    if len(lines) < 2 or "Steps" not in found:
        raise InputError(
            "The settings have no line like 'Steps: 20, Sampler: Euler a, …'. Give a picture made by ip2p."
        )
    start = next((i for i, line in enumerate(lines[:-1]) if i and line.startswith("Negative prompt:")), None)
    negative = "" if start is None else "\n".join(lines[start:-1]).removeprefix("Negative prompt:").strip()
    instruction = "\n".join(lines[: start if start is not None else -1]).strip()
    samplers = {label: name for name, label in SAMPLER_NAMES.items()}
    spacings = {label: name for name, label in SCHEDULE_NAMES.items()}
    sampler, spacing = found.pop("Sampler", "Euler a"), found.pop("Schedule type", "Automatic")
    # A1111 before 1.9 has the schedule in the sampler's name: "DPM++ 2M Karras".
    if sampler not in samplers and sampler.endswith(" Karras"):
        sampler, spacing = sampler.removesuffix(" Karras"), "Karras"
    try:
        width, height = (int(side) for side in found.pop("Size").split("x"))
        more = {name: read(found.pop(label)) for name, (label, _, read) in MORE.items() if label in found}
        loras: list[str] = []
        while f"LoRA {len(loras) + 1}" in found:
            loras.append(found.pop(f"LoRA {len(loras) + 1}"))
        return Settings(
            instruction=instruction,
            negative=negative,
            steps=int(found.pop("Steps")),
            sampler=samplers.get(sampler, sampler),
            text_cfg=float(found.pop("CFG scale")),
            image_cfg=float(found.pop("Image CFG scale", "1.5")),
            seed=int(found.pop("Seed")),
            size=(width, height),
            model=found.pop("Model", ""),
            spacing=spacings.get(spacing, spacing),
            version=found.pop("Version", ""),
            loras=tuple(loras),
            others=found,
            **more,
        )
    except KeyError as error:
        raise InputError(f"The settings lack {error.args[0]!r}. Give a picture made by ip2p.") from None
    except ValueError as error:
        raise InputError(f"The settings cannot be read ({error}). Give a picture made by ip2p.") from None


def amend(text: str, **fields: Any) -> str:
    """The infotext with other values in some fields of its Settings."""
    return format_infotext(dataclasses.replace(parse_infotext(text), **fields))


def read_infotext(path: str | Path) -> str | None:
    """The infotext that a PNG, JPEG or WebP file carries, or None. Raises InputError for any other file."""
    path = Path(path)
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            text = image.info.get("parameters")
            if isinstance(text, str):
                return text
            return decode_comment(image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT))
    except FileNotFoundError:
        raise missing_file(path) from None
    except Exception as error:  # as in images.load_image: decoders raise anything
        raise InputError(f"{path} cannot be read ({error}). Give a PNG, JPEG or WebP file.") from None


def decode_comment(comment: bytes | str | None) -> str | None:
    """The text of an EXIF UserComment: eight bytes of code name, then the text (either byte order)."""
    if not comment:
        return None
    if isinstance(comment, str):
        return comment
    code, body = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        # Writers disagree on the byte order; zeros sit in the even places of big-endian Latin text.
        order = "utf-16-be" if body[0::2].count(0) >= body[1::2].count(0) else "utf-16-le"
        return body.decode(order, "replace")
    if code == b"ASCII\0\0\0":
        return body.decode("utf-8", "replace")
    return comment.decode("utf-8", "replace").strip("\0")


def _interval(text: str) -> tuple[float, float]:
    low, high = (float(end) for end in text.split(" to "))
    return low, high


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except json.JSONDecodeError:
        return value


# Field of Settings: its name in the infotext, how its value is written, how it is read.
MORE: dict[str, tuple[str, Callable[[Any], str], Callable[[str], Any]]] = {
    "text_cfg_rescale": ("CFG rescale", _number, float),
    "cfg_interval": ("CFG interval", lambda ends: " to ".join(map(_number, ends)), _interval),
    "mask": ("Mask", str, str),
    "mask_padding": ("Mask padding", str, int),
    "feather": ("Mask feather", _number, float),
    "auto_mask": ("Auto mask", _number, float),
    "fit": ("Fit", str, str),
    "revision": ("Model revision", str, str),
    "weights": ("Model weights", str, str),
    "vae": ("VAE model", str, str),  # A1111's VAE is a file's name in its own folder
    "controlnet": ("ControlNet", str, str),
    "control_image": ("Control image", str, str),
    "control_scale": ("Control scale", _number, float),
}
