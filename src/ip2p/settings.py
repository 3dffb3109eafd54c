"""The settings of an edit, each declared once: default, range, help text, infotext label, API names.

The command line, the HTTP bodies, the infotext, `Editor.edit`, grids, chains and batches are derived from
these classes. To add a setting, add one field; `tests/test_settings.py` checks that it exists everywhere.
"""

from __future__ import annotations

import copy
import difflib
import functools
import json
import re
import secrets
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo

from ip2p import __version__
from ip2p.base.errors import InputError

if typing.TYPE_CHECKING:
    from typing_extensions import Self

_Body = TypeVar("_Body", bound=BaseModel)

DType = Literal["auto", "fp32", "bf16", "fp16"]
SamplerName = Literal["euler_ancestral", "euler", "dpmpp_2m", "lcm", "tcd"]
ScheduleName = Literal["linspace", "karras", "exponential", "trailing", "lcm"]
WeightSet = Literal["auto", "ema", "plain"]
Prediction = Literal["epsilon", "v_prediction", "sample"]  # diffusers' prediction_type
MemoryUse = Literal["auto", "low", "high"]
Fit = Literal["original", "model"]
Split = Literal["train", "test", "unseen_phrasings", "unseen_combinations", "paraphrases"]
Interface = Literal["openai", "a1111"]

MAX_STEPS = 1000  # the number of noise levels in training
MAX_SCALE = 100.0
MAX_COUNT = 1000
MAX_SEED = 2**63 - 1
MIN_SIZE, MAX_SIZE = 16, 4096
MAX_PIXELS = 100_000_000  # of an input picture; decoding takes about 1.2 GB
SERVER_PIXELS = 16_000_000  # the same for servers; about 200 MB
AUTO_MASK = 0.5  # the threshold of --auto-mask without a value, and of auto_mask=True

COMMON, OTHER, MODEL = "Common options", "Other options", "Model"
GUIDANCE, MASK, SIZES, CONTROL = "Sampling and guidance", "Mask", "Size", "ControlNet"


# --- declaring a setting ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The attributes of a setting in addition to its type, default, range and help text."""

    group: str = OTHER  # its group in help texts and on the page
    name: str = ""  # its name outside Python, if different
    label: str = ""  # its name in the infotext; "" omits it
    written: Literal["required", "always", "changed"] = "changed"  # when the infotext includes it
    labels: Mapping[str, str] = field(default_factory=dict)  # infotext names of its values
    fallback: Any = None  # replaces None if the model's card has no value
    example: Any = None  # a valid value, for error messages
    names: Mapping[Interface, str] = field(default_factory=dict)  # its names in other HTTP interfaces
    aliases: tuple[str, ...] = ()  # old names, still accepted
    flags: tuple[str, ...] = ()  # additional command-line flags
    bare: Any = None  # the value of its flag without a value
    metavar: str = ""  # the placeholder of its value in help texts
    positional: int = 0  # its position, if it is a positional argument
    called: str = ""  # its name in error messages
    same_job: bool = True  # whether a resumed job must have the same value
    hidden: bool = False  # omitted from help texts
    fits: Callable[[str], bool] | None = None  # whether the next argument is the value of a bare flag

    def __call__(self, schema: dict[str, Any]) -> None:
        """Add the group and fallback to the JSON schema, for the web page. Called by pydantic."""
        schema["group"] = self.group
        if self.fallback is not None:
            schema["fallback"] = self.fallback


def setting(
    default: Any = ...,
    help: str = "",
    *,
    ge: float | None = None,
    le: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
    **meta: Any,
) -> Any:
    """Declare a field of a `Settings` class: default, help text, range, and the attributes of `Meta`."""
    limits = {"ge": ge, "le": le, "gt": gt, "lt": lt}
    present: dict[str, Any] = {name: limit for name, limit in limits.items() if limit is not None}
    return Field(default, description=help, json_schema_extra=Meta(**meta), **present)


def meta_of(found: FieldInfo) -> Meta:
    """The `Meta` of a field; the defaults if it was declared without `setting`."""
    return found.json_schema_extra if isinstance(found.json_schema_extra, Meta) else Meta()


def _is_text(kind: type[BaseModel], name: str) -> bool:
    found = kind.model_fields.get(name)
    return found is not None and found.annotation in (str, str | None)


# --- the notation of a setting ------------------------------------------------------------------


@dataclass(frozen=True)
class Voice:
    """How error messages write a setting: `name(setting)`, and `example(setting, value)` in hints."""

    name: Callable[[str], str]
    example: Callable[[str, Any], str]


def flag_of(name: str) -> str:
    """text_cfg → --text-cfg."""
    return "--" + name.replace("_", "-")


def written_value(value: Any) -> str:
    """A value in command-line notation: 7.5, 576x384, "0.2 0.9"."""
    if isinstance(value, tuple | list):
        return " ".join(map(written_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


PYTHON = Voice(str, lambda name, value: f"{name}={value!r}")
COMMAND_LINE = Voice(flag_of, lambda name, value: f"{flag_of(name)} {written_value(value)}")


def voice_of(interface: Interface, settings: type[Settings] | None = None) -> Voice:
    """The notation of another HTTP interface."""

    def name(setting: str) -> str:
        found = (settings or EditSettings).model_fields.get(setting)
        return setting if found is None else meta_of(found).names.get(interface, setting)

    return Voice(name, lambda setting, value: f"{name(setting)}={value!r}")


class SettingError(InputError):
    """An invalid setting; `field` is its name in the settings class, "" for a combination of several."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Conflict(Exception):
    """Settings that cannot be combined; "{text_cfg}" in the message becomes the caller's name for it."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Settings(BaseModel):
    """The base of all settings: frozen; unknown names and invalid values raise SettingError.

    Old names of settings are accepted, too (`Meta.aliases`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
    # Names in other libraries → names in ip2p, for error messages.
    foreign_names: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def read(cls, values: Mapping[str, Any], voice: Voice = PYTHON) -> Self:
        """Settings with these values. Raises SettingError in the notation `voice`."""
        return cls.model_validate(dict(values), context={"voice": voice})

    def changed(self, **values: Any) -> Self:
        """A copy with some values replaced. Raises SettingError."""
        return type(self).read({**dict(self), **values}) if values else self

    def part(self, kind: type[SomeSettings]) -> SomeSettings:
        """The settings that the class `kind` has."""
        return kind.read({name: getattr(self, name) for name in kind.model_fields})

    def resolved(self, card: object = None) -> Self:
        """A copy with None replaced by the value in the model's card, else by the setting's fallback."""
        chosen = {}
        for name, found in type(self).model_fields.items():
            meta = meta_of(found)
            if meta.fallback is not None and getattr(self, name) is None:
                known = (getattr(card, each, None) for each in (name, *meta.aliases))
                chosen[name] = next((each for each in known if each is not None), meta.fallback)
        return self.changed(**chosen)

    @classmethod
    def inherited(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Additional values from a file that `values` refer to; flags override them."""
        return {}

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values, in their order."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in self}

    @classmethod
    def field_names(cls) -> dict[str, str]:
        """Each accepted name, including old ones, and its field."""
        fields = cls.model_fields
        earlier = {alias: name for name, found in fields.items() for alias in meta_of(found).aliases}
        outer = {meta_of(found).name: name for name, found in fields.items() if meta_of(found).name}
        return earlier | {name: name for name in fields} | outer

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, values: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Accept old names and paths for text, and raise errors in the caller's notation."""
        voice = (info.context or {}).get("voice", PYTHON)
        if isinstance(values, dict):
            known = cls.field_names()
            values = {known.get(name, name): value for name, value in values.items()}
            for name, value in values.items():
                if isinstance(value, Path) and _is_text(cls, name):
                    values[name] = str(value)  # the text of a model or a data set may be a path
        try:
            settings = handler(values)
            settings.check_together()
        except ValidationError as error:
            raise explained(error, cls, voice) from None
        except Conflict as error:
            raise SettingError(_in_voice(str(error), voice), field=error.field) from None
        return settings

    def check_together(self) -> None:
        """Raise Conflict for valid settings that cannot be combined."""


SomeSettings = TypeVar("SomeSettings", bound=Settings)


def first_difference(settings: Settings, before: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The first setting that differs from `run.json` and must not change on resume: flag, old, new.

    Settings that are missing in the file had their defaults.
    """
    known = settings.field_names()
    before = {known.get(name, name): value for name, value in before.items()}
    now = settings.as_dict()
    for name, found in type(settings).model_fields.items():
        meta = meta_of(found)
        values = before.get(name, found.default), now[name]
        old, new = (json.dumps(value, ensure_ascii=False, default=str) for value in values)
        if meta.same_job and old != new:
            flag = name if meta.positional else flag_of(name)
            return flag, old.replace("null", "not given"), new.replace("null", "not given")
    return None


def run_json(settings: Settings, **also: object) -> str:
    """The text of the `run.json` beside an output: version, settings, and the values in `also`."""
    record = {"ip2p": __version__, "settings": settings.as_dict(), **also}
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


# --- error messages -----------------------------------------------------------------------------


def explained(error: ValidationError, kind: type[BaseModel], voice: Voice = PYTHON) -> SettingError:
    """The first error as one line: the setting, its value, the limit, the next step."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if not first["loc"]:
        return SettingError(f"the settings are invalid: {first['msg']}.")
    name, value = str(first["loc"][0]), first["input"]
    if first["type"] == "extra_forbidden":
        return _unknown(name, kind, voice)
    shown = voice.name(name)
    found = kind.model_fields[name]
    meta = meta_of(found)
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return SettingError(f"{shown} is missing.", field=name)
    example = next((each for each in (meta.example, meta.fallback, found.default) if each is not None), None)
    hint = "" if example is None or example == "" else f" Try {voice.example(name, example)}."
    if isinstance(cause, ValueError):
        message = str(cause).rstrip(".")
        return SettingError(f"{shown} is {_shown(value)}; {message}.{hint}", field=name)
    return SettingError(f"{shown} is {_shown(value)}; {_limit(found, first)}.{hint}", field=name)


def _in_voice(message: str, voice: Voice) -> str:
    """The message with each {setting} in the caller's notation."""
    return re.sub(r"\{(\w+)\}", lambda found: voice.name(found[1]), message)


def _unknown(name: str, kind: type[BaseModel], voice: Voice) -> SettingError:
    known = kind.field_names() if issubclass(kind, Settings) else {each: each for each in kind.model_fields}
    if issubclass(kind, Settings) and name in kind.foreign_names:
        ours = voice.name(kind.foreign_names[name])
        return SettingError(f"{name} is called {ours} here; use {ours}.", field=name)
    near = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean {voice.name(known[near[0]])}?"
        if near
        else f"known: {', '.join(map(voice.name, kind.model_fields))}."
    )
    shown = name if len(name) <= 40 else name[:37] + "..."
    return SettingError(f"{shown!a} is not a setting; {hint}", field=name)


def _limit(found: FieldInfo, error: Any) -> str:
    """The allowed values, as in "it must be 1 to 1000"."""
    if error["type"] == "literal_error":
        return f"choose one of: {', '.join(map(str, choices_of(found.annotation)))}"
    if error["type"].startswith("bool"):
        return "it must be true or false"
    kinds = flat_types(found.annotation)
    pair = next((kind for kind in kinds if typing.get_origin(kind) is tuple), None)
    parts = typing.get_args(pair) if pair is not None else ()
    kinds = kinds if pair is None else flat_types(parts[0])
    if kinds[0] is str:
        return "it must be text"
    if not {int, float} & set(kinds):
        return str(error["msg"])[:1].lower() + str(error["msg"])[1:]
    whole = float not in kinds
    low, high = limits_of(found)
    numeral = f"{len(parts)} numbers" if parts and Ellipsis not in parts else "a number"
    misread = any(sign in error["type"] for sign in ("missing", "parsing", "type", "from_float"))
    if whole and misread:
        numeral = "a whole number"
    if low is None and high is None:
        return f"it must be {numeral}"
    lowest, highest = written_value(low), written_value(high)
    strict = any("lt" in str(type(limit)).lower() or hasattr(limit, "lt") for limit in found.metadata)
    if strict:
        return f"it must be at least {lowest} and less than {highest}"
    if high is None:
        return f"it must be {numeral} of at least {lowest}" if misread else f"it must be at least {lowest}"
    if misread or not whole:
        return f"it must be {numeral} from {lowest} to {highest}"
    return f"it must be {lowest} to {highest}"


def _shown(value: object) -> str:
    text = str(value) if re.fullmatch(r"[-+\d.e]+|nan|-?inf", str(value)) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def flat_types(hint: Any) -> list[Any]:
    """The types in an annotation: `int | None` → [int, NoneType]."""
    if typing.get_origin(hint) is Annotated:
        return flat_types(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in flat_types(part)]
    return [hint]


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal in an annotation."""
    return tuple(
        choice
        for kind in flat_types(hint)
        if typing.get_origin(kind) is Literal
        for choice in typing.get_args(kind)
    )


def limits_of(found: FieldInfo) -> tuple[float | None, float | None]:
    """The minimum and maximum of a setting, or of each number of a pair."""
    metadata: Iterable[Any] = found.metadata
    for kind in flat_types(found.annotation):
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            metadata = typing.get_args(inner)[1:] if typing.get_origin(inner) is Annotated else ()
            metadata = [m for each in metadata for m in getattr(each, "metadata", [each])]
    low: float | None = None
    high: float | None = None
    for limit in metadata:
        low = getattr(limit, "ge", getattr(limit, "gt", low))
        high = getattr(limit, "le", getattr(limit, "lt", high))
    return low, high


# --- parsing values -----------------------------------------------------------------------------


def parse_size(value: Any) -> Any:
    """256 → 256, "256" → 256, "576x384" → (576, 384). Raises ValueError for other values."""
    if isinstance(value, str):
        try:
            sides = [int(side) for side in value.lower().split("x")]
        except ValueError:
            sides = []
        if not 1 <= len(sides) <= 2:
            raise ValueError("write a side, or width and height as 576x384")
        value = sides[0] if len(sides) == 1 else tuple(sides)
    sides = list(value) if isinstance(value, tuple | list) else [] if value is None else [value]
    if len(sides) > 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError("write a side, or width and height as 576x384")
    if not all(MIN_SIZE <= side <= MAX_SIZE for side in sides):
        raise ValueError(f"it must be {MIN_SIZE} to {MAX_SIZE}")
    return value


def _read_threshold(value: Any) -> Any:
    """True → the default threshold, as for --auto-mask without a value; False → None."""
    return (AUTO_MASK if value else None) if isinstance(value, bool) else value


def read_pair(value: Any) -> Any:
    """Split "0.2 0.9", "0.2,0.9" or "0.2 to 0.9" into two numbers."""
    return value.replace(",", " ").replace(" to ", " ").split() if isinstance(value, str) else value


def _read_texts(value: Any) -> Any:
    """A single text → a list; a file with a weight, ("a.safetensors", 0.8), → "a.safetensors:0.8"."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list | tuple):
        return value
    return [f"{part[0]}:{part[1]:g}" if isinstance(part, list | tuple) else part for part in value]


def _check_loras(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        parse_lora(text)
    return texts


def parse_lora(text: str) -> tuple[Path, float]:
    """The file and the weight of FILE:WEIGHT; the weight of FILE is 1.

    File names may contain colons: only a number after the last colon is a weight. Raises ValueError.
    """
    file, colon, number = text.rpartition(":")
    try:
        weight = float(number) if colon else None
    except ValueError:
        weight = None
    if weight is None:
        file, weight = text, 1.0
    if not file.strip():
        raise ValueError("it has no file name")
    if not -10 <= weight <= 10:
        raise ValueError(f"the weight {weight:g} must be a number from -10 to 10")
    return Path(file), weight


SIZE_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": MIN_SIZE, "maximum": MAX_SIZE},
        {"type": "string", "pattern": r"^\d+([xX]\d+)?$"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
        {"type": "null"},
    ]
}
Size = Annotated[int | tuple[int, int] | None, BeforeValidator(parse_size), WithJsonSchema(SIZE_SCHEMA)]
UnitFloat = Annotated[float, Field(ge=0, le=1)]
SharePair = Annotated[tuple[UnitFloat, UnitFloat], BeforeValidator(read_pair)]


def _drawn_seed(value: Any) -> Any:
    """-1 → a random seed, as in A1111; the results record it."""
    if value in (-1, "-1"):
        return secrets.randbelow(2**32)
    if isinstance(value, int) and not 0 <= value <= MAX_SEED:
        raise ValueError(f"it must be 0 to {MAX_SEED}, or -1 for a random seed")
    return value


def _check_color(value: str | None) -> str | None:
    from PIL import ImageColor

    if value is not None and len(ImageColor.getrgb(value)) != 3:  # raises ValueError
        raise ValueError("it must be opaque")
    return value


# The fields of a pair as the user names them: their names in `data.records.Pair`.
PAIR_PARTS = {"original": "before", "edited": "after", "instruction": "instruction", "caption": "caption"}
PAIR_PARTS |= {"edited_caption": "edited_caption", "mask": "mask", "id": "id"}


def parse_columns(text: str) -> dict[str, str]:
    """The columns of `original=COLUMN,instruction=COLUMN,edited=COLUMN` by field of `Pair`.

    `before` and `after` are accepted for original and edited. Raises ValueError.
    """
    columns: dict[str, str] = {}
    for entry in text.split(","):
        part, _, name = (word.strip() for word in entry.partition("="))
        if not part or not name:
            raise ValueError("write PART=COLUMN, separated by commas, such as original=src,edited=tgt")
        field = PAIR_PARTS.get(part, part)
        if field not in PAIR_PARTS.values():
            raise ValueError(f"{part} is no part of a pair: {', '.join(PAIR_PARTS)}")
        if field in columns:
            raise ValueError(f"{part_name(field)} is named twice")
        columns[field] = name
    return columns


def part_name(field: str) -> str:
    """The user's name of a field of `Pair`."""
    return next(part for part, name in PAIR_PARTS.items() if name == field)


def _check_columns(value: str | None) -> str | None:
    return value and ",".join(f"{part_name(part)}={name}" for part, name in parse_columns(value).items())


Columns = Annotated[str | None, AfterValidator(_check_columns)]
Color = Annotated[str | None, AfterValidator(_check_color)]
Seed = Annotated[int, BeforeValidator(_drawn_seed)]
Threshold = Annotated[float | None, BeforeValidator(_read_threshold)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_read_texts)]
Loras = Annotated[Texts, AfterValidator(_check_loras)]
# A path, the bytes of a file, an open file, a PIL image or a NumPy array; over HTTP a file or base64.
AnyPicture = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}]})]


def picture_name(picture: Any) -> str | None:
    """The file name of a picture setting, None if it is not a file."""
    name = picture if isinstance(picture, str | Path) else getattr(picture, "filename", None)
    return Path(name).as_posix() if isinstance(name, str | Path) and str(name) else None


# --- an edit ------------------------------------------------------------------------------------


class InstructionSettings(Settings):
    """What to change."""

    instruction: str = setting(
        "",
        "what to change",
        group=COMMON,
        positional=3,
        metavar="INSTRUCTION",
        called="the instruction",
        names={"openai": "prompt", "a1111": "prompt"},
    )
    negative: str = setting(
        "",
        "what to avoid in the result",
        group=GUIDANCE,
        metavar="TEXT",
        names={"openai": "negative_prompt", "a1111": "negative_prompt"},
    )


class StepSettings(Settings):
    """How to sample."""

    steps: int | None = setting(
        None,
        "sampling steps",
        ge=1,
        le=MAX_STEPS,
        fallback=20,
        group=COMMON,
        label="Steps",
        written="required",
        names={"openai": "num_inference_steps"},
    )
    sampler: SamplerName | None = setting(
        None,
        "sampler",
        fallback="euler_ancestral",
        group=GUIDANCE,
        label="Sampler",
        written="always",
        labels={
            "euler_ancestral": "Euler a",
            "euler": "Euler",
            "dpmpp_2m": "DPM++ 2M",
            "lcm": "LCM",
            "tcd": "TCD",
        },
        names={"a1111": "sampler_name"},
    )


class ScaleSettings(Settings):
    """The guidance scales and the seed."""

    text_cfg: float | None = setting(
        None,
        "how strongly to follow the instruction",
        ge=0,
        le=MAX_SCALE,
        fallback=7.5,
        group=COMMON,
        label="CFG scale",
        written="required",
        names={"openai": "guidance_scale", "a1111": "cfg_scale"},
    )
    image_cfg: float | None = setting(
        None,
        "how strongly to keep the input picture",
        ge=0,
        le=MAX_SCALE,
        fallback=1.5,
        group=COMMON,
        label="Image CFG scale",
        written="always",
        names={"openai": "image_guidance_scale", "a1111": "image_cfg_scale"},
    )
    seed: Seed = setting(
        0,
        "seed of the first result, increased by 1 for each further one; -1: random",
        ge=0,
        le=MAX_SEED,
        example=7,
        group=COMMON,
        label="Seed",
        written="required",
    )


class PictureSettings(Settings):
    """The working size and the noise schedule."""

    size: Size = setting(
        None,
        "working size of the model in pixels; default: close to its training size",
        example=256,
        group=COMMON,
        label="Size",
        written="required",
        metavar="SIDE|WxH",
    )
    schedule: ScheduleName | None = setting(
        None,
        "noise schedule",
        fallback="linspace",
        group=GUIDANCE,
        label="Schedule type",
        # A1111's "SGM Uniform" is "trailing" without rounding of the times.
        labels={
            "linspace": "Uniform",
            "karras": "Karras",
            "exponential": "Exponential",
            "trailing": "SGM Uniform",
            "lcm": "LCM",
        },
        names={"a1111": "scheduler"},
        aliases=("spacing",),
    )


class EditSettings(PictureSettings, ScaleSettings, StepSettings, InstructionSettings):
    """The settings of an edit. None means the value in the model's card, else the usual default.

    The infotext has the order of the fields: those of the last base class come first.
    """

    foreign_names: ClassVar[Mapping[str, str]] = {
        "guidance_scale": "text_cfg",
        "image_guidance_scale": "image_cfg",
        "num_inference_steps": "steps",
        "negative_prompt": "negative",
        "prompt": "instruction",
        "guidance_rescale": "text_cfg_rescale",
        "controlnet_conditioning_scale": "control_scale",
        "mask_image": "mask",
        "generator": "seed",
        "cfg_scale": "text_cfg",
        "image_cfg_scale": "image_cfg",
    }

    text_cfg_rescale: float = setting(
        0.0,
        "reduce the contrast that high scales add; 0 to 1",
        ge=0,
        le=1,
        example=0.7,
        group=GUIDANCE,
        label="CFG rescale",
    )
    cfg_interval: SharePair | None = setting(
        None,
        "apply guidance only between these noise levels; 1 is the highest",
        fallback=(0.0, 1.0),
        example=(0.2, 0.9),
        group=GUIDANCE,
        label="CFG interval",
        metavar="LOW HIGH",
    )
    cfg_every: int = setting(
        1,
        "compute guidance only at every Nth step and reuse it between; faster, approximate",
        ge=1,
        le=100,
        example=2,
        group=GUIDANCE,
        label="CFG every",
        hidden=True,
    )
    cache_every: int = setting(
        1,
        "run the whole UNet only at every Nth step and reuse its deep features between; faster, approximate",
        ge=1,
        le=100,
        example=2,
        group=GUIDANCE,
        label="Cache every",
        hidden=True,
    )
    mask: AnyPicture = setting(
        None,
        "picture of the input's size: white is edited, black stays unchanged to the byte",
        group=MASK,
        label="Mask",
        metavar="FILE",
        names={"a1111": "mask"},
    )
    mask_padding: int = setting(
        32,
        "pixels around the white area to show the model",
        ge=0,
        le=MAX_SIZE,
        group=MASK,
        label="Mask padding",
        names={"a1111": "inpaint_full_res_padding"},
    )
    feather: float | None = setting(
        None,
        "width in pixels of the soft edge inside the mask; default: 1/128 of its longer side",
        ge=0,
        le=MAX_SIZE,
        example=8.0,
        group=MASK,
        label="Mask feather",
        names={"a1111": "mask_blur"},
    )
    auto_mask: Threshold = setting(
        None,
        "let the model find the region to edit; lower thresholds select more (without a value: 0.5)",
        ge=0,
        le=1,
        example=AUTO_MASK,
        bare=AUTO_MASK,
        group=MASK,
        label="Auto mask",
        metavar="[THRESHOLD]",
    )
    fit: Fit = setting(
        "original",
        "original: apply the change at the input resolution; model: keep the working size",
        group=SIZES,
        label="Fit",
    )
    background: Color = setting(
        None,
        "color behind transparent parts: a name or #rrggbb; default: results stay transparent",
        group=SIZES,
        label="Background",
        metavar="COLOR",
        example="white",
        names={"openai": "background_color"},  # OpenAI's `background` is opaque, transparent or auto
    )
    control_image: AnyPicture = setting(
        None,
        "input of the ControlNet: edges, a depth map, …",
        group=CONTROL,
        label="Control image",
        metavar="FILE",
    )
    control_scale: float = setting(
        1.0,
        "strength of the ControlNet",
        ge=0,
        le=MAX_SCALE,
        group=CONTROL,
        label="Control scale",
    )

    def check_together(self) -> None:
        super().check_together()
        low, high = self.cfg_interval or (0, 1)
        if low >= high:
            raise Conflict(
                f"{{cfg_interval}} {low:g} {high:g} is empty; the first number must be the smaller one.",
                field="cfg_interval",
            )
        if self.mask is not None and self.auto_mask is not None:
            raise Conflict(
                "{mask} and {auto_mask} both select the region; give one of them.", field="auto_mask"
            )


class PartsSettings(Settings):
    """Where the parts of a UNet-only file come from."""

    parts_from: str | None = setting(
        None,
        "model that provides the parts a UNet-only file lacks",
        group=MODEL,
        label="Model parts",
        metavar="MODEL",
    )


class VaeSettings(Settings):
    """Which autoencoder to use."""

    vae: str | None = setting(
        None,
        "replace the autoencoder: a folder, a Hugging Face model id, or a file",
        group=MODEL,
        label="VAE model",  # "VAE" in A1111 is a file name in its own folder
        metavar="MODEL",
    )


class ModelChoice(VaeSettings, PartsSettings):
    """Which model to load."""

    model: str = setting(
        "storybook",
        "storybook, a Hugging Face model id, a diffusers folder, a .safetensors or .ckpt file",
        group=COMMON,
        label="Model",
        written="always",
        metavar="MODEL",
    )
    revision: str | None = setting(
        None,
        "branch, tag or commit on Hugging Face",
        group=MODEL,
        label="Model revision",
        metavar="TEXT",
    )
    weights: WeightSet = setting(
        "auto",
        "for files with both: ema or plain weights; auto uses ema unless it belongs to another model",
        group=MODEL,
        label="Model weights",
    )


class DeviceSettings(Settings):
    """Where to run."""

    device: str = setting(
        "auto", "cuda, cuda:N, mps or cpu; auto: the first available one", group=MODEL, same_job=False
    )


class DTypeSettings(Settings):
    """The number format."""

    dtype: DType = setting(
        "auto", "fp32, bf16 or fp16; auto: half precision if the device supports it well", group=MODEL
    )


class MemorySettings(Settings):
    """How much memory to use."""

    memory: MemoryUse = setting(
        "auto",
        "low: save memory, slower; high: never save memory; auto: depends on the free memory",
        group=MODEL,
        same_job=False,
    )


class CompileSettings(Settings):
    """Whether to compile the networks."""

    compile: bool = setting(
        False,
        "compile the networks; the first edit of each size takes minutes, later ones are faster",
        group=MODEL,
        same_job=False,
    )


class ModelSettings(CompileSettings, MemorySettings, DTypeSettings, DeviceSettings, ModelChoice):
    """Which model to load, what to add to it, and where to run it."""

    lora: Loras = setting(
        (),
        "LoRA file, with a weight (default: 1); may be repeated",
        group=MODEL,
        label="LoRA",
        metavar="FILE:WEIGHT",
        example="style.safetensors:0.8",
        aliases=("loras",),
    )
    controlnet: str | None = setting(
        None,
        "ControlNet for Stable Diffusion 1.x: a folder or a Hugging Face model id",
        group=CONTROL,
        label="ControlNet",
        metavar="MODEL",
    )


# --- shared by several stages --------------------------------------------------------------------


class RunSettings(Settings):
    """Settings of every verb."""

    config: Path | None = setting(
        None, "settings file, TOML or YAML; default: ip2p.toml in this folder", metavar="FILE", same_job=False
    )
    debug: bool = setting(False, "show the traceback of errors", same_job=False)


class OverwriteSettings(Settings):
    """Settings of every verb that writes files."""

    overwrite: bool = setting(False, "replace an existing output", same_job=False)


class ColumnSettings(Settings):
    """Which columns of a data set hold what."""

    columns: Columns = setting(
        None,
        "original=NAME,instruction=NAME,edited=NAME; default: known names (docs/data.md)",
        example="original=src,edited=tgt",
        group="Data",
        metavar="PART=NAME,…",
    )


class HubDataSettings(Settings):
    """Settings of Hugging Face data sets."""

    split: str = setting(
        "train", "split of the data set; for storybook as in `storybook draw`", group="Data", hidden=True
    )
    revision: str | None = setting(None, "branch, tag or commit on Hugging Face", group="Data")
    stream: bool = setting(False, "stream a Hugging Face data set instead of downloading it", group="Data")


WORKERS = "Workers"


def is_cluster(word: str) -> bool:
    """Whether the argument after --ray is the address of a cluster, not an input file of the verb."""
    return re.fullmatch(r"auto|local|ray://\S+|[\w.\-]+:\d+|\[[0-9a-fA-F:]+\]:\d+", word) is not None


class RaySettings(Settings):
    """Whether to run on a Ray cluster."""

    ray: str | None = setting(
        None,
        "run on a Ray cluster: at this address, else RAY_ADDRESS, else a local one",
        group=WORKERS,
        metavar="[ADDRESS]",
        bare="",
        fits=is_cluster,
        same_job=False,
    )


class WorkerSettings(RaySettings):
    """The number of workers of a stage, locally or on a cluster."""

    workers: int | None = setting(
        None,
        "local processes; default: one per core for small models on a CPU, else 1",
        ge=1,
        le=10**9,
        example=2,
        group=WORKERS,
        same_job=False,
    )
    ray_workers: int | None = setting(
        None, "workers on the cluster; default: as many as fit", ge=1, le=10**9, example=4, group=WORKERS
    )
    ray_gpus: float | None = setting(
        None,
        "GPUs per worker; default: one if the cluster has any",
        ge=0,
        le=1024,
        example=1.0,
        group=WORKERS,
    )
    threads: int | None = setting(
        None,
        "threads per worker; default: 1 with several workers or --ray, else all",
        ge=1,
        le=10**9,
        example=1,
        group=WORKERS,
        hidden=True,
    )

    def check_together(self) -> None:
        super().check_together()
        for name in ("ray_workers", "ray_gpus"):
            if self.ray is None and getattr(self, name) is not None:
                raise Conflict(f"{{{name}}} is for a Ray cluster; add {{ray}}.", field=name)
        if self.ray is not None and self.workers is not None:
            raise Conflict(
                "{workers} is for local processes; on a Ray cluster use {ray_workers}.", field="workers"
            )


def check_needed(settings: Settings, *needed: tuple[str, str], example: str) -> None:
    """Raise InputError if a required setting is empty. needed: names, and how a message starts."""
    for name, called in needed:
        if not str(getattr(settings, name) or "").strip():
            raise InputError(f"{called} missing; write: {example}")


# --- HTTP bodies --------------------------------------------------------------------------------


def interface_body(
    base: type[_Body],
    interface: Interface | None = None,
    *,
    settings: type[Settings] = EditSettings,
    defaults: Mapping[str, Any] | None = None,
    leave_out: Iterable[str] = (),
    nullable: bool = False,
) -> type[_Body]:
    """The request body `base` plus the fields of `settings` that it lacks, under the interface's names.

    defaults: override those of the settings. leave_out: settings to omit. nullable: accept null for the
    default, as some clients send it.
    """
    fields: dict[str, Any] = {}
    for name, found in settings.model_fields.items():
        called = _name_in(found, name, interface)
        if called in base.model_fields or name in set(leave_out):
            continue
        copied = copy.copy(found)
        if defaults is not None and name in defaults:
            copied.default = defaults[name]
        annotation: Any = found.annotation
        fields[called] = (annotation | None if nullable else annotation, copied)
    return create_model(
        base.__name__, __base__=base, __doc__=base.__doc__, __module__=base.__module__, **fields
    )


def settings_from_body(
    body: BaseModel,
    interface: Interface | None = None,
    *,
    settings: type[SomeSettings] = EditSettings,  # type: ignore[assignment]
    **values: Any,
) -> SomeSettings:
    """The settings in a body of `interface_body`; `values` override them.

    Raises SettingError with the interface's names.
    """
    kind: Any = settings
    found = {}
    for name, declared in kind.model_fields.items():
        called = _name_in(declared, name, interface)
        if called in type(body).model_fields and getattr(body, called) is not None:
            found[name] = getattr(body, called)
    voice = PYTHON if interface is None else voice_of(interface, kind)
    return kind.read(found | values, voice)  # type: ignore[no-any-return]


def _name_in(found: FieldInfo, name: str, interface: Interface | None) -> str:
    return name if interface is None else meta_of(found).names.get(interface, name)


@functools.cache
def numeric_settings(kind: type[Settings] = EditSettings) -> tuple[str, ...]:
    """The names of the settings that are a single number and can be an axis of a grid."""
    return tuple(
        name
        for name, found in kind.model_fields.items()
        if set(flat_types(found.annotation)) <= {int, float, type(None)} and found.annotation is not Any
    )
