"""Jobs: what is committed is whole, nothing is lost or made twice, and Ray makes the same files.

Ray itself is an extra and takes a minute to start, so that a stand-in takes its place here.
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p.base import cluster as clusters
from ip2p.base import jobs, terminal
from ip2p.base.cluster import Cluster, plan_workers
from ip2p.base.errors import InputError, ModelError, ResourceError, Terminated
from ip2p.base.jobs import StageOutput

PARTS = [range(0, 3), range(3, 6), range(6, 7)]
SETTINGS = {"key": "squares"}


class Squares:
    """Squares of numbers; numbers in `none` go into another table."""

    loaded = 0

    def __init__(self, none=(), call=lambda part: None):
        type(self).loaded += 1
        self.none, self.call, self.made = none, call, []

    def __call__(self, part):
        self.call(part)
        self.made.append(part)
        kept = [n for n in part if n not in self.none]
        return StageOutput(
            tables={
                "data/train": pa.table({"n": pa.array(kept, pa.int64()), "square": [n * n for n in kept]}),
                "rejected/rejected": pa.table(
                    {"n": pa.array([n for n in part if n in self.none], pa.int64())}
                ),
            },
            counts={"looked": len(part), "odd": sum(n % 2 for n in part)},
        )


@pytest.fixture
def said():
    return []


@pytest.fixture
def go(tmp_path, said):
    """Run the job of squares in a folder, with whatever is to be otherwise."""

    def go(stage=Squares, parts=PARTS, folder=tmp_path / "job", settings=SETTINGS, **more):
        return jobs.run_job(stage, parts, folder, settings=settings, say=said.append, **more)

    return go


def rows(folder):
    return [row for path in jobs.committed(folder, "data/train") for row in pq.read_table(path).to_pylist()]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.parquet")}


def lines(folder):
    return [json.loads(line) for line in (folder / jobs.MANIFEST).read_text().splitlines()]


def test_every_part_is_made_once_and_named_with_its_checksums(go, tmp_path):
    summary = go(partial(Squares, none=(4,)))
    folder = tmp_path / "job"
    assert [row["square"] for row in rows(folder)] == [0, 1, 4, 9, 25, 36]
    assert (summary.parts, summary.made) == (3, 3)
    assert summary.rows == {"data/train": 6, "rejected/rejected": 1}
    assert summary.counts == {"looked": 7, "odd": 3}
    assert [next(iter(line)) for line in lines(folder)] == ["job", "part", "part", "part", "done"]
    assert sorted(contents(folder)) == sorted(name for line in lines(folder)[1:4] for name in line["files"])
    assert jobs.damaged(folder) == []
    assert jobs.is_job(folder) and not jobs.is_job(tmp_path)
    assert jobs.summary(folder).counts == summary.counts


def test_a_finished_job_loads_nothing_and_tells_the_same(go, said):
    first = go()
    loaded = Squares.loaded
    again = go()
    assert Squares.loaded == loaded
    assert (again.made, again.rows, again.counts) == (0, first.rows, first.counts)
    assert said == [said[0]] and said[0].startswith("3 of 3 parts already exist in ")


def test_an_error_leaves_what_was_committed_and_the_next_call_makes_the_rest(go, tmp_path):
    def fail(part):
        if part[0] == 3:
            raise ModelError("the model is gone")

    with pytest.raises(ModelError):
        go(partial(Squares, call=fail))
    assert [row["n"] for row in rows(tmp_path / "job")] == [0, 1, 2]
    seen = []
    assert go(partial(Squares, call=seen.append)).made == 2
    assert seen == PARTS[1:]


def refuse(part):
    if part[0] == 3:
        raise ModelError("the model is gone")


def die(part):
    os.kill(os.getpid(), signal.SIGKILL)


def fall(mark, part):
    """Kill the process at its first part, once in all."""
    if not mark.exists():
        mark.touch()
        die(part)


def test_several_processes_make_the_same_files_as_one(go, tmp_path):
    one = go(folder=tmp_path / "one")
    two = go(folder=tmp_path / "two", processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and len(contents(tmp_path / "two")) == 6
    assert (two.made, two.rows, two.counts) == (3, one.rows, one.counts)


def test_an_error_of_a_process_is_raised_here_and_what_was_committed_stays(go, tmp_path):
    with pytest.raises(ModelError, match="the model is gone"):
        go(partial(Squares, call=refuse), processes=2)
    assert {row["n"] for row in rows(tmp_path / "job")} <= {0, 1, 2, 6}
    go(processes=2)
    assert [row["n"] for row in rows(tmp_path / "job")] == list(range(7))


def test_a_process_that_is_lost_begins_anew_and_one_that_always_is_ends_the_job(go, tmp_path):
    go(partial(Squares, call=partial(fall, tmp_path / "fallen")), processes=2)
    assert (tmp_path / "fallen").exists()
    assert [row["n"] for row in rows(tmp_path / "job")] == list(range(7))
    with pytest.raises(ResourceError, match=r"died 4 times on part \d; .* try --workers 1"):
        go(partial(Squares, call=die), folder=tmp_path / "other", processes=2)


ORPHANS = """
import os, sys, time
from pathlib import Path
from ip2p.base import jobs

class Slow:
    def __call__(self, part):
        Path(sys.argv[1], f"{os.getpid()}").touch()
        time.sleep(120)

if __name__ == "__main__":
    jobs.run_job(Slow, [range(1), range(1)], Path(sys.argv[1], "job"), settings={}, processes=2)
"""


def test_processes_end_with_the_one_that_began_them(tmp_path):
    (tmp_path / "run.py").write_text(ORPHANS)
    parent = subprocess.Popen([sys.executable, tmp_path / "run.py", tmp_path])

    def workers():
        return [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]

    try:
        assert wait_until(lambda: len(workers()) == 2)
    finally:
        parent.kill()
        parent.wait()
    assert wait_until(lambda: not any(is_alive(number) for number in workers()))


def is_alive(number):
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(holds):
    """Whether it holds within a minute."""
    end = time.monotonic() + 60
    while not (found := holds()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_writing_leaves_no_half_file(go, tmp_path, monkeypatch, kind):
    def ended(number, frame):
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    write = pq.write_table

    def interrupted(table, path, **more):
        write(table, path, **more)
        if len(jobs.committed(tmp_path / "job", "data/train")) == 1:
            os.truncate(path, 20)
            os.kill(os.getpid(), kind)

    monkeypatch.setattr(pq, "write_table", interrupted)
    before = signal.signal(kind, ended)
    try:
        with pytest.raises((Terminated, KeyboardInterrupt)):
            go()
    finally:
        signal.signal(kind, before)
    monkeypatch.undo()
    assert sorted(contents(tmp_path / "job")) == [
        "data/train-00000.parquet",
        "rejected/rejected-00000.parquet",
    ]
    assert go().made == 2


KILLED = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import pyarrow.parquet as pq
from ip2p.base import jobs
from test_jobs import PARTS, SETTINGS, Squares, rows

def child(folder, fatal):
    # Runs the job and kills itself at the fatal one of the calls that reach the disk.
    if (pid := os.fork()) == 0:
        calls = 0
        def deadly(function):
            def call(*given, **more):
                nonlocal calls
                calls += 1
                if calls == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*given, **more)
            return call
        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
        pq.write_table = deadly(pq.write_table)
        jobs.run_job(Squares, PARTS, folder, settings=SETTINGS, say=lambda line: None)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

told = []
for fatal in range(1, 100):
    folder = Path(sys.argv[1]) / str(fatal)
    code = child(folder, fatal)
    there = len(jobs.committed(folder, "data/train")) if jobs.is_job(folder) else 0
    damaged = jobs.damaged(folder) if jobs.is_job(folder) else []
    again = child(folder, 0)
    told.append([code, there, damaged, again, rows(folder), sorted(p.name for p in folder.rglob(".*"))])
    if code == 0:
        break
print(json.dumps(told))
"""


def test_killed_at_any_write_nothing_is_lost_or_doubled(tmp_path):
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), tests], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    # A line for the head, three parts of two files and a line each, one for the end.
    assert len(runs) > 20
    assert [code for code, *_ in runs] == [-signal.SIGKILL] * (len(runs) - 1) + [0]
    assert {there for _, there, *_ in runs} == {0, 1, 2, 3}
    for _, _, damaged, again, made, halves in runs:
        assert (damaged, again, halves) == ([], 0, [])
        assert [row["n"] for row in made] == list(range(7))


def test_a_torn_line_never_counted(go, tmp_path):
    go()
    manifest = tmp_path / "job" / jobs.MANIFEST
    whole = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(whole[:2]) + whole[2][:-7])
    assert len(jobs.committed(tmp_path / "job", "data/train")) == 1
    assert go().made == 2
    assert len(rows(tmp_path / "job")) == 7


def test_a_part_that_was_cut_short_is_reported_and_recreated(go, tmp_path, said):
    go()
    path = tmp_path / "job" / "data" / "train-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert go().made == 1
    assert "train-00001.parquet is missing or truncated" in said[0]
    assert path.read_bytes() == whole
    flipped = bytearray(whole)
    flipped[10] ^= 1
    path.write_bytes(flipped)
    assert jobs.damaged(tmp_path / "job") == ["data/train-00001.parquet"]


def test_two_jobs_in_one_folder_are_refused(go):
    def other(part):
        with pytest.raises(InputError, match="another ip2p process is writing to"):
            go()

    go(partial(Squares, call=other))


def test_other_settings_are_refused_by_name_unless_overwritten(go, tmp_path):
    go()
    with pytest.raises(
        InputError, match=r'started with key "squares", but it is now "cubes"; add --overwrite'
    ):
        go(settings={"key": "cubes"})
    with pytest.raises(InputError, match="started with parts 3, but it is now 1"):
        go(parts=PARTS[:1])
    with pytest.raises(InputError, match="started with seed null, but it is now 1"):
        go(settings={**SETTINGS, "seed": 1})
    assert go(overwrite="changed").made == 0
    own = tmp_path / "job" / "notes.txt"
    own.write_text("mine")
    assert go(parts=PARTS[:1], overwrite="changed").made == 1
    assert go(parts=PARTS[:1], overwrite=True).made == 1
    assert sorted(contents(tmp_path / "job")) == [
        "data/train-00000.parquet",
        "rejected/rejected-00000.parquet",
    ]
    assert own.read_text() == "mine"


def test_what_a_killed_run_had_not_named_goes_when_a_job_begins_anew(go, tmp_path):
    go()
    folder, own = tmp_path / "job", ("data/other.parquet", "data/train-00000-of-00002.parquet")
    for name in own:
        (folder / name).write_bytes(b"mine")
    # Renamed, and killed before its line.
    (folder / "data" / "train-00009.parquet").write_bytes((folder / "data/train-00000.parquet").read_bytes())
    go(parts=PARTS[:1], overwrite=True)
    there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.parquet"))
    assert there == sorted([*own, "data/train-00000.parquet", "rejected/rejected-00000.parquet"])


def test_a_folder_of_something_else_is_refused(go, tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "photo.jpg").write_text("mine")
    with pytest.raises(InputError, match="already contains other files"):
        go()
    assert not (folder / jobs.MANIFEST).exists()
    (folder / "photo.jpg").unlink()
    assert go().made == 3
    for foreign in ('{"convert": {}}\n', '{"convert": {}}', "[1]"):
        (folder / jobs.MANIFEST).write_text(foreign)
        with pytest.raises(InputError, match="already contains other files"):
            go(overwrite=True)
        assert (folder / jobs.MANIFEST).read_text() == foreign
    with pytest.raises(InputError, match=r"holds no manifest\.jsonl of a job"):
        jobs.committed(folder, "data/train")


def test_a_full_disk_is_reported_and_what_was_committed_stays(go, tmp_path, monkeypatch):
    write = pq.write_table

    def full(table, path, **more):
        write(table, path, **more)
        if len(jobs.committed(tmp_path / "job", "data/train")) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(ResourceError, match=r"no space left .* from the 1 parts already written"):
        go()
    monkeypatch.undo()
    assert len(contents(tmp_path / "job")) == 2
    assert go().made == 2


def test_pace_tells_the_rate_and_the_time_left():
    assert terminal.pace(0, 10, 5.0, "rows") == ""
    assert terminal.pace(50, 250, 4.0, "rows") == "12.5 rows/s, 0:16 left"
    assert terminal.pace(3000, 6000, 2.0, "rows") == "1,500 rows/s, 0:02 left"
    assert terminal.pace(10, 250, 150.0, "triples") == "4 triples/min, 1:00:00 left"


# --- Ray ------------------------------------------------------------------------------------------


class TaskFailed(Exception):
    def __init__(self, cause):
        super().__init__("a worker raised")
        self.cause = cause


class RayError(Exception):
    pass


class ActorDied(RayError):
    pass


class Unschedulable(RayError):
    pass


@pytest.fixture
def ray(monkeypatch):
    """A Ray whose tasks end in the order last begun, first done."""
    fake = SimpleNamespace(nodes=machines({"CPU": 3.0}), options=[], actors=0, most=0, killed=0, shut=0)
    fake.lost, fake.refused, fake.addresses, fake.room = (), (), [], 100

    class Actor:
        def __init__(self, worker):
            self.worker = worker
            fake.actors += 1
            self.process_remotely = SimpleNamespace(remote=self.begin)
            self.ready = SimpleNamespace(remote=self.place)

        def begin(self, part):
            return (lambda: self.worker.process_remotely(part), tuple(part))

        def place(self):
            fake.room -= 1
            return (self.worker.ready, ("begun", fake.room))

    class Remote:
        def __init__(self, kind):
            self.kind = kind

        def options(self, **options):
            fake.options.append(options)
            return self

        def remote(self, *given):
            return Actor(self.kind(*given))

    def wait(refs, num_returns, timeout):
        fake.most = max(fake.most, len(refs))
        begun = [ref for ref in refs if ref[1][0] == "begun" and ref[1][1] >= 0]
        ready = (begun or [ref for ref in refs if ref[1][0] != "begun"])[-1:]
        return ready, [ref for ref in refs if ref not in ready]

    def get(ref):
        if ref[1][0] in fake.lost:
            if isinstance(fake.lost, list):  # so many times
                fake.lost.remove(ref[1][0])
            raise ActorDied("The actor died unexpectedly.\nMore.")
        if ref[1][0] in fake.refused:
            raise Unschedulable("Worker startup failed.\nMore.")
        try:
            return ref[0]()
        except Exception as error:
            raise TaskFailed(error) from None

    def count(name):
        return lambda *given: setattr(fake, name, getattr(fake, name) + 1)

    def init(address, **more):
        fake.addresses.append(address)
        if address == "nowhere:1":
            raise ConnectionError("no")
        if address == "busy:1":
            raise Exception("the node timed out.\nMore.")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the real one's import

    module = ModuleType("ray")
    module.__dict__.update(
        exceptions=SimpleNamespace(RayActorError=ActorDied, RayTaskError=TaskFailed, RayError=RayError),
        is_initialized=lambda: False,
        init=init,
        remote=Remote,
        wait=wait,
        get=get,
        kill=count("killed"),
        shutdown=count("shut"),
        nodes=lambda: fake.nodes,
    )
    monkeypatch.setitem(sys.modules, "ray", module)
    return fake


def machines(*resources):
    """As Ray tells of them, with one that is gone."""
    nodes = [{"Alive": True, "Resources": each} for each in resources]
    return [*nodes, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]


def test_ray_makes_the_same_files_whatever_the_order(go, tmp_path, ray):
    go(folder=tmp_path / "here")
    handler = signal.getsignal(signal.SIGTERM)
    summary = go(cluster=Cluster(workers=2))
    assert contents(tmp_path / "job") == contents(tmp_path / "here")
    assert [line["part"] for line in lines(tmp_path / "job")[1:4]] != [0, 1, 2]
    assert summary.counts == jobs.summary(tmp_path / "here").counts
    assert (ray.actors, ray.most, ray.killed, ray.shut) == (2, 2, 2, 1)
    assert ray.options == [{"max_restarts": 0, "num_cpus": 1, "num_gpus": 0.0}]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_job_begun_here_goes_on_on_ray(go, ray, tmp_path):
    def fail(part):
        if part[0] == 3:
            raise ModelError("stopped")

    with pytest.raises(ModelError):
        go(partial(Squares, call=fail))
    assert go(cluster=Cluster()).made == 2
    assert [row["n"] for row in rows(tmp_path / "job")] == list(range(7))


def test_errors_on_ray_come_back_as_themselves_and_lost_workers_are_reported(go, ray, tmp_path):
    def fail(part):
        raise ModelError("no such model") if part[0] == 6 else ZeroDivisionError("a fault")

    with pytest.raises(ModelError, match="no such model"):
        go(partial(Squares, call=fail), cluster=Cluster())
    with pytest.raises(ZeroDivisionError):
        go(partial(Squares, call=fail), cluster=Cluster(workers=1))
    ray.lost = (3,)
    with pytest.raises(ResourceError, match="worker was lost on part 1, 4 times"):
        go(cluster=Cluster(workers=1))
    assert [row["n"] for row in rows(tmp_path / "job")] == [0, 1, 2]
    ray.lost, ray.refused = (), (3,)
    with pytest.raises(ResourceError, match=r"failed on part 1 \(Worker startup failed\)\. .* resume"):
        go(cluster=Cluster(workers=1))
    assert ray.shut == 4


def test_workers_are_as_many_as_fit(ray, go):
    fits = partial(plan_workers, parts=100)
    cpus, gpus = machines({"CPU": 8.0}), machines({"CPU": 32.0, "GPU": 3.0})
    assert fits(cpus, Cluster(cpus=2)) == (4, {"num_cpus": 2, "num_gpus": 0.0})
    assert fits(gpus, Cluster()) == (3, {"num_cpus": 1, "num_gpus": 1.0})
    assert fits(gpus, Cluster(gpus=0.25)) == (12, {"num_cpus": 1, "num_gpus": 0.25})
    assert plan_workers(cpus, Cluster(), 3)[0] == 3
    # A worker is on one machine, and its part of a GPU on one GPU.
    assert fits(machines({"CPU": 6.0}, {"CPU": 6.0}), Cluster(cpus=4))[0] == 2
    assert fits(machines({"CPU": 8.0, "GPU": 2.0}), Cluster(gpus=0.4))[0] == 4
    assert fits(machines({"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 1.0}), Cluster(gpus=2))[0] == 1
    assert fits(machines({"CPU": 64.0}, {"CPU": 2.0, "GPU": 4.0}), Cluster())[0] == 2
    with pytest.raises(ResourceError, match=r"4 workers with 1 CPU each do not fit .* 3 CPU; 3 would"):
        go(cluster=Cluster(workers=4))
    with pytest.raises(ResourceError, match="1 workers with 1 CPU, 1 GPU each do not fit"):
        go(cluster=Cluster(gpus=1))


def test_a_worker_without_room_keeps_no_part_waiting(go, ray, tmp_path):
    ray.room = 1  # another program took the rest
    go(cluster=Cluster())
    assert [row["n"] for row in rows(tmp_path / "job")] == list(range(7))
    assert ray.actors == ray.killed == 3


def test_machines_that_join_get_workers(go, ray, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "POLL_SECONDS", -1)
    ray.nodes = machines({"CPU": 1.0})

    def join(part):
        ray.nodes = machines({"CPU": 1.0}, {"CPU": 1.0})

    go(partial(Squares, call=join), cluster=Cluster())
    assert ray.actors == 2
    assert [row["n"] for row in rows(tmp_path / "job")] == list(range(7))


def test_what_a_lost_worker_was_at_is_given_to_another(go, ray, tmp_path):
    ray.lost = [3, 3, 0]
    assert go(cluster=Cluster(workers=2)).made == 3
    assert (ray.actors, ray.killed) == (5, 5)
    assert [row["n"] for row in rows(tmp_path / "job")] == list(range(7))


def test_a_cluster_that_does_not_answer_and_a_missing_ray_are_errors(ray, go, monkeypatch):
    with pytest.raises(ResourceError, match="no Ray cluster responds at nowhere:1"):
        go(cluster=Cluster(address="nowhere:1"))
    with pytest.raises(ResourceError, match=r"Ray does not start \(the node timed out\)\. .* resume"):
        go(cluster=Cluster(address="busy:1"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'ip2p\[ray\]'"):
        go(cluster=Cluster())


def test_a_cluster_of_which_only_the_address_is_left_is_not_waited_for(ray, go, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    left = tmp_path / "ray" / "ray_current_cluster"
    left.parent.mkdir()

    def address(given=""):
        go(folder=tmp_path / f"job-{len(ray.addresses)}", cluster=Cluster(address=given))
        return ray.addresses[-1]

    assert address() is None
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        left.write_text(f"127.0.0.1:{port}")
        assert address() is None
    assert address() == "local"
    assert address("auto") == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert address() is None
    monkeypatch.delenv("RAY_ADDRESS")
    left.write_text("nonsense")
    assert address() is None
