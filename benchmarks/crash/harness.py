"""Kill a command at random times, call it again, and compare the result with an undisturbed run's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import ENVIRONMENT, PATIENCE, ROOT, Failed, Process, mount_disk, must, on_small_disk

WORKERS = 2
HERE = ("--workers", "1")
# Ray lowers the priority of its workers and gives up on slow starts, which a busy machine cannot have.
RAY = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),  # where its workers find `Noting`
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
    "RAY_worker_register_timeout_seconds": "600",
}
NOTES = "notes.jsonl"  # beside an output: which process began a shard, in which run
UNITS = ("part", "name")  # a manifest's line with one of these commits something
BOOKS = ("manifest.jsonl", "run.json")  # these hold times and paths, so they differ between runs


def plain_files(output: Path) -> dict[str, str]:
    """The checksum of every file below the output but manifests and settings."""
    roots = [path for path in (output, output.with_suffix(".parts")) if path.exists()]
    files = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*"))]
    return {
        str(path.relative_to(output.parent)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
        if path.is_file() and path.name not in BOOKS and not path.name.endswith(".lock")
    }


def listed_units(output: Path) -> Counter[str]:
    """How often the manifests of an output list each unit: a shard, or a picture."""
    found: Counter[str] = Counter()
    for root in (output, output.with_suffix(".parts")):
        for manifest in root.rglob("manifest.jsonl") if root.is_dir() else ():
            data = manifest.read_bytes()
            for row in map(json.loads, data[: data.rfind(b"\n") + 1].splitlines()):
                units = [f"{manifest.parent.name} {key} {row[key]}" for key in UNITS if key in row]
                found.update(units[:1])
    return found


@dataclass(frozen=True, kw_only=True)
class Target:
    """A command to kill.

    words: its words for (root, output). output: the output's name. ways: the trials that make sense for it.
    result: everything that must be equal to an undisturbed run's. committed: how often each unit of work is
    listed as done. notes: its shards run as stages, which note their start. disk: bytes of the small disk,
    from an undisturbed output; None for half of what was written.
    """

    name: str
    words: Callable[[Path, Path], list[str]]
    output: str
    ways: tuple[str, ...]
    result: Callable[[Path], dict[str, Any]] = plain_files
    committed: Callable[[Path], Counter[str]] = listed_units
    notes: bool = False
    more: tuple[str, ...] = ()
    disk: Callable[[Path], int] | None = None


class Noting:
    """A stage that notes each shard that it begins, and in which process."""

    def __init__(self, stage: Callable[[], Any], notes: str, run: int) -> None:
        self.notes, self.run = notes, run
        self.stage = stage()

    def __call__(self, shard: Any) -> Any:
        line = json.dumps({"run": self.run, "pid": os.getpid(), "begun": repr(shard[0])[:80]}) + "\n"
        file = os.open(self.notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, line.encode())
        os.close(file)
        return self.stage(shard)


def run_noting(notes: Path, run: int, words: list[str]) -> int:
    """Run the `ip2p` command with `words`; its stages note what they begin."""
    from ip2p.base import jobs
    from ip2p.cli import main as cli

    plain = jobs.run_job

    def noting(stage: Callable[[], Any], *rest: Any, **more: Any) -> Any:
        return plain(partial(Noting, stage, str(notes), run), *rest, **more)

    jobs.run_job = noting  # type: ignore[assignment]
    return cli.main(words)


@dataclass
class Runs:
    """The runs of a target into one output. `folder` has the notes, and the output unless `disk` has it."""

    root: Path
    target: Target
    folder: Path
    more: tuple[str, ...] = ()
    disk: Path | None = None
    count: int = 0

    @property
    def output(self) -> Path:
        return (self.disk or self.folder) / self.target.output

    def start(self, *more: object) -> Process:
        self.folder.mkdir(exist_ok=True)
        self.count += 1
        words = [*self.target.words(self.root, self.output), *self.more, *map(str, more)]
        main = partial(run_noting, self.folder / NOTES, self.count, words)
        return Process(main, self.folder / f"messages-{self.count}.txt")

    def run(self, *more: object, code: int = 0) -> str:
        return self.start(*more).finish(code)

    def begun(self) -> list[dict[str, Any]]:
        """The notes of all runs."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / NOTES).read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]
        return []

    def done(self) -> int:
        return len(self.target.committed(self.output))

    def moves(self) -> int:
        """A number that grows while the command works."""
        return len(self.begun()) if self.target.notes else self.done()


@dataclass(frozen=True)
class Undisturbed:
    """An undisturbed run: its result, its units of work, and seconds before and after its first unit."""

    result: dict[str, Any]
    units: int
    startup: float
    work: float
    output: Path


@dataclass
class Bench:
    """The inputs of all targets, and their undisturbed runs."""

    root: Path
    kills: int
    random: random.Random
    known: dict[str, Undisturbed] = field(default_factory=dict)
    ray: subprocess.Popen[str] | None = None
    address: str | None = None

    def runs(self, target: Target, name: str, way: str = "kills", disk: Path | None = None) -> Runs:
        more = target.more
        if target.notes:
            more += HERE if way == "kills" else ("--workers", str(WORKERS))
            if way in ("driver", "worker"):
                more = (*target.more, "--ray", self.start_ray())
        return Runs(self.root, target, self.root / f"{target.name}-{name}", more, disk)

    def undisturbed(self, target: Target) -> Undisturbed:
        if target.name not in self.known:
            runs = self.runs(target, "undisturbed")
            process, started = runs.start(), time.monotonic()
            process.wait_for(runs.moves, "its first unit of work")
            startup = time.monotonic() - started
            process.finish()
            work = time.monotonic() - started - startup
            found = Undisturbed(target.result(runs.output), runs.done(), startup, work, runs.output)
            must(found.units >= 3, f"{found.units} units of work are too few to try anything")
            print(
                f"{target.name}, undisturbed: {found.units} units, {len(found.result)} files or tensors, "
                f"{startup:.1f} s to the first, then {work:.1f} s",
                flush=True,
            )
            self.known[target.name] = found
        return self.known[target.name]

    def compare(self, runs: Runs) -> int:
        """Units of work. Raises Failed if the result differs or a unit is listed twice."""
        expected, found = self.undisturbed(runs.target).result, runs.target.result(runs.output)
        lost, new = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        must(not lost and not new, f"missing: {lost[:3]}, unexpected: {new[:3]}")
        differ = [name for name in expected if expected[name] != found[name]]
        must(not differ, f"other bytes: {differ[:3]}")
        units = runs.target.committed(runs.output)
        must(max(units.values()) == 1, f"committed twice: {units.most_common(3)}")
        return len(units)

    def start_ray(self) -> str:
        if self.address is None:
            self.ray = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.crash", "--cluster"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=os.environ | ENVIRONMENT | RAY,
            )
            assert self.ray.stdout is not None
            self.address = self.ray.stdout.readline().strip() or None
        must(self.address, "Ray does not start")
        return str(self.address)

    def stop_ray(self) -> None:
        if self.ray is not None:
            with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
                self.ray.communicate(timeout=60)
            if self.ray.poll() is None:
                self.ray.kill()


def run_cluster() -> int:
    """Run Ray on this machine until stdin ends; its address goes to stdout."""
    import ray
    from ray._private import services

    ask, until = services.get_node, time.monotonic() + PATIENCE

    def asking(*words: Any) -> Any:
        """Ray allows itself 30 seconds to start, which is too little on a busy machine."""
        while True:
            try:
                return ask(*words)
            except RuntimeError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    services.get_node = asking
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "warning"}
    ray.init("local", num_cpus=WORKERS, **quiet)
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()
    return 0


# --- the trials -----------------------------------------------------------------------------------


def kill_commands(bench: Bench, target: Target, way: str) -> Iterator[str]:
    """Kill the command at random times: half of them in its start-up, half while it works."""
    usual = bench.undisturbed(target)
    workers = 1 if way == "kills" else WORKERS
    killed = ended = repeated = made = 0
    runs = bench.runs(target, f"{way}-0", way)
    while killed < bench.kills:
        moves, begun, done = runs.moves(), len(runs.begun()), runs.done()
        process = runs.start()
        phase = "work" if killed % 2 else "start-up"
        pause = bench.random.uniform(0, usual.startup)
        if phase == "work":
            moved = lambda: runs.moves() > moves or process.poll() is not None  # noqa: E731, B023
            process.wait_for(moved, "a unit of work")
            pause = bench.random.uniform(0, usual.work / 3)
        if not process.ends_within(pause):
            process.kill()
            killed += 1
            line = (
                f"{target.name}, {way}: kill {killed} in {phase}, {pause:.2f} s in; {runs.done()} committed"
            )
            if target.notes:
                lost = (len(runs.begun()) - begun) - (runs.done() - done)
                must(lost <= workers, f"{lost} shards were made in vain by {workers} workers")
                repeated += lost
                line += f", {lost} begun in vain"
            yield line
            continue
        process.finish()
        made += bench.compare(runs)  # it was quicker than the kill
        ended += 1
        runs = bench.runs(target, f"{way}-{ended}", way)
    runs.run()
    made += bench.compare(runs)
    vain = f"; {made + repeated} begun for {made}" if target.notes else ""
    yield (
        f"{target.name}, {way}: HOLDS. {killed} kills in {ended + 1} outputs: {usual.units} units each, "
        f"none lost, none doubled, all bytes equal{vain}"
    )


def kill_workers(bench: Bench, target: Target, way: str) -> Iterator[str]:
    """Kill workers, of this machine or the cluster, at random times while the command goes on."""
    from ip2p.base.work import RETRIES

    usual = bench.undisturbed(target)
    killed = number = repeated = made = 0
    while killed < bench.kills:
        runs = bench.runs(target, f"{way}-{number}", way)
        process = runs.start()
        dead: set[int] = set()
        hit: Counter[str] = Counter()
        seen = 0
        while killed < bench.kills and process.poll() is None:
            # A worker notes each shard it begins; then up to the time of two shards passes.
            noted = lambda: len(runs.begun()) > seen or process.poll() is not None  # noqa: E731, B023
            process.wait_for(noted, "a shard")
            if process.ends_within(bench.random.uniform(0, 2 * usual.work / usual.units)):
                break
            seen = len(runs.begun())
            alive = {note["pid"]: note["begun"] for note in runs.begun() if note["pid"] not in dead}
            alive.pop(process.pid, None)  # the command itself
            # A shard that loses its worker too often ends the job, as it should.
            alive = {pid: shard for pid, shard in alive.items() if hit[shard] < RETRIES}
            if not alive:
                continue
            pid = bench.random.choice(sorted(alive))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                hit[alive[pid]] += 1
                killed += 1
                yield f"{target.name}, {way}: kill {killed}, process {pid}; {runs.done()} committed"
            dead.add(pid)
        process.finish()
        units = bench.compare(runs)
        vain = len(runs.begun()) - units
        must(vain <= len(dead), f"{vain} shards were made in vain after {len(dead)} kills")
        made, repeated, number = made + units, repeated + vain, number + 1
    yield (
        f"{target.name}, {way}: HOLDS. {killed} kills in {number} runs: {usual.units} units each, none lost, "
        f"none doubled, all bytes equal; {made + repeated} begun for {made}"
    )


def stop_command(bench: Bench, target: Target, way: str) -> Iterator[str]:
    """SIGTERM: exit 143, nothing half-written; the same command goes on."""
    bench.undisturbed(target)
    runs = bench.runs(target, way)
    process = runs.start()
    process.wait_for(runs.moves, "its first unit of work")
    process.send(signal.SIGTERM)
    messages = process.finish(143)
    must("Traceback" not in messages, messages)
    must(not half_written(runs.output), f"half-written: {half_written(runs.output)}")
    done = runs.done()
    runs.run()
    bench.compare(runs)
    yield f"{target.name}, {way}: HOLDS. exit 143 with {done} units committed; resumed, all bytes equal"


def start_twice(bench: Bench, target: Target, way: str) -> Iterator[str]:
    """A second command in the same folder exits 2 and leaves the first undisturbed."""
    bench.undisturbed(target)
    first = bench.runs(target, way)
    process = first.start()
    process.wait_for(first.moves, "its first unit of work")
    process.send(signal.SIGSTOP)  # so that it does not end before the second one looks
    try:
        messages = first.run(code=2)
    finally:
        process.send(signal.SIGCONT)
    must("another" in messages, f"the reason is not named: {messages}")
    process.finish()
    bench.compare(first)
    yield f"{target.name}, {way}: HOLDS. the second exits 2; the first ends with all bytes equal"


def half_written(output: Path) -> list[Path]:
    """Temporary files that should have been removed; locks are none."""
    roots = [path for path in (output, output.with_suffix(".parts")) if path.is_dir()]
    files = [path for root in roots for path in root.rglob(".*") if path.is_file()]
    return [path for path in files if not path.name.endswith(".lock")]


def fill_disk(bench: Bench, target: Target, way: str) -> Iterator[str]:
    """Run on a disk that is too small: exit 4, what is committed stays; it goes on when there is space."""
    usual = bench.undisturbed(target)
    files = [usual.output, usual.output.with_suffix(".parts")]
    every = [path for root in files for path in ([root] if root.is_file() else root.rglob("*"))]
    # In pages of 4 KiB, as a tmpfs counts.
    written = sum(-(-path.stat().st_size // 4096) * 4096 for path in every if path.is_file())
    size = target.disk(usual.output) if target.disk else written // 2
    yield from on_small_disk("-m", "benchmarks.crash", "--on-small-disk", bench.root, target.name, size)


def on_disk(bench: Bench, target: Target, size: int) -> None:
    """Inside the mount namespace of `fill_disk`."""
    runs = bench.runs(target, "undisturbed")
    bench.known[target.name] = Undisturbed(target.result(runs.output), runs.done(), 0.0, 0.0, runs.output)
    disk = bench.root / f"{target.name}-disk"
    mount_disk(disk, size)
    runs = bench.runs(target, "full-disk", disk=disk)
    messages = runs.run(code=4)
    must("space" in messages and "Traceback" not in messages, f"not a plain message: {messages}")
    must(not half_written(runs.output), f"half-written: {half_written(runs.output)}")
    done = runs.done()
    mount_disk(disk, 20 * size, again=True)
    runs.run()
    bench.compare(runs)
    print(
        f"{target.name}, full-disk: HOLDS. exit 4 with {done} units committed, nothing half-written; with "
        "space again all bytes are equal"
    )


Trial = Callable[[Bench, Target, str], Iterator[str]]
WAYS: dict[str, Trial] = {
    "kills": kill_commands,
    "processes": kill_commands,
    "process": kill_workers,
    "driver": kill_commands,
    "worker": kill_workers,
    "full-disk": fill_disk,
    "sigterm": stop_command,
    "two": start_twice,
}
__all__ = ["WAYS", "Bench", "Failed", "Runs", "Target", "Trial", "on_disk", "run_cluster"]
