"""Write settings as keyword arguments (a TypedDict each), which editors and mypy read.

python scripts/make_arguments.py            # writes src/ip2p/{editing,training}/arguments.py
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated, Any

from ip2p.settings import EditSettings, Settings
from ip2p.training.settings import TrainConfig

SOURCE = Path(__file__).parents[1] / "src/ip2p"
# The file, the settings, the name of the TypedDict, what it is, and what is an argument of its own.
FILES: list[tuple[Path, type[Settings], str, str, tuple[str, ...]]] = [
    (
        SOURCE / "editing/arguments.py",
        EditSettings,
        "EditArguments",
        "Keyword arguments of `Editor.edit` besides the picture, instruction and seeds; see `EditSettings`.",
        ("instruction",),
    ),
    (
        SOURCE / "training/arguments.py",
        TrainConfig,
        "TrainArguments",
        "What `train` takes; see `TrainConfig`.",
        ("config", "debug"),
    ),
]
HEAD = '''"""{what} Written by scripts/make_arguments.py: do not edit."""

{imports}
'''


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
    if origin is tuple:
        return f"tuple[{', '.join('...' if part is ... else source_of(part) for part in parts)}]"
    if parts:
        return " | ".join(map(source_of, parts))
    return "None" if hint is type(None) else str(hint.__name__)


def write_arguments(
    kind: type[Settings] = EditSettings,
    name: str = "EditArguments",
    what: str = FILES[0][3],
    without: tuple[str, ...] = ("instruction",),
) -> str:
    """The source of a module with one TypedDict."""
    lines = []
    for field, found in kind.model_fields.items():
        if field not in without:
            lines += [f"    # {found.description}", f"    {field}: {source_of(found.annotation)}"]
    body = "\n".join(lines)
    imports = ["from pathlib import Path"] if "Path" in body else []
    imports += ["from typing import Literal", "", "from typing_extensions import TypedDict", ""]
    imports += ["from ip2p.pictures.images import Picture", ""] if "Picture" in body else []
    title = "The settings as keyword arguments."
    head = HEAD.format(what=title, imports="\n".join(imports))
    return f'{head}\nclass {name}(TypedDict, total=False):\n    """{what}"""\n\n{body}\n'


if __name__ == "__main__":
    for path, *rest in FILES:
        path.write_text(write_arguments(*rest), encoding="utf-8")
        print(path.relative_to(SOURCE.parents[1]))
