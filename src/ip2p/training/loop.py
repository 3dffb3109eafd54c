"""The one training loop: optimizer, moving average, accumulation, checkpoints, and how it stops.

What is trained is a `torch.nn.Module` whose call on a micro-batch gives the mean loss of its samples and
numbers to log. Where its batches come from is its own matter, with one rule: the batches of step k
follow from k alone, so that a run which goes on sees what it would have seen.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import signal
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from ip2p.base.errors import InputError, ModelError, Terminated
from ip2p.base.files import append_row, write_text
from ip2p.training.checkpoints import Checkpoints
from ip2p.training.ema import Ema

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("ip2p")

LOG = "log.jsonl"
BAD_STEPS = "not-applied.jsonl"


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how fast, how careful. `batch` counts the samples of an optimizer step over all processes."""

    steps: int
    batch: int
    lr: float
    minutes: float | None = None  # of training time, over all calls; whichever of the two ends first
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.01
    decay_vectors: bool = True  # biases and norms too, as the released code
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = 1.0
    ema: float | None = 0.9999
    ema_on_cpu: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    ema_updates: int = 1  # a step; the released code makes one a micro-batch
    nan_steps: int = 1  # so many steps in a row that are not finite end the run
    keep: int = 2
    save_every: int | None = 500  # steps
    save_seconds: float | None = None
    check_every: int | None = None  # steps between two calls of `check`
    log_seconds: float = 20.0


@dataclass
class Result:
    """How a call ended: whether the run is finished, and what it logged."""

    finished: bool
    step: int
    seconds: float
    curve: list[dict[str, float]]
    stopped_early: bool = False


@dataclass
class Clock:
    """How much time a run has used, over all the calls that it took."""

    used: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return self.used + time.monotonic() - self.started


def learning_rate(config: LoopConfig, step: int, progress: float) -> float:
    """Linear warm-up; then constant, or a cosine to a fiftieth of the peak as `progress` goes from 0 to 1."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    return config.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def new_accelerator(device: torch.device | str, precision: str, **more: Any) -> Accelerator:
    """accelerate's Accelerator for one more run in this process; `precision` is no, bf16 or fp16."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # It remembers the first run's precision for the whole process; a build trains three networks in one.
    AcceleratorState._reset_state()
    return Accelerator(cpu=torch.device(device).type == "cpu", mixed_precision=precision, **more)


class Timer:
    """Where a step's time goes. It waits for the device at every border, so it slows what it measures."""

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
        """A line a part: its share of a step and its milliseconds; and samples a second."""
        whole = sum(self.seconds.values())
        if not self.steps or not whole:
            return ["profile: no step was made"]
        lines = [f"profile of {self.steps} steps of {batch} samples:"]
        for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            lines.append(
                f"  {name:<22}{seconds / whole:>6.1%} {1000 * seconds / self.steps:>10.1f} ms a step"
            )
        lines.append(f"  {'whole step':<22}{'':>6} {1000 * whole / self.steps:>10.1f} ms")
        lines.append(f"  {batch * self.steps / whole:.1f} images a second")
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
    check: Callable[[int], bool] | None = None,
    parts: dict[str, Any] | None = None,
    profile: bool = False,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Train `task` to the end of `config`, going on from the newest checkpoint in `folder`.

    task: called on a micro-batch it gives (mean loss, numbers to log); its parameters that want a
    gradient are trained, and hold their averages when a finished run returns. batches: gives, from
    step k on, this process's micro-batches of each step; a micro-batch may have `ids`. fingerprint:
    what must not change under a resumed run. deadline: `time.monotonic()` at which this call saves and
    returns unfinished. check: called every `check_every` steps with the averages in place, by the main
    process; True ends the run. parts: what else has a state_dict and is saved along.

    SIGTERM and Ctrl-C save first and then raise `Terminated` and KeyboardInterrupt. Raises InputError for a
    changed fingerprint, ModelError after `nan_steps` steps in a row whose gradients are not finite: such a
    step is not applied, and its samples' ids lie in not-applied.jsonl. Loss and gradients are means
    over the whole batch, however it is split over processes and micro-batches.
    """
    say = say or (lambda text: log.info("%s", text))
    main = accelerator.is_main_process
    folder.mkdir(parents=True, exist_ok=True)
    task.to(accelerator.device)
    ema = Ema(task, config.ema, on_cpu=config.ema_on_cpu) if config.ema is not None else None
    trained = [p for p in task.parameters() if p.requires_grad]
    optimizer = new_optimizer(trained, config)
    checkpoints = Checkpoints(folder, keep=config.keep)
    step, clock, curve, bad = 0, Clock(), [], 0
    parts = parts or {}

    state = checkpoints.load()
    if state is not None:
        _check_same(state["fingerprint"], fingerprint, folder)
        _load_trained(task, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if ema:
            ema.load_state_dict(state["ema"])
        for key, part in parts.items():
            part.load_state_dict(state["parts"][key])
        step, curve, clock.used = state["step"], state["curve"], state["seconds"]
        if main:
            _forget_after(folder / LOG, step)
            say(f"{name}: going on from step {step}")
    model, optimizer = accelerator.prepare(task, optimizer)
    if state is not None:
        _set_rng(state["rng"], accelerator)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        del state
    timer = Timer(profile, accelerator.device)
    scaler = accelerator.scaler
    # fp16 looks for its scale by steps that are not finite.
    patience = config.nan_steps if scaler is None else max(config.nan_steps, 30)

    def save() -> None:
        if main:
            checkpoints.save(
                step,
                {
                    "fingerprint": fingerprint,
                    "step": step,
                    "samples": step * config.batch,
                    "seconds": clock.seconds(),
                    "model": {k: p.detach() for k, p in task.named_parameters() if p.requires_grad},
                    "ema": ema.state_dict() if ema else None,
                    "optimizer": optimizer.state_dict(),
                    "rng": _rng(),
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "parts": {key: part.state_dict() for key, part in parts.items()},
                    "curve": curve,
                },
            )
        accelerator.wait_for_everyone()

    def now_done() -> float:
        spent = clock.seconds() / (60 * config.minutes) if config.minutes else 0.0
        return max(step / config.steps, spent)

    def result(finished: bool, early: bool = False) -> Result:
        return Result(finished, step, clock.seconds(), curve, early)

    saved = shown = time.monotonic()
    shown_step, count = step, 0
    totals: dict[str, float] = {}
    model.train()
    source = batches(step)
    ended_early = False
    with _signals() as signals, contextlib.closing(source):  # type: ignore[type-var]
        while (progress := now_done()) < 1 and not ended_early:
            late = deadline is not None and time.monotonic() > deadline
            if _any_process(accelerator, signals.number is not None or late):
                save()
                if signals.number is not None:
                    say(f"{name}: saved at step {step}; the same command goes on from here")
                signals.raise_if_any()
                return result(False)
            lr = learning_rate(config, step, progress)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with timer.part("waiting for data"):
                micro = next(source)
            optimizer.zero_grad(set_to_none=True)
            numbers: dict[str, float] = {}
            losses = []
            for k, batch in enumerate(micro):
                last = k == len(micro) - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    with timer.part("forward"):
                        loss, more = model(batch)
                    with timer.part("backward"):
                        accelerator.backward(loss / len(micro))
                losses.append(loss.detach())
                for key, value in more.items():
                    numbers[key] = numbers.get(key, 0.0) + float(value) / len(micro)
            with timer.part("optimizer"):
                norm = accelerator.clip_grad_norm_(trained, config.clip_norm or math.inf)
                finite = bool(torch.isfinite(norm))
                if finite or scaler is not None:  # a scaler skips the step itself, and lowers its scale
                    optimizer.step()
            if finite:
                bad = 0
                with timer.part("moving average"):
                    if ema:
                        ema.update(task, config.ema_updates)
            else:
                bad += 1
                _not_applied(folder, step, losses, micro, accelerator)
                say(f"{name}: step {step} is not finite; it was not applied")
                if bad >= patience:
                    step -= bad - 1
                    save()
                    raise ModelError(
                        f"{name}: the gradients of step {step} are not finite. The weights before it are "
                        f"saved, and its samples' ids are in {folder / BAD_STEPS}. Look at those samples, "
                        "lower the learning rate, or step over it: --nan-steps 10."
                    )
            step += 1
            timer.steps += 1
            loss_now = float(torch.stack(losses).mean())
            for key, number in {"loss": loss_now, "norm": float(norm), **numbers}.items():
                totals[key] = totals.get(key, 0.0) + number
            count += 1
            now = time.monotonic()
            if now - shown > config.log_seconds or step >= config.steps:
                rate = (step - shown_step) * config.batch / max(now - shown, 1e-9)
                means = {k: _mean(accelerator, v / count) for k, v in totals.items()}
                row = {"step": step, "seconds": round(clock.seconds()), **means, "rate": round(rate, 2)}
                curve.append({k: round(v, 6) for k, v in row.items()})
                if main:
                    _log(accelerator, folder, curve[-1])
                    text = " ".join(f"{k} {v:.5g}" for k, v in means.items())
                    pace = (now - shown) / max(step - shown_step, 1)
                    left = time_left(pace * (config.steps - step), config.minutes, clock.seconds())
                    say(f"{name}: step {step} {min(now_done(), 1):.1%} {text} {rate:.3g} samples/s{left}")
                shown, shown_step, totals, count = now, step, {}, 0
            if config.check_every and check and step % config.check_every == 0 and step < config.steps:
                ended_early = _checked(check, step, task, ema, accelerator)
                model.train()
                save()
                saved = time.monotonic()
            elif (config.save_every and step % config.save_every == 0) or _any_process(
                accelerator,
                config.save_seconds is not None and now - saved > config.save_seconds,
                sure=config.save_seconds is None,
            ):
                save()
                saved = time.monotonic()
        save()
        signals.raise_if_any()
    if profile and main:
        for line in timer.report(config.batch):
            say(line)
    if ema:
        ema.copy_to(task)
    task.eval()
    return result(True, ended_early)


def time_left(seconds: float, minutes: float | None, spent: float) -> str:
    """The words for what is left of a run: by its pace, and by its limit of time if it has one."""
    if minutes:
        seconds = min(seconds, 60 * minutes - spent)
    if seconds < 1:
        return ""
    if seconds < 100:
        return f", about {seconds:.0f} s left"
    return (
        f", about {seconds / 60:.0f} min left" if seconds < 6000 else f", about {seconds / 3600:.1f} h left"
    )


def new_optimizer(trained: Sequence[nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
    """AdamW, or with moments in 8 bits (Dettmers et al. 2022, bitsandbytes). Raises InputError without it."""
    groups = _groups(trained, config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise InputError(
            "optimizer: adamw8bit needs bitsandbytes, which is missing; install it: pip install 'ip2p[8bit]'"
        ) from None
    return AdamW8bit(groups, lr=config.lr, betas=config.betas)


def _groups(trained: Sequence[nn.Parameter], config: LoopConfig) -> list[dict[str, Any]]:
    if config.decay_vectors:
        return [{"params": list(trained), "weight_decay": config.weight_decay}]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _check_same(was: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    changed = [k for k in {**was, **wanted} if was.get(k) != wanted.get(k)]
    if changed:
        told = ", ".join(f"{k} was {was.get(k)!r} and is now {wanted.get(k)!r}" for k in changed[:3])
        raise InputError(
            f"the checkpoints in {folder} were made with another {' and '.join(changed)} ({told}); "
            "give the same again, or another output folder"
        )


def _load_trained(task: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    own = {k: p for k, p in task.named_parameters() if p.requires_grad}
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())[0]
        raise InputError(f"the checkpoint is of another network ({odd}); give another output folder.")
    with torch.no_grad():
        for key, value in weights.items():
            own[key].copy_(value)


# --- several processes ---


def _any_process(accelerator: Accelerator, here: bool, *, sure: bool = False) -> bool:
    """Whether `here` holds in any process; all learn the same. `sure`: it is the same in all anyway."""
    if accelerator.num_processes == 1 or sure:
        return here
    flag = torch.tensor([float(here)], device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") > 0)


def _mean(accelerator: Accelerator, value: float) -> float:
    if accelerator.num_processes == 1:
        return value
    return float(accelerator.reduce(torch.tensor([value], device=accelerator.device), reduction="mean"))


def _checked(
    check: Callable[[int], bool], step: int, task: nn.Module, ema: Ema | None, accelerator: Accelerator
) -> bool:
    stop = False
    if accelerator.is_main_process:
        task.eval()
        with ema.in_place(task) if ema else contextlib.nullcontext():
            stop = check(step)
    return _any_process(accelerator, stop)


# --- randomness beside the samples' own: dropout layers ---


def _rng() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    kind, keys, place, has, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has, cached],
    }


def _set_rng(state: dict[str, Any], accelerator: Accelerator) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


# --- what is written beside the checkpoints ---


def _log(accelerator: Accelerator, folder: Path, row: dict[str, float]) -> None:
    append_row(folder / LOG, row)
    told = {k: v for k, v in row.items() if k not in ("step", "seconds")}
    accelerator.log(told, step=int(row["step"]))


def _forget_after(path: Path, step: int) -> None:
    """Drop the log's lines after `step`, which the run is about to write again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_text(path, "".join(kept))


def _not_applied(
    folder: Path, step: int, losses: Sequence[torch.Tensor], micro: Sequence[Any], accelerator: Accelerator
) -> None:
    ids = [str(i) for batch in micro for i in getattr(batch, "ids", ())]
    row = {
        "step": step,
        "process": accelerator.process_index,
        "losses": [float(x) for x in losses],
        "ids": ids,
    }
    append_row(folder / BAD_STEPS, row)


# --- stopping ---


class _Signals:
    def __init__(self) -> None:
        self.number: int | None = None

    def raise_if_any(self) -> None:
        if self.number == signal.SIGTERM:
            raise Terminated
        if self.number is not None:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    """Note SIGTERM and Ctrl-C instead of unwinding in the middle of a step; a second Ctrl-C does unwind."""
    told = _Signals()

    def note(number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT and told.number is not None:
            raise KeyboardInterrupt
        told.number = number

    before: dict[int, Any] = {}
    try:
        for kind in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(kind) is not signal.SIG_IGN:
                before[kind] = signal.signal(kind, note)
    except ValueError:  # not the main thread: the process's owner handles signals
        pass
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
