"""Who edits next: one bounded queue in which the clients take turns."""

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
    """No room for a request now. retry_after: seconds; scope: whose room is taken."""

    def __init__(self, message: str, *, retry_after: float, scope: Literal["queue", "client"]) -> None:
        super().__init__(message)
        self.retry_after, self.scope = retry_after, scope


class Draining(ResourceError):
    """The server takes no more requests. retry_after: seconds after which another one may be there."""

    retry_after = 10.0


@dataclass(frozen=True, eq=False)
class Place:
    """A place in the queue, kept for a request of a client."""

    client: str


class FairQueue:
    """Jobs that wait, by client, and those that run in a number of slots. Any thread may call it.

    changed: the lock; it is notified when a job may begin. slots: pictures that are sampled at once.
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
        self._pace: float | None = None  # seconds from one end to the next while all slots are taken
        self._seconds: float | None = None  # that a request runs

    @property
    def waiting(self) -> list[Job]:
        with self._changed:
            return [job for jobs in self._waiting.values() for job in jobs]

    @property
    def clients(self) -> int:
        """How many have jobs that wait or run."""
        return len(self._of_client)

    # --- room -------------------------------------------------------------------------------------

    def check_room(self, client: str) -> None:
        """Raise Full or Draining if a request of this client would not be taken now."""
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
        # By then all that waits now has begun; for a client, one of its jobs has ended.
        ahead = len(self.waiting) if scope == "queue" else self.clients
        seconds = min(600.0, max(1.0, (self._pace or 1.0) * ahead))
        raise Full(f"{message} Try again in {seconds:.0f} seconds.", retry_after=seconds, scope=scope)

    @contextlib.contextmanager
    def room(self, client: str) -> Iterator[Place]:
        """Keep a place while a picture is decoded, so that no request is refused after that work.

        Not while a body is on its way: a slow upload would block others. Raises Full or Draining.
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
        """The next job, started, if there is a slot and `reserve` gives its model."""
        with self._changed:
            if not self._waiting or not self._free:
                return None
            client, jobs = next(iter(self._waiting.items()))
            # No job overtakes it: a model that is always busy would block another one forever.
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
        """Take out a job that waits."""
        with self._changed:
            jobs = self._waiting[job.client]
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.client]

    def free(self, job: Job) -> None:
        """Give the job's slots to others, also while its results are written."""
        with self._changed:
            self._free += job.places

    def measure(self, job: Job) -> None:
        """Take the time of a job that was made into the estimates."""
        with self._changed:
            assert job.started is not None
            took = time.monotonic() - job.started
            self._seconds = _smoothed(self._seconds, took)
            self._pace = _smoothed(self._pace, took / max(1, len(self.running)))

    def leave(self, job: Job) -> None:
        """Stop counting a job, which ends."""
        with self._changed:
            self.running.pop(job.id, None)
            self._of_client[job.client] -= 1
            if not self._of_client[job.client]:
                del self._of_client[job.client]

    # --- estimates --------------------------------------------------------------------------------

    def position(self, job: Job) -> int:
        """How many jobs begin before it; 0 for one that does not wait."""
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

    def estimate(self, job: Job) -> float | None:
        """Seconds until its end; None where nothing was measured yet."""
        with self._changed:
            if self._seconds is None or self._pace is None:
                return None
            if job.started is not None:
                return max(0.0, self._seconds - (time.monotonic() - job.started))
            return self._pace * (self.position(job) + 1) + self._seconds


def _smoothed(mean: float | None, value: float) -> float:
    return value if mean is None else mean + SMOOTH * (value - mean)
