"""A single mapping turns other libraries' exceptions into our three error classes."""

import errno

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from ip2p.base.errors import (
    InputError,
    ModelError,
    ResourceError,
    as_ip2p_error,
    hub_error,
    translated_errors,
)


def cpu_allocator_error():
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error


def numpy_error():
    try:
        np.empty(2**60, np.uint8)
    except MemoryError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        numpy_error(),
        cpu_allocator_error(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_every_out_of_memory_error_is_a_resource_error_with_the_callers_advice(error):
    assert error is not None
    with pytest.raises(ResourceError, match="out of memory; try a smaller size") as caught:
        raise as_ip2p_error(error)
    assert caught.value.code == 4
    with pytest.raises(ResourceError, match="^try less$"), translated_errors(memory="try less"):
        raise error


def test_a_full_disk_is_a_resource_error_that_names_the_file():
    full = OSError(errno.ENOSPC, "No space left on device", "out.png")
    assert str(as_ip2p_error(full)) == "no space left on the disk of out.png; free some."
    assert isinstance(as_ip2p_error(OSError(errno.EDQUOT, "Disk quota exceeded")), ResourceError)
    rust = safetensors.SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )
    assert isinstance(as_ip2p_error(rust), ResourceError)
    assert str(as_ip2p_error(full, disk="free 2 GB")) == "free 2 GB"


def test_pillow_errors_are_input_errors():
    assert isinstance(as_ip2p_error(Image.UnidentifiedImageError("cannot identify")), InputError)
    assert isinstance(as_ip2p_error(Image.DecompressionBombError("too many pixels.")), InputError)


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("memory"), RuntimeError("shape"), OSError(2, "no file")]
)
def test_a_programming_error_passes_unchanged(error):
    assert as_ip2p_error(error) is None
    with pytest.raises(type(error)) as caught, translated_errors():
        raise error
    assert caught.value is error


def test_our_own_errors_pass_unchanged():
    error = ModelError("no model")
    assert as_ip2p_error(error) is error
    with pytest.raises(ModelError, match="no model"), translated_errors():
        raise error


def test_hub_errors_give_a_message_with_the_next_step():
    from huggingface_hub import errors

    def error(kind, **more):
        return hub_error(kind.__new__(kind), "some/name", "hf download some/name", **more)

    assert "Accept it on its page, then: HF_TOKEN=... hf download" in str(error(errors.GatedRepoError))
    assert "has no revision v9" in str(error(errors.RevisionNotFoundError, revision="v9"))
    assert "neither a local folder nor a Hugging Face model" in str(error(errors.RepositoryNotFoundError))
    assert "neither a local path nor a Hugging Face data set" in str(
        error(errors.RepositoryNotFoundError, what="data set")
    )
    assert "cannot be reached (ConnectionError)" in str(error(ConnectionError))
    full = hub_error(OSError(errno.ENOSPC, "full"), "some/name", "hf download some/name")
    assert isinstance(full, ResourceError) and "the cache for some/name" in str(full)
