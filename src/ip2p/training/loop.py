"""The training loop: optimizer, EMA, gradient accumulation, checkpoints, and clean stops.

The module to train returns the mean loss of a micro-batch and metrics to log. The batches of step k must
depend on k alone, so that a resumed run sees the same batches as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import signal
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ip2p.base.errors import InputError, ModelError, Terminated
from ip2p.base.files import append_row
from ip2p.training.checkpoints import Checkpoints
from ip2p.training.curves import Curves
from ip2p.training.ema import Ema
from ip2p.training.muon import Muon

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ip2p.training.validation import Validation

log = logging.getLogger("ip2p")

LOG = "log.jsonl"
BAD_STEPS = "not-applied.jsonl"


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The settings of `fit`. Those that `TrainConfig` has as well have the same name and meaning there."""

    steps: int
    batch: int  # samples per optimizer step, over all processes
    lr: float
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0
    ema: float = 0.9999
    ema_on_cpu: bool = False
    ema_updates: int = 1  # per step; the released code makes one per micro-batch
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    nan_steps: int = 1  # consecutive nonfinite steps that end the run
    keep: int = 2
    save_every: int | None = 500  # steps
    validate_every: int = 0
    profile: bool = False
    minutes: float | None = None  # of training time, over all calls; the run ends at this or at `steps`
    decay_vectors: bool = True  # weight decay also for biases and norms, as in the released code
    save_seconds: float | None = None
    log_seconds: float = 20.0


@dataclass
class FitResult:
    """How a call ended: whether the run is finished, and what it logged."""

    finished: bool
    step: int
    seconds: float  # of training, over all calls
    curve: list[dict[str, float]]
    stopped_early: bool = False


def learning_rate(config: LoopConfig, step: int, progress: float) -> float:
    """Linear warm-up, then constant, or a cosine down to 2% of the peak as `progress` goes from 0 to 1."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    return config.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def new_accelerator(device: torch.device | str, precision: str, **more: Any) -> Accelerator:
    """A new Accelerator. precision: no, bf16 or fp16; more: other arguments of Accelerator."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate keeps the first precision for the whole process, but a build trains several networks.
    AcceleratorState._reset_state()
    return Accelerator(cpu=torch.device(device).type == "cpu", mixed_precision=precision, **more)


class Timer:
    """Measures the parts of a step. It synchronizes the device after each, which slows the step down."""

    def __init__(self, on: bool, device: torch.device) -> None:
        self.on, self.device = on, device
        self.seconds: dict[str, float] = {}
        self.steps = 0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def report(self, batch: int) -> list[str]:
        """One line per part: its share of a step and its milliseconds; then the images per second."""
        whole = sum(self.seconds.values())
        if not self.steps or not whole:
            return ["profile: no steps were run"]
        lines = [f"profile of {self.steps} steps of {batch} samples:"]
        for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            lines.append(f"  {name:<22}{seconds / whole:>6.1%} {1000 * seconds / self.steps:>10.1f} ms/step")
        lines.append(f"  {'whole step':<22}{'':>6} {1000 * whole / self.steps:>10.1f} ms/step")
        lines.append(f"  {batch * self.steps / whole:.1f} images/s")
        return lines


def fit(
    task: nn.Module,
    batches: Callable[[int], Iterator[Sequence[Any]]],
    config: LoopConfig,
    *,
    folder: Path,
    accelerator: Accelerator,
    fingerprint: dict[str, Any],
    name: str = "training",
    deadline: float | None = None,
    validation: Validation | None = None,
    say: Callable[[str], None] | None = None,
) -> FitResult:
    """Train `task` to the end of `config`, resuming from the newest checkpoint in `folder`.

    task: maps a micro-batch to (mean loss, metrics to log). Its parameters that require gradients are
    trained; when a finished run returns, they hold the EMA weights. batches: yields, from a step on, this
    process's micro-batches of each step; a micro-batch may have `ids`. fingerprint: what must not change on
    resume. deadline: the value of `time.monotonic()` at which this call saves and returns unfinished.
    validation: called with the step every `config.validate_every` steps, on the main process and with the
    EMA weights; True ends the run.

    SIGTERM and Ctrl-C save first and then raise Terminated and KeyboardInterrupt. Raises InputError for a
    changed fingerprint, and ModelError after `nan_steps` consecutive steps with nonfinite gradients. Such
    steps are not applied, and the ids of their samples are written to not-applied.jsonl. Loss and gradients
    are means over the whole batch, however it is split over processes and micro-batches.
    """
    run = _Run(task, config, folder, accelerator, fingerprint, name, validation, say)
    # fp16 searches for its loss scale with nonfinite steps.
    patience = config.nan_steps if accelerator.scaler is None else max(config.nan_steps, 30)
    bad, stopped_early = 0, False
    saved = run.logged = time.monotonic()
    run.model.train()
    steps = batches(run.step)
    with _signals() as signals, contextlib.closing(steps):  # type: ignore[type-var]
        while run.progress() < 1 and not stopped_early:
            late = deadline is not None and time.monotonic() > deadline
            if _any_process(accelerator, signals.number is not None or late):
                run.save()
                if signals.number is not None:
                    run.say(f"{name}: saved at step {run.step}; run the same command again to resume")
                signals.raise_if_any()
                return run.result(finished=False)
            with run.timer.part("waiting for data"):
                micro_batches = next(steps)
            bad = 0 if run.train_step(micro_batches) else bad + 1
            if bad >= patience:
                run.step -= bad - 1
                run.save()
                raise ModelError(
                    f"{name}: the gradients of step {run.step} are not finite. The weights before it are "
                    f"saved, and the ids of its samples are in {folder / BAD_STEPS}. Check those samples, "
                    "lower the learning rate, or skip the step: --nan-steps 10."
                )
            run.step += 1
            run.log_if_due()
            if config.validate_every and run.step % config.validate_every == 0 and run.step < config.steps:
                stopped_early = run.validate()
                due = True
            elif config.save_every and run.step % config.save_every == 0:
                due = True
            else:
                due = config.save_seconds is not None and _any_process(
                    accelerator, time.monotonic() - saved > config.save_seconds
                )
            if due:
                run.save()
                saved = time.monotonic()
        run.save()
        signals.raise_if_any()
    if config.profile and run.main:
        for line in run.timer.report(config.batch):
            run.say(line)
    if run.ema:
        run.ema.copy_to(task)
    task.eval()
    return run.result(finished=True, stopped_early=stopped_early)


class _Run:
    """What a run saves and restores: networks, optimizer, EMA, the number of finished steps, and the log."""

    def __init__(
        self,
        task: nn.Module,
        config: LoopConfig,
        folder: Path,
        accelerator: Accelerator,
        fingerprint: dict[str, Any],
        name: str,
        validation: Validation | None,
        say: Callable[[str], None] | None,
    ) -> None:
        self.task, self.config, self.folder, self.accelerator = task, config, folder, accelerator
        self.fingerprint, self.name, self.validation = fingerprint, name, validation
        self.say = say or log.info
        self.main = accelerator.is_main_process
        self.timer = Timer(config.profile, accelerator.device)
        self.checkpoints, self.log = Checkpoints(folder, keep=config.keep), Curves(folder, LOG)
        self.step, self.curve = 0, list[dict[str, float]]()
        self.started = time.monotonic()  # moved back by the time of earlier calls
        self.logged = self.started  # time of the last line of the log
        self.sums: dict[str, float] = {}  # of the metrics since the last line of the log

        # 1. The initial state.
        task.to(accelerator.device)
        self.trained = {k: p for k, p in task.named_parameters() if p.requires_grad}
        self.ema = Ema(task, config.ema, on_cpu=config.ema_on_cpu) if config.ema else None
        optimizer = new_optimizer(self.trained, config)

        # 2. The checkpoint.
        state = self.checkpoints.load()
        if state is not None:
            _check_same(state["fingerprint"], fingerprint, folder)
            if odd := self.trained.keys() ^ state["model"].keys():
                raise InputError(
                    f"the checkpoint is of another network ({min(odd)}); choose another output folder."
                )
            with torch.no_grad():
                for key, value in state["model"].items():
                    self.trained[key].copy_(value)
            optimizer.load_state_dict(state["optimizer"])
            if self.ema:
                self.ema.load_state_dict(state["ema"])
            if validation is not None and "watch" in state["parts"]:
                validation.watch.load_state_dict(state["parts"]["watch"])
            elif validation is not None and self.main:
                self.say(
                    f"{name}: there were no validations up to step {state['step']}. Until then the "
                    "held-out pairs of a data set were trained on, so their scores are too good."
                )
            self.step, self.curve = state["step"], state["curve"]
            self.started -= state["seconds"]
            if self.main:
                self.say(f"{name}: resuming from step {self.step}")
        if self.main:
            self.log.forget_after(self.step)  # also what a run wrote that was killed before it saved
        self.logged_step = self.step

        # 3. What accelerate wraps.
        self.model, self.optimizer = accelerator.prepare(task, optimizer)
        if state is not None:
            _set_rng(state["rng"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(state["scaler"])

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def progress(self) -> float:
        minutes = self.config.minutes
        return max(self.step / self.config.steps, self.seconds() / (60 * minutes) if minutes else 0.0)

    def result(self, *, finished: bool, stopped_early: bool = False) -> FitResult:
        return FitResult(finished, self.step, self.seconds(), self.curve, stopped_early)

    def save(self) -> None:
        """Write a checkpoint; all processes wait for it."""
        if self.main:
            scaler = self.accelerator.scaler
            self.checkpoints.save(
                self.step,
                {
                    "fingerprint": self.fingerprint,
                    "step": self.step,
                    "samples": self.step * self.config.batch,
                    "seconds": self.seconds(),
                    "model": {k: p.detach() for k, p in self.trained.items()},
                    "ema": self.ema.state_dict() if self.ema else None,
                    "optimizer": self.optimizer.state_dict(),
                    "rng": _rng(),
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "parts": {} if self.validation is None else {"watch": self.validation.watch.state_dict()},
                    "curve": self.curve,
                },
            )
        self.accelerator.wait_for_everyone()

    def train_step(self, micro_batches: Sequence[Any]) -> bool:
        """Accumulate gradients and update the weights and their EMA. False if a gradient is not finite."""
        # 1. The learning rate.
        config, accelerator = self.config, self.accelerator
        lr = learning_rate(config, self.step, self.progress())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)

        # 2. Gradients, which the processes exchange after the last micro-batch.
        metrics: dict[str, float] = {}
        losses = []
        for k, batch in enumerate(micro_batches, 1):
            last = k == len(micro_batches)
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                with self.timer.part("forward"):
                    loss, more = self.model(batch)
                with self.timer.part("backward"):
                    accelerator.backward(loss / len(micro_batches))
            losses.append(loss.detach())
            for key, value in more.items():
                metrics[key] = metrics.get(key, 0.0) + float(value) / len(micro_batches)

        # 3. The update, unless a gradient is not finite.
        with self.timer.part("optimizer"):
            norm = accelerator.clip_grad_norm_(list(self.trained.values()), config.clip_norm or math.inf)
            finite = bool(torch.isfinite(norm))
            if finite or accelerator.scaler is not None:  # a scaler skips the step and lowers its scale
                self.optimizer.step()
        if finite and self.ema:
            with self.timer.part("EMA"):
                self.ema.update(self.task, config.ema_updates)
        if not finite:
            row = {
                "step": self.step,
                "process": accelerator.process_index,
                "losses": [float(loss) for loss in losses],
                "ids": [str(i) for batch in micro_batches for i in getattr(batch, "ids", ())],
            }
            append_row(self.folder / BAD_STEPS, row)
            self.say(f"{self.name}: the gradients of step {self.step} are not finite; it was not applied")

        # 4. Metrics.
        metrics = {"loss": float(torch.stack(losses).mean()), "norm": float(norm), **metrics}
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.timer.steps += 1
        return finite

    def log_if_due(self) -> None:
        """Log the mean metrics of the steps since the last line, every `log_seconds` and at the end."""
        config, passed = self.config, time.monotonic() - self.logged
        if passed <= config.log_seconds and self.step < config.steps:
            return
        steps = self.step - self.logged_step
        means = {k: _mean(self.accelerator, v / steps) for k, v in self.sums.items()}
        rate = steps * config.batch / max(passed, 1e-9)
        row = {"step": self.step, "seconds": round(self.seconds()), **means, "rate": round(rate, 2)}
        self.curve.append({k: round(v, 6) for k, v in row.items()})
        if self.main:
            metrics = {k: v for k, v in self.curve[-1].items() if k != "step"}
            self.log.add(self.step, metrics)
            metrics.pop("seconds")
            self.accelerator.log(metrics, step=self.step)
            text = " ".join(f"{k} {v:.5g}" for k, v in means.items())
            left = time_left(
                passed / max(steps, 1) * (config.steps - self.step), config.minutes, self.seconds()
            )
            done = min(self.progress(), 1)
            self.say(f"{self.name}: step {self.step} {done:.1%} {text} {rate:.3g} samples/s{left}")
        self.logged, self.logged_step = time.monotonic(), self.step
        self.sums = {}

    def validate(self) -> bool:
        """Run the validation with the EMA weights on the main process. True if it ends the run."""
        stop = False
        if self.validation is not None and self.main:
            self.task.eval()
            with self.ema.in_place(self.task) if self.ema else contextlib.nullcontext():
                stop = self.validation(self.step)
            self.model.train()
        return _any_process(self.accelerator, stop)


def time_left(seconds: float, minutes: float | None, spent: float) -> str:
    """The remaining time of a run as text, from its pace and, if it has one, its limit of `minutes`."""
    if minutes:
        seconds = min(seconds, 60 * minutes - spent)
    if seconds < 1:
        return ""
    if seconds < 100:
        return f", about {seconds:.0f} s left"
    return (
        f", about {seconds / 60:.0f} min left" if seconds < 6000 else f", about {seconds / 3600:.1f} h left"
    )


def new_optimizer(trained: Mapping[str, nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
    """The optimizer of the named parameters.

    adamw: with fp32 moments. adamw8bit: with 8-bit moments (Dettmers et al. 2022); raises InputError without
    bitsandbytes. muon: Muon for the matrices of a UNet or decoder except its first and last convolution,
    AdamW for everything else.
    """
    decayed = {k: p for k, p in trained.items() if p.ndim > 1 or config.decay_vectors}
    vectors = [p for k, p in trained.items() if k not in decayed]
    betas = (config.beta1, config.beta2)
    matrices = {k for k in decayed if config.optimizer == "muon" and is_muon_matrix(k, decayed[k])}
    groups: list[dict[str, Any]] = [
        {"params": [p for k, p in decayed.items() if k not in matrices], "weight_decay": config.weight_decay}
    ]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
    if config.optimizer == "muon":
        inner = [decayed[k] for k in sorted(matrices)]
        groups.append({"params": inner, "weight_decay": config.weight_decay, "matrices": True})
        return Muon(groups, lr=config.lr, betas=betas)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise InputError(
            "optimizer: adamw8bit needs bitsandbytes, which is not installed: pip install 'ip2p[8bit]'"
        ) from None
    return AdamW8bit(groups, lr=config.lr, betas=betas)


def is_muon_matrix(name: str, weight: Tensor) -> bool:
    """Whether Muon trains a parameter, by its name in the task, such as "unet.mid_block.…"."""
    network, _, layer = name.partition(".")
    inner = network in ("unet", "decoder") and not layer.startswith(("conv_in", "conv_out"))
    return inner and weight.ndim > 1


def _check_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        changes = ", ".join(f"{k} was {before.get(k)!r} and is now {now.get(k)!r}" for k in changed[:3])
        raise InputError(
            f"the checkpoints in {folder} were made with another {' and '.join(changed)} ({changes}); "
            "use the same settings, or choose another output folder"
        )


# --- several processes ---


def _any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether `here` is true in any process; the result is the same in all of them."""
    if accelerator.num_processes == 1:
        return here
    flag = torch.tensor([float(here)], device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") > 0)


def _mean(accelerator: Accelerator, value: float) -> float:
    if accelerator.num_processes == 1:
        return value
    return float(accelerator.reduce(torch.tensor([value], device=accelerator.device), reduction="mean"))


# --- global random state: samples have their own generators, but dropout layers do not ---


def _rng() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    kind, keys, place, has, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has, cached],
    }


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


# --- signals ---


class _Signals:
    number: int | None = None

    def raise_if_any(self) -> None:
        if self.number == signal.SIGTERM:
            raise Terminated
        if self.number is not None:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    """Record SIGTERM and Ctrl-C instead of interrupting a step; a second Ctrl-C does interrupt it."""
    received = _Signals()

    def record(number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT and received.number is not None:
            raise KeyboardInterrupt
        received.number = number

    before: dict[int, Any] = {}
    try:
        for kind in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(kind) is not signal.SIG_IGN:
                before[kind] = signal.signal(kind, record)
    except ValueError:  # not the main thread: the owner of the process handles signals
        pass
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
