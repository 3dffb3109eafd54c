"""A job: one request from the queue to its results, and its events."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from PIL import Image

from ip2p.base.errors import Ip2pError

if TYPE_CHECKING:
    from ip2p.serve.queue import FairQueue
    from ip2p.serve.requests import EditRequest

State = Literal["waiting", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")
Encode = Callable[[Image.Image], tuple[bytes, str]]  # a picture's file and its suffix, such as ".png"

PREVIEW_SIDE = 256  # longer side of a preview, in pixels
WATCHED = 5.0  # seconds after which a reader of the previews counts as gone


class Stopped(Exception):
    """An edit was stopped."""


class Stoppable(Protocol):
    """Something that works on a job. Any thread may call `stop`."""

    def stop(self) -> None: ...


@dataclass(frozen=True)
class Result:
    """A finished picture with the `info` of `Editor.edit`, its seed, and the detected mask, if any."""

    image: Image.Image
    seed: int
    mask: Image.Image | None = None

    @property
    def parameters(self) -> str:
        """The infotext of the picture."""
        return str(self.image.info.get("parameters", ""))


@dataclass(frozen=True)
class Kept:
    """A result on disk. file, mask: file names. parameters: the infotext."""

    file: str
    mask: str | None
    seed: int
    parameters: str


@dataclass(frozen=True, kw_only=True)
class Event:
    """A change of a job. image: a preview of result `number`."""

    kind: Literal["position", "step", "preview", "done", "failed", "cancelled"]
    position: int
    step: int
    steps: int
    number: int | None = None
    image: Image.Image | None = None


class Job:
    """A request that waits, runs or has ended. Any thread may read it; the service and the maker change it.

    steps: of all results together. results: each result as soon as it is finished, also of a cancelled job.
    kept: replaces the results once they are on disk. places: pictures that are sampled at once. encode:
    writes a result. keep: whether the results move to disk as soon as they are finished.
    """

    def __init__(
        self,
        request: EditRequest,
        *,
        client: str,
        model: str,
        queue: FairQueue,
        encode: Encode | None = None,
        keep: bool = False,
    ) -> None:
        self.id = secrets.token_urlsafe(16)
        self.client, self.model, self.encode, self.keep = client, model, encode, keep
        self.size = request.image.size
        self.count = len(request.seeds)
        self.request: EditRequest | None = request  # None after the end, since its picture is large
        self.state: State = "waiting"
        self.step, self.steps = 0, (request.settings.resolved().steps or 1) * self.count
        self.results: list[Result] = []
        self.kept: list[Kept] | None = None
        self.warnings: list[str] = list(request.warnings)
        self.error: Ip2pError | None = None
        self.places = 0
        self.created = time.monotonic()
        self.started: float | None = None
        self.ended: float | None = None
        self.keeping = threading.Lock()  # held while the results move to disk
        self._queue = queue
        self._lock = threading.Lock()
        self._previews: list[Image.Image | None] = [None] * self.count
        self._previews_read = -math.inf
        self._sampled: float | None = None  # when its sampling began
        self._worker: Stoppable | None = None
        self._stopped = False
        self.stop_reason: Ip2pError | None = None  # unless its client stopped it
        self._over = threading.Event()
        self._listeners: set[Callable[[], None]] = set()  # called at each change
        self._enders: set[Callable[[], None]] = set()  # called at the end

    # --- for readers ------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        return self.state not in ENDED

    @property
    def position(self) -> int:
        """The number of requests that start before it; 0 once it runs."""
        return self._queue.position(self)

    @property
    def previews(self) -> list[Image.Image | None]:
        """The newest preview of each result. Previews are made only while someone reads them."""
        self._previews_read = time.monotonic()
        return list(self._previews)

    @property
    def watched(self) -> bool:
        """Whether someone reads its events or previews."""
        return bool(self._listeners) or time.monotonic() - self._previews_read < WATCHED

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the end; None before the first measurement, 0 after the end."""
        if not self.active:
            return 0.0
        if self._sampled is not None and self.step:
            # One more step accounts for the work after the last one.
            each = (time.monotonic() - self._sampled) / self.step
            return each * (self.steps - self.step + 1)
        return self._queue.estimate(self)

    @property
    def bytes(self) -> int:
        """The approximate memory of its pictures."""
        pictures = [*(result.image for result in self.results), *filter(None, self._previews)]
        return sum(image.width * image.height * 4 for image in pictures)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most `timeout` seconds. Returns whether the job has ended."""
        return self._over.wait(timeout)

    async def until_end(self) -> None:
        """`wait` for asyncio. It does not count as watching, so it causes no previews."""
        with _waker(self._enders) as over:
            if not self._over.is_set():
                await over.wait()

    async def events(self) -> AsyncIterator[Event]:
        """Yield changes until the end. Any number of readers is allowed; a slow one skips outdated events."""
        position, step, shown = -1, 0, list[Image.Image | None]([None] * self.count)
        with _waker(self._listeners) as changed:
            while True:
                changed.clear()
                state = self.state  # read first, because it changes last
                if state == "waiting" and self.position != position:
                    position = self.position
                    yield self._event("position")
                if state != "waiting" and self.step != step:
                    step = self.step
                    yield self._event("step")
                for number, image in enumerate(self._previews):
                    if image is not None and image is not shown[number]:
                        shown[number] = image
                        yield self._event("preview", number=number, image=image)
                if state in ENDED:
                    yield self._event(state)
                    return
                await changed.wait()

    def _event(self, kind: str, **preview: object) -> Event:
        state = {"position": self.position, "step": self.step, "steps": self.steps}
        return Event(kind=kind, **state, **preview)  # type: ignore[arg-type]

    # --- for the service and the maker --------------------------------------------------------------

    def start(self, places: int) -> None:
        self.places, self.started, self.state = places, time.monotonic(), "running"
        self.notify()

    def start_sampling(self) -> None:
        """Start the clock of the steps. Only the first call has an effect."""
        if self._sampled is None:
            self._sampled = time.monotonic()

    def restart(self) -> None:
        """Start over after its worker was lost."""
        self.step, self.results, self._sampled = 0, [], time.monotonic()

    def add_result(self, result: Result, *, preview: bool) -> None:
        self.results = [*self.results, result]
        found = result.image.info.get("warnings", ())
        self.warnings += [text for text in found if text not in self.warnings]
        if preview:
            self.show(len(self.results) - 1, result.image)

    def show(self, number: int, picture: Image.Image) -> None:
        """Set the preview of a result to a picture, scaled down."""
        small = picture.copy()
        small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        small.info = {}
        self._previews[number] = small

    def put_away(self, kept: list[Kept]) -> None:
        """Replace the results with their files."""
        self.kept = kept
        self.results = []  # after `kept`: a reader who finds no results reads that

    def notify(self) -> None:
        """Wake all readers of events."""
        for wake in list(self._listeners):
            wake()

    @contextlib.contextmanager
    def stoppable(self, worker: Stoppable) -> Iterator[None]:
        """Within the block, `stop` stops the worker; immediately if it was called before."""
        with self._lock:
            self._worker = worker
            if self._stopped:
                worker.stop()
        try:
            yield
        finally:
            with self._lock:
                self._worker = None

    def stop(self, reason: Ip2pError | None = None) -> None:
        """Stop the job within a step. reason: the error with which it fails; None: it counts as cancelled."""
        with self._lock:
            self.stop_reason, self._stopped = self.stop_reason or reason, True
            if self._worker is not None:
                self._worker.stop()

    def check_stopped(self) -> None:
        """Raise Stopped if `stop` was called."""
        if self._stopped:
            raise Stopped

    def settle(self, state: State, error: Ip2pError | None) -> None:
        """Record the outcome and free what an ended job no longer needs."""
        self.ended, self.error, self.request = time.monotonic(), error, None
        if state == "failed":
            self.results, self._previews = [], [None] * self.count

    def end(self, state: State) -> None:
        """Set the final state and wake all waiters. Call it last, because readers use no lock."""
        self.state = state
        self._over.set()
        self.notify()
        for wake in list(self._enders):
            wake()


@contextlib.contextmanager
def _waker(wakers: set[Callable[[], None]]) -> Iterator[asyncio.Event]:
    """An event of the running loop. Any thread sets it by calling the function that is added to `wakers`."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(changed.set)

    wakers.add(wake)
    try:
        yield changed
    finally:
        wakers.discard(wake)
