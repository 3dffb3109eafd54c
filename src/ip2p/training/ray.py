"""Runs training on the workers of a Ray cluster, with the same function as on one machine."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ip2p.base.errors import InputError, Ip2pError, ResourceError

log = logging.getLogger("ip2p")

Config = TypeVar("Config")


def launch(
    train: Callable[[Config], object],
    config: Config,
    *,
    workers: int,
    use_gpu: bool | None = None,
    retries: int = 3,
    storage: Path | None = None,
) -> None:
    """Call `train(config)` in each of `workers` Ray processes, as one process group.

    Ray sets RANK, WORLD_SIZE, MASTER_ADDR and the device of each process, which accelerate reads; otherwise
    this equals `accelerate launch`. `train` must be a module-level function, because it is imported by name
    on each machine. use_gpu: one GPU per worker; None uses GPUs if the cluster has enough. retries: restarts
    of all workers from the newest checkpoint after a worker or machine is lost; an Ip2pError ends the run
    immediately and is raised here. storage: a folder for Ray's state that all machines can access. Joins the
    cluster in RAY_ADDRESS, or else starts one on this machine.

    Raises InputError without Ray, and ResourceError if the cluster is too small or the retries are exhausted.
    """
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError:
        raise InputError("--ray needs Ray, which is not installed: pip install 'ip2p[ray]'") from None
    # Otherwise Ray changes each worker's folder again, after `_worker` has set it.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    if not ray.is_initialized():
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    if use_gpu is None:
        use_gpu = gpus >= workers
    kind, found = ("GPU", gpus) if use_gpu else ("CPU", int(there.get("CPU", 0)))
    # Ray would wait forever for missing resources.
    if found < workers:
        raise ResourceError(
            f"--ray {workers} needs {workers} {kind}s, but the cluster has {found}. "
            f"Try --ray {max(found, 1)}, or add machines: ray start --address HEAD:6379"
        )
    for attempt in range(retries + 1):
        trainer = TorchTrainer(
            partial(_worker, train, config, os.getcwd()),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            run_config=RunConfig(storage_path=str(storage.resolve()) if storage else None),
        )
        try:
            trainer.fit()
            return
        # Ray's class for this error, and the place of its cause, differ between versions.
        except Exception as error:
            ours = next((each for each in _causes(error) if isinstance(each, Ip2pError)), None)
            if ours is not None:
                raise ours from None
            if attempt == retries:
                raise ResourceError(
                    f"training on Ray failed {retries + 1} times, the last time with: {_last_line(error)}. "
                    "The saved state is intact; fix the problem and run the same command to resume."
                ) from error
            log.warning("training on Ray failed (%s); resuming from the saved state", _last_line(error))


def _worker(train: Callable[[Any], object], config: Any, folder: str) -> None:
    """Run `train` on a worker, in the folder of the command, so that relative paths are valid."""
    try:
        os.chdir(folder)
    except OSError:
        raise InputError(
            f"the folder {folder} of the command does not exist on the machine {platform.node()}; run it in "
            "a folder on a disk that all machines share."
        ) from None
    train(config)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, its causes, and the failures of the individual workers, recursively."""
    waiting, seen = [error], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        more = [each.__cause__, getattr(each, "cause", None), *_failures(each)]
        waiting += [other for other in more if isinstance(other, BaseException)]


def _failures(error: BaseException) -> list[object]:
    failures = getattr(error, "worker_failures", None)
    return list(failures.values()) if isinstance(failures, dict) else []


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")
