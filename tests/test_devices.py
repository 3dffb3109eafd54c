import platform
import subprocess
import sys

import pytest
import torch

from ip2p.base.devices import NoiseStream, pick_device, pick_dtype
from ip2p.base.errors import InputError, ResourceError


def test_the_noise_of_a_seed_does_not_depend_on_its_batch():
    first, second = NoiseStream([1, 2, 3], (4, 8, 8)), NoiseStream([2], (4, 8, 8))
    for _ in range(3):
        assert torch.equal(first()[1:2], second())


def test_auto_picks_a_working_device_and_dtype():
    device = pick_device("auto")
    dtype = pick_dtype(device, "auto")
    assert torch.ones(2, device=device, dtype=dtype).sum().item() == 2


def test_dtypes_have_short_and_long_names_and_unknown_ones_are_refused():
    cpu = torch.device("cpu")
    assert pick_dtype(cpu, "fp32") is pick_dtype(cpu, "float32") is torch.float32
    assert pick_dtype(cpu, "bf16") is torch.bfloat16
    with pytest.raises(InputError, match="fp8"):
        pick_dtype(cpu, "fp8")


def test_unknown_and_absent_devices_are_refused():
    with pytest.raises(InputError, match="unknown"):
        pick_device("toaster")
    with pytest.raises(ResourceError, match="not available on this machine"):
        pick_device("cuda:99")


REUSE = """
import resource, torch
from pathlib import Path
from ip2p.base.devices import return_freed_memory, reuse_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

plain = faults()
assert reuse_freed_memory()
faults()  # until the heap has its shape
kept, held = min(faults() for _ in range(4)), resident()
return_freed_memory()
assert kept < plain / 4, (kept, plain)
assert resident() < held - 32 * 2**20
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_reused_and_can_be_returned():
    subprocess.run([sys.executable, "-c", REUSE], check=True)
