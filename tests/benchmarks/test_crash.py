"""The crash harness: one small trial, and the violations that it must report."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import Failed, Process
from benchmarks.crash import harness
from benchmarks.crash.targets import TARGETS

ROOT = Path(__file__).parents[2]


# Runs in a separate process, since it forks.
TRIAL = """
import random, sys
from dataclasses import replace
from pathlib import Path
from benchmarks.crash import harness
from benchmarks.crash.targets import TARGETS
import torch, ip2p.cli.data, ip2p.data.convert, ip2p.data.loading, ip2p_storybook.draw  # shared by forks

target = TARGETS["convert"]
small = ["--size", "32", "--count", "60", "--shard-rows", "5"]
target = replace(target, words=lambda root, output: [*TARGETS["convert"].words(root, output), *small])
for line in harness.kill_commands(harness.Bench(Path(sys.argv[1]), 2, random.Random(0)), target, "kills"):
    print(line)
"""


def test_a_killed_conversion_matches_an_undisturbed_one(tmp_path):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-c", TRIAL, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "convert, kills: HOLDS. 2 kills" in done.stdout and "12 units each" in done.stdout


@pytest.fixture
def bench(tmp_path):
    """A bench whose undisturbed run wrote two files in two shards."""
    bench = harness.Bench(tmp_path, 0, random.Random(0))
    undisturbed = bench.runs(TARGETS["convert"], "undisturbed")
    write_shards(undisturbed.output, {"a.tar": b"a", "b.tar": b"b"})
    reference = harness.Undisturbed(harness.plain_files(undisturbed.output), 2, 0.0, 0.0, undisturbed.output)
    bench.known["convert"] = reference
    return bench


def write_shards(output: Path, files: dict[str, bytes], listed=(0, 1)) -> None:
    output.mkdir(parents=True)
    for name, data in files.items():
        (output / name).write_bytes(data)
    (output / "manifest.jsonl").write_text("".join(f'{{"part": {part}}}\n' for part in listed))


@pytest.mark.parametrize(
    ("files", "listed", "complaint"),
    [
        ({"a.tar": b"a"}, (0, 1), "missing: \\['shards/b.tar'\\]"),
        ({"a.tar": b"a", "b.tar": b"b", "c.tar": b"c"}, (0, 1), "unexpected: \\['shards/c.tar'\\]"),
        ({"a.tar": b"a", "b.tar": b"x"}, (0, 1), "other bytes"),
        ({"a.tar": b"a", "b.tar": b"b"}, (0, 1, 1), "committed twice"),
    ],
)
def test_a_difference_from_the_undisturbed_run_is_reported(bench, files, listed, complaint):
    runs = bench.runs(TARGETS["convert"], "other")
    write_shards(runs.output, files, listed)
    with pytest.raises(Failed, match=complaint):
        bench.compare(runs)


def test_an_equal_result_passes(bench):
    runs = bench.runs(TARGETS["convert"], "other")
    write_shards(runs.output, {"a.tar": b"a", "b.tar": b"b"})
    assert bench.compare(runs) == 2


def complain() -> int:
    os.write(2, b"no such model")
    return 3


def test_the_exit_code_of_a_process_is_checked(tmp_path):
    assert Process(complain, tmp_path / "log.txt").finish(3) == "no such model"
    with pytest.raises(Failed, match="exit 3, not 0: no such model"):
        Process(complain, tmp_path / "log.txt").finish()
