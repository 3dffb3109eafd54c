"""Shared by the stages of the storybook build: folders, time limits, and the call of the training loop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ip2p.base.errors import InputError
from ip2p.base.files import write_text
from ip2p.training.checkpoints import Checkpoints
from ip2p.training.loop import LoopConfig, fit, new_accelerator
from ip2p.training.storybook.numerics import Numerics, measure_numerics
from ip2p.training.storybook.presets import Preset, StageConfig

SUMMARY = ("steps", "samples", "minutes")  # of each stage, in the model's `ip2p.json`


class OutOfTime(Exception):
    """The time limit of this call is reached; the state is saved."""


@dataclass
class Run:
    """One call of the build: its preset, folder, device and time limit."""

    preset: Preset
    name: str
    output: Path
    device: torch.device
    deadline: float | None  # of time.monotonic()
    log: Callable[[str], None]
    seed_shift: int = 0  # added to the seed of the editor's pages when a model is trained further

    @property
    def state_dir(self) -> Path:
        return self.output / "state"

    @cached_property
    def numerics(self) -> Numerics:
        """The precision and memory layout for training on this machine."""
        if self.preset.precision != "auto":
            return Numerics(self.preset.precision, torch.contiguous_format)
        found = measure_numerics(self.device)
        layout = "channels last" if found.memory_format == torch.channels_last else "channels first"
        self.log(f"training in {'fp32' if found.precision == 'no' else found.precision}, {layout}")
        return found

    def is_done(self, stage: str) -> bool:
        return (self.state_dir / f"{stage}.done.json").exists()

    def summary(self, stage: str) -> dict[str, Any]:
        """The summary of a finished stage; empty for an unfinished one."""
        path = self.state_dir / f"{stage}.done.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def restart_after(self, name: str, steps: int) -> str:
        """A stage that starts again when the one before it has more steps; older copies are deleted.

        Returns its name: that of the stage and the number of steps before it.
        """
        stage = f"{name}-{steps:08}"
        for older in self.state_dir.glob(f"{name}-*"):
            if older.is_dir() and older.name != stage:
                shutil.rmtree(older)
        return stage

    def finish(self, stage: str, summary: dict[str, Any]) -> None:
        """Save the summary of a stage, which marks it as finished."""
        self.state_dir.mkdir(parents=True, exist_ok=True)
        write_text(self.state_dir / f"{stage}.done.json", json.dumps(summary, indent=1) + "\n")


def train_stage(
    run: Run,
    stage: str,
    task: nn.Module,
    config: StageConfig,
    batches: Callable[[int], Iterator[list[Any]]],
    *,
    fingerprint: dict[str, Any],
    precision: str | None = None,
    after: str | None = None,
    optimizer: Literal["adamw", "muon"] = "adamw",
) -> dict[str, Any]:
    """Train the stage to its end (`training.loop.fit`) and return its summary.

    fingerprint: settings that must not change on resume, in addition to batch size and optimizer. Length,
    learning rate, workers and precision may change, so that a run can be extended or moved to another
    machine. precision: overrides the run's. after: a stage of the same network; a new stage starts with its
    weights, EMA and optimizer state. optimizer: see `training.loop.new_optimizer`. Raises OutOfTime when the
    time limit is reached.
    """
    fingerprint = plain(
        {
            "preset": run.name,
            "ema": run.preset.ema,
            "seed": run.preset.seed,
            **fingerprint,
            "batch": config.batch,
            "optimizer": optimizer,
        }
    )
    if after is not None:
        _continue_from(run, after, stage, fingerprint)
    result = fit(
        task,
        batches,
        LoopConfig(
            **vars(config),
            optimizer=optimizer,
            decay_vectors=False,
            beta2=0.99,
            ema=run.preset.ema,
            nan_steps=10,
            save_every=None,
            save_seconds=run.preset.save_every,
        ),
        folder=run.state_dir / stage,
        accelerator=new_accelerator(run.device, precision or run.numerics.precision),
        fingerprint=fingerprint,
        name=stage,
        deadline=run.deadline,
        say=run.log,
    )
    if not result.finished:
        raise OutOfTime
    return {
        "steps": result.step,
        "samples": result.step * config.batch,
        "minutes": round(result.seconds / 60, 1),
        "curve": result.curve,
        "config": asdict(config),
    }


def _continue_from(run: Run, source: str, target: str, fingerprint: dict[str, Any]) -> None:
    """Copy the newest state of stage `source` to a new stage `target`, whose steps start at 0."""
    checkpoints = Checkpoints(run.state_dir / target)
    if checkpoints.rows():
        return
    state = Checkpoints(run.state_dir / source).load()
    if state is None:
        raise InputError(f"stage {source} has no state in {run.state_dir}; train it first")
    state.update(step=0, samples=0, seconds=0.0, curve=[], fingerprint=fingerprint)
    checkpoints.save(0, state)


def plain(value: Any) -> Any:
    """Replace tuples with lists, as JSON does."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value
