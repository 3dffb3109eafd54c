"""One bounded queue in which clients take turns."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ip2p.base.errors import ResourceError
from ip2p.serve.jobs import Job
from ip2p.serve.requests import Limits

SMOOTH = 0.2  # weight of the newest request in the running means


class Full(ResourceError):
    """There is no room for a request. retry_after: seconds; scope: which limit is reached."""

    def __init__(self, message: str, *, retry_after: float, scope: Literal["queue", "client"]) -> None:
        super().__init__(message)
        self.retry_after, self.scope = retry_after, scope


class Draining(ResourceError):
    """The server accepts no more requests. retry_after: seconds until a new server may be running."""

    retry_after = 10.0


@dataclass(frozen=True, eq=False)
class Place:
    """A place in the queue that is reserved for a client's request."""

    client: str


class FairQueue:
    """The waiting jobs, by client, and the running jobs. All methods are thread-safe.

    changed: the lock; it is notified when a job may start. slots: number of pictures sampled at once.
    """

    def __init__(self, limits: Limits, slots: int, changed: threading.Condition) -> None:
        self.limits = limits
        self.running: dict[str, Job] = {}
        self.rejected: Counter[str] = Counter()
        self.draining = False
        self._changed = changed
        self._free = slots
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # by client; the first is next
        self._of_client: Counter[str] = Counter()
        self._places: list[Place] = []
        self._pace: float | None = None  # seconds between two finished jobs while all slots are taken
        self._seconds: float | None = None  # for which a request runs

    @property
    def waiting(self) -> list[Job]:
        with self._changed:
            return [job for jobs in self._waiting.values() for job in jobs]

    @property
    def clients(self) -> int:
        """The number of clients with waiting or running jobs."""
        return len(self._of_client)

    # --- room -------------------------------------------------------------------------------------

    def check_room(self, client: str) -> None:
        """Raise Full or Draining if a request from this client would be rejected now."""
        with self._changed:
            if self.draining:
                self.rejected["draining"] += 1
                raise Draining("The server is shutting down and accepts no more requests. Try again soon.")
            most, own = self.limits.per_client, sum(place.client == client for place in self._places)
            if self._of_client.get(client, 0) + own >= most:
                self._refuse("client", f"You have {most} requests waiting or running, which is the limit.")
            if len(self.waiting) + len(self._places) >= self.limits.queue:
                self._refuse("queue", f"{self.limits.queue} requests are waiting, which is the limit.")

    def _refuse(self, scope: Literal["queue", "client"], message: str) -> None:
        self.rejected[scope] += 1
        # By then every waiting job has started, or one of the client's jobs has ended.
        ahead = len(self.waiting) if scope == "queue" else self.clients
        seconds = min(600.0, max(1.0, (self._pace or 1.0) * ahead))
        raise Full(f"{message} Try again in {seconds:.0f} seconds.", retry_after=seconds, scope=scope)

    @contextlib.contextmanager
    def room(self, client: str) -> Iterator[Place]:
        """Reserve a place while a picture is decoded, so that no request is rejected after that work.

        Do not reserve it during the upload: a slow upload would block others. Raises Full or Draining.
        """
        with self._changed:
            self.check_room(client)
            place = Place(client)
            self._places.append(place)
        try:
            yield place
        finally:
            self._give_up(place)

    def _give_up(self, place: Place | None) -> None:
        with self._changed:
            if place in self._places:
                self._places.remove(place)

    def add(self, job: Job, place: Place | None) -> None:
        """Put a job at the end of its client's row. Raises Full or Draining."""
        with self._changed:
            self._give_up(place)
            self.check_room(job.client)
            waiting = sum(other.size[0] * other.size[1] for other in self.waiting)
            most = self.limits.waiting_pixels
            if waiting and waiting + job.size[0] * job.size[1] > most:
                self._refuse(
                    "queue", f"Pictures of {most / 1e6:g} megapixels are waiting, which is the limit."
                )
            self._of_client[job.client] += 1
            self._waiting.setdefault(job.client, deque()).append(job)
            self._changed.notify()

    # --- turns ------------------------------------------------------------------------------------

    def take(self, reserve: Callable[[str], bool]) -> Job | None:
        """Start and return the next job, if there is a free slot and `reserve` succeeds for its model."""
        with self._changed:
            if not self._waiting or not self._free:
                return None
            client, jobs = next(iter(self._waiting.items()))
            # Later jobs must not overtake it, or a model that is always busy would block the others forever.
            if not reserve(jobs[0].model):
                return None
            job = jobs.popleft()
            del self._waiting[client]
            if jobs:
                self._waiting[client] = jobs  # behind all others
            places = min(job.count, self._free)
            self._free -= places
            self.running[job.id] = job
            job.start(places)
            for other in self.waiting:
                other.notify()
            if self._free:
                self._changed.notify()
            return job

    def withdraw(self, job: Job) -> None:
        """Remove a waiting job."""
        with self._changed:
            jobs = self._waiting[job.client]
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.client]

    def free(self, job: Job) -> None:
        """Free the job's slots."""
        with self._changed:
            self._free += job.places

    def measure(self, job: Job) -> None:
        """Update the estimates with the time of a finished job."""
        with self._changed:
            assert job.started is not None
            took = time.monotonic() - job.started
            self._seconds = _smoothed(self._seconds, took)
            self._pace = _smoothed(self._pace, took / max(1, len(self.running)))

    def leave(self, job: Job) -> None:
        """Remove a job that has ended from the counts."""
        with self._changed:
            self.running.pop(job.id, None)
            self._of_client[job.client] -= 1
            if not self._of_client[job.client]:
                del self._of_client[job.client]

    # --- estimates --------------------------------------------------------------------------------

    def position(self, job: Job) -> int:
        """The number of jobs that start before it; 0 if it is not waiting."""
        with self._changed:
            before, own = 0, self._waiting.get(job.client)
            if own is None or job not in own:
                return 0
            turn = own.index(job)  # full rounds before it; then the clients ahead of it in its own round
            passed = False
            for client, jobs in self._waiting.items():
                passed = passed or client == job.client
                before += turn if client == job.client else min(len(jobs), turn if passed else turn + 1)
            return before

    def estimate(self, job: Job) -> float | None:
        """Seconds until the job ends; None before the first measurement."""
        with self._changed:
            if self._seconds is None or self._pace is None:
                return None
            if job.started is not None:
                return max(0.0, self._seconds - (time.monotonic() - job.started))
            return self._pace * (self.position(job) + 1) + self._seconds


def _smoothed(mean: float | None, value: float) -> float:
    return value if mean is None else mean + SMOOTH * (value - mean)
