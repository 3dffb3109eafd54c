"""Every setting of an edit, declared once: default, range, help text, infotext label, names elsewhere.

The command line, the HTTP bodies, the infotext, `Editor.edit`, grids, chains and batches derive from the
classes here. To add a setting, add one field; `tests/test_settings.py` shows that it then exists everywhere.
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
MemoryUse = Literal["auto", "low", "high"]
Fit = Literal["original", "model"]
Split = Literal["train", "test", "unseen_phrasings", "unseen_combinations", "paraphrases"]
Interface = Literal["openai", "a1111"]

MAX_STEPS = 1000  # the number of noise levels that a model is trained on
MAX_SCALE = 100.0
MAX_COUNT = 1000
MAX_SEED = 2**63 - 1
MIN_SIZE, MAX_SIZE = 16, 4096
MAX_PIXELS = 100_000_000  # of a picture to read; about 1.2 GB while it is decoded
SERVER_PIXELS = 16_000_000  # the same for servers: about 200 MB
AUTO_MASK = 0.5  # the threshold of a bare --auto-mask, and of auto_mask=True


COMMON, OTHER, MODEL = "Common options", "Other options", "Model"
GUIDANCE, MASK, SIZES, CONTROL = "Sampling and guidance", "Mask", "Size", "ControlNet"


# --- how a setting is declared ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What a setting has beside its type, default, range and help text.

    group: its title in help texts and on the page. name: its name outside of Python, if it differs.
    label: its name in the infotext ("" keeps it out), where
    it is always there and "required" to read it back, "always" there, or there when "changed". labels: the
    infotext's words for its values. fallback: what None stands for if the model's card has no value.
    example: a good value, for error messages. names: what the other HTTP interfaces call it. aliases: its
    earlier names, still accepted. flags: more flags of the command line. bare: the value of its flag alone.
    metavar: what the help shows in place of a value. positional: its place among the words without a flag.
    called: how a sentence names it. same_job: whether a resumed job must have the same value. hidden: only a
    settings file or an IP2P_* variable sets it; help texts omit it. fits: whether a word is the value of a
    bare flag.
    """

    group: str = OTHER
    name: str = ""
    label: str = ""
    written: Literal["required", "always", "changed"] = "changed"
    labels: Mapping[str, str] = field(default_factory=dict)
    fallback: Any = None
    example: Any = None
    names: Mapping[Interface, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    bare: Any = None
    metavar: str = ""
    positional: int = 0
    called: str = ""
    same_job: bool = True
    hidden: bool = False
    fits: Callable[[str], bool] | None = None

    def __call__(self, schema: dict[str, Any]) -> None:
        """Add to the JSON schema what the page builds its controls from (pydantic calls this)."""
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
    """A field of a `Settings` class: its default, its help text, its range, and what `Meta` has."""
    limits = {name: limit for name, limit in (("ge", ge), ("le", le), ("gt", gt), ("lt", lt))}
    given: dict[str, Any] = {name: limit for name, limit in limits.items() if limit is not None}
    return Field(default, description=help, json_schema_extra=Meta(**meta), **given)


def meta_of(found: FieldInfo) -> Meta:
    """What `setting` was given; the defaults for a field that was declared without it."""
    return found.json_schema_extra if isinstance(found.json_schema_extra, Meta) else Meta()


# --- how a caller writes a setting --------------------------------------------------------------


@dataclass(frozen=True)
class Voice:
    """How a caller writes a setting: `name(setting)` in a sentence, `example(setting, value)` as a hint."""

    name: Callable[[str], str]
    example: Callable[[str, Any], str]


def flag_of(name: str) -> str:
    """text_cfg → --text-cfg."""
    return "--" + name.replace("_", "-")


def written_value(value: Any) -> str:
    """A value as it is typed on a command line: 7.5, 576x384, "0.2 0.9"."""
    if isinstance(value, tuple | list):
        return " ".join(map(written_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


PYTHON = Voice(str, lambda name, value: f"{name}={value!r}")
COMMAND_LINE = Voice(flag_of, lambda name, value: f"{flag_of(name)} {written_value(value)}")


def voice_of(interface: Interface, settings: type[Settings] | None = None) -> Voice:
    """How another HTTP interface writes the settings."""

    def name(setting: str) -> str:
        found = (settings or EditSettings).model_fields.get(setting)
        return setting if found is None else meta_of(found).names.get(interface, setting)

    return Voice(name, lambda setting, value: f"{name(setting)}={value!r}")


class SettingError(InputError):
    """A setting that cannot be used; `field` is its name in the settings class, "" if several are."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Conflict(Exception):
    """Settings that do not go together; {text_cfg} in the message becomes the name that the caller writes."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Settings(BaseModel):
    """The base of all settings: frozen, without unknown names; what is wrong becomes one SettingError.

    A class may hold settings under their earlier names too (`Meta.aliases`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
    # How callers are used to calling something, and what it is called here.
    foreign_names: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def read(cls, values: Mapping[str, Any], voice: Voice = PYTHON) -> Self:
        """The settings with these values; SettingError in the caller's voice for what is wrong."""
        return cls.model_validate(dict(values), context={"voice": voice})

    def changed(self, **values: Any) -> Self:
        """The same settings but for `values`, which are checked."""
        return type(self).read({**dict(self), **values}) if values else self

    def part(self, kind: type[SomeSettings]) -> SomeSettings:
        """Those of the settings that the class `kind` has."""
        return kind.read({name: getattr(self, name) for name in kind.model_fields})

    def resolved(self, card: object = None) -> Self:
        """None replaced by the value of the same name in the model's card, else by the setting's fallback."""
        chosen = {}
        for name, found in type(self).model_fields.items():
            meta = meta_of(found)
            if meta.fallback is not None and getattr(self, name) is None:
                known = (getattr(card, each, None) for each in (name, *meta.aliases))
                chosen[name] = next((each for each in known if each is not None), meta.fallback)
        return self.changed(**chosen)

    @classmethod
    def inherited(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """More values, from a file that the given ones name; flags take their place."""
        return {}

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, in their order."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in self}

    @classmethod
    def field_names(cls) -> dict[str, str]:
        """Each accepted name, earlier ones included, and the field that it stands for."""
        fields = cls.model_fields
        earlier = {alias: name for name, found in fields.items() for alias in meta_of(found).aliases}
        outer = {meta_of(found).name: name for name, found in fields.items() if meta_of(found).name}
        return earlier | {name: name for name in fields} | outer

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, values: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Accept earlier names, and say in the caller's voice what is wrong."""
        voice = (info.context or {}).get("voice", PYTHON)
        if isinstance(values, dict):
            known = cls.field_names()
            values = {known.get(name, name): value for name, value in values.items()}
        try:
            made = handler(values)
            made.check_together()
        except ValidationError as error:
            raise explained(error, cls, voice) from None
        except Conflict as error:
            raise SettingError(_in_voice(str(error), voice), field=error.field) from None
        return made

    def check_together(self) -> None:
        """Raise Conflict for settings that are right alone and not together."""


SomeSettings = TypeVar("SomeSettings", bound=Settings)


def first_difference(settings: Settings, before: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The first setting of `run.json` that a resumed job may not change and that differs: flag, old, new.

    A setting that the file lacks had its default.
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
    """The text of the `run.json` beside an output: version, settings, and what else is given."""
    record = {"ip2p": __version__, "settings": settings.as_dict(), **also}
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


# --- what is wrong, in one line -----------------------------------------------------------------


def explained(error: ValidationError, kind: type[BaseModel], voice: Voice = PYTHON) -> SettingError:
    """The first thing that is wrong as one line: the setting, its value, the limit, the next step."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if not first["loc"]:
        return SettingError(f"these are no settings: {first['msg']}.")
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
    """The message with each {setting} as the caller writes it."""
    return re.sub(r"\{(\w+)\}", lambda found: voice.name(found[1]), message)


def _unknown(name: str, kind: type[BaseModel], voice: Voice) -> SettingError:
    known = kind.field_names() if issubclass(kind, Settings) else {each: each for each in kind.model_fields}
    foreign = kind.foreign_names if issubclass(kind, Settings) else {}
    if name in foreign:
        ours = foreign[name]
        return SettingError(
            f"{name} is called {voice.name(ours)} here; write {voice.name(ours)}.", field=name
        )
    near = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean {voice.name(known[near[0]])}?"
        if near
        else f"known: {', '.join(map(voice.name, kind.model_fields))}."
    )
    shown = name if len(name) <= 40 else name[:37] + "..."
    return SettingError(f"{shown!a} is no setting; {hint}", field=name)


def _limit(found: FieldInfo, error: Any) -> str:
    """What a value must be: "it must be 1 to 1000"."""
    if error["type"] == "literal_error":
        return f"choose one of: {', '.join(map(str, choices_of(found.annotation)))}"
    if error["type"].startswith("bool"):
        return "write true or false"
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
    misread = (
        "missing" in error["type"]
        or "parsing" in error["type"]
        or "type" in error["type"]
        or "from_float" in error["type"]
    )
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
    return (
        f"it must be {numeral} from {lowest} to {highest}"
        if misread or not whole
        else (f"it must be {lowest} to {highest}")
    )


def _shown(value: object) -> str:
    text = str(value) if re.fullmatch(r"[-+\d.e]+|nan|-?inf", str(value)) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def flat_types(hint: Any) -> list[Any]:
    """The types that an annotation allows: `int | None` gives [int, NoneType]."""
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
    """The least and the largest value of a setting, or of each number of a pair."""
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


# --- types that need reading --------------------------------------------------------------------


def parse_size(value: Any) -> Any:
    """256 → 256, "256" → 256, "576x384" → (576, 384); ValueError for anything else."""
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
    """True is the usual threshold and False is none, as a bare --auto-mask."""
    return (AUTO_MASK if value else None) if isinstance(value, bool) else value


def read_pair(value: Any) -> Any:
    """ "0.2 0.9", "0.2,0.9" and "0.2 to 0.9" are pairs of numbers."""
    return value.replace(",", " ").replace(" to ", " ").split() if isinstance(value, str) else value


def _read_texts(value: Any) -> Any:
    """A text alone is a list of one; a file with its weight, ("a.safetensors", 0.8), is written as text."""
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
    """The file and the weight of FILE:WEIGHT, or of FILE alone, whose weight is 1.

    The file's name may hold colons: only a number after the last one is a weight. Raises ValueError.
    """
    file, colon, number = text.rpartition(":")
    try:
        weight = float(number) if colon else None
    except ValueError:
        weight = None
    if weight is None:
        file, weight = text, 1.0
    if not file.strip():
        raise ValueError("it names no file")
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
    """-1 becomes a random seed, as in A1111's tools; results say which."""
    return secrets.randbelow(2**32) if value in (-1, "-1") else value


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
    """The name of the file that a picture setting is, None if it is no file."""
    name = picture if isinstance(picture, str | Path) else getattr(picture, "filename", None)
    return Path(name).as_posix() if isinstance(name, str | Path) and str(name) else None


# --- an edit ------------------------------------------------------------------------------------


class InstructionSettings(Settings):
    """What an edit is asked for."""

    instruction: str = setting(
        "",
        "what to change, in words",
        group=COMMON,
        positional=3,
        metavar="INSTRUCTION",
        called="the instruction",
        names={"openai": "prompt", "a1111": "prompt"},
    )
    negative: str = setting(
        "",
        "what to stay away from",
        group=GUIDANCE,
        metavar="TEXT",
        names={"openai": "negative_prompt", "a1111": "negative_prompt"},
    )


class StepSettings(Settings):
    """How a diffusion model is sampled."""

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
    """How strongly an edit is guided, and its noise."""

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
        "seed of the first result; the next ones count up; -1 draws one",
        ge=0,
        le=MAX_SEED,
        example=7,
        group=COMMON,
        label="Seed",
        written="required",
    )


class PictureSettings(Settings):
    """The working size, and the noise levels."""

    size: Size = setting(
        None,
        "working size of the model, in pixels; default: near the size it was trained at",
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
        # A1111's "SGM Uniform" takes the times of trailing before they are rounded.
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
    """The settings of an edit. `None` takes the value of the model's card, else the usual one.

    The order of the fields is that of the infotext: the last base comes first.
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
        "0 to 1: reduce the contrast that high scales add",
        ge=0,
        le=1,
        example=0.7,
        group=GUIDANCE,
        label="CFG rescale",
    )
    cfg_interval: SharePair = setting(
        (0.0, 1.0),
        "use guidance only between these noise levels; 1 is the noisiest",
        example=(0.2, 0.9),
        group=GUIDANCE,
        label="CFG interval",
        metavar="LOW HIGH",
    )
    mask: AnyPicture = setting(
        None,
        "picture of the input's size: white is edited, black stays the same to the byte",
        group=MASK,
        label="Mask",
        metavar="FILE",
        names={"a1111": "mask"},
    )
    mask_padding: int = setting(
        32,
        "pixels around the white area that the model sees too",
        ge=0,
        le=MAX_SIZE,
        group=MASK,
        label="Mask padding",
        names={"a1111": "inpaint_full_res_padding"},
    )
    feather: float | None = setting(
        None,
        "pixels over which the edit fades inside the mask; default: 1/128 of its longer side",
        ge=0,
        le=MAX_SIZE,
        example=8.0,
        group=MASK,
        label="Mask feather",
        names={"a1111": "mask_blur"},
    )
    auto_mask: Threshold = setting(
        None,
        "let the model find the region to edit; a lower threshold takes more (default alone: 0.5)",
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
        "original: apply the change at the picture's own resolution; model: keep the working size",
        group=SIZES,
        label="Fit",
    )
    background: Color = setting(
        None,
        "color to lay transparent parts on: a name or #rrggbb; default: results stay transparent",
        group=SIZES,
        label="Background",
        metavar="COLOR",
        example="white",
        names={"openai": "background_color"},  # its own `background` is opaque, transparent or auto
    )
    control_image: AnyPicture = setting(
        None,
        "picture that the ControlNet reads: edges, a depth map, …",
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
        low, high = self.cfg_interval
        if low >= high:
            raise Conflict(
                f"{{cfg_interval}} {low:g} {high:g} is empty: the first number must be the smaller one.",
                field="cfg_interval",
            )
        if self.mask is not None and self.auto_mask is not None:
            raise Conflict(
                "{mask} names the region and {auto_mask} looks for it; give one of them.", field="auto_mask"
            )


class PartsSettings(Settings):
    """Where the parts come from that a UNet alone lacks."""

    parts_from: str | None = setting(
        None,
        "model that brings what a file of a UNet alone lacks",
        group=MODEL,
        label="Model parts",
        metavar="MODEL",
    )


class ModelChoice(PartsSettings):
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
        "of a file that holds both: ema or plain weights; auto takes ema unless it is another model's",
        group=MODEL,
        label="Model weights",
    )
    vae: str | None = setting(
        None,
        "another autoencoder: a folder, a Hugging Face model id, or a file",
        group=MODEL,
        label="VAE model",  # A1111's VAE is a file's name in its own folder
        metavar="MODEL",
    )


class DeviceSettings(Settings):
    """Where to run."""

    device: str = setting(
        "auto", "cuda, cuda:N, mps or cpu; auto takes the first that exists", group=MODEL, same_job=False
    )


class DTypeSettings(Settings):
    """In which number format to run."""

    dtype: DType = setting(
        "auto", "fp32, bf16 or fp16; auto takes half precision where the device is fast at it", group=MODEL
    )


class MemorySettings(Settings):
    """How much memory to use."""

    memory: MemoryUse = setting(
        "auto",
        "low saves memory and is slower, high never saves, auto looks at what is free",
        group=MODEL,
        same_job=False,
    )


class CompileSettings(Settings):
    """Whether to compile the networks."""

    compile: bool = setting(
        False,
        "compile the networks; the first edit of each size takes minutes, those after it are faster",
        group=MODEL,
        same_job=False,
    )


class ModelSettings(CompileSettings, MemorySettings, DTypeSettings, DeviceSettings, ModelChoice):
    """Which model to load, what to add to it, and where to run it."""

    lora: Loras = setting(
        (),
        "add a LoRA file with a weight (1 if none is given); may be repeated",
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


# --- what several stages share -------------------------------------------------------------------


class RunSettings(Settings):
    """What every verb has."""

    config: Path | None = setting(
        None, "settings file, TOML or YAML; default: ip2p.toml in this folder", metavar="FILE", same_job=False
    )
    debug: bool = setting(False, "show the traceback of an error", same_job=False)


class OverwriteSettings(Settings):
    """What every verb that writes has."""

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
    """What data sets of Hugging Face need."""

    split: str = setting(
        "train", "split of the data set; storybook: as in `storybook draw`", group="Data", hidden=True
    )
    revision: str | None = setting(None, "branch, tag or commit on Hugging Face", group="Data")
    stream: bool = setting(False, "read a Hugging Face data set without downloading it first", group="Data")


WORKERS = "Workers"


def is_cluster(word: str) -> bool:
    """Whether a word after --ray is the address of a cluster, and not the file that the verb reads."""
    return re.fullmatch(r"auto|local|ray://\S+|[\w.\-]+:\d+|\[[0-9a-fA-F:]+\]:\d+", word) is not None


class RaySettings(Settings):
    """Whether to run on a Ray cluster."""

    ray: str | None = setting(
        None,
        "run on a Ray cluster: at this address, else at RAY_ADDRESS, else a local one",
        group=WORKERS,
        metavar="[ADDRESS]",
        bare="",
        fits=is_cluster,
        same_job=False,
    )


class WorkerSettings(RaySettings):
    """How many processes a stage has, here or on a cluster."""

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
        "threads per worker; default: 1 where there are several workers or --ray is given, else all",
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
    """Raise InputError for a setting without which nothing can be done; each with its words."""
    for name, called in needed:
        if not str(getattr(settings, name) or "").strip():
            raise InputError(f"{called} missing; write: {example}")


# --- the settings under the names of another HTTP interface -------------------------------------


def interface_body(
    base: type[_Body],
    interface: Interface | None = None,
    *,
    settings: type[Settings] = EditSettings,
    defaults: Mapping[str, Any] | None = None,
    leave_out: Iterable[str] = (),
    nullable: bool = False,
) -> type[_Body]:
    """The request body `base` and, under the interface's names, the fields of `settings` that it lacks.

    defaults: of settings, in place of their own. leave_out: settings that the interface has not. nullable:
    null stands for a setting's default, as some clients send it.
    """
    fields: dict[str, Any] = {}
    for name, found in settings.model_fields.items():
        called = _name_in(found, name, interface)
        if called in base.model_fields or name in set(leave_out):
            continue
        own = copy.copy(found)
        if defaults is not None and name in defaults:
            own.default = defaults[name]
        annotation: Any = found.annotation
        fields[called] = (annotation | None if nullable else annotation, own)
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
    """The settings in a body of `interface_body`; `values` take the place of its own.

    Raises SettingError, in the interface's names.
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
    """The names of the settings that are one number, over which a grid can be drawn."""
    return tuple(
        name
        for name, found in kind.model_fields.items()
        if set(flat_types(found.annotation)) <= {int, float, type(None)} and found.annotation is not Any
    )
