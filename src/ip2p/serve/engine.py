"""One editor for many threads: their simultaneous calls of its network are joined into one.

Every thread edits as if it were alone. One more thread runs the networks: it waits until each thread that
samples has asked for its next step, joins rows of equal shape, also those of different steps, into one call,
and splits the answer. Rows of a batch do not see each other in these networks, so each thread gets what it
would get alone, except for the rounding of sums.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ip2p.base.errors import ResourceError
from ip2p.diffusion import Latent, Sigma
from ip2p.diffusion.denoiser import UNetDenoiser
from ip2p.editing.editor import Editor
from ip2p.models.bundle import load_tiny
from ip2p.models.memory import Memory
from ip2p.models.text import Prompt, words_without_effect
from ip2p.serve.jobs import Stopped

T = TypeVar("T")

# Seconds that a call waits for a thread that samples and has not asked yet. Between two steps a thread does
# next to nothing; one that decodes, ends or fails is not waited for at all.
PATIENCE = 0.02
# Seconds for which a memory plan holds: to make one takes as long as a small network's call.
LOOK = 1.0
PASSES = 3  # rows that a picture has in a call at most (equation 3)


class Lane:
    """One thread's way through a JoinedEditor. Any thread may call `stop`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.pictures: int | None = None  # how many of an edit's results to make at once; None: what fits
        self.x0: Tensor | None = None  # the newest prediction of the result, [batch, channels, h, w]
        self.most = PASSES  # rows of a call that fit in memory
        self.stopped = False
        self.kind: Kind | None = None  # of its last rows
        self.work: _Work | None = None  # what it waits for

    def stop(self) -> None:
        """Make the edit raise Stopped: at once if it waits, else at its next call of the model."""
        self._engine.stop(self)


# What has to be equal for rows to share a call: each argument's name, the shape of a row, the dtype.
Kind = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@dataclass(eq=False)
class _Work:
    """Something for the engine to do: a call of its own, or rows that may be joined to those of others."""

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
        # Before its thread wakes up: until it calls again it is one to wait for.
        self.lane.work = None
        with contextlib.suppress(InvalidStateError):  # it was stopped meanwhile
            if error is None:
                self.answer.set_result(answer)
            else:
                self.answer.set_exception(error)


class Engine:
    """The thread in which an editor's networks work, and what waits for it."""

    def __init__(self, unet: nn.Module, join: int, patience: float, calls: Counter[int]) -> None:
        self.unet, self.join, self.patience, self.calls = unet, join, patience, calls
        self._changed = threading.Condition()
        self._single: deque[_Work] = deque()
        self._posted: list[_Work] = []
        self._lanes: set[Lane] = set()  # those that sample
        self._own = threading.local()
        self._free_since = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="ip2p-engine", daemon=True)
        self._thread.start()

    # --- for the threads that edit ---------------------------------------------------------------

    @property
    def lane(self) -> Lane:
        """The calling thread's lane."""
        if getattr(self._own, "lane", None) is None:
            self._own.lane = Lane(self)
        lane: Lane = self._own.lane
        return lane

    @contextlib.contextmanager
    def new_lane(self) -> Iterator[Lane]:
        """A lane for the calling thread, to be watched and stopped, while the block runs."""
        before = getattr(self._own, "lane", None)
        lane = self._own.lane = Lane(self)
        try:
            yield lane
        finally:
            self.leave(lane)
            lane.x0 = None
            self._own.lane = before

    def enter(self, lane: Lane) -> None:
        """The lane samples from now on: calls wait for its next step."""
        with self._changed:
            lane.kind = None
            self._lanes.add(lane)

    def leave(self, lane: Lane) -> None:
        with self._changed:
            self._lanes.discard(lane)
            self._changed.notify()

    def call(self, call: Callable[[], T]) -> T:
        """`call()`, in the engine's thread."""
        if threading.current_thread() is self._thread:
            return call()
        answer: T = self._wait_for(_Work(self.lane, call))
        return answer

    def predict(self, rows: dict[str, Tensor]) -> Tensor:
        """The network's answer to rows, [rows, channel, h, w], in one call with rows of others."""
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
                # What the engine has begun it ends; nobody waits for the answer.
                if work in self._single:
                    self._single.remove(work)
                if work in self._posted:
                    self._posted.remove(work)
                work.end(error=Stopped())
            self._changed.notify()

    def close(self) -> None:
        """End the thread after what it is doing; what waits fails."""
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
            del some  # or the last pictures stay in memory until the next call
            self._free_since = time.monotonic()

    def _take(self) -> list[_Work]:
        """Wait for what to do; nothing at the end."""
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
        """What to do now: a call of its own first, since it begins or ends an edit; else rows to join."""
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
        """Whether no thread that may add rows of the same shape needs to be waited for."""
        if time.monotonic() >= self._deadline(work):
            return True
        return not any(lane.work is None and lane.kind in (None, work.lane.kind) for lane in self._lanes)

    def _deadline(self, work: _Work) -> float:
        # Threads that have just been answered need their time, however long another one has waited.
        return max(work.since, self._free_since) + self.patience

    def _answer(self, some: Sequence[_Work]) -> None:
        """Compute all rows in one call; if that fails, each alone, so that only the culprit fails."""
        if len(some) > 1:
            # Most often memory runs out; nothing is known of whose fault it is.
            with contextlib.suppress(Exception):
                joined = {name: torch.cat([work.rows[name] for work in some]) for name in some[0].rows}
                answers = self._predict(joined).split([work.count for work in some])
                for work, answer in zip(some, answers, strict=True):
                    work.end(answer)
                return
        for work in some:
            work.run(lambda rows=work.rows: self._predict(rows))  # type: ignore[misc]

    def _predict(self, rows: dict[str, Tensor]) -> Tensor:
        named = {name: rows[name] for name in ("encoder_hidden_states", "timestep_cond") if name in rows}
        added = {name: value for name, value in rows.items() if name not in (*named, "sample", "timestep")}
        output: Tensor = self.unet(
            rows["sample"],
            rows["timestep"],
            return_dict=False,
            **named,
            **({"added_cond_kwargs": added} if added else {}),
        )[0]
        return output


class _JoinedUNet(nn.Module):
    """Takes the UNet's place and hands its inputs to the engine."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.unet = engine.unet
        self.engine = engine

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        timestep_cond: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor]:
        rows = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        rows |= added_cond_kwargs or {}
        if timestep_cond is not None:
            rows["timestep_cond"] = timestep_cond
        residuals = {name: value for name, value in more.items() if name != "return_dict"}
        if residuals:  # of a ControlNet: lists of maps, which are not joined
            named = {**more, "encoder_hidden_states": encoder_hidden_states, "timestep_cond": timestep_cond}
            if added_cond_kwargs:
                named["added_cond_kwargs"] = added_cond_kwargs
            answer: tuple[Tensor] = self.engine.call(lambda: self.unet(sample, timestep, **named))
            return answer
        return (self.engine.predict(rows),)


@dataclass(frozen=True)
class _WatchedDenoiser(UNetDenoiser):
    """A denoiser that keeps its last prediction of the result in the thread's lane, for previews."""

    def x0(self, x: Latent, prediction: Latent, sigma: Sigma) -> Latent:
        result = super().x0(x, prediction, sigma)
        assert isinstance(self.unet, _JoinedUNet)
        self.unet.engine.lane.x0 = result
        return result


class JoinedEditor(Editor):
    """An editor for any number of threads at once; it shares the weights of the editor that it is made from.

    join: how many threads share a call at most, and how many pictures an edit makes at once unless its lane
    sets that. calls: counts the calls of the network by the number of threads joined. tiny_vae: an
    AutoencoderTiny for `decode_preview`, a folder or a hub name. Close it at the end.
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
        # The same networks, where they are: hooks that move them to the device are replaced, not doubled.
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
        own = {each.name: getattr(self.model, each.name) for each in fields(self.model)}
        self.model = _WatchedDenoiser(**{**own, "unet": _JoinedUNet(self.engine)})
        self.lane = self.engine.new_lane
        self._plans: dict[tuple[int, int, int], tuple[float, Memory]] = {}
        self._reading = threading.Lock()
        self._reader = replace(editor.bundle, tokenizer=copy.deepcopy(editor.bundle.tokenizer))

    def close(self) -> None:
        """End the engine's thread; edits that still run fail."""
        self.engine.close()

    # All that touches a network runs in the engine's thread: the CPU's cores and the switches for tiling,
    # tokenizing and offloading serve one thread at a time.

    def encode_text(self, text: str, size: tuple[int, int] | None = None) -> Tensor | Prompt:
        encode = super().encode_text
        return self.engine.call(lambda: encode(text, size))

    def words_without_effect(self, text: str) -> list[str]:
        with self._reading:  # not in the engine, where it would wait for a step
            return words_without_effect(self._reader, text)

    def encode_image(self, pictures: Tensor) -> Tensor:
        encode = super().encode_image
        return self.engine.call(lambda: encode(pictures))

    def decode(self, latents: Tensor) -> Tensor:
        decode = super().decode
        return self.engine.call(lambda: decode(latents))

    def decode_preview(self, latents: Tensor) -> Tensor:
        """As `decode`, by the tiny autoencoder if there is one."""
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
