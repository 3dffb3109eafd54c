"""What went wrong, in one line that names the thing, the limit and the next step; and its exit code."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Literal


class Ip2pError(Exception):
    """Base of every error that a user can cause; the command line prints it and exits with `code`."""

    code = 1


class InputError(Ip2pError):
    """A picture, instruction or option that cannot be used."""

    code = 2


class ModelError(Ip2pError):
    """A model that is missing, unreadable or of the wrong kind, or a network that is needed for it."""

    code = 3


class ResourceError(Ip2pError):
    """Memory, disk or time ran out."""

    code = 4


class Terminated(BaseException):
    """SIGTERM came. Not an Exception, so that no handler in between swallows it."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message without the final period; the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# --- errors of other libraries -------------------------------------------------------------------

OUT_OF_MEMORY = "out of memory; try a smaller picture (--size 256) or fewer at once (--batch-size 1)."


def as_ip2p_error(
    error: BaseException, *, memory: str = OUT_OF_MEMORY, disk: str | None = None
) -> Ip2pError | None:
    """The map from foreign exceptions (torch, the system, PIL) to ours; None for a fault of the program.

    memory, disk: the messages for memory and for a disk that ran out, where the caller knows better advice.
    Nothing is imported: exceptions are known by the names of their classes.
    """
    if isinstance(error, Ip2pError):
        return error
    if is_out_of_memory(error):
        return ResourceError(memory)
    if is_disk_full(error):
        place = getattr(error, "filename", None) or "the output"
        return ResourceError(disk or f"no space left on the disk of {place}; free some.")
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "UnidentifiedImageError" in kinds:
        return InputError(f"A picture cannot be read ({error}). Give a PNG, JPEG, WebP or TIFF file.")
    if "DecompressionBombError" in kinds:
        return InputError(f"A picture is too large: {error} Make it smaller first.")
    return None


@contextlib.contextmanager
def translated_errors(*, memory: str = OUT_OF_MEMORY, disk: str | None = None) -> Iterator[None]:
    """Raise foreign exceptions of the block as ours: `as_ip2p_error`."""
    try:
        yield
    except Exception as error:
        known = as_ip2p_error(error, memory=memory, disk=disk)
        if known is None or known is error:
            raise
        raise known from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, by Python's, NumPy's, Arrow's, torch's and the system's errors."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    # CPU: "can't allocate memory"; MPS and CUDA: "out of memory"; cuBLAS and cuDNN: "STATUS_ALLOC_FAILED".
    signs = "out of memory" in text or "alloc_failed" in text or ("alloc" in text and "memory" in text)
    return isinstance(error, RuntimeError) and signs


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk or a quota is full. Libraries in Rust and C++ say so in their text alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left on device" in str(error)


def hub_error(
    error: BaseException,
    name: str,
    command: str,
    *,
    what: Literal["model", "data set"] = "model",
    revision: str | None = None,
) -> Ip2pError:
    """An exception of the hub's client, of its transport or of the system, while `name` was fetched.

    command: fetches it where there is a network. A full disk is a ResourceError, all else a ModelError.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    known = as_ip2p_error(error, disk=f"no space left on the disk of the cache for {name}; free some.")
    if isinstance(known, ResourceError):
        return known
    if "GatedRepoError" in kinds:
        accept = "Accept it on its page, then: HF_TOKEN=..."
        return ModelError(f"{name} requires an agreement. {accept} {command}")
    if "RevisionNotFoundError" in kinds:
        return ModelError(f"{name} has no revision {revision}. Check it on the {what}'s page.")
    if "RepositoryNotFoundError" in kinds:
        local = {"model": "folder", "data set": "path"}[what]
        return ModelError(f"{name} is neither a local {local} nor a Hugging Face {what}. Check the name.")
    reason = {
        "model": f"{name} is not in the cache and the hub cannot be reached",
        "data set": f"The hub cannot be reached for the data set {name}",
    }[what]
    return ModelError(f"{reason} ({type(error).__name__}). Where there is a network: {command}")
