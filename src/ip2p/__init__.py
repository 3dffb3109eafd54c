"""Edit a picture with an instruction: InstructPix2Pix, from data to measurement.

`ip2p.edit` is the one call, `ip2p.Editor` loads a model once and edits many pictures.
Importing the package is cheap: torch is imported when one of these names is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Editor", "__version__", "edit"]

if TYPE_CHECKING:
    from ip2p.editing.editor import Editor, edit


def __getattr__(name: str) -> Any:
    if name in ("Editor", "edit"):
        from ip2p.editing import editor

        return getattr(editor, name)
    raise AttributeError(f"module 'ip2p' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
