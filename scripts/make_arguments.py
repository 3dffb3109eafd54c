"""Write settings as keyword arguments (a TypedDict each), which editors and mypy read.

python scripts/make_arguments.py            # writes src/ip2p/{editing,evaluation,synth,training}/arguments.py
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from ip2p.evaluation.settings import EvaluateConfig
from ip2p.settings import EditSettings, Settings, meta_of
from ip2p.synth.settings import SynthInstructConfig, SynthPairsConfig, SynthTuneConfig
from ip2p.training.settings import DistillConfig, TrainConfig

SOURCE = Path(__file__).parents[1] / "src/ip2p"


OF_COMMANDS = ("config", "debug", "list_metrics")  # settings of the command line alone


class Arguments(NamedTuple):
    """A TypedDict of the settings `kind`. without: settings that are arguments of their own."""

    kind: type[Settings]
    name: str
    what: str
    without: tuple[str, ...] = ()


EDIT = Arguments(
    EditSettings,
    "EditArguments",
    "Keyword arguments of `Editor.edit` besides the picture, instruction and seeds; see `EditSettings`.",
    ("instruction",),
)
FILES: dict[Path, list[Arguments]] = {
    SOURCE / "editing/arguments.py": [EDIT],
    SOURCE / "evaluation/arguments.py": [
        Arguments(EvaluateConfig, "EvaluateArguments", "Arguments of `evaluate`; see `EvaluateConfig`.")
    ],
    SOURCE / "synth/arguments.py": [
        Arguments(
            SynthInstructConfig,
            "InstructArguments",
            "Keyword arguments of `ServerWriter`; see `SynthInstructConfig`.",
            ("model",),
        ),
        Arguments(
            SynthPairsConfig,
            "PairsArguments",
            "Keyword arguments of `PairMaker`; see `SynthPairsConfig`.",
            ("model", "early", "tiny_vae"),
        ),
        Arguments(
            SynthTuneConfig,
            "TuneArguments",
            "Keyword arguments of `tune_lm`; see `SynthTuneConfig`.",
            ("base", "out", "triples"),
        ),
    ],
    SOURCE / "training/arguments.py": [
        Arguments(TrainConfig, "TrainArguments", "Arguments of `train`; see `TrainConfig`."),
        Arguments(DistillConfig, "DistillArguments", "Arguments of `distill`; see `DistillConfig`."),
    ],
}
HEAD = '"""The settings as keyword arguments. Written by scripts/make_arguments.py: do not edit."""'


def source_of(hint: Any) -> str:
    """An annotation as source text: int | None, tuple[float, float], Literal["original", "model"]."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return source_of(parts[0])
    if hint is Any:
        return "Picture | None"  # a setting that is a picture
    if hint is Path:
        return "str | Path"
    if origin is typing.Literal:
        return f"Literal[{', '.join(repr(part).replace(chr(39), chr(34)) for part in parts)}]"
    if origin in (tuple, list, dict):
        return f"{origin.__name__}[{', '.join('...' if p is ... else source_of(p) for p in parts)}]"
    if parts:
        return " | ".join(map(source_of, parts))
    return "None" if hint is type(None) else str(hint.__name__)


def _argument(kind: type[Settings], field: str) -> str:
    return meta_of(kind.model_fields[field]).name or field


def write_arguments(classes: Sequence[Arguments]) -> str:
    """The source of a module with some TypedDicts. One of a subclass inherits that of its base class."""
    blocks = []
    for number, (kind, name, what, without) in enumerate(classes):
        base = next((each for each in classes[:number] if issubclass(kind, each.kind)), None)
        inherited = (
            set() if base is None else {_argument(base.kind, field) for field in base.kind.model_fields}
        )
        lines = []
        for field, found in kind.model_fields.items():
            called = _argument(kind, field)
            if field not in (*without, *OF_COMMANDS) and called not in inherited:
                lines += [f"    # {found.description}", f"    {called}: {source_of(found.annotation)}"]
        parent = "TypedDict" if base is None else base.name
        blocks.append(f'class {name}({parent}, total=False):\n    """{what}"""\n\n' + "\n".join(lines))
    body = "\n\n\n".join(blocks)
    imports = ["from pathlib import Path"] if "Path" in body else []
    imports += ["from typing import Literal", "", "from typing_extensions import TypedDict", ""]
    imports += ["from ip2p.pictures.images import Picture", ""] if "Picture |" in body else []
    return "\n".join([HEAD, "", *imports, "", body, ""])


if __name__ == "__main__":
    for path, classes in FILES.items():
        path.write_text(write_arguments(classes), encoding="utf-8")
        print(path.relative_to(SOURCE.parents[1]))
