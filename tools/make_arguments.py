"""Write the keyword arguments of `Editor.edit` as a TypedDict, from `EditSettings`: editors and mypy read it.

python tools/make_arguments.py            # writes src/ip2p/editing/arguments.py
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated, Any

from ip2p.settings import EditSettings, Settings

TARGET = Path(__file__).parents[1] / "src/ip2p/editing/arguments.py"
HEAD = '''"""The settings of an edit as keyword arguments. Written by tools/make_arguments.py: do not edit."""

from typing import Literal

from typing_extensions import TypedDict

from ip2p.pictures.images import Picture


class EditArguments(TypedDict, total=False):
    """What `Editor.edit` takes beside the picture, the instruction and the seeds; see `EditSettings`."""

'''


def source_of(hint: Any) -> str:
    """An annotation as source text: int | None, tuple[float, float], Literal["original", "model"]."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return source_of(parts[0])
    if hint is Any:
        return "Picture | None"  # a setting that is a picture
    if origin is typing.Literal:
        return f"Literal[{', '.join(repr(part).replace(chr(39), chr(34)) for part in parts)}]"
    if origin is tuple:
        return f"tuple[{', '.join('...' if part is ... else source_of(part) for part in parts)}]"
    if parts:
        return " | ".join(map(source_of, parts))
    return "None" if hint is type(None) else str(hint.__name__)


def write_arguments(kind: type[Settings] = EditSettings) -> str:
    """The source of the module."""
    lines = []
    for name, found in kind.model_fields.items():
        if name != "instruction":
            lines.append(f"    # {found.description}")
            lines.append(f"    {name}: {source_of(found.annotation)}")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(write_arguments(), encoding="utf-8")
    print(TARGET)
