"""Run a stage over numbered parts into a folder, here or on Ray. It can be killed at any point and resumed.

A stage maps a part (some items) to tables. Workers send their tables to the calling process, so they need no
shared disk; only that process writes, through the `ledger`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ip2p.base import terminal
from ip2p.base.cluster import Cluster, work_on_ray
from ip2p.base.errors import InputError
from ip2p.base.files import make_folder
from ip2p.base.ledger import MANIFEST, Files, Ledger, Line, check_free, is_kind, open_ledger
from ip2p.base.work import work_here, work_in_processes

if TYPE_CHECKING:
    import pyarrow as pa

KIND = "job"
FORMAT = 1  # goes up when the lines change: older folders are then refused
ROWS_A_GROUP = 100  # a row may hold two pictures, and a reader takes a group whole
BESIDE = ("run.json",)  # what may be in a folder before its job begins


@dataclass(frozen=True, kw_only=True)
class StageOutput:
    """What a stage made of a part.

    tables: by the first part of their file names in the job's folder; "data/train" of part 7 is written as
    data/train-00007.parquet. Every part has the same tables, though some may have no rows. counts: numbers
    that are summed over the parts, such as network evaluations, or rejections by reason.
    """

    tables: Mapping[str, pa.Table]
    counts: Mapping[str, float] = field(default_factory=dict)


class Stage(Protocol):
    """Loads what it needs in `__init__` and turns parts into tables; the same class runs here and on Ray.

    Its result must depend on the part alone, not on earlier parts.
    """

    def __call__(self, part: Any) -> StageOutput: ...


@dataclass(frozen=True)
class Summary:
    """The state of a job's folder. made: how many parts this run made; the rest is over all runs."""

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
    beside: Collection[str] = BESIDE,
    threads: int | None = None,
    say: Callable[[str], None] = terminal.say,
) -> Summary:
    """Have `stage()` make every part into `folder`, here or on a cluster, with the same files as the result.

    Called again after it was stopped, it makes the parts that are missing or truncated. A part is any value
    with a length, counted in `unit`s: a list of triples, a range of rows. stage: a class, or
    `functools.partial(Class, ...)`; called once in each worker, and not at all if nothing is left to do.
    settings: what determines the result, as JSON values: a hash of the input, models, seeds. They must be
    the same on resume. overwrite: begin again; "changed": only if they changed. beside: names of files that
    may be in the folder before the job begins. processes: how many work here, if there is no cluster; 1 is
    this process, and for more the stage must be picklable. threads: of torch, in each worker; on a CPU their
    number can change the last bits of a result, and Ray's default is different.

    Raises InputError for a folder that holds something else, was begun with other settings, or is locked by
    another process, and if Ray is missing; ResourceError for a full disk, or a cluster that is too small or
    keeps losing workers; and what the stage raises. What was committed always stays.
    """
    make_folder(folder)
    # As they come back from JSON, so that they compare.
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))
    head = {"format": FORMAT, **plain, "parts": len(parts)}
    with open_ledger(
        folder, KIND, head, remove=_remove, overwrite=overwrite, beside=beside, say=say
    ) as ledger:
        todo = [part for part in range(len(parts)) if part not in ledger.done]
        if len(todo) < len(parts):
            say(f"{len(parts) - len(todo):,} of {len(parts):,} parts lie in {folder} already")
        if todo:
            if cluster is not None:
                work = work_on_ray(stage, parts, todo, cluster, threads)
            elif min(processes, len(todo)) > 1:
                work = work_in_processes(stage, parts, todo, min(processes, len(todo)), threads)
            else:
                work = work_here(stage, parts, todo, threads)
            items = sum(len(parts[part]) for part in todo)
            with contextlib.closing(work), terminal.progress(folder.name, items, unit) as advance:
                for part, made, seconds in work:
                    _commit(ledger, part, made, seconds)
                    advance(len(parts[part]))
        ledger.finish()
        return _summary(ledger, len(todo))


def _commit(ledger: Ledger, part: int, made: StageOutput, seconds: float) -> None:
    """Write the tables of a part, then its line."""
    import pyarrow.parquet as pq

    files: Files = {}
    for stem, table in made.tables.items():
        with ledger.write(f"{stem}-{part:05}.parquet", files) as temporary:
            pq.write_table(table, temporary, row_group_size=ROWS_A_GROUP)
    rows = {stem: table.num_rows for stem, table in made.tables.items()}
    line = {"part": part, "files": files, "rows": rows, "counts": dict(made.counts)}
    ledger.append(line | {"seconds": round(seconds, 3)})


def _remove(folder: Path) -> None:
    """Remove a job's tables, also those that a killed run renamed but did not commit: readers glob."""
    for pattern in ("*.parquet", "*/*.parquet"):
        for path in folder.glob(pattern):
            if re.fullmatch(r"[^-]+-\d{5,}\.parquet", path.name):
                path.unlink(missing_ok=True)


# --- the state of a folder ------------------------------------------------------------------------


def is_job(folder: Path) -> bool:
    """Whether a folder holds a job."""
    return is_kind(folder, KIND)


def check_folder(folder: Path, *, beside: Collection[str] = BESIDE) -> None:
    """Raise InputError for a folder that holds anything but a job, as `run` does when it begins."""
    check_free(folder, KIND, beside=beside)


def committed(folder: Path, table: str) -> list[Path]:
    """The committed files of a table in the order of their parts, whether the job is done or not.

    Raises InputError if the folder holds no job.
    """
    done = _read(folder).done
    names = (name for part in sorted(done) for name in done[part]["files"])
    return [folder / name for name in names if name.rpartition("-")[0] == table]


def summary(folder: Path) -> Summary:
    """The state of a job's folder. Raises InputError if the folder holds no job."""
    return _summary(_read(folder), 0)


def settings(folder: Path) -> dict[str, Any]:
    """The settings that `run` was called with. Raises InputError if the folder holds no job."""
    return {name: value for name, value in _head(_read(folder)).items() if name not in ("format", "parts")}


def is_done(folder: Path) -> bool:
    """Whether all parts of a job are committed. Raises InputError if the folder holds no job."""
    ledger = _read(folder)
    return len(ledger.done) == _head(ledger)["parts"]


def damaged(folder: Path) -> list[str]:
    """The committed files that are missing or changed. Reads and hashes all of them."""
    return _read(folder).damaged()


def _read(folder: Path) -> Ledger:
    if not is_job(folder):
        raise InputError(f"{folder} holds no {MANIFEST} of a job. Name the folder that a stage wrote.")
    return Ledger(folder)


def _head(ledger: Ledger) -> Line:
    head: Line = ledger.lines[0][KIND]
    return head


def _summary(ledger: Ledger, made: int) -> Summary:
    rows: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    lines = [line for _, line in sorted(ledger.done.items())]  # in one order: sums of floats are the same
    for line in lines:
        rows.update(line["rows"])
        counts.update(line["counts"])
    seconds = sum(line["seconds"] for line in lines)
    return Summary(_head(ledger)["parts"], made, dict(rows), dict(counts), seconds)
