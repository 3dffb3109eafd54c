"""Run a stage over the parts of a job in this process or in local worker processes; `cluster` uses Ray."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from ip2p.base.errors import Ip2pError, ResourceError

RETRIES = 3  # of one part, after its worker was lost
RESUME = "Completed parts are kept; run the same command again to resume."

StageFactory = Callable[[], Callable[[Any], Any]]  # creates a stage, which maps a part to an output
Outputs = Generator[tuple[int, Any, float], None, None]  # part number, output, seconds


class Worker:
    """A stage in one process. The stage is loaded with the first part."""

    def __init__(self, factory: StageFactory, threads: int | None, folder: str | None = None) -> None:
        self.factory, self.threads, self.folder = factory, threads, folder
        self.stage: Callable[[Any], Any] | None = None

    def process(self, part: Any) -> tuple[Any, float]:
        """The stage's output for a part, and the seconds it took."""
        if self.stage is None:
            if self.threads is not None:
                import torch

                torch.set_num_threads(self.threads)
            self.stage = self.factory()
        start = time.monotonic()
        output = self.stage(part)
        return output, time.monotonic() - start

    def ready(self) -> None:
        """Return as soon as this worker has been scheduled."""

    def process_remotely(self, part: Any) -> tuple[Any, float] | Ip2pError:
        """`process` on another machine. Returns ip2p errors as values, because Ray would wrap them."""
        if self.folder is not None:
            # Resolve relative paths as the command does, if its folder is visible here.
            with contextlib.suppress(OSError):
                os.chdir(self.folder)
        try:
            return self.process(part)
        except Ip2pError as error:
            return error


def work_in_this_process(
    factory: StageFactory, parts: Sequence[Any], todo: Sequence[int], threads: int | None
) -> Outputs:
    """Process the parts one after the other in this process."""
    worker = Worker(factory, threads)
    for number in todo:
        yield number, *worker.process(parts[number])


def work_in_processes(
    factory: StageFactory, parts: Sequence[Any], todo: Sequence[int], count: int, threads: int | None
) -> Outputs:
    """Process the parts in `count` local processes, one part at a time in each.

    Each process is its own pool: in a larger pool, the death of one process loses the parts of all.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would share torch's threads and open files
    child_end, parent_end = spawn.Pipe(duplex=False)
    pools: list[ProcessPoolExecutor] = []
    free: list[ProcessPoolExecutor] = []

    def start() -> None:
        pool = ProcessPoolExecutor(
            1, spawn, initializer=_start_process, initargs=(factory, threads, child_end)
        )
        pools.append(pool)
        free.append(pool)

    waiting = deque(todo)
    running: dict[Future[Any], tuple[int, ProcessPoolExecutor]] = {}
    losses: Counter[int] = Counter()
    try:
        for _ in range(count):
            start()
        while waiting or running:
            while waiting and free:
                pool = free.pop()
                try:
                    running[pool.submit(_process_part, parts[waiting[0]])] = waiting[0], pool
                    waiting.popleft()
                except BrokenProcessPool:  # its process died while idle
                    start()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, pool = running.pop(future)
                try:
                    output, seconds = future.result()
                except BrokenProcessPool:
                    losses[number] += 1
                    if losses[number] > RETRIES:
                        raise ResourceError(
                            f"the worker process died {losses[number]} times on part {number}; there may be "
                            f"too little memory for {count} workers: try --workers 1. {RESUME}"
                        ) from None
                    waiting.appendleft(number)
                    start()
                    continue
                free.append(pool)
                yield number, output, seconds
    finally:
        parent_end.close()  # ends the processes, even in the middle of a part
        for pool in pools:
            pool.shutdown(cancel_futures=True)
        child_end.close()


_worker: Worker  # of a process that `work_in_processes` started


def _start_process(factory: StageFactory, threads: int | None, parent: Connection) -> None:
    global _worker
    if parent.poll():  # the command died while this process started, and its first part must not begin
        os._exit(1)
    _worker = Worker(factory, threads)

    def exit_with_parent() -> None:
        with contextlib.suppress(EOFError, OSError):
            parent.recv()  # nothing is ever sent; this returns when the other end is closed
        os._exit(1)  # even in the middle of a part

    threading.Thread(target=exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    warnings.simplefilter("ignore")


def _process_part(part: Any) -> tuple[Any, float]:
    return _worker.process(part)
