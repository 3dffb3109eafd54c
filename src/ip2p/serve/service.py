"""Edits for many clients at once: takes requests, has them made in turn, keeps the results.

The turns are decided by `queue.FairQueue`, the edits made by a `maker.Maker`, what has ended kept by
`results.JobShelf`. Nothing here knows HTTP.
"""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ip2p.base.errors import Ip2pError, as_ip2p_error
from ip2p.models.bundle import Card
from ip2p.serve.jobs import ENDED, Encode, Job, State, Stopped
from ip2p.serve.maker import Maker
from ip2p.serve.queue import Draining, FairQueue, Place
from ip2p.serve.requests import EditRequest, Limits, check_request
from ip2p.serve.results import JobShelf, Store

log = logging.getLogger("ip2p.serve")

BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # seconds that a request took


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a service has done since it started, and what it does now."""

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


class Service:
    """Takes requests, has `maker` make them, and keeps the results for a while.

    keep_seconds, keep_bytes, keep_jobs: how long ended jobs are known by their id, with how many bytes of
    pictures in memory, and how many. store: a folder for results on disk, bounded by store_bytes (`Store`).
    Close it at the end.
    """

    def __init__(
        self,
        maker: Maker,
        *,
        limits: Limits | None = None,
        keep_seconds: float = 600,
        keep_bytes: int = 2**28,
        keep_jobs: int = 10_000,
        store: Path | None = None,
        store_bytes: int = 2**30,
    ) -> None:
        self.limits = limits or Limits()
        self.maker, self.models, self.warm = maker, maker.models, maker.warm
        self.keep_seconds = keep_seconds
        self.store = None if store is None else Store(store, seconds=keep_seconds, size=store_bytes)
        self.jobs = JobShelf(seconds=keep_seconds, size=keep_bytes, count=keep_jobs, store=self.store)
        self.job, self.keep = self.jobs.get, self.jobs.keep
        self.queue = FairQueue(self.limits, maker.slots, maker.changed)
        self.check_room, self.room = self.queue.check_room, self.queue.room
        self._changed = maker.changed
        self._closed = False
        self._outcomes: Counter[str] = Counter()
        self._buckets: Counter[float] = Counter()
        self._seconds_sum = 0.0
        self._salt = secrets.token_bytes(16)
        self._threads = [
            threading.Thread(target=self._work, name=f"ip2p-edit-{number}", daemon=True)
            for number in range(maker.slots)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- for those who ask -----------------------------------------------------------------------

    def submit(
        self,
        request: EditRequest,
        *,
        client: str,
        place: Place | None = None,
        encode: Encode | None = None,
        keep: bool = False,
    ) -> Job:
        """Put a request into the queue. client: whose it is, for fairness; place: what `room` kept.

        encode: writes a result. keep: for a client who comes back later; results go into the store as soon
        as they are made, since more of them fit there than in memory.

        Raises SettingError for what cannot be done, Full and Draining where there is no room.
        """
        if place is None:
            self.check_room(client)
        request = check_request(request, self.limits, self.models)
        model = request.model or self.models[0]
        self.maker.check(request, model, self.limits)
        assert not keep or (encode is not None and self.store is not None)
        job = Job(request, client=client, model=model, queue=self.queue, encode=encode, keep=keep)
        self.jobs.add(job)
        try:
            self.queue.add(job, place)
        except BaseException:
            self.jobs.remove(job)
            raise
        return job

    def cancel(self, id: str) -> None:
        """Stop a job: one that waits at once, one that runs within a step. Others are left alone."""
        with self._changed:
            job = self.jobs.get(id)
            if job is None or not job.active:
                return
            if job.state == "waiting":
                self.queue.withdraw(job)
                self._end(job, "cancelled")
            else:
                job.stop()

    def card(self, model: str | None = None) -> Card:
        """A model's card, with the settings that it recommends. Loads the model."""
        return self.maker.card(model or self.models[0])

    @property
    def ready(self) -> bool:
        """Whether the first model is loaded and requests are taken."""
        return not self.queue.draining and self.models[0] in self.maker.loaded

    def stats(self) -> Stats:
        """What was done, and what is going on."""
        with self._changed:
            # Counts up to each bound, as Prometheus has them.
            upto = {bound: sum(n for b, n in self._buckets.items() if b <= bound) for bound in BUCKETS}
            return Stats(
                waiting=len(self.queue.waiting),
                running=len(self.queue.running),
                clients=self.queue.clients,
                **{state: self._outcomes[state] for state in ENDED},
                rejected=dict(self.queue.rejected),
                seconds=upto | {math.inf: sum(self._buckets.values())},
                seconds_sum=self._seconds_sum,
                joined=dict(self.maker.calls),
                loaded=self.maker.loaded,
                draining=self.queue.draining,
            )

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, fail those that wait with Draining, and wait for those that run.

        Returns whether they ended in time; those that did not are stopped and fail with Draining too.
        """
        with self._changed:
            self.queue.draining = True
            for job in self.queue.waiting:
                self.queue.withdraw(job)
                message = "The server is shutting down and did not start this request. Try again."
                self._end(job, "failed", Draining(message))
            in_time = self._changed.wait_for(lambda: not self.queue.running, timeout)
            for job in list(self.queue.running.values()):
                job.stop(Draining("The server shut down before this request was done. Try again."))
        return in_time

    def close(self) -> None:
        """Stop everything and give up threads and models."""
        self.drain(0)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self.maker.close()
        if self.store is not None:
            self.store.close()

    # --- the threads that edit -------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while (job := self.queue.take(self.maker.reserve)) is None:
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
                self.maker.make(job, self.limits)
                self.queue.measure(job)
            finally:
                # Its slots and its model are for others, also while its results are written.
                self.queue.free(job)
                self.maker.release(job.model)
            if job.keep and job.encode is not None:
                self.keep(job, job.encode)
            state = "done"
        except Stopped:
            error = job.stop_reason
            state = "failed" if error else "cancelled"
        except Ip2pError as known:
            error = known.with_traceback(None)  # which would hold the pictures
        except Exception as unknown:
            error = as_ip2p_error(unknown, memory="Out of memory. Request a smaller size or fewer results.")
            if error is None:
                log.exception("job=%s outcome=failed", job.id)
                name = type(unknown).__name__
                error = Ip2pError(
                    f"Internal error during the edit ({name}, job {job.id}). See the server's log."
                )
        finally:
            with self._changed:
                self._end(job, state, error)

    def _end(self, job: Job, state: State, error: Ip2pError | None = None) -> None:
        """Count a job that ended and wake everybody who waits for it. Under the lock."""
        took = time.monotonic() - job.created
        self._outcomes[state] += 1
        if state == "done":
            self._seconds_sum += took
            self._buckets[next((bound for bound in BUCKETS if took <= bound), math.inf)] += 1
        self.queue.leave(job)
        job.settle(state, error)
        self.jobs.end(job)
        job.end(state)
        for other in self.queue.waiting:
            other.notify()
        self._changed.notify_all()
        waited = (job.started or job.created + took) - job.created
        # The same client has the same name in the logs while the process lives; it is no address.
        client = hashlib.sha256(self._salt + job.client.encode()).hexdigest()[:8]
        log.info(
            "job=%s client=%s model=%s size=%dx%d steps=%d count=%d waited=%.3f seconds=%.3f outcome=%s%s",
            *(job.id, client, job.model, *job.size, job.steps // job.count, job.count),
            *(waited, took, state, f" error={type(error).__name__}" if error else ""),
        )
