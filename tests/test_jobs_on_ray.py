"""A real Ray on this machine writes the same files as a local run, even if a worker dies.

Tests that need no cluster are in `test_jobs.py`, with a stand-in for Ray.
"""

import io
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_clip, make_model
from PIL import Image

from ip2p.base import jobs
from ip2p.base.cluster import Cluster, work_on_ray
from ip2p.base.errors import ModelError
from ip2p.base.jobs import StageOutput
from ip2p.base.work import RETRIES
from ip2p.cli import main as cli
from ip2p.cli import synth as maker
from ip2p.synth.records import Triple, triple_id, write_triples

WORKERS = 2
PARTS = [range(0, 3), range(3, 6), range(6, 7)]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A Ray of its own, even if others run here; `jobs` uses the one its process is connected to."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # otherwise its workers starve on a busy machine
        patch.setenv("RAY_worker_register_timeout_seconds", "200")
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        ray.init("local", num_cpus=WORKERS, **quiet)
        yield
        ray.shutdown()
    signal.signal(signal.SIGTERM, handler)


def contents(folder):
    """The Parquet files by path; other files contain timings."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


def rows(folder):
    return [row for path in jobs.committed(folder, "data/train") for row in pq.read_table(path).to_pylist()]


def pixels(row, name):
    return np.asarray(Image.open(io.BytesIO(row[name]["bytes"]))).astype(int)


def test_ray_and_another_batch_size_give_the_same_pairs_as_a_local_run(here, monkeypatch):
    painter = make_model(here / "painter", in_channels=4)
    make_clip(painter / "clip")
    monkeypatch.setattr(maker, "TRIPLES_A_PART", 2)
    changes = (("cat", "dog"), ("hill", "lake"), ("boat", "kite"), ("tree", "rock"), ("fox", "hen"))
    triples = [
        Triple(
            id=triple_id(f"a red {one}", 0),
            caption=f"a red {one}",
            instruction=f"make it a {other}",
            edited_caption=f"a red {other}",
        )
        for one, other in changes
    ]
    write_triples(Path("triples.parquet"), triples)

    def draw(out, *more):
        words = ["synth", "pairs", "triples.parquet", "-o", out, "--model", str(painter)]
        words += ["--device", "cpu", "--dtype", "fp32", "--steps", "2", "--most", "4", "--round-size", "2"]
        words += ["--image", "-1", "--caption", "-1", "--directional", "0"]  # random pairs: about half pass
        assert cli.main([*words, *more]) == 0
        return here / out

    alone = draw("alone", "--workers", "1")
    on_ray = draw("on-ray", "--ray", "--ray-workers", str(WORKERS))
    assert len(contents(alone)) == 3 and contents(on_ray) == contents(alone)
    assert jobs.summary(on_ray).counts == jobs.summary(alone).counts
    # Sums round differently at another batch size: the same pairs, at most one level apart.
    single = draw("single", "--workers", "1", "--batch-size", "1")
    assert rows(single)
    for one, two in zip(rows(single), rows(alone), strict=True):
        for name, value in one.items():
            if isinstance(value, dict):  # a picture
                assert np.abs(pixels(one, name) - pixels(two, name)).max() <= 1
            elif isinstance(value, float):
                assert value == pytest.approx(two[name], abs=0.01)
            else:
                assert value == two[name]


def test_a_killed_ray_worker_loses_nothing_and_an_error_is_raised_unchanged(tmp_path):
    killed, broken = tmp_path / "fallen", tmp_path / "broken"

    class Numbers:  # defined here so that it is pickled by value
        def __call__(self, part):
            if part[0] == 3 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if part[0] == 6 and not broken.exists():
                broken.touch()
                raise ModelError("the model is gone")
            return StageOutput(tables={"data/train": pa.table({"n": list(part)})}, counts={"seen": len(part)})

    def run():
        return jobs.run_job(Numbers, PARTS, tmp_path / "job", settings={}, cluster=Cluster(workers=1))

    with pytest.raises(ModelError, match="the model is gone"):
        run()
    assert killed.exists() and len(rows(tmp_path / "job")) == 6
    summary = run()
    assert (summary.made, summary.counts) == (1, {"seen": 7})
    assert [row["n"] for row in rows(tmp_path / "job")] == list(range(7))
    assert jobs.damaged(tmp_path / "job") == []


def test_a_ray_worker_that_is_killed_while_idle_costs_the_next_part_no_retry(tmp_path):
    class Fragile:
        def __call__(self, part):
            number, folder = part
            tries = len(list(folder.glob(f"{number}-*")))
            (folder / f"{number}-{tries}").touch()
            if number == 1 and tries < RETRIES:
                os.kill(os.getpid(), signal.SIGKILL)
            return os.getpid()

    finished = []
    parts = [(number, tmp_path) for number in range(3)]
    for number, pid, _ in work_on_ray(Fragile, parts, range(3), Cluster(workers=1), None):
        finished.append(number)
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.05)
    assert finished == [0, 1, 2]
    assert len(list(tmp_path.glob("1-*"))) == RETRIES + 1
