"""A tiny random model with a fixed time per call, for tests and load tests of the service."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from conftest import make_model
from torch import nn

from ip2p.editing.editor import Editor
from ip2p.serve.jobs import Event, Job


class SlowUNet(nn.Module):
    """A UNet that takes `seconds` longer. rows: the batch size of each call.

    before: called with each input; it may raise. asleep: only sleep, and return a share of the input noise.
    """

    def __init__(self, unet: nn.Module, seconds: float) -> None:
        super().__init__()
        self.unet = unet
        self.seconds = seconds
        self.asleep = False
        self.rows: list[int] = []
        self.threads: set[int] = set()
        self.before: Callable[[torch.Tensor], None] = lambda sample: None

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("unet"), name)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **more: object) -> object:
        self.rows.append(len(sample))
        self.threads.add(threading.get_ident())
        self.before(sample)
        time.sleep(self.seconds)
        if self.asleep:
            return (sample[:, :4] * 0.9,)
        return self.unet(sample, timestep, **more)


@functools.lru_cache(maxsize=1)
def _folder() -> TemporaryDirectory:
    folder = TemporaryDirectory(prefix="ip2p-fake-")
    make_model(Path(folder.name) / "fake")
    return folder


def fake_editor(seconds_a_call: float = 0.01, *, asleep: bool = False) -> Editor:
    """A new editor of the tests' tiny random model (64², fp32, on the CPU), named "fake".

    Each network call takes `seconds_a_call` longer or, if asleep, exactly that, so that its time is fixed
    even on a busy machine. `editor.bundle.unet.rows` has the batch size of each call so far.
    """
    editor = Editor.load(Path(_folder().name) / "fake", device="cpu", dtype="fp32")
    slow = SlowUNet(editor.bundle.unet, seconds_a_call)
    slow.asleep = asleep
    return Editor(dataclasses.replace(editor.bundle, unet=slow))


def events_of(job: Job) -> list[Event]:
    """All events of a job, read until its end."""

    async def collect() -> list[Event]:
        return [event async for event in job.events()]

    return asyncio.run(collect())
