"""The editing service: accepts requests of many clients, runs them in turn, and keeps the results.

`queue.FairQueue` decides whose turn it is, a `maker.Maker` makes the edits, and `results.JobShelf` keeps
ended jobs. Nothing here depends on HTTP.
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

BUCKETS = (
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
)  # upper bounds of a request's seconds


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts since the start of a service, and its current state."""

    waiting: int
    running: int
    clients: int  # with requests waiting or running
    done: int
    failed: int
    cancelled: int
    rejected: Mapping[str, int]  # by "queue", "client", "draining"
    seconds: Mapping[float, int]  # requests by upper bound of their seconds, including the wait
    seconds_sum: float
    joined: Mapping[int, int]  # UNet calls, by the number of requests in a call
    loaded: tuple[str, ...]  # models
    draining: bool


class Service:
    """Accepts requests, runs them with `maker`, and keeps the results for some time.

    keep_seconds, keep_bytes, keep_jobs: maximum age of ended jobs, bytes of their pictures in memory, and
    their number. store: a folder for results on disk, of at most store_bytes (`Store`). Call `close` at the
    end.
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

    # --- requests --------------------------------------------------------------------------------

    def submit(
        self,
        request: EditRequest,
        *,
        client: str,
        place: Place | None = None,
        encode: Encode | None = None,
        keep: bool = False,
    ) -> Job:
        """Put a request into the queue.

        client: who sent it, for fairness. place: the place that `room` reserved. encode: writes a result.
        keep: for a client who comes back later: results move to the store as soon as they are finished, since
        more of them fit there than in memory. Raises SettingError for invalid settings, and Full or Draining
        if there is no room.
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
        """Cancel a waiting job immediately, or a running one within a step. Ended jobs stay as they are."""
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
        """A model's card, with its recommended settings. Loads the model."""
        return self.maker.card(model or self.models[0])

    @property
    def ready(self) -> bool:
        """Whether the first model is loaded and requests are accepted."""
        return not self.queue.draining and self.models[0] in self.maker.loaded

    def stats(self) -> Stats:
        """The current counts."""
        with self._changed:
            # Cumulative counts, as in Prometheus.
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
        """Accept no more requests, fail the waiting ones with Draining, and wait for the running ones.

        Returns whether they ended in time. Those that did not are stopped and fail with Draining too.
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
        """Stop all jobs, end the threads, and unload the models."""
        self.drain(0)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self.maker.close()
        if self.store is not None:
            self.store.close()

    # --- worker threads --------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while (job := self.queue.take(self.maker.reserve)) is None:
                    if self._closed:
                        return
                    self._changed.wait()
            self._run(job)
            del job  # frees its pictures while the thread waits

    def _run(self, job: Job) -> None:
        state: State = "failed"
        error: Ip2pError | None = None
        try:
            try:
                self.maker.make(job, self.limits)
                self.queue.measure(job)
            finally:
                # Other jobs may use its slots and its model while its results are written.
                self.queue.free(job)
                self.maker.release(job.model)
            if job.keep and job.encode is not None:
                self.keep(job, job.encode)
            state = "done"
        except Stopped:
            error = job.stop_reason
            state = "failed" if error else "cancelled"
        except Ip2pError as known:
            error = known.with_traceback(None)  # a traceback would keep the pictures in memory
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
        """Count an ended job and wake everyone who waits for it. The caller holds the lock."""
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
        # A client keeps its pseudonym in the logs for the lifetime of the process; it reveals no address.
        client = hashlib.sha256(self._salt + job.client.encode()).hexdigest()[:8]
        log.info(
            "job=%s client=%s model=%s size=%dx%d steps=%d count=%d waited=%.3f seconds=%.3f outcome=%s%s",
            *(job.id, client, job.model, *job.size, job.steps // job.count, job.count),
            *(waited, took, state, f" error={type(error).__name__}" if error else ""),
        )
