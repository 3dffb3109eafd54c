"""Run a stage over the parts of a job on a Ray cluster."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ip2p.base.errors import InputError, Ip2pError, ResourceError
from ip2p.base.work import RESUME, RETRIES, Outputs, StageFactory, Worker

POLL_SECONDS = 20  # between two checks of the cluster's machines


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray cluster, and the workers to run on it.

    address: of the cluster; "" means RAY_ADDRESS, else a new local cluster.
    """

    address: str = ""
    workers: int | None = None  # None: as many as fit
    cpus: float = 1  # per worker; Ray gives a worker as many threads
    gpus: float | None = None  # per worker; None: one if the cluster has any


def work_on_ray(
    factory: StageFactory,
    parts: Sequence[Any],
    todo: Sequence[int],
    cluster: Cluster,
    threads: int | None,
) -> Outputs:
    """Process the parts in a pool of actors, one part at a time in each, so a kill costs at most one part.

    Parts go only to workers that have started: a worker that cannot be scheduled, because a machine left or
    another program uses it, delays nothing. Machines that join later get workers too. Ray's own pools do not
    work here: `ray.util.ActorPool` hands parts to actors that may never start and does not report which part
    was lost; Ray Data merges parts into blocks and retries without limit by default.
    """
    with connect_to_ray(cluster) as ray:
        count, resources = plan_workers(ray.nodes(), cluster, len(todo))
        actor = ray.remote(Worker).options(max_restarts=0, **resources)
        waiting: deque[int] = deque(todo)
        free: deque[Any] = deque()
        pool: list[Any] = []
        # The part of each call, its worker, and the call before it. None: waiting for the worker to start.
        running: dict[Any, tuple[int | None, Any, Any]] = {}
        losses: Counter[int | None] = Counter()
        checked = time.monotonic()

        def start(count: int) -> None:
            for _ in range(count):
                worker = actor.remote(factory, threads, os.getcwd())
                pool.append(worker)
                running[worker.ready.remote()] = (None, worker, None)

        start(count)
        try:
            while waiting or any(number is not None for number, *_ in running.values()):
                while waiting and free:
                    number, worker = waiting.popleft(), free.popleft()
                    alive = worker.ready.remote()  # fails if the worker died while it was idle
                    running[worker.process_remotely.remote(parts[number])] = (number, worker, alive)
                if waiting and time.monotonic() - checked > POLL_SECONDS:
                    checked = time.monotonic()
                    target = cluster.workers or capacity(ray.nodes(), cluster)
                    start(min(target, len(waiting) + len(running)) - len(pool))
                finished, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
                if not finished:
                    continue
                part, worker, alive = running.pop(finished[0])
                try:
                    output = ray.get(finished[0])
                except ray.exceptions.RayActorError as error:
                    lost = part if _succeeded(ray, alive) else None  # None: it began no part
                    losses[lost] += 1
                    if losses[lost] > RETRIES * (count if lost is None else 1):
                        what = "workers did not start" if lost is None else f"worker was lost on part {part}"
                        raise ResourceError(
                            f"the {what}, {losses[lost]} times ({_first_line(error)}); run fewer workers to "
                            f"give each more memory. {RESUME}"
                        ) from None
                    pool.remove(worker)
                    with contextlib.suppress(Exception):
                        ray.kill(worker)  # it may only have been unreachable
                    if part is not None:
                        waiting.appendleft(part)
                    start(1)
                    continue
                except ray.exceptions.RayTaskError as error:
                    cause = getattr(error, "cause", None)
                    raise (cause if isinstance(cause, Exception) else error) from error
                except ray.exceptions.RayError as error:
                    # A worker that could not be started, a result lost with its machine, no memory.
                    raise ResourceError(
                        f"Ray failed on part {part} ({_first_line(error)}). {RESUME}"
                    ) from None
                if isinstance(output, Ip2pError):
                    raise output
                free.append(worker)
                if part is not None:
                    del losses[None]
                    yield part, *output
        finally:
            for each in pool:
                with contextlib.suppress(Exception):
                    ray.kill(each)


def _succeeded(ray: Any, call: Any) -> bool:
    """Whether a call of an actor returned before the actor died. False for None."""
    if call is None:
        return False
    try:
        ray.get(call)
    except ray.exceptions.RayError:
        return False
    return True


@contextlib.contextmanager
def connect_to_ray(cluster: Cluster) -> Iterator[Any]:
    """Yield the `ray` module, connected. Shuts Ray down at the end unless it was already initialized."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        import ray
    except ImportError:
        raise InputError("--ray needs Ray, which is missing; install it: pip install 'ip2p[ray]'") from None
    ours = not ray.is_initialized()
    try:
        if ours:
            address = _address(cluster)
            try:
                ray.init(address=address, log_to_driver=False, logging_level="warning")
            except ConnectionError:
                shown = address or os.environ.get("RAY_ADDRESS", "")
                raise ResourceError(
                    f"no Ray cluster responds at {shown}; start one with `ray start --head`, or omit the "
                    "address."
                ) from None
            except Exception as error:  # for example, the machine is too busy to start Ray within 30 seconds
                raise ResourceError(f"Ray does not start ({_first_line(error)}). {RESUME}") from error
        # Importing Ray installs a SIGTERM handler that exits without unwinding to ip2p's exit code.
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, handler)
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _address(cluster: Cluster) -> str | None:
    """The address for `ray.init`, which by default joins the last cluster started on this machine, if any.

    If that cluster no longer runs, `ray.init` would search for minutes and fail; this returns "local" then.
    """
    if cluster.address or os.environ.get("RAY_ADDRESS"):
        return cluster.address or None
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        host, _, port = Path(folder, "ray", "ray_current_cluster").read_text().strip().rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (FileNotFoundError, ValueError):
        return None
    except OSError:
        return "local"
    return None


Nodes = Sequence[Mapping[str, Any]]  # machines, as `ray.nodes()` lists them


def plan_workers(nodes: Nodes, cluster: Cluster, parts: int) -> tuple[int, dict[str, float]]:
    """The number of workers, and the resources each requests. Raises ResourceError if too few workers fit."""
    needs = _needs(nodes, cluster)
    fitting = capacity(nodes, cluster)
    count = max(1, fitting) if cluster.workers is None else cluster.workers
    if fitting < count:  # Ray would wait for resources forever
        each = ", ".join(f"{need:g} {kind}" for kind, need in needs.items() if need)
        total = ", ".join(f"{_sum(nodes, kind):g} {kind}" for kind, need in needs.items() if need)
        raise ResourceError(
            f"{count} workers with {each} each do not fit on the cluster, which has {total}; {fitting} would "
            "fit. Request fewer workers, or add machines: ray start --address HEAD:6379"
        )
    return min(count, parts), {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"]}


def capacity(nodes: Nodes, cluster: Cluster) -> int:
    """The number of workers that fit on the machines, counted machine by machine."""
    needs = _needs(nodes, cluster)
    total = 0
    for node in _alive(nodes):
        resources = node["Resources"]
        limits = [math.floor(resources.get("CPU", 0) / needs["CPU"] + 1e-9)] if needs["CPU"] else []
        if gpus := needs["GPU"]:
            available = int(resources.get("GPU", 0))
            # A fraction of a GPU must be on a single GPU.
            shared = available * math.floor(1 / gpus + 1e-9) if gpus < 1 else math.floor(available / gpus)
            limits.append(shared)
        total += min(limits, default=0)
    return total


def _needs(nodes: Nodes, cluster: Cluster) -> dict[str, float]:
    gpus = cluster.gpus if cluster.gpus is not None else float(_sum(nodes, "GPU") >= 1)
    return {"CPU": cluster.cpus, "GPU": gpus}


def _sum(nodes: Nodes, kind: str) -> float:
    return float(sum(node["Resources"].get(kind, 0) for node in _alive(nodes)))


def _alive(nodes: Nodes) -> list[Mapping[str, Any]]:
    return [node for node in nodes if node.get("Alive")]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
