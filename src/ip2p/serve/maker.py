"""Makers run jobs: `LocalMaker` with models in this process, `spread.ReplicaMaker` on a cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
from ip2p.serve.requests import EditRequest, Limits, naming
from ip2p.settings import SettingError

# Maximum share of a request's time for previews: the decoder is as expensive as a step.
PREVIEW_SHARE = 0.25


class Maker:
    """Makes the results of jobs; the base class of `LocalMaker` and `spread.ReplicaMaker`.

    models: their names, the default first. slots: number of pictures sampled at once. changed: the lock of
    the service's queue; it is notified when a model is free. calls: UNet calls, by the number of requests in
    a call.
    """

    def __init__(self, models: Sequence[str], slots: int) -> None:
        self.models, self.slots = list(models), slots
        self.changed = threading.Condition(threading.RLock())
        self.calls: Counter[int] = Counter()

    @property
    def loaded(self) -> tuple[str, ...]:
        """The names of the loaded models."""
        raise NotImplementedError

    def warm(self) -> None:
        """Load the first model. Raises the errors of loading."""
        self.card(self.models[0])

    def card(self, model: str) -> Card:
        """A model's card, with its recommended settings. Loads the model."""
        raise NotImplementedError

    def check(self, request: EditRequest, model: str, limits: Limits) -> None:
        """Raise SettingError for a request that the model cannot run, if it is loaded already."""

    def reserve(self, model: str) -> bool:
        """Count one more user of a model, if it is loaded or can be. Returns whether it was counted."""
        return True

    def release(self, model: str) -> None:
        """Count one user less."""

    def make(self, job: Job, limits: Limits) -> None:
        """Make all results of a job. Raises Stopped, and the errors of the edit."""
        raise NotImplementedError

    def close(self) -> None:
        """Free all resources."""


@dataclass
class _Model:
    """A model: `loaded` from the start, or loaded with `load` at its first use."""

    load: Callable[[], Editor]
    loaded: Editor | None
    joined: JoinedEditor | None = None
    users: int = 0
    used: float = 0.0  # time of the last release
    loading: threading.Lock = field(default_factory=threading.Lock)

    @property
    def editor(self) -> Editor | None:
        return self.joined or self.loaded


class LocalMaker(Maker):
    """Makes edits with models of this process.

    editors: models by name, each an editor, or a function that loads one at its first use; at most `loaded`
    of the latter stay loaded. join: number of pictures of all requests that are sampled at once
    (`default_join` if None). check: called with each result before anyone sees it; if it raises Ip2pError,
    the request fails. It disables previews, which would be unchecked. finish: called next; its return value
    replaces the result, and it may raise too. tiny_vae: an AutoencoderTiny that decodes previews
    (`bundle.load_tiny`); by default the model's autoencoder does.
    """

    def __init__(
        self,
        editors: Mapping[str, Editor | Callable[[], Editor]],
        *,
        join: int | None = None,
        loaded: int = 1,
        check: Callable[[Image.Image], None] | None = None,
        finish: Callable[[Image.Image], Image.Image] | None = None,
        tiny_vae: str | Path | None = None,
    ) -> None:
        if not editors:
            raise InputError("The service has no model. Name one, for example --model storybook.")
        super().__init__(list(editors), default_join() if join is None else join)
        self.check_result, self.finish_result = check, finish
        self._tiny_vae = tiny_vae
        self._room = max(1, loaded)
        self._models = {
            name: _Model(lambda e=each: e, each) if isinstance(each, Editor) else _Model(each, None)  # type: ignore[misc]
            for name, each in editors.items()
        }

    # --- models -----------------------------------------------------------------------------------

    @property
    def loaded(self) -> tuple[str, ...]:
        with self.changed:
            return tuple(name for name, model in self._models.items() if model.editor is not None)

    def reserve(self, name: str) -> bool:
        """Count one more user of a model that is loaded or can be; unloads an unused model to make room."""
        with self.changed:
            model = self._models[name]
            if model.editor is None and not model.users:
                held = [m for m in self._models.values() if m.loaded is None and (m.joined or m.users)]
                if len(held) >= self._room:
                    idle = [m for m in held if m.joined and not m.users]
                    if not idle:
                        return False
                    self._unload(min(idle, key=lambda m: m.used))
            model.users += 1
            return True

    def release(self, name: str) -> None:
        with self.changed:
            self._models[name].users -= 1
            self._models[name].used = time.monotonic()
            self.changed.notify_all()

    def _open(self, name: str) -> JoinedEditor:
        """The editor of a reserved model. Loads it if necessary."""
        model = self._models[name]
        with model.loading:
            if model.joined is None:
                if model.loaded is None:
                    gc.collect()  # the model that was unloaded
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                model.joined = JoinedEditor(
                    model.load(), join=self.slots, calls=self.calls, tiny_vae=self._tiny_vae
                )
            return model.joined

    @contextlib.contextmanager
    def _using(self, name: str) -> Iterator[JoinedEditor]:
        """The editor of a model. Waits until there is room for it."""
        with self.changed:
            self.changed.wait_for(lambda: self.reserve(name))
        try:
            yield self._open(name)
        finally:
            self.release(name)

    def _unload(self, model: _Model) -> None:
        if model.joined is not None:
            model.joined.close()
            model.joined = None

    def close(self) -> None:
        for model in self._models.values():
            self._unload(model)

    def warm(self) -> None:
        """Load the first model, and compile it if its settings say so. Raises the errors of loading."""
        with self._using(self.models[0]) as editor:
            if editor.origin.compile:
                side = editor.bundle.card.native_size
                say(f"compiling {self.models[0]} for {side}x{side}; this takes minutes the first time")
                started = time.monotonic()
                with editor.lane(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the blank picture
                    editor.edit(Image.new("RGB", (side, side)), "warm up", steps=1)
                say(f"{self.models[0]} is warm ({time.monotonic() - started:.0f} s)")

    def card(self, model: str) -> Card:
        with self._using(model) as editor:
            return editor.bundle.card

    # --- edits ------------------------------------------------------------------------------------

    def check(self, request: EditRequest, model: str, limits: Limits) -> None:
        with self.changed:
            editor = self._models[model].editor
        if editor is not None:
            _working_size(editor, request, limits)

    def make(self, job: Job, limits: Limits) -> None:
        """Make all results of a job, as many at once as it has places. Raises Stopped and edit errors."""
        editor = self._open(job.model)
        request = _resolved(job, editor, limits)
        size = _working_size(editor, request, limits)
        every = request.previews if self.check_result is None else 0
        with editor.lane() as lane, job.stoppable(lane):
            lane.pictures = job.places
            at_once = editor.fitting_batch(size)
            start = 0
            while start < job.count:
                seeds = request.seeds[start : start + at_once]
                try:
                    pictures = editor.edit(
                        request.image,
                        settings=request.settings,
                        seeds=seeds,
                        batch_size=len(seeds),
                        max_pixels=None,  # checked
                        callback=_watch(job, editor, lane, start, len(seeds), every),
                    )
                except ResourceError:
                    if len(seeds) == 1 or lane.stopped:
                        raise
                    at_once = lane.pictures = 1  # one may fit where several do not
                    continue
                for seed, picture in zip(seeds, pictures, strict=True):
                    self._finish(job, request, seed, picture)
                start += len(seeds)
                job.notify()

    def _finish(self, job: Job, request: EditRequest, seed: int, picture: Image.Image) -> None:
        info = picture.info
        if self.check_result is not None:
            self.check_result(picture)
        if self.finish_result is not None:
            picture = self.finish_result(picture)
            picture.info = {**info, **picture.info}
        mask = info.get("mask") if request.settings.auto_mask is not None else None
        job.add_result(Result(picture, seed, mask), preview=request.previews > 0)


def _resolved(job: Job, editor: Editor, limits: Limits) -> EditRequest:
    """The job's request with the model's defaults for unset values. Sets the number of the job's steps."""
    assert job.request is not None
    settings = editor.resolved(job.request.settings)
    assert settings.steps is not None
    # The steps of a request were checked against the server's limit; the model's default may exceed it.
    steps = min(settings.steps, limits.steps)
    job.steps = steps * job.count
    return dataclasses.replace(job.request, settings=settings.changed(steps=steps))


def _working_size(editor: Editor, request: EditRequest, limits: Limits) -> tuple[int, int]:
    """The working width and height. Raises SettingError for a size over the limit."""
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
            f"size makes the model work at {width}x{height} ({width * height:,} pixels); "
            f"the limit is {most:,}.",
            field="size",
        )
    return width, height


def _watch(
    job: Job, editor: JoinedEditor, lane: Lane, first: int, count: int, every: int
) -> Callable[[int, int, Tensor], None]:
    """The callback of an edit: it counts the steps, stops the edit, and makes previews."""
    before, began, shown = job.step, time.monotonic(), 0.0
    job.start_sampling()

    def preview() -> None:
        """Decode the current x0, if someone watches and previews have taken little time so far.

        An autoencoder decodes it, because a linear map from latents to colors would have to be fitted for
        each model.
        """
        nonlocal shown
        started, x0 = time.monotonic(), lane.x0
        if x0 is None or not job.watched or shown > PREVIEW_SHARE * (started - began):
            return
        for number, row in enumerate(x0):
            pixels = editor.decode_preview(row[None])
            if pixels.isfinite().all():
                job.show(first + number, to_pil(pixels))
        shown += time.monotonic() - started

    def watch(step: int, steps: int, x: Tensor) -> None:
        job.check_stopped()
        job.step = before + step * count
        if every and step % every == 0 and step < steps:
            preview()
        job.notify()

    return watch


def default_join(device: torch.device | None = None) -> int:
    """How many pictures to sample at once unless the operator sets it; for the device of `auto` if None.

    Measured on 8 requests of one picture at once, against one at a time: the storybook model on a CPU made
    1.24 times the requests a second joined by twos, 1.39 by fours and 1.43 by eights, at twice the wait of
    fours; on a GPU 8 pictures of 512² take 3.2 times as long as one.
    """
    return 4 if (device or pick_device()).type == "cpu" else 8
