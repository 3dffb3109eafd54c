"""How a process starts that reads pictures ahead of training."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import torch


def start_worker(number: int) -> None:
    """For a DataLoader's `worker_init_fn`: one thread, no signals, and an end with the parent's.

    Ctrl-C and SIGTERM reach a whole group; the main process needs its workers until it has saved. By torch's
    own check a worker whose parent was killed would first wait for its pictures to be read, which nobody
    does any more.
    """
    torch.set_num_threads(1)
    os.nice(5)  # training's threads wait for each other, so reading must not hold one of them up
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
