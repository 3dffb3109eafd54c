"""One server over many machines: replicas on a Ray cluster edit, and this process alone speaks HTTP.

What must be one stays here: the queue, the callers' turns, jobs by their ids, results on disk, the page's
browsers. So no later request has to find the replica of an earlier one, and Ray's own HTTP proxy, which knows
nothing of keys, Host and Origin, is not started.
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
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from PIL import Image

from ip2p.base.cluster import Cluster, connect_to_ray, plan_workers
from ip2p.base.errors import InputError, Ip2pError, ModelError, ResourceError
from ip2p.models.bundle import Card
from ip2p.serve.jobs import Job, Result, Stopped
from ip2p.serve.options import ServeConfig
from ip2p.serve.requests import EditRequest, Limits
from ip2p.serve.service import Service
from ip2p.settings import SettingError

log = logging.getLogger("ip2p.serve")

Build = Callable[[contextlib.ExitStack], Service]
TRIES = 2  # an edit whose replica is lost begins again on another one
START_SECONDS, CARD_SECONDS = 60, 600  # Ray's part of the start; what a model may take to load


@dataclass(frozen=True)
class Failure:
    """An error of ours between processes: one whose field is given by name cannot be pickled."""

    kind: str
    message: str
    field: str | None = None

    @classmethod
    def of(cls, error: Ip2pError) -> Failure:
        return cls(type(error).__name__, str(error), getattr(error, "field", None))

    def throw(self) -> NoReturn:
        """Raise the error that it was. Draining is Lost: what the replica did not do another one may."""
        if self.kind == "Draining":
            raise Lost(self.message)
        if self.field is not None:
            raise SettingError(self.message, field=self.field)
        known = {kind.__name__: kind for kind in (InputError, ModelError, ResourceError)}
        raise known.get(self.kind, Ip2pError)(self.message)


class Lost(Exception):
    """The replica that worked on an edit is gone, or is going."""


@dataclass(frozen=True, kw_only=True)
class News:
    """What a replica reports of an edit: its step of `steps`, with it a preview, a result, or a failure."""

    step: int
    steps: int = 0
    number: int | None = None
    preview: Image.Image | None = None
    result: Result | None = None
    failure: Failure | None = None


class Answer(Protocol):
    """The news of an edit as they come; `stop` ends them and the edit. Raises Lost, and Stopped."""

    def __iter__(self) -> Iterator[News]: ...

    def stop(self) -> None: ...


class Replicas(Protocol):
    """Where edits are made."""

    def edit(self, request: EditRequest) -> Answer: ...

    def card(self, model: str) -> Card: ...


class Replica:
    """One process that edits: a service, in which the edits that it was given share the network's calls."""

    def __init__(self, build: Build) -> None:
        self._stack = contextlib.ExitStack()
        self._failure: Failure | None = None
        try:
            self.service = self._stack.enter_context(build(self._stack))
            self.service.warm()
        except Ip2pError as error:  # told by `failure`: Ray would begin it again and again
            self._failure = Failure.of(error)

    async def failure(self) -> Failure | None:
        """Why it cannot edit."""
        return self._failure

    async def card(self, model: str) -> Card | Failure:
        try:
            return await asyncio.to_thread(self.service.card, model)
        except Ip2pError as error:
            return Failure.of(error)

    async def edit(self, request: EditRequest) -> AsyncIterator[News]:
        """Edit, and tell of it. Stopped when nobody listens any more."""
        try:
            job = await asyncio.to_thread(self.service.submit, request, client="front")
        except Ip2pError as error:
            yield News(step=0, failure=Failure.of(error))
            return
        sent = 0
        try:
            async for event in job.aevents():
                if event.kind == "preview":
                    yield News(step=event.step, steps=event.steps, number=event.number, preview=event.image)
                elif event.kind == "step":
                    yield News(step=event.step, steps=event.steps)
                # Each as it is finished, for who stops the edit and takes what there is.
                for result in job.results[sent:]:
                    yield News(step=job.step, steps=job.steps, result=result)
                    sent += 1
            if job.state != "done":
                yield News(step=job.step, failure=Failure.of(job.error or ResourceError("It was stopped.")))
        finally:
            if job.active:
                self.service.cancel(job.id)


class ReplicaMaker:
    """Has replicas make the edits; the queue and all else is the service's.

    each: how many pictures one replica samples at once, of `count` replicas.
    """

    def __init__(self, replicas: Replicas, models: Sequence[str], *, count: int, each: int) -> None:
        self.models = list(models)
        self.slots = count * each
        self.changed = threading.Condition(threading.RLock())
        self.calls: Counter[int] = Counter()  # the replicas count their own
        self._replicas = replicas
        self._cards: dict[str, Card] = {}

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(self._cards)

    @property
    def ready(self) -> bool:
        return self.models[0] in self._cards

    def warm(self) -> None:
        self.card(self.models[0])

    def card(self, model: str) -> Card:
        if model not in self._cards:
            self._cards[model] = self._replicas.card(model)
        return self._cards[model]

    def check(self, request: EditRequest, model: str, limits: Limits) -> None:
        """The replica checks what only a model knows."""

    def reserve(self, model: str) -> bool:
        """Every replica has every model."""
        return True

    def release(self, model: str) -> None:
        """See `reserve`."""

    def close(self) -> None:
        """The replicas are not this maker's."""

    def make(self, job: Job, limits: Limits) -> None:
        request = job.request
        assert request is not None
        for _ in range(TRIES):
            answer = self._replicas.edit(request)
            try:
                with job.stoppable(answer):
                    return _follow(job, request, answer)
            except Lost as lost:
                log.warning("job=%s replica lost: %s", job.id, " ".join(str(lost).split())[:200])
        raise ResourceError(
            f"{TRIES} replicas were lost at this edit. Ask for a smaller size or fewer results, or later."
        )


def _follow(job: Job, request: EditRequest, answer: Answer) -> None:
    """Make the news of an edit the job's."""
    job.restart()  # without the results of a replica that was lost
    for news in answer:
        job.check_stopped()
        if news.failure is not None:
            news.failure.throw()
        job.step = max(job.step, news.step)
        job.steps = news.steps or job.steps
        if news.preview is not None and news.number is not None:
            job.show(news.number, news.preview)
        if news.result is not None:
            job.add_result(news.result, preview=request.previews > 0)
        job.notify()
    job.check_stopped()
    if len(job.results) < job.count:
        raise Lost("the answer ended before the results")


# --- Ray ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def spread(config: ServeConfig, build: Build, *, each: int, **how: Any) -> Iterator[Service]:
    """A service over as many replicas as the config asks for, which are taken down at the end.

    build: makes the service of a replica, there; each: its `join`; how: of `Service`, for the one here.
    Raises InputError without Ray, ResourceError for a cluster that is not there or too small, and what the
    loading of a model raises.
    """
    cluster = Cluster(
        address=config.ray or "",
        workers=config.replicas,
        cpus=config.replica_cpus,
        gpus=config.replica_gpus,
    )
    with connect_to_ray(cluster) as ray:
        try:
            from ray import serve
        except ImportError:
            raise InputError(
                "--ray needs Ray Serve, which is missing; install it: pip install 'ip2p[ray]'"
            ) from None
        if cluster.workers is None:
            gpus = ray.cluster_resources().get("GPU", 0)
            cluster = dataclasses.replace(cluster, workers=max(1, int(gpus)))
        assert cluster.workers is not None
        count, resources = plan_workers(ray.nodes(), cluster, cluster.workers)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        # The same at the next start: what one that was killed left on the cluster is replaced.
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
        try:
            try:
                handle = serve.run(deployment.bind(build), name=name, route_prefix=None)
            except RuntimeError as error:
                raise ResourceError(
                    f"the replicas did not begin ({' '.join(str(error).split())[:300]}). Is ip2p[serve] "
                    "installed on every machine of the cluster?"
                ) from None
            failure = handle.failure.remote().result()
            if failure is not None:
                failure.throw()
            maker = ReplicaMaker(
                _OnRay(handle, _lost_errors(ray, serve)), list(config.models()), count=count, each=each
            )
            with Service(maker, **how) as service:
                yield service
        finally:
            with contextlib.suppress(Exception):
                serve.delete(name)


def portable(config: ServeConfig) -> ServeConfig:
    """The config for other processes: folders by their whole path, nothing of what the front alone does."""

    def whole(place: str) -> str:
        return str(Path(place).resolve()) if Path(place).exists() else place

    return config.changed(
        model=tuple(f"{name}={whole(place)}" for name, place in config.models().items()),
        safety=config.safety and whole(config.safety),
        tiny_vae=config.tiny_vae and whole(config.tiny_vae),
        parts_from=config.parts_from and whole(config.parts_from),
        ray=None,
        api_key_file=None,
        config=None,
        store=None,
    )


def _lost_errors(ray: Any, serve: Any) -> tuple[type[BaseException], ...]:
    from ray.serve.exceptions import DeploymentUnavailableError

    return (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, DeploymentUnavailableError)


@dataclass
class _OnRay:
    """The replicas of a deployment. lost: the errors that mean that one of them is gone."""

    handle: Any
    lost: tuple[type[BaseException], ...]

    def edit(self, request: EditRequest) -> _Stream:
        return _Stream(self.handle.options(stream=True).edit.remote(request), self.lost)

    def card(self, model: str) -> Card:
        card: Card | Failure = self.handle.card.remote(model).result(timeout_s=CARD_SECONDS)
        if isinstance(card, Failure):
            card.throw()
        return card


class _Stream:
    """The news of one edit, through Ray."""

    def __init__(self, response: Any, lost: tuple[type[BaseException], ...]) -> None:
        self._response, self._lost = response, lost

    def __iter__(self) -> Iterator[News]:
        from ray.exceptions import TaskCancelledError

        try:
            yield from self._response
        except (TaskCancelledError, asyncio.CancelledError, concurrent.futures.CancelledError):
            raise Stopped from None
        except self._lost as error:
            raise Lost(str(error)) from None

    def stop(self) -> None:
        # It waits until Ray has given the edit to a replica, and whoever stops it holds the service's lock.
        threading.Thread(target=self._response.cancel, name="ip2p-cancel", daemon=True).start()
