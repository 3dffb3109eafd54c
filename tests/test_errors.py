"""One map turns what other libraries raise into our three families of errors."""

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
def test_every_way_to_run_out_of_memory_is_a_resource_error_with_the_callers_advice(error):
    assert error is not None
    with pytest.raises(ResourceError, match="out of memory; try a smaller picture") as caught:
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


def test_pillows_errors_are_bad_input():
    assert isinstance(as_ip2p_error(Image.UnidentifiedImageError("cannot identify")), InputError)
    assert isinstance(as_ip2p_error(Image.DecompressionBombError("too many pixels.")), InputError)


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("memory"), RuntimeError("shape"), OSError(2, "no file")]
)
def test_a_fault_of_the_program_stays_what_it_is(error):
    assert as_ip2p_error(error) is None
    with pytest.raises(type(error)) as caught, translated_errors():
        raise error
    assert caught.value is error


def test_our_own_errors_pass_unchanged():
    own = ModelError("no model")
    assert as_ip2p_error(own) is own
    with pytest.raises(ModelError, match="no model"), translated_errors():
        raise own


def test_what_the_hub_refuses_is_a_line_with_the_next_step():
    from huggingface_hub import errors

    def raised(kind, **more):
        return hub_error(kind.__new__(kind), "some/name", "hf download some/name", **more)

    assert "Accept it on its page, then: HF_TOKEN=... hf download" in str(raised(errors.GatedRepoError))
    assert "has no revision v9" in str(raised(errors.RevisionNotFoundError, revision="v9"))
    assert "neither a local folder nor a Hugging Face model" in str(raised(errors.RepositoryNotFoundError))
    assert "neither a local path nor a Hugging Face data set" in str(
        raised(errors.RepositoryNotFoundError, what="data set")
    )
    assert "cannot be reached (ConnectionError)" in str(raised(ConnectionError))
    full = hub_error(OSError(errno.ENOSPC, "full"), "some/name", "hf download some/name")
    assert isinstance(full, ResourceError) and "the cache for some/name" in str(full)
