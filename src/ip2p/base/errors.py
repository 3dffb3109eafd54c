"""The errors of ip2p. Each message is one line that names the problem, the limit and the next step."""

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
    """A model that is missing, unreadable or of the wrong kind, or that needs a network connection."""

    code = 3


class ResourceError(Ip2pError):
    """Memory, disk or time ran out."""

    code = 4


class Terminated(BaseException):
    """SIGTERM was received. Not an Exception, so that `except Exception` does not swallow it."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message without the final period; the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# --- errors of other libraries -------------------------------------------------------------------

OUT_OF_MEMORY = "out of memory; try a smaller size, such as 256, or a batch size of 1."


def as_ip2p_error(
    error: BaseException, *, memory: str = OUT_OF_MEMORY, disk: str | None = None
) -> Ip2pError | None:
    """Map an exception of torch, the system or PIL to an ip2p error; None for a bug of the program.

    memory, disk: messages for an out-of-memory error and for a full disk, if the caller has better advice.
    Exceptions are recognized by the names of their classes, so nothing is imported.
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
    """Raise the block's exceptions as ip2p errors where `as_ip2p_error` knows them."""
    try:
        yield
    except Exception as error:
        known = as_ip2p_error(error, memory=memory, disk=disk)
        if known is None or known is error:
            raise
        raise known from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy, Arrow, torch or the system reports that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    # CPU: "can't allocate memory"; MPS and CUDA: "out of memory"; cuBLAS and cuDNN: "STATUS_ALLOC_FAILED".
    signs = "out of memory" in text or "alloc_failed" in text or ("alloc" in text and "memory" in text)
    return isinstance(error, RuntimeError) and signs


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk or a quota is full. Libraries in Rust and C++ report it only in the message."""
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
    """Map an exception that was raised while `name` was fetched from the hub.

    command: fetches `name` on a machine with a network. Returns a ResourceError for a full disk or memory,
    else a ModelError.
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
    return ModelError(f"{reason} ({type(error).__name__}). With a network connection, run: {command}")
