"""One editor for many threads: their simultaneous UNet calls are joined into one batch.

Each thread edits as if it were alone. An additional thread runs the networks: it waits until every sampling
thread has requested its next step, joins rows of equal shape into one call, even from different steps, and
splits the output. Rows of a batch are independent in these networks, so each thread gets the result that it
would get alone, up to the rounding of sums.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ip2p.base.errors import ResourceError
from ip2p.diffusion import Latent, Sigma
from ip2p.diffusion.denoiser import TextInputs, UNetDenoiser, call_unet
from ip2p.editing.editor import Editor
from ip2p.models.bundle import load_tiny
from ip2p.models.memory import Memory
from ip2p.models.text import Prompt, words_without_effect
from ip2p.serve.jobs import Stopped

T = TypeVar("T")

# Seconds for which a call waits for a sampling thread that has not requested its step yet. A thread does very
# little between two steps; one that decodes, ends or fails is not waited for.
PATIENCE = 0.02
# Seconds for which a memory plan is valid: making one takes as long as a call of a small network.
LOOK = 1.0
PASSES = 3  # maximum rows of a picture in a call (equation 3)


class Lane:
    """The state of one thread in a JoinedEditor. Any thread may call `stop`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.pictures: int | None = None  # of an edit that are sampled at once; None: as many as fit
        self.x0: Tensor | None = None  # the newest prediction of the result, [batch, channels, h, w]
        self.most = PASSES  # maximum rows of a call, given the memory
        self.stopped = False
        self.kind: Kind | None = None  # of its last rows
        self.work: _Work | None = None  # the work that it waits for

    def stop(self) -> None:
        """Make the edit raise Stopped: immediately if it waits, or else at its next call of a network."""
        self._engine.stop(self)


# Rows can share a call if these are equal: each argument's name, the shape of a row, and the dtype.
Kind = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@dataclass(eq=False)
class _Work:
    """Work for the engine: a call, or rows that can be joined with others."""

    lane: Lane
    call: Callable[[], Any] | None = None
    rows: dict[str, Tensor] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)
    answer: Future[Any] = field(default_factory=Future)

    @property
    def count(self) -> int:
        return len(self.rows["sample"])

    def run(self, call: Callable[[], Any]) -> None:
        try:
            answer = call()
        except BaseException as error:
            self.end(error=error)
        else:
            self.end(answer)

    def end(self, answer: Any = None, error: BaseException | None = None) -> None:
        # Before its thread wakes up, so that the engine waits for the thread's next step.
        self.lane.work = None
        with contextlib.suppress(InvalidStateError):  # it was stopped in the meantime
            if error is None:
                self.answer.set_result(answer)
            else:
                self.answer.set_exception(error)


class Engine:
    """The thread that runs an editor's networks, and its waiting work."""

    def __init__(self, unet: nn.Module, join: int, patience: float, calls: Counter[int]) -> None:
        self.unet, self.join, self.patience, self.calls = unet, join, patience, calls
        self._changed = threading.Condition()
        self._single: deque[_Work] = deque()
        self._posted: list[_Work] = []
        self._lanes: set[Lane] = set()  # of sampling threads
        self._own = threading.local()
        self._free_since = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="ip2p-engine", daemon=True)
        self._thread.start()

    # --- called by the editing threads -----------------------------------------------------------

    @property
    def lane(self) -> Lane:
        """The calling thread's lane."""
        if getattr(self._own, "lane", None) is None:
            self._own.lane = Lane(self)
        lane: Lane = self._own.lane
        return lane

    @contextlib.contextmanager
    def new_lane(self) -> Iterator[Lane]:
        """A lane for the calling thread within the block, with which another thread can watch and stop it."""
        before = getattr(self._own, "lane", None)
        lane = self._own.lane = Lane(self)
        try:
            yield lane
        finally:
            self.leave(lane)
            lane.x0 = None
            self._own.lane = before

    def enter(self, lane: Lane) -> None:
        """Mark the lane as sampling: calls wait for its next step."""
        with self._changed:
            lane.kind = None
            self._lanes.add(lane)

    def leave(self, lane: Lane) -> None:
        with self._changed:
            self._lanes.discard(lane)
            self._changed.notify()

    def call(self, call: Callable[[], T]) -> T:
        """Run `call()` in the engine's thread and return its result."""
        if threading.current_thread() is self._thread:
            return call()
        answer: T = self._wait_for(_Work(self.lane, call))
        return answer

    def predict(self, rows: dict[str, Tensor]) -> Tensor:
        """The UNet's output for some rows, computed in one call with the rows of other threads."""
        answer: Tensor = self._wait_for(_Work(self.lane, rows=rows))
        return answer

    def _wait_for(self, work: _Work) -> Any:
        lane = work.lane
        with self._changed:
            if lane.stopped:
                raise Stopped
            if self._closed:
                raise ResourceError("The model was unloaded. Try again.")
            lane.work = work
            if work.call is not None:
                self._single.append(work)
            else:
                rows = work.rows.items()
                lane.kind = tuple((name, tuple(value.shape[1:]), value.dtype) for name, value in rows)
                self._posted.append(work)
            self._changed.notify()
        answer = work.answer.result()
        if lane.stopped:
            raise Stopped
        return answer

    def stop(self, lane: Lane) -> None:
        with self._changed:
            lane.stopped = True
            if (work := lane.work) is not None:
                # If the engine is running it already, it finishes and the result is discarded.
                if work in self._single:
                    self._single.remove(work)
                if work in self._posted:
                    self._posted.remove(work)
                work.end(error=Stopped())
            self._changed.notify()

    def close(self) -> None:
        """End the thread after its current work; waiting work fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # --- the engine's own thread -----------------------------------------------------------------

    @torch.inference_mode()
    def _work(self) -> None:
        while some := self._take():
            if some[0].call is not None:
                some[0].run(some[0].call)
            else:
                self.calls[len(some)] += 1
                self._answer(some)
            del some  # otherwise the last pictures stay in memory until the next call
            self._free_since = time.monotonic()

    def _take(self) -> list[_Work]:
        """Wait for the next work; empty after `close`."""
        with self._changed:
            while not self._closed:
                if some := self._next():
                    return some
                due = min(map(self._deadline, self._posted), default=math.inf) - time.monotonic()
                self._changed.wait(None if due == math.inf else max(0.0, due))
            for work in [*self._single, *self._posted]:
                work.end(error=ResourceError("The model was unloaded during the edit. Try again."))
            return []

    def _next(self) -> list[_Work]:
        """The next work: calls first, since they begin or end an edit, then rows to join."""
        if self._single:
            return [self._single.popleft()]
        first = next(filter(self._complete, self._posted), None)
        some: list[_Work] = []
        if first is not None:
            most = min(work.lane.most for work in self._posted)
            for work in self._posted:
                fits = not some or sum(each.count for each in some) + work.count <= most
                if fits and len(some) < self.join and work.lane.kind == first.lane.kind:
                    some.append(work)
            self._posted = [work for work in self._posted if work not in some]
        return some

    def _complete(self, work: _Work) -> bool:
        """Whether every thread that might add rows of the same shape has done so, or the wait is over."""
        if time.monotonic() >= self._deadline(work):
            return True
        return not any(lane.work is None and lane.kind in (None, work.lane.kind) for lane in self._lanes)

    def _deadline(self, work: _Work) -> float:
        # Threads that just got a result need time for their next step, however long others have waited.
        return max(work.since, self._free_since) + self.patience

    def _answer(self, some: Sequence[_Work]) -> None:
        """Compute all rows in one call. If it fails, compute each alone, so that only the cause fails."""
        if len(some) > 1:
            # The usual cause is memory, and any of the rows may be at fault.
            with contextlib.suppress(Exception):
                joined = {name: torch.cat([work.rows[name] for work in some]) for name in some[0].rows}
                answers = call_unet(self.unet, joined).split([work.count for work in some])
                for work, answer in zip(some, answers, strict=True):
                    work.end(answer)
                return
        for work in some:
            work.run(lambda rows=work.rows: call_unet(self.unet, rows))  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class _JoinedDenoiser(UNetDenoiser):
    """A denoiser whose UNet runs in the engine; its last x0 stays in the thread's lane, for previews."""

    engine: Engine

    def run(self, unet: nn.Module, rows: TextInputs, residuals: Mapping[str, Any]) -> Tensor:
        # A ControlNet's lists of maps are not joined, nor is what a feature cache computes.
        if residuals or unet is not self.unet:
            return self.engine.call(lambda: call_unet(unet, rows, residuals))
        return self.engine.predict(dict(rows))

    def x0(self, x: Latent, prediction: Latent, sigma: Sigma) -> Latent:
        result = super().x0(x, prediction, sigma)
        self.engine.lane.x0 = result
        return result


class JoinedEditor(Editor):
    """An editor for any number of threads, which shares the weights of `editor`.

    join: maximum number of threads in a call, and of pictures that an edit samples at once unless its lane
    sets that. calls: counts the UNet calls by the number of threads joined. tiny_vae: an AutoencoderTiny for
    `decode_preview`, a folder or a hub name. Call `close` at the end.
    """

    def __init__(
        self,
        editor: Editor,
        *,
        join: int = 8,
        patience: float = PATIENCE,
        calls: Counter[int] | None = None,
        tiny_vae: str | Path | None = None,
    ) -> None:
        # The networks stay where they are. Hooks that move them to the device are replaced, not added twice.
        super().__init__(
            editor.bundle,
            controlnet=editor.controlnet,
            memory=editor.memory,
            device=editor.device,
            origin=editor.origin,
        )
        self.tiny_vae = None if tiny_vae is None else load_tiny(tiny_vae, editor.bundle)
        self.batch_size = join
        self.warn_once = False  # each request has its own client
        self.calls = Counter() if calls is None else calls
        self.engine = Engine(editor.bundle.unet, join, patience, self.calls)
        settings = {each.name: getattr(self.model, each.name) for each in fields(self.model)}
        self.model = _JoinedDenoiser(**settings, engine=self.engine)
        self.lane = self.engine.new_lane
        self._plans: dict[tuple[int, int, int], tuple[float, Memory]] = {}
        self._reading = threading.Lock()
        self._reader = replace(editor.bundle, tokenizer=copy.deepcopy(editor.bundle.tokenizer))

    def close(self) -> None:
        """End the engine's thread. Running edits fail."""
        self.engine.close()

    # Everything that uses a network runs in the engine's thread, because tiling, offloading, and the CPU's
    # cores serve one thread at a time.

    def encode_text(self, text: str, size: tuple[int, int] | None = None) -> Tensor | Prompt:
        encode = super().encode_text
        return self.engine.call(lambda: encode(text, size))

    def words_without_effect(self, text: str) -> list[str]:
        with self._reading:  # not in the engine, which may be busy with a step
            return words_without_effect(self._reader, text)

    def encode_image(self, pictures: Tensor) -> Tensor:
        encode = super().encode_image
        return self.engine.call(lambda: encode(pictures))

    def decode(self, latents: Tensor) -> Tensor:
        decode = super().decode
        return self.engine.call(lambda: decode(latents))

    def decode_preview(self, latents: Tensor) -> Tensor:
        """Like `decode`, with the tiny autoencoder if there is one."""
        tiny = self.tiny_vae
        if tiny is None:
            return self.decode(latents)

        @torch.inference_mode()
        def decode() -> Tensor:
            scaled = latents / tiny.config.scaling_factor
            return tiny.decode(scaled.to(tiny.device, tiny.dtype)).sample.float()

        return self.engine.call(decode)

    def edit_latents(self, *args: Any, **options: Any) -> Iterator[Tensor]:
        lane = self.engine.lane
        height, width = (side * self.bundle.latent_factor for side in options["noise"].shape[-2:])
        passes = self._footprint.passes if self._plan(1, height, width).passes_at_once else 1
        lane.most = passes * super().fitting_batch((width, height))
        self.engine.enter(lane)
        try:
            yield from super().edit_latents(*args, **options)
        finally:
            self.engine.leave(lane)

    def _plan(self, batch: int, height: int, width: int) -> Memory:
        key, now = (batch, height, width), time.monotonic()
        since, plan = self._plans.get(key, (-LOOK, None))
        if plan is None or now - since >= LOOK:
            plan = super()._plan(batch, height, width)
            if len(self._plans) > 100:
                self._plans.clear()
            self._plans[key] = now, plan
        return plan

    def fitting_batch(self, size: tuple[int, int]) -> int:
        fitting, wanted = super().fitting_batch(size), self.engine.lane.pictures
        return fitting if wanted is None else min(fitting, wanted)
