"""A training run on the workers of a Ray cluster, in the same function as on one machine."""

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
    """Call `train(config)` in each of `workers` processes that Ray places, as one process group.

    Ray sets RANK, WORLD_SIZE, MASTER_ADDR and the device of each process, where accelerate looks for
    them; nothing else differs from `accelerate launch`. `train` must be a module's own function, for it
    is found by name on every machine. use_gpu: a GPU a worker; None: when the cluster has that many.
    retries: how often all begin again, from the newest checkpoint, after a worker or its machine is
    lost; an error of ours (Ip2pError) ends the run at once and is raised here. storage: a folder for
    Ray's own notes, which all machines must see. It joins the cluster that RAY_ADDRESS names, else
    starts one on this machine.

    Raises InputError without Ray, ResourceError when the cluster is too small or the retries are spent.
    """
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError:
        raise InputError("--ray needs Ray, which is missing; install it: pip install 'ip2p[ray]'") from None
    # Otherwise Ray moves each worker into a folder of its own once more, after ours.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    if not ray.is_initialized():
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    if use_gpu is None:
        use_gpu = gpus >= workers
    kind, found = ("GPU", gpus) if use_gpu else ("CPU", int(there.get("CPU", 0)))
    # It would wait for them without end.
    if found < workers:
        raise ResourceError(
            f"--ray {workers} needs {workers} {kind}s and the cluster has {found}. "
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
        # Ray's own class of this error has moved between its versions, and its cause with it.
        except Exception as error:
            ours = next((each for each in _causes(error) if isinstance(each, Ip2pError)), None)
            if ours is not None:
                raise ours from None
            if attempt == retries:
                raise ResourceError(
                    f"training on Ray failed {retries + 1} times, the last time with: {_last_line(error)}. "
                    "What was saved is whole; mend that, and the same command goes on."
                ) from error
            log.warning("training on Ray failed (%s); going on from what is saved", _last_line(error))


def _worker(train: Callable[[Any], object], config: Any, folder: str) -> None:
    """What runs on each worker: from the folder of the command, so that relative paths mean the same."""
    try:
        os.chdir(folder)
    except OSError:
        raise InputError(
            f"the folder {folder} of the command is not on the machine {platform.node()}; start from one "
            "on a disk that all machines share."
        ) from None
    train(config)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and all that lies behind it: causes, and the failures of the single workers."""
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
