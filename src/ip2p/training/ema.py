"""An exponential moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn


class Ema:
    """Keeps `decay * average + (1 - decay) * weights`, with decay min(max_decay, (1 + n) / (10 + n)).

    The decay warm-up is that of the released code, so that early averages forget the random initialization.
    Only trained weights are averaged; frozen weights equal their average.
    """

    def __init__(self, model: nn.Module, max_decay: float = 0.9999, *, on_cpu: bool = False) -> None:
        """`on_cpu`: keep the averages in the host's memory and update them in a thread, beside the next step.

        The numbers are those of the device, up to its rounding; on CPUs the same to the bit.
        """
        self.max_decay = max_decay
        self.updates = 0
        self.average: dict[str, Tensor] = {k: p.detach().clone().float() for k, p in _trained(model).items()}
        self._copies: list[Tensor] | None = None  # of the weights, on the host
        if on_cpu:
            pin = torch.cuda.is_available()  # copies to pinned memory do not block
            hosted = {k: torch.empty(v.shape, pin_memory=pin).copy_(v) for k, v in self.average.items()}
            self._copies = [torch.empty_like(v, pin_memory=pin) for v in hosted.values()]
            self.average = hosted
            self._worker = ThreadPoolExecutor(1)
            self._pending: Future[None] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, times: int = 1) -> None:
        """Update the average `times` times; the released code updates after every micro-batch."""
        weights = _trained(model)
        keep = 1.0  # remaining weight of the old average: all updates need only one pass
        for _ in range(times):
            self.updates += 1
            keep *= min(self.max_decay, (1 + self.updates) / (10 + self.updates))
        new = [weights[k].detach() for k in self.average]
        if self._copies is None:
            torch._foreach_lerp_(list(self.average.values()), [weight.float() for weight in new], 1 - keep)
            return
        self._wait()
        for copy, weight in zip(self._copies, new, strict=True):
            copy.copy_(weight, non_blocking=True)
        ready = None
        if new and new[0].is_cuda:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(new[0].device))
        self._pending = self._worker.submit(self._average_copies, 1 - keep, ready)

    def _average_copies(self, share: float, ready: torch.cuda.Event | None) -> None:
        if ready is not None:
            ready.synchronize()
        assert self._copies is not None, "only called with averages on the host"
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), self._copies, share)

    def _wait(self) -> None:
        """Wait for an update that is under way on the host."""
        if self._copies is not None and self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        self._wait()
        weights = _trained(model)
        for key, value in self.average.items():
            weights[key].copy_(value)

    @contextlib.contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Use the averages as the model's weights inside the block."""
        weights = _trained(model)
        own = {k: weights[k].detach().clone() for k in self.average}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for key, value in own.items():
                    weights[key].copy_(value)

    def state_dict(self) -> dict[str, object]:
        self._wait()
        return {"updates": self.updates, "average": self.average}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self._wait()
        self.updates = state["updates"]
        for key, value in state["average"].items():
            self.average[key].copy_(value)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {k: p for k, p in model.named_parameters() if p.requires_grad}
