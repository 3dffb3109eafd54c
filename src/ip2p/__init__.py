"""Edit a picture with an instruction: InstructPix2Pix, from data to measurement.

`ip2p.edit` is the one call, `ip2p.Editor` loads a model once and edits many pictures. `ip2p.train` trains an
editor, `ip2p.distill` makes it faster, `ip2p.synth` makes the data, `ip2p.evaluate` scores editors. Importing
the package is cheap: torch is imported when one of these names is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ip2p import synth
    from ip2p.base.errors import InputError, Ip2pError, ModelError, ResourceError
    from ip2p.editing.editor import Editor, edit
    from ip2p.evaluation.run import evaluate
    from ip2p.pictures.images import save_image
    from ip2p.settings import EditSettings, ModelSettings
    from ip2p.training.distill import distill
    from ip2p.training.settings import DistillConfig, TrainConfig
    from ip2p.training.trainer import train

# Each public name and the module that has it; `synth` is a package itself.
_PLACES = {
    **dict.fromkeys(("Editor", "edit"), "ip2p.editing.editor"),
    **dict.fromkeys(("EditSettings", "ModelSettings"), "ip2p.settings"),
    **dict.fromkeys(("InputError", "Ip2pError", "ModelError", "ResourceError"), "ip2p.base.errors"),
    **dict.fromkeys(("DistillConfig", "TrainConfig"), "ip2p.training.settings"),
    "distill": "ip2p.training.distill",
    "save_image": "ip2p.pictures.images",
    "train": "ip2p.training.trainer",
    "evaluate": "ip2p.evaluation.run",
}
__all__ = [
    "DistillConfig",
    "EditSettings",
    "Editor",
    "InputError",
    "Ip2pError",
    "ModelError",
    "ModelSettings",
    "ResourceError",
    "TrainConfig",
    "__version__",
    "distill",
    "edit",
    "evaluate",
    "save_image",
    "synth",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "synth":
        return importlib.import_module("ip2p.synth")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'ip2p' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
