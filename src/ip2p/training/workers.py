"""Startup of the worker processes that prefetch pictures for training."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import torch


def start_worker(number: int) -> None:
    """A DataLoader `worker_init_fn`: use one thread, ignore signals, and exit with the parent.

    Ctrl-C and SIGTERM reach the whole process group, but the main process needs its workers until it has
    saved. With torch's own check, a worker whose parent was killed would wait forever for someone to consume
    its pictures.
    """
    torch.set_num_threads(1)
    os.nice(5)  # lower priority: training threads wait for each other, so reading must not delay one of them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
