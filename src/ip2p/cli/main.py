"""The command line: finds the verb, reads its settings, runs it and reports errors.

Errors become one line on stderr and an exit code: 2 input, 3 model or network, 4 resources, 130 Ctrl-C,
143 SIGTERM, 1 a bug in ip2p. Heavy modules are imported only when a verb runs.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib
import logging
import os
import signal
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ip2p import __version__
from ip2p.base.errors import InputError, Terminated, as_ip2p_error
from ip2p.base.terminal import say

# verb: (settings class, function, description); modules are below `ip2p`
VERBS = {
    "edit": ("cli.edit:EditConfig", "cli.edit:run_edit", "edit a picture, or many, with an instruction"),
    "grid": ("cli.edit:GridConfig", "cli.edit:run_grid", "draw the results over two settings as one picture"),
    "ui": ("serve.options:UiConfig", "cli.serve:run_ui", "edit in the browser"),
    "serve": ("serve.options:ServeConfig", "cli.serve:run_serve", "serve edits over HTTP, with the web page"),
    "train": ("training.settings:TrainConfig", "cli.train:run_train", "train an editor on pairs of pictures"),
    "distill": (
        "training.settings:DistillConfig",
        "cli.train:run_distill",
        "make an editor faster: fewer passes a step, fewer steps",
    ),
    "evaluate": (
        "evaluation.settings:EvaluateConfig",
        "cli.evaluate:run_evaluate",
        "score editors on a data set",
    ),
    "synth instruct": (
        "synth.settings:SynthInstructConfig",
        "cli.synth:run_instruct",
        "write instructions and edited captions for captions",
    ),
    "synth tune-lm": (
        "synth.settings:SynthTuneConfig",
        "cli.synth:run_tune_lm",
        "fine-tune a language model that writes edits",
    ),
    "synth pairs": (
        "synth.settings:SynthPairsConfig",
        "cli.synth:run_pairs",
        "generate pairs of pictures for written edits",
    ),
    "synth filter": (
        "synth.settings:SynthFilterConfig",
        "cli.synth:run_filter_pairs",
        "keep the good pairs, by CLIP",
    ),
    "synth inspect": (
        "synth.settings:SynthInspectConfig",
        "cli.synth:run_inspect",
        "show kept and rejected pairs on a page",
    ),
    "data check": ("cli.data:DataCheckConfig", "cli.data:run_data_check", "report problems in a data set"),
    "data convert": (
        "cli.data:DataConvertConfig",
        "cli.data:run_data_convert",
        "convert a data set to another layout",
    ),
    "model info": (
        "cli.model:InfoConfig",
        "cli.model:run_model_info",
        "describe a model and report missing parts",
    ),
    "model convert": (
        "cli.model:ConvertConfig",
        "cli.model:run_model_convert",
        "convert a diffusers folder to one file, or back",
    ),
    "model list": ("cli.model:ListConfig", "cli.model:run_model_list", "list the models on this machine"),
    "storybook draw": (
        "cli.storybook:DrawConfig",
        "cli.storybook:run_draw",
        "draw pages, edit pairs, captions",
    ),
    "storybook build": ("cli.storybook:BuildConfig", "cli.storybook:run_build", "train the storybook model"),
    "storybook score": (
        "cli.storybook:ScoreConfig",
        "cli.storybook:run_score",
        "score a model on edits with exact answers",
    ),
}
# Verbs of other tools, and the ip2p verb to suggest.
SUGGESTIONS = {
    **dict.fromkeys(("eval", "score", "benchmark", "test", "metrics"), "evaluate"),
    **dict.fromkeys(("infer", "inference", "run", "generate", "sample"), "edit"),
    **dict.fromkeys(("web", "gui", "app"), "ui"),
    **dict.fromkeys(("finetune", "fine-tune"), "train"),
    **dict.fromkeys(("convert", "info", "models"), "model"),
    **dict.fromkeys(("matrix", "plot"), "grid"),
}


def entry() -> None:
    """The `ip2p` command."""
    # Imports make about a million objects that last. Searching them for garbage, and freeing each at the
    # exit, takes 1.4 s of a small edit.
    gc.set_threshold(50_000)
    code = main()
    gc.freeze()
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get("IP2P_DEBUG", "").lower() in ("1", "true", "yes")
    try:
        with _sigterm_raises(), _messages_to_stderr(debug):
            code = _run(words)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        # The reader closed the pipe, like `| head`. Nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        known = as_ip2p_error(error)
        if debug:
            import traceback

            traceback.print_exc()
        if known is None:
            say(f"{type(error).__name__}: {error} (a bug in ip2p; --debug shows the traceback)")
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
    while plain and plain[0] == "--debug":  # also allowed before the verb
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
    if not group and rest[0] in SUGGESTIONS:
        raise InputError(f"ip2p has no verb {rest[0]!r}; did you mean ip2p {SUGGESTIONS[rest[0]]}?")
    near = difflib.get_close_matches(rest[0], [k.split()[0] for k in known], n=1)
    name = " ".join(filter(None, ("ip2p", group)))
    hint = f"did you mean {name} {near[0]}?" if near else f"{name} --help lists the verbs."
    raise InputError(f"{name} has no verb {rest[0]!r}; {hint}")


def overview(group: str = "") -> str:
    """The help text of `ip2p` or of a group of verbs."""
    verbs = {verb: row[2] for verb, row in VERBS.items() if verb.startswith(group)}
    width = max(map(len, verbs)) + 2
    return "\n".join(
        [
            f"usage: ip2p {group + ' ' if group else ''}VERB [OPTIONS]",
            "",
            "Edit pictures by instruction, and train and evaluate editing models.",
            "",
            *(f"  {verb:<{width}}{words}" for verb, words in verbs.items()),
            "",
            "`ip2p VERB --help` shows the options of a verb. Options can also be set by IP2P_* environment",
            "variables (IP2P_STEPS=30) or in ip2p.toml in this folder.",
        ]
    )


def config_class(verb: str) -> type[Any]:
    """The settings class of a verb."""
    return imported(VERBS[verb][0])  # type: ignore[no-any-return]


def imported(name: str) -> Any:
    """An object of ip2p by name: "cli.edit:run_edit"."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(f"ip2p.{module}"), attribute)


def _run_verb(verb: str, words: list[str]) -> int:
    config = parse(verb, words)
    if config is None:
        return 0
    if hasattr(config, "check"):
        config.check()
    imported(VERBS[verb][1])(config)
    return 0


def parse(verb: str, words: Sequence[str]) -> Any:
    """The verb's settings from its arguments. For --help, prints the help and returns None."""
    from ip2p.cli.options import read_options, write_help

    kind = config_class(verb)
    before = list(words)[: list(words).index("--")] if "--" in words else list(words)
    if "--help" in before or "-h" in before:
        print(write_help(kind, verb))
        return None
    return read_options(kind, verb, words)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Raise Terminated on SIGTERM, so that temporary files are removed, as for Ctrl-C."""

    def raise_terminated(number: int, frame: types.FrameType | None) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, raise_terminated)
    except ValueError:  # not the main thread: the owner of the process handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _messages_to_stderr(debug: bool) -> Iterator[None]:
    """Print the log messages and warnings of ip2p as one line each; those of libraries only with --debug."""

    class Line(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            say(level + " ".join(record.getMessage().split()))

    package = str(Path(__file__).parents[1])

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: object) -> None:
        if debug or filename.startswith(package):
            log.warning("%s", message)

    if not debug:
        # These libraries log instead of warning, and read their log level when they are first imported.
        for library in ("TRANSFORMERS", "DIFFUSERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
        # Where it is installed, diffusers imports it, and it warns of a kernel that is not used here.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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
