"""Train the storybook models from nothing: `ip2p storybook build --preset smoke|cpu|h100`.

The stages follow one another; every preset is this one recipe with other numbers. A stage saves its state,
stops in time, and continues from where it stopped.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ip2p.base.errors import InputError
from ip2p.training.loop import sole_owner
from ip2p.training.storybook.autoencoder import train_autoencoder
from ip2p.training.storybook.presets import PRESETS
from ip2p.training.storybook.stage import OutOfTime, Run

TRAINERS: dict[str, Callable[[Run], None]] = {"vae": train_autoencoder}
STAGES = tuple(TRAINERS)


def run(
    preset_name: str,
    output: str | os.PathLike[str],
    *,
    seconds: float | None = None,
    stage: str = "all",
    device: str = "auto",
    steps: int | None = None,
    start: str | None = None,
    bundle: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] | None = None,
) -> bool:
    from ip2p.base.devices import pick_device

    if preset_name not in PRESETS:
        raise InputError(f"unknown preset {preset_name!r}; choose one of: {', '.join(PRESETS)}")
    if stage not in ("all", *STAGES):
        raise InputError(f"unknown stage {stage!r}; choose one of: all, {', '.join(STAGES)}")
    started = time.monotonic()
    here = Run(
        preset=PRESETS[preset_name],
        name=preset_name,
        output=Path(output),
        device=torch.device(pick_device(device)),
        deadline=None if seconds is None else started + seconds,
        log=log or (lambda text: print(text, file=sys.stderr, flush=True)),
    )
    here.output.mkdir(parents=True, exist_ok=True)
    with sole_owner(here.output):
        for name, train in TRAINERS.items():
            if stage not in ("all", name):
                continue
            if here.is_done(name):
                here.log(f"{name}: finished already")
                continue
            try:
                train(here)
            except OutOfTime:
                here.log(f"{name}: time is up; the same command goes on from here")
                return False
    return True
