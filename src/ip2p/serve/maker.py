"""What makes the results of jobs in this process: the models that are loaded, the steps that they share."""

from __future__ import annotations

import dataclasses
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ip2p.base.devices import pick_device
from ip2p.base.errors import InputError, ResourceError
from ip2p.base.terminal import say
from ip2p.editing.editor import Editor
from ip2p.models.bundle import Card
from ip2p.pictures import masks
from ip2p.pictures.images import to_pil
from ip2p.serve.engine import JoinedEditor, Lane
from ip2p.serve.jobs import Job, Result
from ip2p.serve.models import ModelPool, Source
from ip2p.serve.requests import EditRequest, Limits, naming
from ip2p.settings import SettingError

# The share of a request's time that previews may take: the autoencoder's decoder costs as much as a step.
PREVIEW_SHARE = 0.25


class Maker(Protocol):
    """What makes the results of jobs.

    models: their names, the default first. slots: pictures at once. changed: the lock of the service's
    queue; it is notified when a model is free. calls: calls of a network, by how many requests shared one.
    """

    models: list[str]
    slots: int
    changed: threading.Condition
    calls: Counter[int]

    @property
    def loaded(self) -> tuple[str, ...]: ...

    @property
    def ready(self) -> bool: ...

    def warm(self) -> None: ...

    def card(self, model: str) -> Card: ...

    def check(self, request: EditRequest, model: str, limits: Limits) -> None: ...

    def reserve(self, model: str) -> bool: ...

    def release(self, model: str) -> None: ...

    def make(self, job: Job, limits: Limits) -> None: ...

    def close(self) -> None: ...


class LocalMaker:
    """Makes edits with models of this process.

    editors: models by name, each an editor or a function that loads one when it is first asked for; at most
    `loaded` of the functions' stay loaded. join: how many pictures are sampled at once, of all requests
    (`default_join` if None). check: called on every result before anybody sees it; an Ip2pError that it
    raises fails the request. With it there are no previews, which nobody would have checked. finish: called
    next, with the same right; what it returns takes the result's place. tiny_vae: an AutoencoderTiny that
    decodes the previews (`bundle.load_tiny`); without one, the model's autoencoder does.
    """

    def __init__(
        self,
        editors: Mapping[str, Source],
        *,
        join: int | None = None,
        loaded: int = 1,
        check: Callable[[Image.Image], None] | None = None,
        finish: Callable[[Image.Image], Image.Image] | None = None,
        tiny_vae: str | Path | None = None,
    ) -> None:
        if not editors:
            raise InputError("The service has no model. Name one, for example --model storybook.")
        self.models = list(editors)
        self.slots = default_join() if join is None else join
        self.changed = threading.Condition(threading.RLock())
        self.calls: Counter[int] = Counter()
        self.check_result, self.finish_result = check, finish
        self._pool = ModelPool(
            editors,
            room=loaded,
            join=self.slots,
            calls=self.calls,
            changed=self.changed,
            tiny_vae=tiny_vae,
        )
        self.reserve, self.release, self.close = self._pool.reserve, self._pool.release, self._pool.close

    @property
    def loaded(self) -> tuple[str, ...]:
        return self._pool.loaded

    @property
    def ready(self) -> bool:
        return self._pool.peek(self.models[0]) is not None

    def warm(self) -> None:
        """Load the first model, and compile it if it is to be compiled. Raises as loading does."""
        with self._pool.using(self.models[0]) as editor:
            if editor.origin.compile:
                side = editor.bundle.card.native_size
                say(f"compiling {self.models[0]} for {side}x{side}; this takes minutes the first time")
                started = time.monotonic()
                with editor.lane(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the blank picture
                    editor.edit(Image.new("RGB", (side, side)), "warm up", steps=1)
                say(f"{self.models[0]} is warm ({time.monotonic() - started:.0f} s)")

    def card(self, model: str) -> Card:
        """What a model says of itself, with the settings that it recommends. Loads it."""
        with self._pool.using(model) as editor:
            return editor.bundle.card

    def check(self, request: EditRequest, model: str, limits: Limits) -> None:
        """Raise SettingError for what a model does not do; if it is not loaded, its job says so."""
        editor = self._pool.peek(model)
        if editor is not None:
            working_size(editor, request, limits)

    def make(self, job: Job, limits: Limits) -> None:
        """Make all results of a job, as many at once as it has places. Raises Stopped, and what failed."""
        editor = self._pool.open(job.model)
        request = resolve_request(job, editor, limits)
        size = working_size(editor, request, limits)
        with editor.lane() as lane, job.stoppable(lane):
            lane.pictures = job.places
            at_once = editor.fitting_batch(size)
            start = 0
            while start < job.count:
                seeds = request.seeds[start : start + at_once]
                watch = _Watch(job, request, editor, lane, start, len(seeds), self.check_result is None)
                try:
                    pictures = editor.edit(
                        request.image,
                        settings=request.settings,
                        seeds=seeds,
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
                    self._finish(job, request, seed, picture)
                start += len(seeds)
                job.notify()

    def _finish(self, job: Job, request: EditRequest, seed: int, picture: Image.Image) -> None:
        found = picture.info.get("mask") if request.settings.auto_mask is not None else None
        if self.check_result is not None:
            self.check_result(picture)
        if self.finish_result is not None:
            info = picture.info
            picture = self.finish_result(picture)
            picture.info = {**info, **picture.info}
        job.add_result(Result(picture, seed, found), preview=request.previews > 0)


def resolve_request(job: Job, editor: Editor, limits: Limits) -> EditRequest:
    """The job's request with the model's own values for what it leaves open; its steps are known now."""
    assert job.request is not None
    settings = editor.resolved(job.request.settings)
    assert settings.steps is not None
    # A model's own steps stay within the server's limit, which a request's were checked against.
    steps = min(settings.steps, limits.steps)
    job.steps = steps * job.count
    return dataclasses.replace(job.request, settings=settings.changed(steps=steps))


def working_size(editor: Editor, request: EditRequest, limits: Limits) -> tuple[int, int]:
    """The width and height at which the model works. Raises SettingError for one over the limit."""
    pixels, settings = request.image.size, request.settings
    if settings.mask is not None:
        left, top, right, bottom = masks.padded_box(settings.mask, settings.mask_padding)
        pixels = right - left, bottom - top
    with naming("size"):
        width, height = editor.working_size(pixels, settings.size)
    most = limits.working_pixels
    if most is None:
        most = max(1024**2, 4 * editor.bundle.card.native_size**2)
    if width * height > most:
        raise SettingError(
            f"size has the model work at {width}x{height}, {width * height:,} pixels; the limit is {most:,}.",
            field="size",
        )
    return width, height


class _Watch:
    """Called after each step of an edit: counts it, stops it, and has previews made."""

    def __init__(
        self,
        job: Job,
        request: EditRequest,
        editor: JoinedEditor,
        lane: Lane,
        first: int,
        count: int,
        previews: bool,
    ) -> None:
        self.job, self.editor, self.lane = job, editor, lane
        self.every = request.previews if previews else 0
        self.first, self.count = first, count
        self.before = job.step
        self.shown = 0.0  # seconds that previews took
        self.began = time.monotonic()
        job.start_sampling()

    def __call__(self, step: int, steps: int, x: Tensor) -> None:
        self.job.check_stopped()
        self.job.step = self.before + step * self.count
        if self.every and step % self.every == 0 and step < steps:
            self.preview()
        self.job.notify()

    def preview(self) -> None:
        """Decode the model's present idea of the results: whole, if somebody looks and it is cheap.

        With an autoencoder, since a linear map from latents to colors would have to be fitted to every
        model; the cost is bounded by its share of the time.
        """
        began = time.monotonic()
        x0 = self.lane.x0
        if x0 is None or not self.job.watched or self.shown > PREVIEW_SHARE * (began - self.began):
            return
        for number, row in enumerate(x0):
            pixels = self.editor.decode_preview(row[None])
            if pixels.isfinite().all():
                self.job.show(self.first + number, to_pil(pixels))
        self.shown += time.monotonic() - began


def default_join(device: torch.device | None = None) -> int:
    """How many pictures to sample at once where the operator does not say; for the device of `auto` if None.

    Measured on 8 requests of one picture at once, against one at a time: the storybook model on a CPU gave
    1.24 times the requests a second joined by twos, 1.39 by fours and 1.43 by eights, where each would wait
    twice as long for next to nothing; on a GPU 8 pictures of 512² take 3.2 times as long as one.
    """
    return 4 if (device or pick_device()).type == "cpu" else 8
