"""One server for many machines: replicas on a Ray cluster run the edits, and only this process serves HTTP.

The fair queue, jobs, and results on disk stay in this process. So requests do not have to find the replica of
an earlier request, and Ray's own HTTP proxy, which does not check keys, Host or Origin, is not started.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from ip2p.base.cluster import Cluster, connect_to_ray, plan_workers
from ip2p.base.errors import InputError, Ip2pError, ResourceError
from ip2p.models.bundle import Card
from ip2p.serve.jobs import Job, Result, Stopped
from ip2p.serve.maker import Maker
from ip2p.serve.options import ServeConfig
from ip2p.serve.queue import Draining
from ip2p.serve.requests import EditRequest, Limits
from ip2p.serve.service import Service

log = logging.getLogger("ip2p.serve")

Build = Callable[[contextlib.ExitStack], Service]
TRIES = 2  # attempts per edit: if its replica is lost, it starts over on another one
CARD_SECONDS = 600  # timeout for loading a model


class Lost(Exception):
    """The replica that runs an edit is gone or shutting down."""


@dataclass(frozen=True, kw_only=True)
class News:
    """A replica's report on an edit: its step of `steps`, and a preview, a result or an error.

    ip2p's errors are sent as values, because Ray would wrap a raised error.
    """

    step: int
    steps: int = 0
    number: int | None = None
    preview: Image.Image | None = None
    result: Result | None = None
    error: Ip2pError | None = None


class Replica:
    """A worker process with a service, which batches the network calls of concurrent edits."""

    def __init__(self, build: Build) -> None:
        self._stack = contextlib.ExitStack()
        self._error: Ip2pError | None = None
        try:
            self.service = self._stack.enter_context(build(self._stack))
            self.service.warm()
        except Ip2pError as error:  # if it were raised, Ray would retry
            self._error = error

    async def error(self) -> Ip2pError | None:
        """The error that prevents the replica from editing, if any."""
        return self._error

    async def card(self, model: str) -> Card | Ip2pError:
        try:
            return await asyncio.to_thread(self.service.card, model)
        except Ip2pError as error:
            return error

    async def edit(self, request: EditRequest) -> AsyncIterator[News]:
        """Run an edit and yield reports. The edit is stopped when the reader goes away."""
        try:
            job = await asyncio.to_thread(self.service.submit, request, client="front")
        except Ip2pError as error:
            yield News(step=0, error=error)
            return
        sent = 0
        try:
            async for event in job.events():
                if event.kind == "preview":
                    yield News(step=event.step, steps=event.steps, number=event.number, preview=event.image)
                elif event.kind == "step":
                    yield News(step=event.step, steps=event.steps)
                # Send each result when it is finished, since a client may stop the edit and use those.
                for result in job.results[sent:]:
                    yield News(step=job.step, steps=job.steps, result=result)
                    sent += 1
            if job.state != "done":
                yield News(step=job.step, error=job.error or ResourceError("The edit was stopped."))
        finally:
            if job.active:
                self.service.cancel(job.id)


class ReplicaMaker(Maker):
    """Runs edits on replicas. Every replica has all models, and does the checks that need a model.

    replicas: an object with the methods `edit` and `card` of a Replica. `edit` returns an iterable of News
    that may raise Lost or Stopped and has a `stop` method. count: number of replicas. each: number of
    pictures that a replica samples at once.
    """

    def __init__(self, replicas: Any, models: Sequence[str], *, count: int, each: int) -> None:
        super().__init__(models, count * each)
        self._replicas = replicas
        self._cards: dict[str, Card] = {}

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(self._cards)

    def card(self, model: str) -> Card:
        if model not in self._cards:
            card = self._replicas.card(model)
            if isinstance(card, Ip2pError):
                raise_error(card)
            self._cards[model] = card
        return self._cards[model]

    def make(self, job: Job, limits: Limits) -> None:
        assert job.request is not None
        for _ in range(TRIES):
            answer = self._replicas.edit(job.request)
            try:
                with job.stoppable(answer):
                    return _follow(job, answer, preview=job.request.previews > 0)
            except Lost as lost:
                log.warning("job=%s replica lost: %s", job.id, " ".join(str(lost).split())[:200])
        raise ResourceError(
            f"{TRIES} replicas failed during this edit. Request a smaller size or fewer results."
        )


def raise_error(error: Ip2pError) -> NoReturn:
    """Raise a replica's error. Draining becomes Lost, because another replica can run the edit."""
    raise Lost(str(error)) if isinstance(error, Draining) else error


def _follow(job: Job, answer: Iterator[News], *, preview: bool) -> None:
    """Apply the reports on an edit to its job."""
    job.restart()  # discard the results of a lost replica
    for news in answer:
        job.check_stopped()
        if news.error is not None:
            raise_error(news.error)
        job.step = max(job.step, news.step)
        job.steps = news.steps or job.steps
        if news.preview is not None and news.number is not None:
            job.show(news.number, news.preview)
        if news.result is not None:
            job.add_result(news.result, preview=preview)
        job.notify()
    job.check_stopped()
    if len(job.results) < job.count:
        raise Lost("the reports ended before all results arrived")


# --- Ray ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def spread(config: ServeConfig, build: Build, *, each: int, **how: Any) -> Iterator[Service]:
    """A service that runs edits on the replicas of a config, and shuts them down at the end.

    build: creates the service of a replica, on the replica. each: `join` of a replica. how: options of the
    `Service` in this process. Raises InputError if Ray is missing, ResourceError if the cluster is missing
    or too small, and the errors of loading a model.
    """
    cluster = Cluster(
        address=config.ray or "", workers=config.replicas, cpus=config.replica_cpus, gpus=config.replica_gpus
    )
    with connect_to_ray(cluster) as ray, contextlib.ExitStack() as stack:
        try:
            from ray import serve
        except ImportError:
            raise InputError(
                "--ray needs Ray Serve, which is missing; install it: pip install 'ip2p[ray]'"
            ) from None
        workers = cluster.workers or max(1, int(ray.cluster_resources().get("GPU", 0)))
        count, resources = plan_workers(ray.nodes(), dataclasses.replace(cluster, workers=workers), workers)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        # The same name at each start, so that a new server replaces the deployment of a killed one.
        name = f"ip2p-{re.sub(r'[^A-Za-z0-9-]', '-', socket.gethostname())}-{config.port}"
        deployment = serve.deployment(
            Replica,
            name="edits",
            num_replicas=count,
            ray_actor_options=resources,
            max_ongoing_requests=each,
            max_constructor_retry_count=3,
            graceful_shutdown_timeout_s=5,
            graceful_shutdown_wait_loop_s=0.5,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.start(proxy_location="Disabled")
        stack.callback(_delete, serve, name)
        try:
            handle = serve.run(deployment.bind(build), name=name, route_prefix=None)
        except RuntimeError as error:
            raise ResourceError(
                f"the replicas did not start ({' '.join(str(error).split())[:300]}). Is ip2p[serve] "
                "installed on every machine of the cluster?"
            ) from None
        if (failed := handle.error.remote().result()) is not None:
            raise_error(failed)
        maker = ReplicaMaker(_OnRay(handle), list(config.models()), count=count, each=each)
        yield stack.enter_context(Service(maker, **how))


def _delete(serve: Any, name: str) -> None:
    with contextlib.suppress(Exception):
        serve.delete(name)


def portable(config: ServeConfig) -> ServeConfig:
    """The config for replicas: absolute paths, and no settings that concern only this process."""

    def absolute(path: str) -> str:
        return str(Path(path).resolve()) if Path(path).exists() else path

    return config.changed(
        model=tuple(f"{name}={absolute(model)}" for name, model in config.models().items()),
        safety=config.safety and absolute(config.safety),
        tiny_vae=config.tiny_vae and absolute(config.tiny_vae),
        parts_from=config.parts_from and absolute(config.parts_from),
        vae=config.vae and absolute(config.vae),
        ray=None,
        api_key_file=None,
        config=None,
        store=None,
    )


class _OnRay:
    """The replicas of a Ray deployment."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def edit(self, request: EditRequest) -> _Stream:
        return _Stream(self._handle.options(stream=True).edit.remote(request))

    def card(self, model: str) -> Card | Ip2pError:
        card: Card | Ip2pError = self._handle.card.remote(model).result(timeout_s=CARD_SECONDS)
        return card


class _Stream:
    """The reports on an edit, streamed through Ray."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def __iter__(self) -> Iterator[News]:
        from ray.exceptions import ObjectLostError, RayActorError, TaskCancelledError
        from ray.serve.exceptions import DeploymentUnavailableError

        try:
            yield from self._response
        except (TaskCancelledError, asyncio.CancelledError, concurrent.futures.CancelledError):
            raise Stopped from None
        except (RayActorError, ObjectLostError, DeploymentUnavailableError) as error:
            raise Lost(str(error)) from None

    def stop(self) -> None:
        # `cancel` blocks until Ray has assigned the edit to a replica; our caller holds the service's lock.
        threading.Thread(target=self._response.cancel, name="ip2p-cancel", daemon=True).start()
