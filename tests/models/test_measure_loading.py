"""The script that measures loading; its full-size run is not a test."""

import importlib.util
import sys
from pathlib import Path

import pytest

from ip2p.models.load import open_model

SCRIPT = Path(__file__).parents[2] / "tools" / "measure_loading.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_loading_takes_little_more_than_the_file(tmp_path):
    spec = importlib.util.spec_from_file_location("measure_loading", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules["measure_loading"] = script
    spec.loader.exec_module(script)
    path = tmp_path / "editor.safetensors"
    script.write_model(path, script.TINY)
    assert open_model(path).architecture == "SD 1.x"
    found = script.measure(path, "fp16")
    # At this size the objects around the weights count most.
    assert found["peak"] - found["libraries"] < 1.3 * found["file"] + 60e6
