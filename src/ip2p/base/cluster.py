"""Workers on a Ray cluster: how many fit, and parts that go to those that have begun."""

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

from ip2p.base.errors import InputError, Ip2pError, ResourceError, first_line
from ip2p.base.work import RETRIES, NewStage, Work, Worker

LOOK = 20  # seconds between two looks at what machines the cluster has


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Workers on Ray. address: of the cluster; "" takes RAY_ADDRESS, else starts one on this machine."""

    address: str = ""
    workers: int | None = None  # None: as many as fit
    cpus: float = 1  # a worker; Ray gives a worker as many threads
    gpus: float | None = None  # a worker; None: one if the cluster has any


def work_on_ray(
    stage: NewStage,
    parts: Sequence[Any],
    todo: Sequence[int],
    cluster: Cluster,
    threads: int | None,
) -> Work:
    """A pool of actors, one part at a time each, so that a kill costs at most one part a worker.

    A part goes only to a worker that has started: one for which there is no room, because a machine left or
    another program took it, holds up nothing. Machines that join later get workers too. Ray's own pools do
    not serve here: `ray.util.ActorPool` hands parts to actors that may never start and does not say which
    part was lost; Ray Data merges parts into blocks and by default retries without limit.
    """
    with ray_of(cluster) as ray:
        count, resources = fitting(ray.nodes(), cluster, len(todo))
        actor = ray.remote(Worker).options(max_restarts=0, **resources)
        waiting: deque[int] = deque(todo)
        free: deque[Any] = deque()
        pool: list[Any] = []
        running: dict[Any, tuple[int | None, Any]] = {}  # None: it is to say that it has begun
        lost: Counter[int | None] = Counter()
        looked = time.monotonic()

        def begin(count: int) -> None:
            for _ in range(count):
                worker = actor.remote(stage, threads, os.getcwd())
                pool.append(worker)
                running[worker.begun.remote()] = (None, worker)

        begin(count)
        try:
            while waiting or any(part is not None for part, _ in running.values()):
                while waiting and free:
                    number, worker = waiting.popleft(), free.popleft()
                    running[worker.answer.remote(parts[number])] = (number, worker)
                if waiting and time.monotonic() - looked > LOOK:
                    looked = time.monotonic()
                    target = cluster.workers or fits(ray.nodes(), cluster)
                    begin(min(target, len(waiting) + len(running)) - len(pool))
                found, _ = ray.wait(list(running), num_returns=1, timeout=LOOK)
                if not found:
                    continue
                part, worker = running.pop(found[0])
                try:
                    answer = ray.get(found[0])
                except ray.exceptions.RayActorError as error:
                    lost[part] += 1
                    if lost[part] > RETRIES * (count if part is None else 1):
                        what = "workers" if part is None else f"workers at part {part}"
                        raise ResourceError(
                            f"the {what} were lost {lost[part]} times ({first_line(error)}); "
                            "give each more memory with fewer workers. What is written stays, and the same "
                            "command goes on."
                        ) from None
                    pool.remove(worker)
                    with contextlib.suppress(Exception):
                        ray.kill(worker)  # it may only have been out of reach
                    if part is not None:
                        waiting.appendleft(part)
                    begin(1)
                    continue
                except ray.exceptions.RayTaskError as error:
                    cause = getattr(error, "cause", None)
                    raise (cause if isinstance(cause, Exception) else error) from error
                except ray.exceptions.RayError as error:
                    # A worker that could not be started, a result lost with its machine, no memory.
                    raise ResourceError(
                        f"Ray gave up at part {part} ({first_line(error)}). What is written stays, and the "
                        "same command goes on."
                    ) from None
                if isinstance(answer, Ip2pError):
                    raise answer
                free.append(worker)
                if part is not None:
                    del lost[None]
                    yield part, *answer
        finally:
            for each in pool:
                with contextlib.suppress(Exception):
                    ray.kill(each)


@contextlib.contextmanager
def ray_of(cluster: Cluster) -> Iterator[Any]:
    """Ray, connected. If it was started here, it is stopped at the end."""
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
                named = address or os.environ.get("RAY_ADDRESS", "")
                raise ResourceError(
                    f"no Ray cluster answers at {named}; start one: ray start --head, "
                    "or leave the address out."
                ) from None
            except Exception as error:  # such as a machine that is too busy to start it within half a minute
                raise ResourceError(
                    f"Ray does not start ({first_line(error)}). What is written stays, and the same command "
                    "goes on."
                ) from error
        # Ray takes SIGTERM for itself as it is imported, and would end without unwinding to our exit code.
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, handler)
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _address(cluster: Cluster) -> str | None:
    """For `ray.init`, which without one joins the cluster that was last started on this machine, if any.

    For a cluster that was killed, or ended by a restart of the machine, it would search for minutes and fail.
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


def fitting(nodes: Nodes, cluster: Cluster, parts: int) -> tuple[int, dict[str, float]]:
    """How many workers, and what each requests from Ray. ResourceError if not enough of them fit."""
    needs = _needs(nodes, cluster)
    there = fits(nodes, cluster)
    wanted = max(1, there) if cluster.workers is None else cluster.workers
    if there < wanted:
        # It would wait for them without end.
        short = ", ".join(f"{need:g} {kind}" for kind, need in needs.items() if need)
        found = ", ".join(f"{_sum(nodes, kind):g} {kind}" for kind, need in needs.items() if need)
        raise ResourceError(
            f"{wanted} workers of {short} each do not fit into the cluster's {found}; {there} would. "
            "Ask for fewer, or add machines: ray start --address HEAD:6379"
        )
    return min(wanted, parts), {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"]}


def fits(nodes: Nodes, cluster: Cluster) -> int:
    """How many workers fit on the machines, counted machine by machine."""
    needs = _needs(nodes, cluster)
    room = 0
    for node in _alive(nodes):
        there = node["Resources"]
        each = [math.floor(there.get("CPU", 0) / needs["CPU"] + 1e-9)] if needs["CPU"] else []
        if gpus := needs["GPU"]:
            whole = int(there.get("GPU", 0))
            # A part of a GPU is of one GPU.
            shares = whole * math.floor(1 / gpus + 1e-9) if gpus < 1 else math.floor(whole / gpus)
            each.append(shares)
        room += min(each, default=0)
    return room


def _needs(nodes: Nodes, cluster: Cluster) -> dict[str, float]:
    gpus = cluster.gpus if cluster.gpus is not None else float(_sum(nodes, "GPU") >= 1)
    return {"CPU": cluster.cpus, "GPU": gpus}


def _sum(nodes: Nodes, kind: str) -> float:
    return float(sum(node["Resources"].get(kind, 0) for node in _alive(nodes)))


def _alive(nodes: Nodes) -> list[Mapping[str, Any]]:
    return [node for node in nodes if node.get("Alive")]
