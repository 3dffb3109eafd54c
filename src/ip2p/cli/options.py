"""Read a verb's settings from the command line, the environment and the settings file; write its help.

A setting comes from its flag, else from an `IP2P_*` variable (`IP2P_STEPS=30`), else from the settings file
(`ip2p.toml` in the working folder, or `--config FILE`), else from its default. The settings class validates
all of them.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic.fields import FieldInfo

from ip2p.base.errors import InputError
from ip2p.settings import (
    COMMON,
    OTHER,
    Settings,
    Voice,
    choices_of,
    flag_of,
    flat_types,
    meta_of,
    written_value,
)

_Options = TypeVar("_Options", bound=Settings)
CONFIG_FILE = "ip2p.toml"
HELP_COLUMN = 30


# --- reading settings ---------------------------------------------------------------------------


def read_options(
    kind: type[_Options], verb: str, words: Sequence[str], env: Mapping[str, str] = os.environ
) -> _Options:
    """The verb's settings from its arguments, the environment and the settings file. Raises InputError."""
    given, places = parse_words(kind, words)
    given |= assign_places(kind, places)
    file = given.get("config")
    values, sources = outer_values(kind, verb, file=None if file is None else Path(file), env=env)
    values |= kind.inherited({**values, **given}) | given
    sources = {name: source for name, source in sources.items() if name not in given}

    def name(setting: str) -> str:
        found = kind.model_fields.get(setting)
        called = "" if found is None else meta_of(found).called
        return sources.get(setting) or called or flag_of(setting)

    def example(setting: str, value: Any) -> str:
        return f"{flag_of(setting)} {written_value(value)}"

    return kind.read(values, Voice(name, example))


def parse_words(kind: type[Settings], words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of the flags, and the positional arguments. Raises InputError for an unknown flag."""
    flags = flags_of(kind)
    values: dict[str, Any] = {}
    places: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            places += left
            break
        if not word.startswith("-") or len(word) == 1:
            places.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag not in flags:
            known = [flag for flag in flags if flag.startswith("--")]
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the options."
            raise InputError(f"there is no option {flag}; {hint}")
        name = flags[flag]
        found = kind.model_fields[name]
        meta, count = meta_of(found), count_words(found)
        following = left[0] if left else ""
        if equals:
            taken = [value]
        elif count == 0:
            taken = ["true"]
        elif meta.bare is not None and not (meta.fits or is_number)(following):
            taken = [str(meta.bare)]
        else:
            taken, left = left[:count], left[count:]
            if len(taken) < count or any(word in flags for word in taken):
                raise InputError(
                    f"{flag} needs {'a value' if count == 1 else f'{count} values'}{_try(name, found)}"
                )
        if is_list(found):
            values.setdefault(name, []).extend(taken)
        else:
            values[name] = taken if count > 1 and not equals else taken[0]
    return values, places


def assign_places(kind: type[Settings], places: Sequence[str]) -> dict[str, Any]:
    """Assign positional arguments to settings: one each; a list takes the surplus ones."""
    fields = {name: kind.model_fields[name] for name in positional_settings(kind)}
    single = [name for name, found in fields.items() if not is_list(found)]
    lists = [name for name, found in fields.items() if is_list(found)]
    surplus = len(places) - len(single)
    if surplus > 0 and not lists:
        raise InputError(
            f"{places[len(single)]!r} is one argument too many; put quotes around a text of several words."
        )
    values: dict[str, Any] = {}
    left = list(places)
    for name in fields:
        if name in lists:
            values[name], left = left[: max(0, surplus)], left[max(0, surplus) :]
        elif left:
            values[name] = left.pop(0)
    return values if surplus > 0 else {name: value for name, value in values.items() if value}


def outer_values(
    kind: type[Settings], verb: str, *, file: Path | None = None, env: Mapping[str, str] = os.environ
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values in the settings file and the environment, and their sources: "steps in ip2p.toml".

    verb: selects the table of the file, `[edit]`, or `[storybook.draw]` for "storybook draw". file: default:
    the file in IP2P_CONFIG, else `ip2p.toml` in the working folder if it exists. Raises InputError for an
    unknown setting.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    known = kind.field_names()
    if file is None and env.get("IP2P_CONFIG"):
        file = Path(env["IP2P_CONFIG"])
    shown = file or CONFIG_FILE
    for key, value in _file_table(file, verb).items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(kind.model_fields)}."
            raise InputError(f"{shown} sets {key} for {verb}, which has no such setting; {hint}")
        if value is not None:  # null in YAML keeps the default
            values[known[name]], sources[known[name]] = value, f"{key} in {shown}"
    for alias, name in known.items():
        variable = f"IP2P_{alias.upper()}"
        if env.get(variable, "") != "":
            values[name], sources[name] = _from_variable(env[variable]), variable
    return values, sources


def read_outer(
    kind: type[_Options], verb: str, *, file: Path | None = None, env: Mapping[str, str] = os.environ
) -> _Options:
    """The verb's settings from the settings file and the environment only."""
    values, sources = outer_values(kind, verb, file=file, env=env)

    def name(setting: str) -> str:
        return sources.get(setting, setting)

    return kind.read(values, Voice(name, lambda setting, value: f"{setting}={written_value(value)}"))


def _from_variable(text: str) -> Any:
    """The value of a variable; several values are written as a JSON list."""
    if text.startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _file_table(file: Path | None, verb: str) -> dict[str, Any]:
    """The verb's table in the settings file, {} if there is none."""
    path = file or Path(CONFIG_FILE)
    if file is None and not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the settings file {path}: {error.strerror}; check --config.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the settings file {path} is not text: {error}") from None
    return (
        _yaml_table(text, path, verb) if path.suffix in (".yaml", ".yml") else _toml_table(text, path, verb)
    )


def _toml_table(text: str, path: Path, verb: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table: Any = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"the settings file {path} is not TOML: {error}") from None
    for word in verb.split():
        table = table.get(word, {})
        if not isinstance(table, dict):
            raise InputError(f"{word} in {path} is not a table; write [{verb.replace(' ', '.')}] above it.")
    return table


def _yaml_table(text: str, path: Path, verb: str) -> dict[str, Any]:
    """A recipe: the verb's settings at the top level, or under the name of the verb."""
    import yaml

    try:
        table = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the settings file {path} is not YAML: {reason}. Correct it.") from None
    inner = table.get(verb, table) if isinstance(table, dict) else table
    if not isinstance(inner, dict):
        raise InputError(f"{path} contains no settings; write lines such as: lr: 0.0001")
    return inner


# --- flags and arguments ------------------------------------------------------------------------


def flags_of(kind: type[Settings]) -> dict[str, str]:
    """Each flag and its field, including old names and flags that the help omits."""
    flags: dict[str, str] = {}
    for alias, name in kind.field_names().items():
        meta = meta_of(kind.model_fields[name])
        if not meta.positional:
            flags |= {flag_of(alias): name} | dict.fromkeys(meta.flags, name)
    return flags


def positional_settings(kind: type[Settings]) -> list[str]:
    """The settings that are positional arguments, in their order."""
    places = {name: meta_of(found).positional for name, found in kind.model_fields.items()}
    return sorted((name for name, place in places.items() if place), key=lambda name: places[name])


def is_list(found: FieldInfo) -> bool:
    """Whether the flag of a field may be repeated."""
    return any(Ellipsis in typing.get_args(kind) for kind in flat_types(found.annotation))


def count_words(found: FieldInfo) -> int:
    """The number of arguments after the flag of a field."""
    kinds = [kind for kind in flat_types(found.annotation) if kind is not type(None)]
    if kinds == [bool]:
        return 0
    pair = len(kinds) == 1 and typing.get_origin(kinds[0]) is tuple and not is_list(found)
    return len(typing.get_args(kinds[0])) if pair else 1


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _try(name: str, found: FieldInfo) -> str:
    meta = meta_of(found)
    example = next((each for each in (meta.example, meta.fallback, found.default) if each is not None), None)
    return "." if example in (None, "", ()) else f"; try {flag_of(name)} {written_value(example)}."


# --- help ---------------------------------------------------------------------------------------


def write_help(kind: type[Settings], verb: str, *, width: int | None = None) -> str:
    """The help of a verb: its description, and its options in groups, the common ones first."""
    width = min(width or shutil.get_terminal_size((100, 24)).columns, 120)
    places = positional_settings(kind)
    shown = [_place(kind, name) for name in places]
    about, _, example = (kind.__doc__ or "").strip().partition(": ip2p ")
    lines = [
        " ".join(["usage: ip2p", verb, *shown, "[OPTIONS]"]),
        "",
        *textwrap.wrap(about.strip(".") + ".", width),
    ]
    if example:
        lines += ["", f"  ip2p {example}"]
    groups: dict[str, list[str]] = {}
    for name, found in kind.model_fields.items():
        meta = meta_of(found)
        if not meta.hidden:
            groups.setdefault("" if meta.positional else meta.group, []).append(name)
    groups[""] = places
    for title in groups.keys() - {""}:  # options with a short flag first
        groups[title].sort(key=lambda name: not meta_of(kind.model_fields[name]).flags)
    order = sorted(groups, key=lambda title: (title != "", title != COMMON, title == OTHER))
    for title in order if places else order[1:]:
        lines += ["", f"{title}:"] if title else [""]
        for name in groups[title]:
            lines += _entry(kind, name, width)
        if title == OTHER:
            lines += _line("-h, --help", "show this help", width)
    return "\n".join(lines)


def _entry(kind: type[Settings], name: str, width: int) -> list[str]:
    found = kind.model_fields[name]
    meta = meta_of(found)
    choices = choices_of(found.annotation)
    metavar = meta.metavar or _metavar(found)
    flag = _place(kind, name) if meta.positional else ", ".join([*meta.flags, flag_of(meta.name or name)])
    shown = f"{flag} {metavar}" if metavar and not meta.positional else flag
    words = found.description or ""
    if choices and not all(str(choice) in words for choice in choices):
        words += f": {', '.join(map(str, choices))}"
    usual = meta.fallback if found.default is None else found.default
    if usual not in (None, "", (), False) and "default" not in words:
        words += f" (default: {written_value(usual)})"
    return _line(shown, words, width)


def _line(shown: str, words: str, width: int) -> list[str]:
    texts = textwrap.wrap(words, max(20, width - HELP_COLUMN)) or [""]
    first = f"  {shown}"
    if len(first) + 2 > HELP_COLUMN:
        return [first, *(" " * HELP_COLUMN + text for text in texts)]
    return [first.ljust(HELP_COLUMN) + texts[0], *(" " * HELP_COLUMN + text for text in texts[1:])]


def _place(kind: type[Settings], name: str) -> str:
    found = kind.model_fields[name]
    shown = meta_of(found).metavar or name.upper()
    return f"[{shown} ...]" if is_list(found) else shown


def _metavar(found: FieldInfo) -> str:
    kinds = [kind for kind in flat_types(found.annotation) if kind is not type(None)]
    if kinds == [bool]:
        return ""
    if any(typing.get_origin(kind) is Literal for kind in kinds):
        return "NAME"
    names: dict[Any, str] = {int: "INT", float: "NUMBER", Path: "PATH"}
    return next((names[kind] for kind in kinds if kind in names), "TEXT")


def hidden_settings(kind: type[Settings]) -> Iterator[tuple[str, str]]:
    """The settings that the help omits, with their help texts."""
    for name, found in kind.model_fields.items():
        if meta_of(found).hidden:
            yield name, found.description or ""
