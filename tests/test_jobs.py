"""Jobs: committed files are complete, nothing is lost or made twice, and Ray writes the same files.

Ray itself is an extra and takes a minute to start, so a stand-in replaces it here.
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
    """Squares of numbers; numbers in `rejected` go into the rejected table."""

    loaded = 0

    def __init__(self, rejected=(), call=lambda part: None):
        type(self).loaded += 1
        self.rejected, self.call, self.made = rejected, call, []

    def __call__(self, part):
        self.call(part)
        self.made.append(part)
        kept = [n for n in part if n not in self.rejected]
        return StageOutput(
            tables={
                "data/train": pa.table({"n": pa.array(kept, pa.int64()), "square": [n * n for n in kept]}),
                "rejected/rejected": pa.table(
                    {"n": pa.array([n for n in part if n in self.rejected], pa.int64())}
                ),
            },
            counts={"looked": len(part), "odd": sum(n % 2 for n in part)},
        )


@pytest.fixture
def said():
    return []


@pytest.fixture
def go(tmp_path, said):
    """Run the squares job in a folder, with any arguments changed."""

    def go(stage=Squares, parts=PARTS, folder=tmp_path / "job", settings=SETTINGS, **more):
        return jobs.run_job(stage, parts, folder, settings=settings, say=said.append, **more)

    return go


def rows(folder):
    return [row for path in jobs.committed(folder, "data/train") for row in pq.read_table(path).to_pylist()]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.parquet")}


def lines(folder):
    return [json.loads(line) for line in (folder / jobs.MANIFEST).read_text().splitlines()]


def test_every_part_is_made_once_and_listed_with_checksums(go, tmp_path):
    summary = go(partial(Squares, rejected=(4,)))
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


def test_a_finished_job_loads_nothing_and_returns_the_same_summary(go, said):
    first = go()
    loaded = Squares.loaded
    again = go()
    assert Squares.loaded == loaded
    assert (again.made, again.rows, again.counts) == (0, first.rows, first.counts)
    assert said == [said[0]] and said[0].startswith("3 of 3 parts already exist in ")


def test_an_error_keeps_committed_parts_and_the_next_call_makes_the_rest(go, tmp_path):
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


def die_once(mark, part):
    """Kill the process at its first part, but only once."""
    if not mark.exists():
        mark.touch()
        die(part)


def test_several_processes_write_the_same_files_as_one(go, tmp_path):
    one = go(folder=tmp_path / "one")
    two = go(folder=tmp_path / "two", processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and len(contents(tmp_path / "two")) == 6
    assert (two.made, two.rows, two.counts) == (3, one.rows, one.counts)


def test_an_error_in_a_worker_process_is_raised_and_committed_parts_stay(go, tmp_path):
    with pytest.raises(ModelError, match="the model is gone"):
        go(partial(Squares, call=refuse), processes=2)
    assert {row["n"] for row in rows(tmp_path / "job")} <= {0, 1, 2, 6}
    go(processes=2)
    assert [row["n"] for row in rows(tmp_path / "job")] == list(range(7))


def test_a_dead_process_is_restarted_and_one_that_keeps_dying_ends_the_job(go, tmp_path):
    go(partial(Squares, call=partial(die_once, tmp_path / "fallen")), processes=2)
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


def test_worker_processes_end_with_their_parent(tmp_path):
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


def wait_until(condition):
    """Return whether the condition holds within a minute."""
    end = time.monotonic() + 60
    while not (result := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return result


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_write_leaves_no_partial_file(go, tmp_path, monkeypatch, kind):
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

runs = []
for fatal in range(1, 100):
    folder = Path(sys.argv[1]) / str(fatal)
    code = child(folder, fatal)
    there = len(jobs.committed(folder, "data/train")) if jobs.is_job(folder) else 0
    damaged = jobs.damaged(folder) if jobs.is_job(folder) else []
    again = child(folder, 0)
    runs.append([code, there, damaged, again, rows(folder), sorted(p.name for p in folder.rglob(".*"))])
    if code == 0:
        break
print(json.dumps(runs))
"""


def test_a_kill_at_any_write_loses_and_duplicates_nothing(tmp_path):
    tests = str(Path(__file__).parent)
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), tests], capture_output=True, text=True, timeout=240
    )
    assert process.returncode == 0, process.stderr
    runs = json.loads(process.stdout)
    # A line for the header, two files and a line for each of three parts, and a line for the end.
    assert len(runs) > 20
    assert [code for code, *_ in runs] == [-signal.SIGKILL] * (len(runs) - 1) + [0]
    assert {committed for _, committed, *_ in runs} == {0, 1, 2, 3}
    for _, _, damaged, again, final_rows, temporaries in runs:
        assert (damaged, again, temporaries) == ([], 0, [])
        assert [row["n"] for row in final_rows] == list(range(7))


def test_a_truncated_manifest_line_does_not_count(go, tmp_path):
    go()
    manifest = tmp_path / "job" / jobs.MANIFEST
    full_lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(full_lines[:2]) + full_lines[2][:-7])
    assert len(jobs.committed(tmp_path / "job", "data/train")) == 1
    assert go().made == 2
    assert len(rows(tmp_path / "job")) == 7


def test_a_truncated_part_is_reported_and_recreated(go, tmp_path, said):
    go()
    path = tmp_path / "job" / "data" / "train-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    assert go().made == 1
    assert "train-00001.parquet is missing or truncated" in said[0]
    assert path.read_bytes() == content
    flipped = bytearray(content)
    flipped[10] ^= 1
    path.write_bytes(flipped)
    assert jobs.damaged(tmp_path / "job") == ["data/train-00001.parquet"]


def test_a_second_job_in_the_same_folder_is_refused(go):
    def other(part):
        with pytest.raises(InputError, match="another ip2p process is writing to"):
            go()

    go(partial(Squares, call=other))


def test_changed_settings_are_refused_by_name_unless_overwritten(go, tmp_path):
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
    notes = tmp_path / "job" / "notes.txt"
    notes.write_text("mine")
    assert go(parts=PARTS[:1], overwrite="changed").made == 1
    assert go(parts=PARTS[:1], overwrite=True).made == 1
    assert sorted(contents(tmp_path / "job")) == [
        "data/train-00000.parquet",
        "rejected/rejected-00000.parquet",
    ]
    assert notes.read_text() == "mine"


def test_overwriting_a_job_removes_uncommitted_files_of_a_killed_run(go, tmp_path):
    go()
    folder, user_files = tmp_path / "job", ("data/other.parquet", "data/train-00000-of-00002.parquet")
    for name in user_files:
        (folder / name).write_bytes(b"mine")
    # Renamed, but killed before its line was written.
    (folder / "data" / "train-00009.parquet").write_bytes((folder / "data/train-00000.parquet").read_bytes())
    go(parts=PARTS[:1], overwrite=True)
    remaining = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.parquet"))
    assert remaining == sorted([*user_files, "data/train-00000.parquet", "rejected/rejected-00000.parquet"])


def test_a_folder_with_other_files_is_refused(go, tmp_path):
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


def test_a_full_disk_is_reported_and_committed_parts_stay(go, tmp_path, monkeypatch):
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


def test_pace_gives_the_rate_and_the_time_left():
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
    """A fake Ray whose last task to start is the first to finish."""
    fake = SimpleNamespace(nodes=machines({"CPU": 3.0}), options=[], actors=0, most=0, killed=0, shut=0)
    fake.lost, fake.refused, fake.addresses, fake.room = (), (), [], 100
    fake.idle = []  # parts whose worker dies before it gets them

    class Actor:
        def __init__(self, worker):
            self.worker = worker
            fake.actors += 1
            self.placed = self.dead = False
            self.process_remotely = SimpleNamespace(remote=self.begin)
            self.ready = SimpleNamespace(remote=self.place)

        def begin(self, part):
            if part[0] in fake.idle:
                fake.idle.remove(part[0])
                self.dead = True
            return (lambda: self.check() or self.worker.process_remotely(part), tuple(part))

        def place(self):
            if self.placed:
                return (self.check, ("alive",))
            self.placed = True
            fake.room -= 1
            return (self.worker.ready, ("begun", fake.room))

        def check(self):
            if self.dead:
                raise ActorDied("The actor is dead.")

    class Remote:
        def __init__(self, kind):
            self.kind = kind

        def options(self, **options):
            fake.options.append(options)
            return self

        def remote(self, *args):
            return Actor(self.kind(*args))

    def wait(refs, num_returns, timeout):
        fake.most = max(fake.most, len(refs))
        begun = [ref for ref in refs if ref[1][0] == "begun" and ref[1][1] >= 0]
        ready = (begun or [ref for ref in refs if ref[1][0] != "begun"])[-1:]
        return ready, [ref for ref in refs if ref not in ready]

    def get(ref):
        if ref[1][0] in fake.lost:
            if isinstance(fake.lost, list):  # once per entry
                fake.lost.remove(ref[1][0])
            raise ActorDied("The actor died unexpectedly.\nMore.")
        if ref[1][0] in fake.refused:
            raise Unschedulable("Worker startup failed.\nMore.")
        try:
            return ref[0]()
        except ActorDied:
            raise
        except Exception as error:
            raise TaskFailed(error) from None

    def count(name):
        return lambda *args: setattr(fake, name, getattr(fake, name) + 1)

    def init(address, **more):
        fake.addresses.append(address)
        if address == "nowhere:1":
            raise ConnectionError("no")
        if address == "busy:1":
            raise Exception("the node timed out.\nMore.")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as importing the real Ray does

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
    """Nodes as Ray lists them, plus one that is gone."""
    nodes = [{"Alive": True, "Resources": each} for each in resources]
    return [*nodes, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]


def test_ray_writes_the_same_files_in_any_order(go, tmp_path, ray):
    go(folder=tmp_path / "here")
    handler = signal.getsignal(signal.SIGTERM)
    summary = go(cluster=Cluster(workers=2))
    assert contents(tmp_path / "job") == contents(tmp_path / "here")
    assert [line["part"] for line in lines(tmp_path / "job")[1:4]] != [0, 1, 2]
    assert summary.counts == jobs.summary(tmp_path / "here").counts
    assert (ray.actors, ray.most, ray.killed, ray.shut) == (2, 2, 2, 1)
    assert ray.options == [{"max_restarts": 0, "num_cpus": 1, "num_gpus": 0.0}]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_job_started_locally_resumes_on_ray(go, ray, tmp_path):
    def fail(part):
        if part[0] == 3:
            raise ModelError("stopped")

    with pytest.raises(ModelError):
        go(partial(Squares, call=fail))
    assert go(cluster=Cluster()).made == 2
    assert [row["n"] for row in rows(tmp_path / "job")] == list(range(7))


def test_errors_on_ray_are_raised_unchanged_and_lost_workers_are_reported(go, ray, tmp_path):
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


def test_the_number_of_workers_is_what_fits_the_machines(ray, go):
    fits = partial(plan_workers, parts=100)
    cpus, gpus = machines({"CPU": 8.0}), machines({"CPU": 32.0, "GPU": 3.0})
    assert fits(cpus, Cluster(cpus=2)) == (4, {"num_cpus": 2, "num_gpus": 0.0})
    assert fits(gpus, Cluster()) == (3, {"num_cpus": 1, "num_gpus": 1.0})
    assert fits(gpus, Cluster(gpus=0.25)) == (12, {"num_cpus": 1, "num_gpus": 0.25})
    assert plan_workers(cpus, Cluster(), 3)[0] == 3
    # A worker runs on one machine, and its fraction of a GPU on one GPU.
    assert fits(machines({"CPU": 6.0}, {"CPU": 6.0}), Cluster(cpus=4))[0] == 2
    assert fits(machines({"CPU": 8.0, "GPU": 2.0}), Cluster(gpus=0.4))[0] == 4
    assert fits(machines({"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 1.0}), Cluster(gpus=2))[0] == 1
    assert fits(machines({"CPU": 64.0}, {"CPU": 2.0, "GPU": 4.0}), Cluster())[0] == 2
    with pytest.raises(ResourceError, match=r"4 workers with 1 CPU each do not fit .* 3 CPU; 3 would"):
        go(cluster=Cluster(workers=4))
    with pytest.raises(ResourceError, match="1 workers with 1 CPU, 1 GPU each do not fit"):
        go(cluster=Cluster(gpus=1))


def test_a_worker_that_cannot_start_blocks_no_part(go, ray, tmp_path):
    ray.room = 1  # another program took the rest
    go(cluster=Cluster())
    assert [row["n"] for row in rows(tmp_path / "job")] == list(range(7))
    assert ray.actors == ray.killed == 3


def test_machines_that_join_later_get_workers(go, ray, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "POLL_SECONDS", -1)
    ray.nodes = machines({"CPU": 1.0})

    def join(part):
        ray.nodes = machines({"CPU": 1.0}, {"CPU": 1.0})

    go(partial(Squares, call=join), cluster=Cluster())
    assert ray.actors == 2
    assert [row["n"] for row in rows(tmp_path / "job")] == list(range(7))


def test_the_part_of_a_lost_worker_is_given_to_another(go, ray, tmp_path):
    ray.lost = [3, 3, 0]
    assert go(cluster=Cluster(workers=2)).made == 3
    assert (ray.actors, ray.killed) == (5, 5)
    assert [row["n"] for row in rows(tmp_path / "job")] == list(range(7))


def test_a_worker_that_dies_while_idle_does_not_count_as_a_loss_of_the_next_part(go, ray, tmp_path):
    ray.idle, ray.lost = [3], [3, 3, 3, 3]  # the first was idle; a part may lose three more
    assert go(cluster=Cluster(workers=1)).made == 3
    assert (ray.idle, ray.lost, ray.actors) == ([], [], 5)
    assert [row["n"] for row in rows(tmp_path / "job")] == list(range(7))


def test_an_unreachable_cluster_and_a_missing_ray_are_errors(ray, go, monkeypatch):
    with pytest.raises(ResourceError, match="no Ray cluster responds at nowhere:1"):
        go(cluster=Cluster(address="nowhere:1"))
    with pytest.raises(ResourceError, match=r"Ray does not start \(the node timed out\)\. .* resume"):
        go(cluster=Cluster(address="busy:1"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'ip2p\[ray\]'"):
        go(cluster=Cluster())


def test_a_stale_cluster_address_is_not_waited_for(ray, go, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    address_file = tmp_path / "ray" / "ray_current_cluster"
    address_file.parent.mkdir()

    def used_address(requested=""):
        go(folder=tmp_path / f"job-{len(ray.addresses)}", cluster=Cluster(address=requested))
        return ray.addresses[-1]

    assert used_address() is None
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        address_file.write_text(f"127.0.0.1:{port}")
        assert used_address() is None
    assert used_address() == "local"
    assert used_address("auto") == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert used_address() is None
    monkeypatch.delenv("RAY_ADDRESS")
    address_file.write_text("nonsense")
    assert used_address() is None
