"""Public benchmarks, for data that the user downloads: how to read each, and its metrics.

docs/evaluate.md lists the faults of each public evaluator, which the `published` metrics reproduce.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ip2p.base.errors import InputError
from ip2p.evaluation.benchmarks import emu_edit, gedit, imgedit, magicbrush, pie
from ip2p.evaluation.metrics import Metric
from ip2p.evaluation.rows import EvalRow, ListedRows

if TYPE_CHECKING:
    from ip2p.evaluation.run import Protocol
    from ip2p.evaluation.settings import EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How to read and measure a benchmark.

    read: returns the records at a path; its second argument is `--as-published`. make: turns a record into a
    row. metrics: of the corrected protocol. published_metrics: of the public evaluator; `published` defines
    those that only it has. by_kind: see `Protocol`.
    """

    read: Callable[[Path, bool], Sequence[Any]]
    make: Callable[[Any], EvalRow]
    metrics: tuple[str, ...]
    published_metrics: tuple[str, ...]
    published: dict[str, Metric] = field(default_factory=dict)
    by_kind: bool = False


_MAGICBRUSH = Benchmark(
    read=magicbrush.read_turns,
    make=magicbrush.make_magicbrush_row,
    metrics=magicbrush.METRICS,
    published_metrics=magicbrush.PUBLISHED_METRICS,
    published=magicbrush.PUBLISHED,
)
BENCHMARKS = {
    "magicbrush": _MAGICBRUSH,
    "magicbrush-multi": replace(_MAGICBRUSH, read=magicbrush.read_sessions),
    "emu-edit": Benchmark(
        read=emu_edit.read_rows_of,
        make=emu_edit.make_emu_row,
        metrics=emu_edit.METRICS,
        published_metrics=emu_edit.PUBLISHED_METRICS,
        published=emu_edit.PUBLISHED,
    ),
    "pie": Benchmark(
        read=pie.read_mapping,
        make=pie.make_pie_row,
        metrics=pie.METRICS,
        published_metrics=tuple(pie.PUBLISHED),
        published=pie.PUBLISHED,
    ),
    "gedit": Benchmark(
        read=gedit.read_gedit_edits,
        make=gedit.make_gedit_row,
        metrics=("clip_image", "l1_input"),
        published_metrics=(),
        by_kind=True,
    ),
    "imgedit": Benchmark(
        read=imgedit.read_imgedit_edits,
        make=imgedit.make_imgedit_row,
        metrics=("clip_image", "l1_input"),
        published_metrics=(),
        by_kind=True,
    ),
}


def open_benchmark(config: EvaluateConfig) -> tuple[ListedRows, Protocol]:
    """The rows and the protocol of the benchmark. Raises InputError for data in another layout."""
    from ip2p.data.columns import stamp
    from ip2p.evaluation.run import Protocol

    assert config.benchmark is not None
    benchmark, path = BENCHMARKS[config.benchmark], Path(config.data).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist; download the benchmark and pass the path of its files.")
    records = benchmark.read(path, config.as_published)
    if not records:
        raise InputError(f"{path} has no rows of {config.benchmark}; see docs/evaluate.md for the layout.")
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    key = stamp(files, config.benchmark, config.as_published)
    source = ListedRows(config.benchmark, key, records, benchmark.make, config.count)
    usual = benchmark.published_metrics if config.as_published else benchmark.metrics
    return source, Protocol(
        metrics=config.metric_names or usual,
        benchmark=config.benchmark,
        by_kind=benchmark.by_kind,
        judged=config.judge is not None,
    )
