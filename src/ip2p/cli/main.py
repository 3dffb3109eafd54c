"""The command line: verb → (config, function), and what happens around every verb.

Errors become one line on stderr and an exit code: 2 input, 3 model or network, 4 resources,
130 Ctrl-C, 143 SIGTERM, 1 a fault of ours. Nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import io
import logging
import os
import re
import signal
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ip2p import __version__
from ip2p.base.errors import InputError, Ip2pError, Terminated, as_ip2p_error
from ip2p.base.terminal import say

# verb: (its config in ip2p.config, the function that runs it, what it does in a few words)
VERBS = {
    "edit": ("EditConfig", "ip2p.cli.edit:edit", "edit a picture, or many, with an instruction"),
    "grid": ("GridConfig", "ip2p.cli.edit:grid", "draw the results over two settings as one picture"),
    "ui": ("UiConfig", "ip2p.serve.app:ui", "edit in the browser"),
    "serve": ("ServeConfig", "ip2p.serve.app:serve", "serve edits over HTTP, with the page"),
    "train": ("TrainConfig", "ip2p.training.trainer:train", "train an editor on pairs of pictures"),
    "synth instruct": ("SynthInstructConfig", "ip2p.cli.synth:instruct", "write edits of captions in words"),
    "synth tune-lm": ("SynthTuneConfig", "ip2p.cli.synth:tune_lm", "tune a language model that writes edits"),
    "synth pairs": ("SynthPairsConfig", "ip2p.cli.synth:pairs", "draw pairs of pictures for edits in words"),
    "synth filter": ("SynthFilterConfig", "ip2p.cli.synth:filter_pairs", "keep the good pairs, by CLIP"),
    "synth inspect": ("SynthInspectConfig", "ip2p.cli.synth:inspect", "a page of what is kept and rejected"),
    "data check": (
        "DataCheckConfig",
        "ip2p.cli.data:check",
        "say what is wrong with a data set",
    ),
    "data convert": (
        "DataConvertConfig",
        "ip2p.cli.data:convert",
        "write a data set in another layout",
    ),
    "model info": ("InfoConfig", "ip2p.cli.model:info", "say what a model is and whether it is whole"),
    "model convert": (
        "ConvertConfig",
        "ip2p.cli.model:convert",
        "diffusers folder from and to one file",
    ),
    "model list": ("ListConfig", "ip2p.cli.model:list_models", "list the models that are here"),
    "storybook draw": ("DrawConfig", "ip2p.cli.storybook:draw", "draw pages, edit pairs, captions"),
    "storybook build": ("BuildConfig", "ip2p.cli.storybook:build", "train the storybook model"),
    "storybook score": ("ScoreConfig", "ip2p.evaluation.storybook:run", "score a model on exact answers"),
}


def entry() -> None:
    """The `ip2p` command."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get("IP2P_DEBUG", "").lower() in ("1", "true", "yes")
    try:
        with _sigterm_raises(), _messages_to_stderr(debug):
            return _run(words)
    except (Ip2pError, Exception) as error:
        known = as_ip2p_error(error)
        if debug:
            import traceback

            traceback.print_exc()
        if known is None:
            say(f"{type(error).__name__}: {error} (a fault of ip2p; --debug shows where)")
            return 1
        say(" ".join(str(known).split()))
        return known.code
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except Terminated:
        say("stopped by SIGTERM")
        return 143


def _run(words: list[str]) -> int:
    if words and words[0] in ("--version", "-V"):
        print(f"ip2p {__version__}")
        return 0
    plain = list(words)
    while plain and plain[0] == "--debug":  # allowed before the verb too
        plain.pop(0)
    for verb in VERBS:
        parts = verb.split()
        if plain[: len(parts)] == parts:
            return _run_verb(verb, plain[len(parts) :])
    group = plain[0] if plain and any(v.startswith(f"{plain[0]} ") for v in VERBS) else ""
    rest = plain[1:] if group else plain
    if not rest or rest[0] in ("--help", "-h"):
        print(overview(group))
        return 0
    known = [v.removeprefix(f"{group} ") for v in VERBS if v.startswith(group)]
    near = difflib.get_close_matches(rest[0], [k.split()[0] for k in known], n=1)
    name = " ".join(filter(None, ("ip2p", group)))
    hint = f"did you mean {name} {near[0]}?" if near else f"{name} --help lists the verbs."
    raise InputError(f"{name} has no verb {rest[0]!r}; {hint}")


def overview(group: str = "") -> str:
    """The help of `ip2p`, or of a group of verbs."""
    verbs = {verb: row[2] for verb, row in VERBS.items() if verb.startswith(group)}
    width = max(map(len, verbs)) + 2
    return "\n".join(
        [
            f"usage: ip2p {group + ' ' if group else ''}VERB [OPTIONS]",
            "",
            "Edit pictures by instruction, and train and measure the models that do.",
            "",
            *(f"  {verb:<{width}}{words}" for verb, words in verbs.items()),
            "",
            "`ip2p VERB --help` shows a verb's options. Any option can also come from an IP2P_* variable",
            "(IP2P_STEPS=30) or from ip2p.toml in this folder.",
        ]
    )


def config_class(verb: str) -> type[Any]:
    return getattr(importlib.import_module("ip2p.config"), VERBS[verb][0])  # type: ignore[no-any-return]


def _run_verb(verb: str, words: list[str]) -> int:
    config = parse(verb, words)
    if config is None:
        return 0
    if hasattr(config, "check"):
        config.check()
    module, function = VERBS[verb][1].split(":")
    getattr(importlib.import_module(module), function)(config)
    return 0


def parse(verb: str, words: Sequence[str]) -> Any:
    """The verb's config from its words, None when they ask for help (which is then printed)."""
    import tyro

    from ip2p.config import AUTO_MASK, with_defaults

    file = _peek(words, "--config")
    kind = config_class(verb)
    defaults = with_defaults(kind, verb, file=Path(file) if file else None)
    settings = _peek(words, "--from-settings")
    if settings and verb == "edit":
        from ip2p.cli.edit import with_settings

        defaults = with_settings(defaults, Path(settings))
    # The parser adds a repeated flag's values to the defaults; a flag takes their place.
    repeated = {
        f"--{name.replace('_', '-')}": name
        for name in ("lora", "then", "model", "allow_host", "allow_origin")
        if isinstance(getattr(defaults, name, 0), tuple)
    }
    given = {name: () for flag, name in repeated.items() if _peek(words, flag) is not None}
    defaults = dataclasses.replace(defaults, **given)
    given_words = _with_value(words, "--auto-mask", str(AUTO_MASK), is_number)
    if typing.get_type_hints(kind).get("ray") == str | None:
        given_words = _with_value(given_words, "--ray", "", is_address)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            config = tyro.cli(
                kind,
                prog=f"ip2p {verb}",
                args=_together(kind, given_words),
                default=defaults,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            return None
        raise InputError(_one_line(told.getvalue())) from None
    if verb == "edit" and config.more:
        # Any number of pictures, and the instruction last.
        config = dataclasses.replace(config, more=config.more[:-1], instruction=config.more[-1])
    return config


def _together(kind: type[Any], words: Sequence[str]) -> list[str]:
    """The words with those of no flag together: the parser takes only one run of them as a list."""
    from ip2p.config import values_of

    takes = {f"--{name.replace('_', '-')}": count for name, count in values_of(kind).items()} | {"-o": 1}
    places: list[str] = []
    flags: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            places += left
        elif word.startswith("-") and len(word) > 1:
            flags.append(word)
            # A value that is missing is the parser's to tell.
            flags += [value for _, value in zip(range(takes.get(word, 0)), left, strict=False)]
        else:
            places.append(word)
    # The parser blames more words than it has to when they follow.
    return [*flags, "--", *places] if any(word.startswith("-") for word in places) else [*places, *flags]


def _with_value(words: Sequence[str], flag: str, value: str, is_one: Callable[[str], bool]) -> list[str]:
    """The words with `value` after each `flag` that no value of its own follows."""
    told: list[str] = []
    for word, following in zip(words, [*words, ""][1:], strict=True):
        told += [word, value] if word == flag and not is_one(following) else [word]
    return told


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def is_address(word: str) -> bool:
    """Whether a word after --ray is where a cluster is, and not the file that the verb reads."""
    return re.fullmatch(r"auto|local|ray://\S+|[\w.\-]+:\d+|\[[0-9a-fA-F:]+\]:\d+", word) is not None


def _peek(words: Sequence[str], flag: str) -> str | None:
    """The value of `flag`, which must be known before the other words are parsed."""
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _one_line(box: str) -> str:
    """The parser's framed complaint as one line, less the help that it repeats."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rows = [row.strip("│╭╮╰╯ \t") for row in box.splitlines()[1:]]
    parts = [" ".join(part.split()) for part in "\n".join(rows).split("─" * 8)]
    parts = [part.strip("─ ") for part in parts]
    kept = [part.rstrip(".") for part in parts if part and not part.startswith("Argument helptext")]
    line = ". ".join(kept)
    line = re.sub(r"invalid literal for int\(\) with base 10: ('[^']*')", r"\1 is not a whole number", line)
    line = re.sub(r"could not convert string to float: ('[^']*')", r"\1 is not a number", line)
    return line.removeprefix("Error parsing ") + "."


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that temporary files go away, as Ctrl-C does."""

    def raise_terminated(number: int, frame: types.FrameType | None) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, raise_terminated)
    except ValueError:  # not the main thread: the process's owner handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _messages_to_stderr(debug: bool) -> Iterator[None]:
    """Show what ip2p logs and warns of as a line each; warnings of the libraries below only with --debug."""

    class Line(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            say(level + " ".join(record.getMessage().split()))

    ours = str(Path(__file__).parents[1])

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: object) -> None:
        if debug or filename.startswith(ours):
            log.warning("%s", message)

    if not debug:
        # These libraries log rather than warn, and read their level when they are first imported.
        for library in ("TRANSFORMERS", "DIFFUSERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
    log, line = logging.getLogger("ip2p"), Line(logging.INFO)
    before = log.level
    log.addHandler(line)
    log.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always" if debug else "default")
            warnings.showwarning = show  # type: ignore[assignment]
            yield
    finally:
        log.removeHandler(line)
        log.setLevel(before)
