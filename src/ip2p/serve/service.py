"""Edits for many clients at once: one bounded queue, fair between clients, worked off by joined threads.

A request waits in its client's row; the clients take turns. What runs does so in a thread of its own
through a `JoinedEditor`, so that running requests share the network's calls. `Service` knows nothing of
HTTP: the page and the faces of the server stand on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import hashlib
import logging
import math
import secrets
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

from ip2p.base.devices import pick_device
from ip2p.base.errors import InputError, Ip2pError, ResourceError, as_ip2p_error
from ip2p.config import MAX_SCALE, MAX_SEED, MAX_SIZE, MIN_SIZE
from ip2p.diffusion.samplers import SAMPLERS
from ip2p.diffusion.schedule import SPACINGS
from ip2p.editing.editor import Editor
from ip2p.models.bundle import RECOMMENDED, Card, resolve_settings
from ip2p.pictures import masks
from ip2p.pictures.images import load_image, to_bytes, to_pil
from ip2p.pictures.infotext import Settings, amend, parse_infotext
from ip2p.serve.joined import JoinedEditor, Lane, Stopped
from ip2p.serve.store import Store

log = logging.getLogger("ip2p.serve")

State = Literal["waiting", "running", "done", "failed", "cancelled"]
Kind = Literal["position", "step", "preview", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")
Make = Callable[[], Editor]
Encode = Callable[[Image.Image], tuple[bytes, str]]  # a picture's file, and its ending such as ".png"

# Of the longer side of a preview, in pixels, and the share of a request's time that previews may take:
# the autoencoder's decoder costs as much as a step.
PREVIEW_SIDE, PREVIEW_SHARE = 256, 0.25
WATCHED = 5.0  # seconds after which one who looked at the previews counts as gone
BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # of the seconds a request took
SMOOTH = 0.2  # weight of the newest request in the running means
REMEMBERED = 10_000  # ids of jobs that made room before their time


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for, and how many may; `Service.submit` checks all of it."""

    pixels: int = 16_000_000  # of a picture
    working_pixels: int | None = None  # at which the model works; None: 4 times its own size, at least 1024²
    steps: int = 150
    count: int = 8  # results of one request
    words: int = 2000  # characters of the instruction, and of the negative prompt
    queue: int = 64  # requests waiting, of all clients
    per_client: int = 16  # requests waiting and running, of one client
    waiting_pixels: int = 256_000_000  # of all pictures waiting: 3 bytes of memory each


class FieldError(InputError):
    """A request that cannot be done; `field` is the name of what is wrong in `Request`."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class Full(ResourceError):
    """No room for a request now. retry_after: seconds; scope: whose room is taken."""

    def __init__(self, message: str, *, retry_after: float, scope: Literal["queue", "client"]) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.scope = scope


class Draining(ResourceError):
    """The server takes no more requests. retry_after: seconds after which another may stand there."""

    retry_after = 10.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One edit. The settings are those of `Editor.edit`, and so are their defaults.

    image: upright RGB; its `info` may have exif and icc_profile, which go over to the results. seeds: one
    result each. mask: "L" of the picture's size, white is edited; mask_name is how the results' settings call
    it. model: a name of `Service.models`, the first if None. previews: every so many steps a small picture
    of what is being made; 0 for none.
    """

    image: Image.Image
    instruction: str
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    sampler: str | None = None
    spacing: str | None = None
    text_cfg: float | None = None
    image_cfg: float | None = None
    negative: str = ""
    size: int | tuple[int, int] | None = None
    mask: Image.Image | None = None
    mask_name: str = "mask"
    auto_mask: float | None = None
    mask_padding: int = 32
    feather: float | None = None
    fit: str = "original"
    model: str | None = None
    previews: int = 0


@dataclass(frozen=True)
class Result:
    """A finished picture, with `info` as `Editor.edit` gives it, and what it was made with."""

    image: Image.Image
    seed: int
    settings: Settings


@dataclass(frozen=True)
class Kept:
    """A result in the store: the names of its file and of its mask's, its seed, its infotext."""

    file: str
    mask: str | None
    seed: int
    parameters: str


@dataclass(frozen=True, kw_only=True)
class Event:
    """News of a job, with its numbers at the time. number, image: of a preview, which result's and what."""

    kind: Kind
    position: int
    step: int
    steps: int
    seconds_left: float | None
    number: int | None = None
    image: Image.Image | None = None


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a service has done since it began, and what it does now."""

    waiting: int
    running: int
    clients: int  # with requests waiting or running
    done: int
    failed: int
    cancelled: int
    rejected: Mapping[str, int]  # by "queue", "client", "draining"
    seconds: Mapping[float, int]  # requests that took at most so many seconds, waiting included
    seconds_sum: float
    joined: Mapping[int, int]  # calls of a network, by how many requests were joined in one
    loaded: tuple[str, ...]  # models
    draining: bool


class Stoppable(Protocol):
    """What works at a job."""

    def stop(self) -> None: ...


class Job:
    """A request on its way. Read it from any thread; `Service` alone changes it.

    state, step, steps (of all results together), results (each as soon as it is finished, and of a cancelled
    one those that were), masks (what `auto_mask` found, beside the results), kept (which takes the place of
    both once they are on disk), error (of a failed one), client, model, size (of the picture).
    """

    def __init__(
        self, service: Service, request: Request, client: str, model: str, encode: Encode | None = None
    ) -> None:
        self.id = secrets.token_urlsafe(16)
        self.client = client
        self.model = model
        self.size = request.image.size
        self.count = len(request.seeds)
        self.state: State = "waiting"
        self.step = 0
        self.steps = (request.steps or service.expected_steps(model)) * self.count
        self.results: list[Result] = []
        self.masks: list[Image.Image] | None = None
        self.kept: list[Kept] | None = None
        self.error: Ip2pError | None = None
        self.created = time.monotonic()
        self.started: float | None = None
        self.ended: float | None = None
        self._service = service
        self._request: Request | None = request
        self._encode = encode
        self._keeping = threading.Lock()
        self._previews: list[Image.Image | None] = [None] * self.count
        self._previews_read = -math.inf
        self._sampled: float | None = None  # when its sampling began
        self._places = 0
        self._lane: Stoppable | None = None
        self._stopped = False
        self._why: Ip2pError | None = None  # it was stopped, if not by its owner
        self._over = threading.Event()
        self._listeners: set[Callable[[], None]] = set()
        self._enders: set[Callable[[], None]] = set()

    @property
    def position(self) -> int:
        """How many requests are to begin before it; 0 once it runs."""
        return self._service._position(self)

    @property
    def previews(self) -> list[Image.Image | None]:
        """The newest small picture of each result. They are made only while somebody looks."""
        self._previews_read = time.monotonic()
        return list(self._previews)

    @property
    def seconds_left(self) -> float | None:
        """An estimate until the end; None where nothing was measured yet, 0 at the end."""
        if self.state in ENDED:
            return 0.0
        if self._sampled is not None and self.step:
            # One step more for what comes after the last.
            each = (time.monotonic() - self._sampled) / self.step
            return each * (self.steps - self.step + 1)
        return self._service._estimate(self)

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it has ended, after waiting for that at most so many seconds."""
        return self._over.wait(timeout)

    async def aend(self) -> None:
        """`wait` for asyncio. Cheaper than events for one who wants no more than the end."""
        loop = asyncio.get_running_loop()
        over = asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(over.set)

        self._enders.add(wake)
        try:
            if not self._over.is_set():
                await over.wait()
        finally:
            self._enders.discard(wake)

    def events(self) -> Iterator[Event]:
        """News until the end, waited for. Any number may read; one who is slow misses what is outdated."""
        changed = threading.Event()
        with self._listening(changed.set):
            seen = _Seen()
            while True:
                changed.clear()
                yield from self._news(seen)
                if seen.ended:
                    return
                changed.wait()

    async def aevents(self) -> AsyncIterator[Event]:
        """`events` for asyncio."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(changed.set)

        with self._listening(wake):
            seen = _Seen()
            while True:
                changed.clear()
                for event in self._news(seen):
                    yield event
                if seen.ended:
                    return
                await changed.wait()

    @contextlib.contextmanager
    def _listening(self, wake: Callable[[], None]) -> Iterator[None]:
        self._listeners.add(wake)
        try:
            yield
        finally:
            self._listeners.discard(wake)

    def _news(self, seen: _Seen) -> Iterator[Event]:
        state = self.state  # before the rest, which changes first
        if state == "waiting" and (position := self.position) != seen.position:
            seen.position = position
            yield self._event("position")
        if state != "waiting" and self.step != seen.step:
            seen.step = self.step
            yield self._event("step")
        for number, image in enumerate(self._previews):
            if image is not None and image is not seen.previews.get(number):
                seen.previews[number] = image
                yield self._event("preview", number, image)
        if state in ENDED:
            seen.ended = True
            yield self._event(state)  # type: ignore[arg-type]

    def _event(self, kind: Kind, number: int | None = None, image: Image.Image | None = None) -> Event:
        return Event(
            kind=kind,
            position=self.position,
            step=self.step,
            steps=self.steps,
            seconds_left=self.seconds_left,
            number=number,
            image=image,
        )

    def _tell(self) -> None:
        for wake in list(self._listeners):
            wake()

    @property
    def _watched(self) -> bool:
        return bool(self._listeners) or time.monotonic() - self._previews_read < WATCHED

    def _bytes(self) -> int:
        """Of its pictures, about."""
        pictures = [result.image for result in self.results] + [image for image in self._previews if image]
        return sum(image.width * image.height * 4 for image in pictures)


@dataclass
class _Seen:
    """What a reader of a job's events knows."""

    position: int | None = None
    step: int = 0
    previews: dict[int, Image.Image] = field(default_factory=dict)
    ended: bool = False


class _Model:
    """A model by its name. make: loads it; None for one that was given loaded and stays."""

    def __init__(self, name: str, source: Editor | Make) -> None:
        self.name = name
        self.make = None if isinstance(source, Editor) else source
        self.given = source if isinstance(source, Editor) else None
        self.editor: JoinedEditor | None = None
        self.users = 0
        self.used = 0.0
        self.loading = threading.Lock()


@dataclass(frozen=True)
class Place:
    """A place in the queue that is kept for a request of a client."""

    client: str


class Service:
    """Takes requests, runs them, and keeps what came out for a while.

    editors: models by name, each an editor or a function that loads one when it is first asked for; of those
    functions' at most `loaded` stay loaded. join: how many pictures are sampled at once, of all requests
    (`default_join` if None). made_from: fields of `infotext.Settings` to add to the results of a
    model, such as its revision. check: called on every result before anybody sees it; an Ip2pError that it
    raises fails the request. With it there are no previews, which nobody would have checked. finish: called
    next, with the same right; what it gives takes the result's place. keep_seconds, keep_bytes, keep_jobs:
    how long ended jobs are known by their id, with how many bytes of pictures in memory, and how many. store:
    a folder for results on disk, bounded by store_bytes (`Store`). Close it at the end.
    """

    def __init__(
        self,
        editors: Mapping[str, Editor | Make],
        *,
        limits: Limits | None = None,
        join: int | None = None,
        loaded: int = 1,
        made_from: Mapping[str, Mapping[str, Any]] | None = None,
        check: Callable[[Image.Image], None] | None = None,
        finish: Callable[[Image.Image], Image.Image] | None = None,
        keep_seconds: float = 600,
        keep_bytes: int = 2**28,
        keep_jobs: int = 10_000,
        store: Path | None = None,
        store_bytes: int = 2**30,
    ) -> None:
        if not editors:
            raise InputError("The service has no model. Name one, for example --model storybook.")
        self.limits = limits or Limits()
        self.models = list(editors)
        self.join = default_join() if join is None else join
        self.keep_seconds = keep_seconds
        self.store = None if store is None else Store(store, seconds=keep_seconds, size=store_bytes)
        self._keep_bytes, self._keep_jobs = keep_bytes, keep_jobs
        self._made_from = made_from or {}
        self._check, self._finish = check, finish
        self._loaded_bound = max(1, loaded)
        self._known = {name: _Model(name, source) for name, source in editors.items()}
        self._changed = threading.Condition(threading.RLock())
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # by client, whose turn is next first
        self._running: dict[str, Job] = {}
        self._jobs: dict[str, Job] = {}
        self._ended: deque[tuple[str, float]] = deque()  # ids of jobs and when they ended, oldest first
        self._heavy: OrderedDict[str, int] = OrderedDict()  # of those the bytes of pictures in memory
        self._heavy_bytes = 0
        self._early: OrderedDict[str, None] = OrderedDict()  # ids that made room before their time
        self._of_client: Counter[str] = Counter()
        self._places: list[Place] = []  # kept for requests that are being read
        self._free = self.join
        self._draining = self._closed = False
        self._outcomes: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._buckets: Counter[float] = Counter()
        self._seconds_sum = 0.0
        self._calls: Counter[int] = Counter()
        self._pace: float | None = None  # seconds from one end to the next while all places are taken
        self._seconds: float | None = None  # that a request runs
        self._salt = secrets.token_bytes(16)
        self._threads = [
            threading.Thread(target=self._work, name=f"ip2p-edit-{number}", daemon=True)
            for number in range(self.join)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- for those who ask -----------------------------------------------------------------------

    def submit(
        self, request: Request, *, client: str, place: Place | None = None, encode: Encode | None = None
    ) -> Job:
        """Put a request into the queue. `client`: whose it is, for fairness; `place`: what `room` kept.

        encode: for one who comes back later. The results go into the store as soon as they are made (`keep`),
        where more of them find room than in memory.

        Raises FieldError for what cannot be done, Full and Draining where there is no room.
        """
        if place is None:
            self.check_room(client)
        request = self.checked(request)
        assert encode is None or self.store is not None
        job = Job(self, request, client, request.model or self.models[0], encode)
        with self._changed:
            if place is not None:
                self._give_up(place)
            self.check_room(client)
            self._check_pixels(request)
            self._jobs[job.id] = job
            self._of_client[client] += 1
            self._waiting.setdefault(client, deque()).append(job)
            self._forget_old()
            self._changed.notify()
        return job

    @contextlib.contextmanager
    def room(self, client: str) -> Iterator[Place]:
        """Keep a place in the queue while a picture is decoded, so that none is refused after that work.

        Not while a body is on its way: who sends slowly would keep others out. Raises Full or Draining at
        once where there is none.
        """
        with self._changed:
            self.check_room(client)
            place = Place(client)
            self._places.append(place)
        try:
            yield place
        finally:
            with self._changed:
                self._give_up(place)

    def check_room(self, client: str) -> None:
        """Raise Full or Draining if a request of this client would not be taken now."""
        with self._changed:
            if self._draining:
                self._rejected["draining"] += 1
                raise Draining("The server is shutting down and takes no more requests. Ask again soon.")
            limits, waiting = self.limits, self._count_waiting() + len(self._places)
            own = sum(place.client == client for place in self._places)
            if self._of_client.get(client, 0) + own >= limits.per_client:
                self._refuse(
                    "client", f"{limits.per_client} of your requests wait or run, which is the limit."
                )
            if waiting >= limits.queue:
                self._refuse("queue", f"{limits.queue} requests wait already, which is the limit.")

    def checked(self, request: Request) -> Request:
        """The request with its picture and mask as the editor takes them. Raises FieldError."""
        request = _checked(request, self.limits, self.models)
        with self._changed:
            model = self._known[request.model or self.models[0]]
            editor = model.editor or model.given
        if editor is not None:  # else it is told when the model is there
            self._working_size(editor, request)
        return request

    def cancel(self, id: str) -> None:
        """Stop a job: one that waits at once, one that runs within a step. Nothing happens to others."""
        with self._changed:
            job = self._jobs.get(id)
            if job is None or job.state in ENDED:
                return
            if job.state == "waiting":
                self._leave_queue(job)
                self._end(job, "cancelled")
                return
            job._stopped = True
            if job._lane is not None:
                job._lane.stop()

    def job(self, id: str) -> Job | None:
        """The job of an id; None once it is forgotten."""
        with self._changed:
            self._forget_old()
            return self._jobs.get(id)

    def went_early(self, id: str) -> bool:
        """Whether the job of an id was forgotten before its time, to make room."""
        with self._changed:
            return id in self._early

    def keep(self, job: Job, encode: Encode) -> list[Kept]:
        """Move a job's results from memory into the store, unless they are there.

        Raises ResourceError where they do not fit, or the disk is full.
        """
        store = self.store
        assert store is not None
        with job._keeping:
            if job.kept is None:
                names: list[str] = []
                kept = []
                try:
                    for number, result in enumerate(job.results):
                        names.append(file := store.put(*encode(result.image), beside=names))
                        mask = None
                        if job.masks:
                            mask = store.put(to_bytes(job.masks[number]), ".png", beside=names)
                            names.append(mask)
                        parameters = str(result.image.info.get("parameters", ""))
                        kept.append(Kept(file, mask, result.seed, parameters))
                except BaseException:
                    for name in names:
                        store.remove(name)
                    raise
                job.kept = kept
                job.results, job.masks = [], None  # only now: who finds them empty looks there
                with self._changed:
                    self._heavy_bytes -= self._heavy.pop(job.id, 0)
            return job.kept

    def card(self, model: str | None = None) -> Card:
        """What a model says of itself, with the settings that it recommends. Loads it."""
        with self._held(self._known[model or self.models[0]]) as editor:
            return editor.bundle.card

    def expected_steps(self, model: str | None = None) -> int:
        """The steps of an edit that names none: known once the model is loaded, until then a guess."""
        known = self._known[model or self.models[0]]
        editor = known.given or known.editor
        return min(Card.steps if editor is None else editor.bundle.card.steps, self.limits.steps)

    def _resolve(self, job: Job, card: Card) -> Request:
        """The job's request, from now on with the model's own values for the settings that it left open."""
        request = job._request
        assert request is not None
        own = resolve_settings(card, {name: getattr(request, name) for name in RECOMMENDED})
        if request.steps is None:
            own["steps"] = min(own["steps"], self.limits.steps)
        job._request = dataclasses.replace(request, **own)
        job.steps = own["steps"] * job.count
        return job._request

    def warm(self) -> None:
        """Load the first model. Raises as it does."""
        with self._held(self._known[self.models[0]]):
            pass

    @property
    def ready(self) -> bool:
        """Whether the first model is loaded and requests are taken."""
        with self._changed:
            first = self._known[self.models[0]]
            return not self._draining and (first.given or first.editor) is not None

    def stats(self) -> Stats:
        """What was done, and what is going on."""
        with self._changed:
            # Counts up to each bound, as Prometheus has them.
            upto = {bound: sum(n for b, n in self._buckets.items() if b <= bound) for bound in BUCKETS}
            return Stats(
                waiting=self._count_waiting(),
                running=len(self._running),
                clients=len(self._of_client),
                done=self._outcomes["done"],
                failed=self._outcomes["failed"],
                cancelled=self._outcomes["cancelled"],
                rejected=dict(self._rejected),
                seconds=upto | {math.inf: sum(self._buckets.values())},
                seconds_sum=self._seconds_sum,
                joined=dict(self._calls),
                loaded=tuple(m.name for m in self._known.values() if (m.editor or m.given) is not None),
                draining=self._draining,
            )

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, fail those that wait with Draining, and wait for those that run.

        Whether they ended in time; those that did not are stopped and fail with Draining too.
        """
        with self._changed:
            self._draining = True
            for job in [job for jobs in self._waiting.values() for job in jobs]:
                self._leave_queue(job)
                self._end(
                    job,
                    "failed",
                    Draining("The server is shutting down before this request began. Ask again."),
                )
            in_time = self._changed.wait_for(lambda: not self._running, timeout)
            for job in list(self._running.values()):
                job._why = Draining("The server shut down before this request was done. Ask again.")
                self.cancel(job.id)
        return in_time

    def close(self) -> None:
        """Stop everything and give up threads and models."""
        self.drain(0)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for model in self._known.values():
            if model.editor is not None:
                model.editor.close()
                model.editor = None
        if self.store is not None:
            self.store.close()

    # --- the queue; all of it under the lock ------------------------------------------------------

    def _count_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _refuse(self, scope: Literal["queue", "client"], message: str) -> None:
        self._rejected[scope] += 1
        # By then all that waits now has begun; for a client, one of its own has ended.
        ahead = self._count_waiting() if scope == "queue" else len(self._of_client)
        seconds = min(600.0, max(1.0, (self._pace or 1.0) * ahead))
        raise Full(f"{message} Ask again in {seconds:.0f} seconds.", retry_after=seconds, scope=scope)

    def _check_pixels(self, request: Request) -> None:
        waiting = sum(job.size[0] * job.size[1] for jobs in self._waiting.values() for job in jobs)
        own = request.image.width * request.image.height
        if waiting and waiting + own > self.limits.waiting_pixels:
            millions = self.limits.waiting_pixels / 1e6
            self._refuse("queue", f"Pictures of {millions:g} megapixels wait already, which is the limit.")

    def _give_up(self, place: Place) -> None:
        # By identity: two places of a client are alike.
        self._places = [each for each in self._places if each is not place]

    def _leave_queue(self, job: Job) -> None:
        jobs = self._waiting[job.client]
        jobs.remove(job)
        if not jobs:
            del self._waiting[job.client]

    def _take(self) -> Job | None:
        """The next job to run, if there is room for it."""
        if not self._waiting or not self._free:
            return None
        client, jobs = next(iter(self._waiting.items()))
        job = jobs[0]
        model = self._known[job.model]
        # None overtakes it: a model that is always busy would keep another out for ever.
        if not self._room_for(model):
            return None
        jobs.popleft()
        del self._waiting[client]
        if jobs:
            self._waiting[client] = jobs  # behind all others
        model.users += 1
        job._places = min(job.count, self._free)
        self._free -= job._places
        self._running[job.id] = job
        job.started = time.monotonic()
        job.state = "running"
        for others in self._waiting.values():
            for other in others:
                other._tell()
        job._tell()
        if self._free:
            self._changed.notify()
        return job

    def _position(self, job: Job) -> int:
        with self._changed:
            before, own = 0, self._waiting.get(job.client)
            if own is None or job not in own:
                return 0
            turn = own.index(job)  # so many rounds come first, and the clients before it in its own round
            passed = False
            for client, jobs in self._waiting.items():
                passed = passed or client == job.client
                before += turn if client == job.client else min(len(jobs), turn if passed else turn + 1)
            return before

    def _estimate(self, job: Job) -> float | None:
        with self._changed:
            if self._seconds is None or self._pace is None:
                return None
            if job.state == "running":
                assert job.started is not None
                return max(0.0, self._seconds - (time.monotonic() - job.started))
            return self._pace * (job.position + 1) + self._seconds

    def _end(self, job: Job, state: State, error: Ip2pError | None = None) -> None:
        now = time.monotonic()
        job.ended = now
        job.error = error
        if state == "failed":
            job.results, job.masks = [], None
            job._previews = [None] * job.count
        request, job._request = job._request, None  # its picture is the largest thing here
        assert request is not None
        self._running.pop(job.id, None)
        self._of_client[job.client] -= 1
        if not self._of_client[job.client]:
            del self._of_client[job.client]
        self._outcomes[state] += 1
        took = now - job.created
        if state == "done":
            self._seconds_sum += took
            self._buckets[next((bound for bound in BUCKETS if took <= bound), math.inf)] += 1
        self._ended.append((job.id, now))
        if size := job._bytes():
            self._heavy[job.id] = size
            self._heavy_bytes += size
        job.state = state  # the last, for those who read without the lock
        job._over.set()
        self._forget_old()
        job._tell()
        for wake in list(job._enders):
            wake()
        for others in self._waiting.values():
            for other in others:
                other._tell()
        self._changed.notify_all()
        waited = (job.started or now) - job.created
        log.info(
            "job=%s client=%s model=%s size=%dx%d steps=%d count=%d waited=%.3f seconds=%.3f outcome=%s%s",
            *(job.id, self._hashed(job.client), job.model, *job.size, request.steps, job.count),
            *(waited, took, state, f" error={type(error).__name__}" if error else ""),
        )

    def _hashed(self, client: str) -> str:
        """A client's name in the logs: the same as long as the process lives, and no address."""
        return hashlib.sha256(self._salt + client.encode()).hexdigest()[:8]

    def _forget_old(self) -> None:
        now = time.monotonic()
        # The newest stays, whatever its size: nobody had the time to ask for it.
        while len(self._heavy) > 1 and self._heavy_bytes > self._keep_bytes:
            self._forget(next(iter(self._heavy)), early=True)
        while self._ended:
            id, ended = self._ended[0]
            old = now - ended >= self.keep_seconds
            if not old and len(self._ended) <= self._keep_jobs:
                return
            self._ended.popleft()
            self._forget(id, early=not old)

    def _forget(self, id: str, *, early: bool) -> None:
        self._heavy_bytes -= self._heavy.pop(id, 0)
        if self._jobs.pop(id, None) is not None and early:
            self._early[id] = None
            while len(self._early) > REMEMBERED:
                self._early.popitem(last=False)

    # --- models ----------------------------------------------------------------------------------

    def _room_for(self, model: _Model) -> bool:
        """Whether it is loaded or may be; one that nobody uses makes room. Under the lock."""
        if model.given is not None or model.editor is not None or model.users:
            return True
        held = [m for m in self._known.values() if m.make is not None and (m.editor is not None or m.users)]
        if len(held) < self._loaded_bound:
            return True
        idle = [m for m in held if not m.users and m.editor is not None]
        if not idle:
            return False
        oldest = min(idle, key=lambda m: m.used)
        assert oldest.editor is not None
        oldest.editor.close()
        oldest.editor = None
        return True

    def _load(self, model: _Model) -> JoinedEditor:
        """The model's editor, loaded if need be; its `users` keep it from being put away."""
        with model.loading:
            if model.editor is None:
                if model.make is not None:
                    gc.collect()  # of one that made room
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                editor = model.given or model.make()  # type: ignore[misc]
                model.editor = JoinedEditor(editor, join=self.join, calls=self._calls)
            return model.editor

    def _release(self, model: _Model) -> None:
        with self._changed:
            model.users -= 1
            model.used = time.monotonic()
            self._changed.notify_all()

    @contextlib.contextmanager
    def _held(self, model: _Model) -> Iterator[JoinedEditor]:
        with self._changed:
            self._changed.wait_for(lambda: self._room_for(model))
            model.users += 1
        try:
            yield self._load(model)
        finally:
            self._release(model)

    # --- the threads that edit -------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while (job := self._take()) is None:
                    if self._closed:
                        return
                    self._changed.wait()
            self._run(job)
            del job  # and its pictures, while the thread waits for another

    def _run(self, job: Job) -> None:
        state: State = "failed"
        error: Ip2pError | None = None
        try:
            try:
                self._make(job)
                self._measure(job)
            finally:
                self._leave(job)
            if job._encode is not None:
                self.keep(job, job._encode)
            state = "done"
        except Stopped:
            # By its owner, unless there is another reason.
            state, error = ("cancelled", None) if job._why is None else ("failed", job._why)
        except Ip2pError as known:
            error = known.with_traceback(None)  # which would hold the pictures
        except Exception as unknown:
            error = as_ip2p_error(unknown, memory="Out of memory. Ask for a smaller size or fewer results.")
            if error is None:
                log.exception("job=%s outcome=failed", job.id)
                error = Ip2pError(
                    f"The edit failed within the server ({type(unknown).__name__}); job {job.id}."
                )
        finally:
            with self._changed:
                self._end(job, state, error)

    def _measure(self, job: Job) -> None:
        with self._changed:
            assert job.started is not None
            took = time.monotonic() - job.started
            self._seconds = _smoothed(self._seconds, took)
            self._pace = _smoothed(self._pace, took / max(1, len(self._running)))

    def _leave(self, job: Job) -> None:
        """Its places and its model are for others, also while its results are written."""
        with self._changed:
            self._free += job._places
            self._release(self._known[job.model])

    def _make(self, job: Job) -> None:
        """Make a job's results, here. Raises Stopped, and what is told as the job's error."""
        editor = self._load(self._known[job.model])
        with editor.lane() as lane, self._stoppable(job, lane):
            self._edit(job, editor, lane)

    @contextlib.contextmanager
    def _stoppable(self, job: Job, lane: Stoppable) -> Iterator[None]:
        """While the block runs, `cancel` reaches what works at the job; at once if it came before."""
        with self._changed:
            job._lane = lane
            if job._stopped:
                lane.stop()
        try:
            yield
        finally:
            with self._changed:
                job._lane = None

    def _edit(self, job: Job, editor: JoinedEditor, lane: Lane) -> None:
        """Make all results of a job, as many at once as it has places."""
        request = self._resolve(job, editor.bundle.card)
        working = self._working_size(editor, request)
        lane.pictures = job._places
        at_once = editor.fitting_batch(working)
        made_from = dict(self._made_from.get(job.model, {}))
        if request.mask is not None:
            made_from["mask"] = request.mask_name
        start = 0
        while start < job.count:
            seeds = request.seeds[start : start + at_once]
            watch = _Watch(job, editor, lane, start, len(seeds), previews=self._check is None)
            try:
                pictures = editor.edit(
                    request.image,
                    request.instruction,
                    seeds=seeds,
                    text_cfg=request.text_cfg,
                    image_cfg=request.image_cfg,
                    steps=request.steps,
                    sampler=request.sampler,
                    spacing=request.spacing,
                    negative=request.negative,
                    size=request.size,
                    fit=request.fit,  # type: ignore[arg-type]
                    mask=request.mask,
                    mask_padding=request.mask_padding,
                    feather=request.feather,
                    auto_mask=request.auto_mask,
                    batch_size=len(seeds),
                    max_pixels=None,  # checked
                    callback=watch,
                )
            except ResourceError:
                if len(seeds) == 1 or lane.stopped:
                    raise
                at_once = lane.pictures = 1  # what does not fit together may fit alone
                continue
            for seed, picture in zip(seeds, pictures, strict=True):
                picture.info["parameters"] = amend(picture.info["parameters"], **made_from)
                found = picture.info.get("mask")
                if self._check is not None:
                    self._check(picture)
                if self._finish is not None:
                    info = picture.info
                    picture = self._finish(picture)
                    picture.info = {**info, **picture.info}
                settings = parse_infotext(picture.info["parameters"])
                if request.auto_mask is not None and found is not None:
                    job.masks = [*(job.masks or []), found]
                job.results = [*job.results, Result(picture, seed, settings)]
                if request.previews:
                    job._previews[len(job.results) - 1] = _small(picture)
            start += len(seeds)
            job._tell()

    def _working_size(self, editor: Editor, request: Request) -> tuple[int, int]:
        """The width and height at which the model works. Raises FieldError for one over the limit."""
        pixels = request.image.size
        if request.mask is not None:
            left, top, right, bottom = masks.padded(request.mask, request.mask_padding)
            pixels = right - left, bottom - top
        try:
            width, height = editor.working_size(pixels, request.size)
        except InputError as error:
            raise FieldError(f"size: {error}", field="size") from None
        most = self.limits.working_pixels
        if most is None:
            most = max(1024**2, 4 * editor.bundle.card.native_size**2)
        if width * height > most:
            raise FieldError(
                f"size has the model work at {width}x{height}, {width * height:,} pixels; "
                f"the limit is {most:,}.",
                field="size",
            )
        return width, height


class _Watch:
    """Called after each step of an edit: counts it, stops it, and has previews made."""

    def __init__(
        self, job: Job, editor: JoinedEditor, lane: Lane, first: int, count: int, *, previews: bool
    ) -> None:
        self.job, self.editor, self.lane, self.previews = job, editor, lane, previews
        self.first, self.count = first, count
        self.before = job.step
        self.shown = 0.0  # seconds that previews took
        self.began = time.monotonic()
        if job._sampled is None:
            job._sampled = self.began

    def __call__(self, step: int, steps: int, x: Tensor) -> None:
        if self.lane.stopped:
            raise Stopped
        self.job.step = self.before + step * self.count
        request = self.job._request
        assert request is not None
        if self.previews and request.previews and step % request.previews == 0 and step < steps:
            self.preview()
        self.job._tell()

    def preview(self) -> None:
        """Decode what the model holds the results to be now: whole, if somebody looks and it is cheap.

        With the autoencoder, since a linear map from latents to colours would have to be fitted to every
        model; the price is bounded by its share of the time.
        """
        began = time.monotonic()
        x0 = self.lane.x0
        if x0 is None or not self.job._watched or self.shown > PREVIEW_SHARE * (began - self.began):
            return
        for number, row in enumerate(x0):
            pixels = self.editor.decode(row[None])
            if pixels.isfinite().all():
                self.job._previews[self.first + number] = _small(to_pil(pixels))
        self.shown += time.monotonic() - began


def default_join(device: torch.device | None = None) -> int:
    """How many pictures to sample at once where the operator does not say; for the device of `auto` if None.

    Measured on 8 requests of one picture at once, against one at a time: the storybook model on a CPU gave
    1.24 times the requests a second joined by twos, 1.39 by fours and 1.43 by eights, where each would wait
    twice as long for next to nothing; on a GPU 8 pictures of 512² take 3.2 times as long as one.
    """
    return 4 if (device or pick_device()).type == "cpu" else 8


def _small(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    small.info = {}
    return small


def _smoothed(mean: float | None, value: float) -> float:
    return value if mean is None else mean + SMOOTH * (value - mean)


# --- what a request may be -------------------------------------------------------------------------


def _checked(request: Request, limits: Limits, models: list[str]) -> Request:
    width, height = request.image.size
    if width * height > limits.pixels:
        raise FieldError(
            f"image is {width}x{height}, {width * height:,} pixels; the limit is {limits.pixels:,}.",
            field="image",
        )
    with _of("image"):
        image = load_image(request.image, max_pixels=None)
    for name, text in (("instruction", request.instruction), ("negative", request.negative)):
        if not is_text(text):
            raise FieldError(f"{name} {NO_TEXT}", field=name)
        if len(text) > limits.words:
            raise FieldError(
                f"{name} has {len(text):,} characters; the limit is {limits.words:,}.", field=name
            )
    if not request.instruction.strip():
        raise FieldError(
            'instruction is empty; say what to change, as in "make it night".', field="instruction"
        )
    if not 1 <= len(request.seeds) <= limits.count:
        raise FieldError(
            f"seeds has {len(request.seeds)} of them, one a result; it must be 1 to {limits.count}.",
            field="seeds",
        )
    for seed in request.seeds:
        _whole("seeds", seed, 0, MAX_SEED)
    if request.steps is not None:
        _whole("steps", request.steps, 1, limits.steps)
    _whole("previews", request.previews, 0, limits.steps)
    _whole("mask_padding", request.mask_padding, 0, MAX_SIZE)
    for name, most in (
        ("text_cfg", MAX_SCALE),
        ("image_cfg", MAX_SCALE),
        ("auto_mask", 1),
        ("feather", MAX_SIZE),
    ):
        _number(name, getattr(request, name), most)
    for name, known in (("sampler", SAMPLERS), ("spacing", SPACINGS), ("fit", ("original", "model"))):
        if (value := getattr(request, name)) is not None:
            _one_of(name, value, list(known))
    if request.model is not None:
        _one_of("model", request.model, models)
    sides = () if request.size is None else (request.size,) if isinstance(request.size, int) else request.size
    for side in sides:
        _whole("size", side, MIN_SIZE, MAX_SIZE)
    mask = request.mask
    if mask is not None:
        if request.auto_mask is not None:
            raise FieldError(
                "auto_mask looks for the region that mask names; give one of them.", field="auto_mask"
            )
        with _of("mask"):
            mask = masks.load_mask(mask, image.size, max_pixels=None)
    return dataclasses.replace(request, image=image, mask=mask)


@contextlib.contextmanager
def _of(name: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise FieldError(f"{name}: {error}", field=name) from None


def _whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise FieldError(f"{name} is {_shown(value)}; it must be {low} to {high}.", field=name)


def _number(name: str, value: object, high: float) -> None:
    if value is None:
        return
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not 0 <= value <= high:  # type: ignore[operator]
        raise FieldError(f"{name} is {_shown(value)}; it must be a number from 0 to {high:g}.", field=name)


def _one_of(name: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise FieldError(f"{name} is {_shown(value)}; use one of {', '.join(known)}.", field=name)


NO_TEXT = "holds half of a character (a lone surrogate). Send whole ones."


def is_text(text: str) -> bool:
    """Whether it can be written: JSON can name halves of characters, which no file and no answer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
