"""Reads the tensors of a torch pickle (.ckpt, .pt, .pth, .bin) without executing anything in it.

Clean files are read by torch's weights-only loader. Training programs store other objects beside the weights
(callbacks, configs, arrays); such files are read by an unpickler that replaces every name that is not a
tensor with an inert placeholder, so nothing from the file or from this machine is called.
"""

from __future__ import annotations

import pickle
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ip2p.base.errors import ModelError, first_line

ADVICE = "Use a .safetensors file of the model."
# Keys of a network's state in the files of training programs, from the outside in.
INSIDE = ("state_dict", "module", "model_state_dict", "model")
# Names that can have effects: no checkpoint needs them, and a file that has one is refused.
ACTING = {
    *("os", "posix", "nt", "sys", "subprocess", "_posixsubprocess", "io", "_io", "shutil", "socket", "pty"),
    *("importlib", "runpy", "ctypes", "_ctypes", "code", "codeop", "pdb", "bdb", "timeit", "webbrowser"),
    *("marshal", "pickle", "_pickle", "pip", "urllib", "http", "requests", "tempfile", "signal", "cProfile"),
}
ACTING_BUILTINS = {"eval", "exec", "compile", "open", "__import__", "breakpoint", "input", "print", "exit"}


class Placeholder:
    """Stands in for an object that is not read; all operations on it do nothing."""

    def __new__(cls, *arguments: Any, **more: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **more: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **more: Any) -> Placeholder:
        return Placeholder()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, *values: Any) -> None:
        pass

    extend = add = update = append


class _ActingName(Exception):
    """A file refers to a name that can have effects."""


# The Python implementation, whose memo is a dict: a file can make the C one use all memory.
class _InertUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Reads tensors, and placeholders for all other objects."""

    @property
    def persistent_load(self) -> Any:
        return self._load_storage

    @persistent_load.setter
    def persistent_load(self, load: Any) -> None:
        """torch's function, restricted to storages: it would also read the sources of modules."""

        def load_storage(saved: Any) -> Any:
            if not isinstance(saved, tuple) or saved[:1] not in (("storage",), (b"storage",)):
                raise pickle.UnpicklingError("it refers to something else than a tensor's data")
            return load(saved)

        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        root = module.partition(".")[0]
        acts = root in ACTING or (root in ("builtins", "__builtin__") and name in ACTING_BUILTINS)
        if acts or module in ("torch.hub", "torch.jit"):
            raise _ActingName(f"{module}.{name}")
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        # Wrappers, so that a file cannot modify torch's own functions.
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda *given: getattr(torch._utils, name)(*given)
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return lambda data, *rest: data
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return lambda rebuild, kind, given, state: rebuild(*given)
        return type(name, (Placeholder,), {"__module__": module})


def _load_inert(file: Any, **settings: Any) -> Any:
    return _InertUnpickler(file, **settings).load()


# The pickle module for `torch.load`.
_INERT = types.SimpleNamespace(__name__="inert", Unpickler=_InertUnpickler, load=_load_inert)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file by name, memory-mapped for a zipped file. Raises ModelError."""
    with path.open("rb") as file:
        start = file.read(4)
    zipped = start == b"PK\x03\x04"
    if (zipped and _is_program(path)) or (not zipped and tarfile.is_tarfile(path)):
        what = "a TorchScript program" if zipped else "a tar file of torch 0.1"
        raise ModelError(f"{path} is {what}, not a file of weights, so it was not opened. {ADVICE}")
    # Only the format of torch 1.6 and later can be mapped.
    settings: dict[str, Any] = {"map_location": "cpu", "mmap": True if zipped else None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles by other protocols, which are then read or refused
            try:
                value = torch.load(path, weights_only=True, **settings)
            except pickle.UnpicklingError:
                value = torch.load(path, weights_only=False, pickle_module=_INERT, **settings)
    except _ActingName as error:
        raise ModelError(
            f"{path} is a pickle that asks to run {error}, so it was refused: it was not opened and nothing "
            f"in it was run. {ADVICE}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # zipfile's, struct's, pickle's, EOFError, RuntimeError, of placeholders
        raise ModelError(
            f"{path} is no pickle of weights that can be read ({first_line(error)}), so it was not opened. "
            "Fetch or save the model again."
        ) from None
    tensors = _tensors(value)
    if not tensors:
        raise ModelError(f"{path} holds no weights by name. {ADVICE}")
    return tensors


def _is_program(path: Path) -> bool:
    """Whether a zip is TorchScript, which torch would compile."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def _tensors(value: Any) -> dict[str, Tensor]:
    """The named tensors of a file's value, or of the nested dict that training programs put them in."""
    if not isinstance(value, dict):
        return {}
    for name in INSIDE:
        if found := _tensors(value.get(name)):
            return found
    return {name: one for name, one in value.items() if isinstance(name, str) and isinstance(one, Tensor)}
