"""Where a job runs: local processes or workers on a cluster, and their threads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ip2p.base.cluster import Cluster
from ip2p.base.devices import pick_device

if TYPE_CHECKING:
    from ip2p.settings import WorkerSettings

SMALL = 256 << 20  # bytes of weights; several copies of a smaller model fit in memory


def worker_options(config: WorkerSettings, weights: Path | None, *, device: str) -> dict[str, Any]:
    """Where a job runs, for `jobs.run_job`: cluster, processes and threads.

    A small model on a CPU runs in one process per core. Several workers have one thread each: small networks
    gain little from more, and the same number of threads gives bit-identical results locally and on Ray.
    weights: path of the model's weights, None if they are not local.
    """
    if config.ray is not None:
        each = config.threads or 1
        cluster = Cluster(address=config.ray, workers=config.ray_workers, cpus=each, gpus=config.ray_gpus)
        return {"cluster": cluster, "threads": each}
    small = weights is not None and pick_device(device).type == "cpu" and _bytes(weights) <= SMALL
    processes = config.workers or (_cores() if small else 1)
    threads = config.threads or (1 if small or processes > 1 else None)
    return {"processes": processes, "threads": threads}


def _bytes(weights: Path) -> int:
    files = weights.rglob("*.safetensors") if weights.is_dir() else [weights]
    return sum(file.stat().st_size for file in files)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
