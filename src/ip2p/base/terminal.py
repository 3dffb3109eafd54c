"""Messages and progress bars on stderr; stdout is for results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY = 60.0  # seconds between the lines that stand for a progress bar where stderr is no terminal


def say(message: str) -> None:
    """Print a message on stderr, so that stdout holds only results."""
    print(f"ip2p: {message}", file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, unit: str = "steps") -> Iterator[Callable[..., None]]:
    """A progress bar on stderr with its rate and remaining time; yields `advance(count=1)`.

    Without a terminal, as in a log file, it is a line per minute. The rate is the mean since the start:
    rich's own rate covers only the last seconds, too short for steps that take minutes. Shows nothing if
    `total` is 0.
    """
    if total <= 0:
        yield lambda count=1: None
        return
    if not sys.stderr.isatty():
        yield _lines(label, total, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    # rich itself respects NO_COLOR.
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        TextColumn("{task.fields[pace]}"),
    )
    start, done = time.monotonic(), 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, pace="")

        def advance(count: int = 1) -> None:
            nonlocal done
            done += count
            bar.update(task, advance=count, pace=pace(done, total, time.monotonic() - start, unit))

        yield advance


def _lines(label: str, total: int, unit: str) -> Callable[..., None]:
    """Progress as lines in a log."""
    start = said = time.monotonic()
    done = 0

    def advance(count: int = 1) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if now - said >= LINE_EVERY:
            said = now
            say(f"{label}: {done:,} of {total:,}, {pace(done, total, now - start, unit)}")

    return advance


def pace(done: int, total: int, seconds: float, unit: str) -> str:
    """The rate and the remaining time: "12.5 rows/s, 3:20 left"; "" before anything is done."""
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    per, number = ("s", rate) if rate >= 1 else ("min", rate * 60)
    words = f"{number:,.0f} {unit}/{per}" if number >= 100 else f"{number:.3g} {unit}/{per}"
    hours, rest = divmod(round((total - done) / rate), 3600)
    minutes, left = divmod(rest, 60)
    return f"{words}, {f'{hours}:{minutes:02}' if hours else minutes}:{left:02} left"
