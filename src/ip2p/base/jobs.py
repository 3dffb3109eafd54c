"""Run a stage over numbered parts into a folder, here or on Ray: killed at any time and gone on with.

A stage maps a part (some items) to tables. Each part's tables are written beside their places, synced,
renamed, and only then named with their checksums in the folder's `manifest.jsonl`, which is the only truth:
a part without a line there does not exist, whatever lies in the folder. Only the process that was called
writes; workers hand their tables to it, so that they need no disk in common.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import re
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, cast

from ip2p.base import terminal
from ip2p.base.errors import InputError, Ip2pError, ResourceError
from ip2p.base.files import make_folder, replacing

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.jsonl"
FORMAT = 1  # goes up when the lines change: older folders are then refused
ROWS_A_GROUP = 100  # a row may hold two pictures, and a reader takes a group whole
LOOK = 20  # seconds between two looks at what machines the cluster has
RETRIES = 3  # of one part, after the worker at it was lost


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a stage made of a part.

    tables: by the beginning of their names below the job's folder; "data/train" of part 7 is written as
    data/train-00007.parquet. Every part has the same tables, though one may have no rows. counts: numbers
    that add up over the parts, such as network evaluations, or refusals by reason.
    """

    tables: Mapping[str, pa.Table]
    counts: Mapping[str, float] = field(default_factory=dict)


class Stage(Protocol):
    """Loads what it needs in `__init__` and turns parts into tables; the same class runs here and on Ray.

    What it makes must follow from the part alone, not from what it was given before.
    """

    def __call__(self, part: Any) -> Made: ...


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Workers on Ray. address: of the cluster; "" takes RAY_ADDRESS, else starts one on this machine."""

    address: str = ""
    workers: int | None = None  # None: as many as fit
    cpus: float = 1  # a worker; Ray gives a worker as many threads
    gpus: float | None = None  # a worker; None: one if the cluster has any


@dataclass(frozen=True)
class Summary:
    """What lies in a job's folder. made: how many of the parts this run made; the rest is of all runs."""

    parts: int
    made: int
    rows: dict[str, int]  # of each table
    counts: dict[str, float]  # the sums of what the parts counted
    seconds: float  # that the stage took, over all workers


def run(
    stage: Callable[[], Stage],
    parts: Sequence[Any],
    folder: Path,
    *,
    settings: Mapping[str, Any],
    unit: str = "rows",
    cluster: Cluster | None = None,
    processes: int = 1,
    overwrite: bool | Literal["changed"] = False,
    beside: Collection[str] = ("run.json",),
    threads: int | None = None,
    say: Callable[[str], None] = terminal.say,
) -> Summary:
    """Have `stage()` make every part into `folder`, here or on a cluster; the same files result.

    Called again after it was stopped it makes the parts that are missing, or that were damaged since. A part
    is any value with a length, in `unit`s: a list of triples, a range of rows. `stage` makes the stage: a
    class, or `functools.partial(Class, ...)`; it is called once a worker, and not when nothing is to be
    done. settings: what decides the result, as JSON values: a hash of the input, models, seeds. They may not
    change while a job goes on. overwrite: begin anew; "changed": only if they did. beside: what may lie in a
    folder that is begun. processes: that work here, if there is no cluster; 1 is this one, and for more the
    stage must be picklable. threads: of torch, in each worker; on a CPU its number can change the last bits
    of a result, and Ray's default is another.

    Raises InputError for a folder that holds something else, that was begun with other settings, or that
    another process writes into, and without Ray; ResourceError for a full disk or a cluster that is too
    small or keeps losing workers; and what the stage raises. Whatever it raises, all that was committed
    stays.
    """
    make_folder(folder)
    head = {"format": FORMAT, **_plain(settings), "parts": len(parts)}
    with _opened(folder, head, overwrite=overwrite, beside=beside, say=say) as job:
        todo = [part for part in range(len(parts)) if part not in job.lines]
        if len(todo) < len(parts):
            say(f"{len(parts) - len(todo):,} of {len(parts):,} parts lie in {folder} already")
        if todo:
            work = _here(stage, parts, todo, threads)
            if cluster is not None:
                work = _on_ray(stage, parts, todo, cluster, threads)
            elif min(processes, len(todo)) > 1:
                work = _in_processes(stage, parts, todo, min(processes, len(todo)), threads)
            items = sum(len(parts[part]) for part in todo)
            with contextlib.closing(work), _progress(folder.name, items, unit) as advance:
                for part, made, seconds in work:
                    job.commit(part, made, seconds)
                    advance(len(parts[part]))
        job.finish()
        return _summary(job.lines, len(todo))


def check_folder(folder: Path, *, beside: Collection[str] = ("run.json",)) -> None:
    """Raise InputError for a folder that holds something else than a job, as `run` does when it begins."""
    if not folder.is_dir() or is_job(folder):
        return
    manifest = folder / MANIFEST
    # A killed run may have left a piece of the first line, before any table.
    begun = manifest.is_file() and b'{"job": '.startswith(manifest.read_bytes()[:8])
    known = (*beside, MANIFEST) if begun else beside
    if any(path.name not in known for path in folder.iterdir()):
        raise InputError(f"{folder} holds something else; choose another folder.")


def committed(folder: Path, table: str) -> list[Path]:
    """The files of a table that are committed, in the order of their parts, whether the job is done or not.

    Raises InputError for a folder that is no job's.
    """
    lines = _lines_of(folder)[1]
    names = (name for part in sorted(lines) for name in lines[part]["files"] if _stem(name) == table)
    return [folder / name for name in names]


def summary(folder: Path) -> Summary:
    """What lies in a job's folder. Raises InputError for a folder that is no job's."""
    head, lines = _lines_of(folder)
    return _summary(lines, 0, parts=head["parts"])


def settings(folder: Path) -> dict[str, Any]:
    """What decides the result of a job, as `run` was told. InputError for a folder that is no job's."""
    head = dict(_lines_of(folder)[0])
    del head["format"], head["parts"]
    return head


def is_job(folder: Path) -> bool:
    """Whether a folder is a job's."""
    try:
        return "job" in _rows((folder / MANIFEST).read_bytes())[0]
    except (OSError, IndexError):
        return False


def is_done(folder: Path) -> bool:
    """Whether all parts of a job are committed. Raises InputError for a folder that is no job's."""
    head, lines = _lines_of(folder)
    return len(lines) == head["parts"]


def damaged(folder: Path) -> list[str]:
    """The committed files that are gone or not as they were written, by their checksums; reads them all."""
    found = []
    for line in _lines_of(folder)[1].values():
        for name, (size, sha256) in line["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size or _sha256(path) != sha256:
                found.append(name)
    return found


# --- the manifest ---------------------------------------------------------------------------------


class _Job:
    """A folder whose manifest this process alone holds."""

    def __init__(self, folder: Path, file: IO[bytes]) -> None:
        self.folder, self.file = folder, file
        self.lines: dict[int, dict[str, Any]] = {}
        self.finished = False

    def append(self, row: Mapping[str, Any]) -> None:
        with self._told(self.folder / MANIFEST):
            left = memoryview(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            while left:  # unbuffered, so that none comes late; a full disk takes a piece
                left = left[self.file.write(left) :]
            os.fsync(self.file.fileno())

    def commit(self, part: int, made: Made, seconds: float) -> None:
        """Write the tables of a part, then its line."""
        import pyarrow.parquet as pq

        files: dict[str, tuple[int, str]] = {}
        for stem, table in made.tables.items():
            name = f"{stem}-{part:05}.parquet"
            path = self.folder / name
            with self._told(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    pq.write_table(table, temporary, row_group_size=ROWS_A_GROUP)
                    files[name] = (temporary.stat().st_size, _sha256(temporary))
        rows = {stem: table.num_rows for stem, table in made.tables.items()}
        line = {"part": part, "files": files, "rows": rows, "counts": dict(made.counts)}
        line["seconds"] = round(seconds, 3)
        self.append(line)
        self.lines[part] = line

    def finish(self) -> None:
        if not self.finished:
            self.append({"done": True})

    @contextlib.contextmanager
    def _told(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(
                    f"no space left on the disk of {path}; free some, and the same command goes on from "
                    f"the {len(self.lines):,} parts that are written."
                ) from None
            raise


@contextlib.contextmanager
def _opened(
    folder: Path,
    head: Mapping[str, Any],
    *,
    overwrite: bool | Literal["changed"],
    beside: Collection[str],
    say: Callable[[str], None],
) -> Iterator[_Job]:
    check_folder(folder, beside=beside)
    with open(folder / MANIFEST, "a+b", buffering=0) as file:
        hold(file, folder)
        file.seek(0)
        data = file.read() or b""
        # A line that was being written when the process was killed never counted.
        whole = data.rfind(b"\n") + 1
        rows = _rows(data[:whole])
        if rows and (overwrite is True or (overwrite and rows[0]["job"] != head)):
            _remove(folder)
            rows, whole = [], 0
        file.truncate(whole)
        job = _Job(folder, file)
        if rows:
            _same(folder, rows[0]["job"], head)
        else:
            job.append({"job": head})
        # What a killed run was writing (`files.replacing`).
        for pattern in (".*.parquet", "*/.*.parquet"):
            for half in folder.glob(pattern):
                half.unlink(missing_ok=True)
        for part, line in _parts(rows).items():
            if lost := [name for name, (size, _) in line["files"].items() if _size(folder / name) != size]:
                say(f"{folder / lost[0]} is gone or cut short; its part is made again")
            else:
                job.lines[part] = line
        job.finished = {"done": True} in rows
        yield job


def hold(file: IO[bytes], folder: Path) -> None:
    """Lock an open file of a folder for this process, until it is closed. InputError when another has it."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"another ip2p is writing into {folder}; wait for it, or choose another folder."
        ) from None


def _lines_of(folder: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    if not is_job(folder):
        raise InputError(f"{folder} holds no {MANIFEST} of a job. Name the folder that a stage wrote.")
    data = (folder / MANIFEST).read_bytes()
    rows = _rows(data[: data.rfind(b"\n") + 1])
    return rows[0]["job"], _parts(rows)


def _rows(data: bytes) -> list[dict[str, Any]]:
    rows = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):  # one that was damaged: its part is made again
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _parts(rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {row["part"]: row for row in rows if "part" in row}  # of two lines of a part the later counts


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from JSON, so that they compare."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))
    return plain


def _same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in dict.fromkeys([*now, *before]):
        if before.get(name) != now.get(name):
            one, two = (json.dumps(told.get(name), ensure_ascii=False) for told in (before, now))
            raise InputError(
                f"{folder} was begun with {name} {one}, and now it is {two}; "
                "add --overwrite, or choose another folder."
            )


def _remove(folder: Path) -> None:
    """Remove a job's tables, also those that a killed run had renamed and not yet named: readers glob."""
    for pattern in ("*.parquet", "*/*.parquet"):
        for path in folder.glob(pattern):
            if re.fullmatch(r"[^-]+-\d{5,}\.parquet", path.name):
                path.unlink(missing_ok=True)


def _summary(lines: Mapping[int, dict[str, Any]], made: int, parts: int | None = None) -> Summary:
    rows: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for _, line in sorted(lines.items()):  # in one order, so that sums of floats are the same
        rows.update(line["rows"])
        counts.update(line["counts"])
    seconds = sum(line["seconds"] for line in lines.values())
    return Summary(parts if parts is not None else len(lines), made, dict(rows), dict(counts), seconds)


def _stem(name: str) -> str:
    return name.rpartition("-")[0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- progress -------------------------------------------------------------------------------------


def pace(done: int, total: int, seconds: float, unit: str) -> str:
    """How fast it goes and what is left, in words: "12.5 rows/s, 3:20 left"; "" before anything is done."""
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    per, rate_told = ("s", rate) if rate >= 1 else ("min", rate * 60)
    told = f"{rate_told:,.0f} {unit}/{per}" if rate_told >= 100 else f"{rate_told:.3g} {unit}/{per}"
    left = round((total - done) / rate)
    hours, minutes = divmod(left // 60, 60)
    return f"{told}, {f'{hours}:{minutes:02}' if hours else minutes}:{left % 60:02} left"


@contextlib.contextmanager
def _progress(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, with its rate and the time left; silent without a terminal.

    `terminal.progress` estimates from the last seconds, in which a part of many minutes shows nothing.
    """
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        TextColumn("{task.fields[pace]}"),
    )
    begun, done = time.monotonic(), 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, pace="")

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.update(task, advance=count, pace=pace(done, total, time.monotonic() - begun, unit))

        yield advance


# --- workers --------------------------------------------------------------------------------------

Work = Generator[tuple[int, Made, float], None, None]  # part, what was made of it, seconds


def _here(stage: Callable[[], Stage], parts: Sequence[Any], todo: Sequence[int], threads: int | None) -> Work:
    worker = _Worker(stage, threads)
    for part in todo:
        made, seconds = worker.make(parts[part])
        yield part, made, seconds


class _Worker:
    """The stage in one process, loaded with its first part."""

    def __init__(self, stage: Callable[[], Stage], threads: int | None, folder: str | None = None) -> None:
        self.new, self.threads, self.folder = stage, threads, folder
        self.stage: Stage | None = None

    def make(self, part: Any) -> tuple[Made, float]:
        if self.stage is None:
            if self.threads is not None:
                import torch

                torch.set_num_threads(self.threads)
            self.stage = self.new()
        begun = time.monotonic()
        made = self.stage(part)
        return made, time.monotonic() - begun

    def begun(self) -> None:
        """Answers as soon as there was room for this worker."""

    def answer(self, part: Any) -> tuple[Made, float] | Ip2pError:
        """As `make`, on another machine. Errors of ours come back as values: Ray would wrap them."""
        if self.folder is not None:
            # So that relative paths mean what they meant to the command, where that folder is to be seen.
            with contextlib.suppress(OSError):
                os.chdir(self.folder)
        try:
            return self.make(part)
        except Ip2pError as error:
            return error


def _in_processes(
    stage: Callable[[], Stage], parts: Sequence[Any], todo: Sequence[int], count: int, threads: int | None
) -> Work:
    """Processes beside this one, each with one part at a time."""
    import multiprocessing
    from multiprocessing.connection import Connection, wait

    spawn = multiprocessing.get_context("spawn")  # a fork would share torch's threads and open files
    processes: dict[Connection, Any] = {}

    def begin() -> Connection:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(stage, threads, theirs), daemon=True)
        process.start()
        theirs.close()  # so that its end is told here
        processes[ours] = process
        return ours

    waiting = deque(todo)
    running: dict[Connection, int] = {}
    lost: Counter[int] = Counter()
    try:
        free = [begin() for _ in range(count)]
        while waiting or running:
            while waiting and free:
                part, worker = waiting.popleft(), free.pop()
                running[worker] = part
                with contextlib.suppress(OSError):  # it is gone, as is told below
                    worker.send(parts[part])
            for ready in wait(list(running)):
                worker = cast("Connection", ready)
                part = running.pop(worker)
                try:
                    answer = worker.recv()
                except (EOFError, OSError):
                    lost[part] += 1
                    if lost[part] > RETRIES:
                        raise ResourceError(
                            f"the processes at part {part} were lost {RETRIES + 1} times; there may be too "
                            "little memory for so many: try --workers 1. What is written stays, and the same "
                            "command goes on."
                        ) from None
                    processes.pop(worker).join()
                    waiting.appendleft(part)
                    free.append(begin())
                    continue
                if isinstance(answer, BaseException):
                    raise answer
                free.append(worker)
                yield part, *answer
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()


def _serve(stage: Callable[[], Stage], threads: int | None, connection: Any) -> None:
    """Make the parts that come, until none come any more."""
    import multiprocessing
    import threading
    import warnings

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)  # also in the middle of a part, which nobody waits for

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this one
    warnings.simplefilter("ignore")
    worker = _Worker(stage, threads)
    while True:
        try:
            part = connection.recv()
        except EOFError:
            return
        try:
            answer: Any = worker.make(part)
        except Exception as error:
            answer = error
        try:
            connection.send(answer)
        except (pickle.PicklingError, TypeError, AttributeError):
            connection.send(RuntimeError(repr(answer)))


def _on_ray(
    stage: Callable[[], Stage],
    parts: Sequence[Any],
    todo: Sequence[int],
    cluster: Cluster,
    threads: int | None,
) -> Work:
    """A pool of actors, each with one part at a time: a kill costs no more than one part a worker.

    A part is given to a worker that has begun: one for which there is no room, since a machine went or
    another program came, keeps none waiting. Machines that join meanwhile get workers.
    """
    with ray_of(cluster) as ray:
        count, resources = fitting(ray.nodes(), cluster, len(todo))
        actor = ray.remote(_Worker).options(max_restarts=0, **resources)
        waiting: deque[int] = deque(todo)
        free: deque[Any] = deque()
        pool: list[Any] = []
        running: dict[Any, tuple[int | None, Any]] = {}  # None: it is to say that it has begun
        lost: Counter[int | None] = Counter()
        looked = time.monotonic()

        def begin(count: int) -> None:
            for _ in range(count):
                worker = actor.remote(stage, threads, os.getcwd())
                pool.append(worker)
                running[worker.begun.remote()] = (None, worker)

        begin(count)
        try:
            while waiting or any(part is not None for part, _ in running.values()):
                while waiting and free:
                    given, worker = waiting.popleft(), free.popleft()
                    running[worker.answer.remote(parts[given])] = (given, worker)
                if waiting and time.monotonic() - looked > LOOK:
                    looked = time.monotonic()
                    wanted = cluster.workers or fits(ray.nodes(), cluster)
                    begin(min(wanted, len(waiting) + len(running)) - len(pool))
                found, _ = ray.wait(list(running), num_returns=1, timeout=LOOK)
                if not found:
                    continue
                part, worker = running.pop(found[0])
                try:
                    answer = ray.get(found[0])
                except ray.exceptions.RayActorError as error:
                    lost[part] += 1
                    if lost[part] > RETRIES * (count if part is None else 1):
                        what = "workers" if part is None else f"workers at part {part}"
                        raise ResourceError(
                            f"the {what} were lost {lost[part]} times ({_first_line(error)}); "
                            "give each more memory with fewer workers. What is written stays, and the same "
                            "command goes on."
                        ) from None
                    pool.remove(worker)
                    with contextlib.suppress(Exception):
                        ray.kill(worker)  # it may only have been out of reach
                    if part is not None:
                        waiting.appendleft(part)
                    begin(1)
                    continue
                except ray.exceptions.RayTaskError as error:
                    cause = getattr(error, "cause", None)
                    raise (cause if isinstance(cause, Exception) else error) from error
                except ray.exceptions.RayError as error:
                    # A worker that could not be started, a result lost with its machine, no memory.
                    raise ResourceError(
                        f"Ray gave up at part {part} ({_first_line(error)}). What is written stays, and the "
                        "same command goes on."
                    ) from None
                if isinstance(answer, Ip2pError):
                    raise answer
                free.append(worker)
                if part is not None:
                    del lost[None]
                    yield part, *answer
        finally:
            for each in pool:
                with contextlib.suppress(Exception):
                    ray.kill(each)


@contextlib.contextmanager
def ray_of(cluster: Cluster) -> Iterator[Any]:
    """Ray, connected; what was started here is stopped at the end."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        import ray
    except ImportError:
        raise InputError("--ray needs Ray, which is missing; install it: pip install 'ip2p[ray]'") from None
    ours = not ray.is_initialized()
    try:
        if ours:
            address = _address(cluster)
            try:
                ray.init(address=address, log_to_driver=False, logging_level="warning")
            except ConnectionError:
                told = address or os.environ.get("RAY_ADDRESS", "")
                raise ResourceError(
                    f"no Ray cluster answers at {told}; start one: ray start --head, "
                    "or leave the address out."
                ) from None
            except Exception as error:  # such as a machine that is too busy to start it within half a minute
                raise ResourceError(
                    f"Ray does not start ({_first_line(error)}). What is written stays, and the same command "
                    "goes on."
                ) from error
        # Ray takes SIGTERM for itself as it is imported, and would end without unwinding to our exit code.
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, handler)
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _address(cluster: Cluster) -> str | None:
    """For `ray.init`, which without one joins the cluster that was last started on this machine, if any.

    It keeps looking for one that was killed or that a restart of the machine ended: for minutes, then fails.
    """
    if cluster.address or os.environ.get("RAY_ADDRESS"):
        return cluster.address or None
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        host, _, port = Path(folder, "ray", "ray_current_cluster").read_text().strip().rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (FileNotFoundError, ValueError):
        return None
    except OSError:
        return "local"
    return None


Nodes = Sequence[Mapping[str, Any]]  # machines, as `ray.nodes()` tells them


def fitting(nodes: Nodes, cluster: Cluster, parts: int) -> tuple[int, dict[str, float]]:
    """How many workers, and what each asks of Ray. ResourceError when not one, or not all wanted, fit."""
    needs = _needs(nodes, cluster)
    there = fits(nodes, cluster)
    wanted = max(1, there) if cluster.workers is None else cluster.workers
    if there < wanted:
        # It would wait for them without end.
        short = ", ".join(f"{need:g} {kind}" for kind, need in needs.items() if need)
        found = ", ".join(f"{_sum(nodes, kind):g} {kind}" for kind, need in needs.items() if need)
        raise ResourceError(
            f"{wanted} workers of {short} each do not fit into the cluster's {found}; {there} would. "
            "Ask for fewer, or add machines: ray start --address HEAD:6379"
        )
    return min(wanted, parts), {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"]}


def fits(nodes: Nodes, cluster: Cluster) -> int:
    """How many workers there is room for, machine by machine."""
    needs = _needs(nodes, cluster)
    room = 0
    for node in _alive(nodes):
        there = node["Resources"]
        each = [math.floor(there.get("CPU", 0) / needs["CPU"] + 1e-9)] if needs["CPU"] else []
        if gpus := needs["GPU"]:
            whole = int(there.get("GPU", 0))
            # A part of a GPU is of one GPU.
            shares = whole * math.floor(1 / gpus + 1e-9) if gpus < 1 else math.floor(whole / gpus)
            each.append(shares)
        room += min(each, default=0)
    return room


def _needs(nodes: Nodes, cluster: Cluster) -> dict[str, float]:
    gpus = cluster.gpus if cluster.gpus is not None else float(_sum(nodes, "GPU") >= 1)
    return {"CPU": cluster.cpus, "GPU": gpus}


def _sum(nodes: Nodes, kind: str) -> float:
    return float(sum(node["Resources"].get(kind, 0) for node in _alive(nodes)))


def _alive(nodes: Nodes) -> list[Mapping[str, Any]]:
    return [node for node in nodes if node.get("Alive")]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
