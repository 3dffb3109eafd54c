"""Run a stage over numbered parts into a folder, locally or on Ray. Jobs can be killed and resumed.

A stage maps a part (a batch of items) to tables. Workers send their tables to the calling process, so they
need no shared disk; only that process writes, through the `ledger`.
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
from ip2p.base.work import work_in_processes, work_in_this_process

if TYPE_CHECKING:
    import pyarrow as pa

KIND = "job"
FORMAT = 1  # increases when the lines change; folders of another format are refused
ROWS_A_GROUP = 100  # a row may hold two pictures, and readers load whole groups
BESIDE = ("run.json",)  # files that may be in a folder before its job starts


@dataclass(frozen=True, kw_only=True)
class StageOutput:
    """The output of a stage for one part.

    tables: by the stem of their file names in the job's folder; "data/train" of part 7 is written to
    data/train-00007.parquet. Every part has the same tables, possibly without rows. counts: numbers that are
    summed over the parts, such as network evaluations, or rejections by reason.
    """

    tables: Mapping[str, pa.Table]
    counts: Mapping[str, float] = field(default_factory=dict)


class Stage(Protocol):
    """Loads its models in `__init__` and turns parts into tables; the same class runs locally and on Ray.

    The output must depend on the part alone, not on earlier parts.
    """

    def __call__(self, part: Any) -> StageOutput: ...


@dataclass(frozen=True)
class Summary:
    """The state of a job's folder. made: the number of parts this run made; the rest covers all runs."""

    parts: int
    made: int
    rows: dict[str, int]  # per table
    counts: dict[str, float]  # summed over the parts
    seconds: float  # spent in the stage, summed over all workers


def run_job(
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
    """Run the stage over every part and write the outputs into `folder`. The files do not depend on where.

    After an interruption, the same call makes the parts that are missing or truncated. A part is any value
    with a length, counted in `unit`s: a list of triples, a range of rows. stage: a class, or
    `functools.partial(Class, ...)`; called once in each worker, and not at all if nothing is left to do.
    settings: everything that determines the result, as JSON values: a hash of the input, models, seeds. They
    must be the same on resume. overwrite: start over; "changed": only if they changed. beside: names of files
    that may be in the folder before the job starts. processes: the number of local processes if there is no
    cluster; 1 means this process, and for more the stage must be picklable. threads: torch threads per
    worker; on a CPU their number can change the last bits of a result, and Ray's default is different.

    Raises InputError if the folder contains other files, was started with other settings, or is locked by
    another process, and if Ray is missing; ResourceError for a full disk, or a cluster that is too small or
    keeps losing workers; and any error of the stage. Committed parts are always kept.
    """
    make_folder(folder)
    # Convert to JSON and back, so that they compare equal to what is read.
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))
    head = {"format": FORMAT, **plain, "parts": len(parts)}
    with open_ledger(
        folder, KIND, head, remove=_remove, overwrite=overwrite, beside=beside, say=say
    ) as ledger:
        todo = [part for part in range(len(parts)) if part not in ledger.done]
        if len(todo) < len(parts):
            say(f"{len(parts) - len(todo):,} of {len(parts):,} parts already exist in {folder}")
        if todo:
            if cluster is not None:
                outputs = work_on_ray(stage, parts, todo, cluster, threads)
            elif min(processes, len(todo)) > 1:
                outputs = work_in_processes(stage, parts, todo, min(processes, len(todo)), threads)
            else:
                outputs = work_in_this_process(stage, parts, todo, threads)
            items = sum(len(parts[part]) for part in todo)
            with contextlib.closing(outputs), terminal.progress(folder.name, items, unit) as advance:
                for part, output, seconds in outputs:
                    _commit(ledger, part, output, seconds)
                    advance(len(parts[part]))
        ledger.finish()
        return _summary(ledger, len(todo))


def _commit(ledger: Ledger, part: int, output: StageOutput, seconds: float) -> None:
    """Write the tables of a part, then its line."""
    import pyarrow.parquet as pq

    files: Files = {}
    for stem, table in output.tables.items():
        with ledger.write(f"{stem}-{part:05}.parquet", files) as temporary:
            pq.write_table(table, temporary, row_group_size=ROWS_A_GROUP)
    rows = {stem: table.num_rows for stem, table in output.tables.items()}
    line = {"part": part, "files": files, "rows": rows, "counts": dict(output.counts)}
    ledger.append(line | {"seconds": round(seconds, 3)})


def _remove(folder: Path) -> None:
    """Remove a job's tables, including files that a killed run did not commit: readers glob."""
    for pattern in ("*.parquet", "*/*.parquet"):
        for path in folder.glob(pattern):
            if re.fullmatch(r"[^-]+-\d{5,}\.parquet", path.name):
                path.unlink(missing_ok=True)


# --- the state of a folder ------------------------------------------------------------------------


def is_job(folder: Path) -> bool:
    """Whether a folder holds a job."""
    return is_kind(folder, KIND)


def check_folder(folder: Path, *, beside: Collection[str] = BESIDE) -> None:
    """Raise InputError for a folder that holds anything but a job, as `run_job` does at its start."""
    check_free(folder, KIND, beside=beside)


def committed(folder: Path, table: str) -> list[Path]:
    """The committed files of a table in the order of their parts, of a finished or unfinished job.

    Raises InputError if the folder holds no job.
    """
    done = _read(folder).done
    names = (name for part in sorted(done) for name in done[part]["files"])
    return [folder / name for name in names if name.rpartition("-")[0] == table]


def summary(folder: Path) -> Summary:
    """The state of a job's folder. Raises InputError if the folder holds no job."""
    return _summary(_read(folder), 0)


def settings(folder: Path) -> dict[str, Any]:
    """The settings that `run_job` was called with. Raises InputError if the folder holds no job."""
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
        raise InputError(f"{folder} holds no {MANIFEST} of a job. Give a folder that a stage wrote.")
    return Ledger(folder)


def _head(ledger: Ledger) -> Line:
    head: Line = ledger.lines[0][KIND]
    return head


def _summary(ledger: Ledger, made: int) -> Summary:
    rows: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    lines = [line for _, line in sorted(ledger.done.items())]  # a fixed order keeps float sums equal
    for line in lines:
        rows.update(line["rows"])
        counts.update(line["counts"])
    seconds = sum(line["seconds"] for line in lines)
    return Summary(_head(ledger)["parts"], made, dict(rows), dict(counts), seconds)
