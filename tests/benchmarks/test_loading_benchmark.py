"""The loading benchmark; its full-size run is not a test."""

from pathlib import Path

import pytest

from benchmarks.speed.loading import TINY, measure_loading, write_single_file
from ip2p.models.load import open_model


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_the_peak_memory_of_loading_is_little_more_than_the_file(tmp_path):
    path = tmp_path / "editor.safetensors"
    write_single_file(path, TINY)
    assert open_model(path).architecture == "SD 1.x"
    measured = measure_loading(path, "fp16")
    # At this size, objects other than the weights dominate.
    assert measured["peak"] - measured["libraries"] < 1.3 * measured["file"] + 60e6
