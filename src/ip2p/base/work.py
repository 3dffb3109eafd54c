"""Workers that make the parts of a job: this process, or processes beside it. `cluster` has those on Ray."""

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

RETRIES = 3  # of one part, after the worker at it was lost

NewStage = Callable[[], Callable[[Any], Any]]  # makes a stage, which maps a part to what is made of it
Work = Generator[tuple[int, Any, float], None, None]  # part, what was made of it, seconds


class Worker:
    """The stage in one process, loaded with its first part."""

    def __init__(self, stage: NewStage, threads: int | None, folder: str | None = None) -> None:
        self.new, self.threads, self.folder = stage, threads, folder
        self.stage: Callable[[Any], Any] | None = None

    def make(self, part: Any) -> tuple[Any, float]:
        """What the stage makes of a part, and the seconds that took."""
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

    def answer(self, part: Any) -> tuple[Any, float] | Ip2pError:
        """As `make`, on another machine. Errors of ours come back as values: Ray would wrap them."""
        if self.folder is not None:
            # So that relative paths mean what they meant to the command, where that folder is to be seen.
            with contextlib.suppress(OSError):
                os.chdir(self.folder)
        try:
            return self.make(part)
        except Ip2pError as error:
            return error


def work_here(stage: NewStage, parts: Sequence[Any], todo: Sequence[int], threads: int | None) -> Work:
    """Parts made in this process."""
    worker = Worker(stage, threads)
    for part in todo:
        yield part, *worker.make(parts[part])


def work_in_processes(
    stage: NewStage, parts: Sequence[Any], todo: Sequence[int], count: int, threads: int | None
) -> Work:
    """Parts made in processes beside this one, one part at a time each.

    Each process is a pool of its own: in a larger pool, the death of one process loses the parts of all.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would share torch's threads and open files
    owned, hold = spawn.Pipe(duplex=False)
    pools: list[ProcessPoolExecutor] = []
    free: list[ProcessPoolExecutor] = []

    def begin() -> None:
        pool = ProcessPoolExecutor(1, spawn, initializer=_begin_process, initargs=(stage, threads, owned))
        pools.append(pool)
        free.append(pool)

    waiting = deque(todo)
    running: dict[Future[Any], tuple[int, ProcessPoolExecutor]] = {}
    lost: Counter[int] = Counter()
    try:
        for _ in range(count):
            begin()
        while waiting or running:
            while waiting and free:
                pool = free.pop()
                try:
                    running[pool.submit(_make_part, parts[waiting[0]])] = waiting[0], pool
                    waiting.popleft()
                except BrokenProcessPool:  # its process died while idle
                    begin()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                part, pool = running.pop(future)
                try:
                    made, seconds = future.result()
                except BrokenProcessPool:
                    lost[part] += 1
                    if lost[part] > RETRIES:
                        raise ResourceError(
                            f"the processes at part {part} were lost {RETRIES + 1} times; there may be too "
                            "little memory for so many: try --workers 1. What is written stays, and the same "
                            "command goes on."
                        ) from None
                    waiting.appendleft(part)
                    begin()
                    continue
                free.append(pool)
                yield part, made, seconds
    finally:
        hold.close()  # ends the processes, even in the middle of a part
        for pool in pools:
            pool.shutdown(cancel_futures=True)
        owned.close()


_worker: Worker  # of a process that `work_in_processes` began


def _begin_process(stage: NewStage, threads: int | None, owner: Connection) -> None:
    global _worker
    _worker = Worker(stage, threads)

    def follow() -> None:
        with contextlib.suppress(EOFError, OSError):
            owner.recv()  # nothing is ever sent; this returns when the other end is closed
        os._exit(1)  # even in the middle of a part

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    warnings.simplefilter("ignore")


def _make_part(part: Any) -> tuple[Any, float]:
    return _worker.make(part)
