"""An exponential moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Ema:
    """Keeps `decay * average + (1 - decay) * weights`, with decay min(max_decay, (1 + n) / (10 + n)).

    The decay warm-up is that of the released code, so that early averages forget the random initialization.
    Only trained weights are averaged; frozen weights equal their average.
    """

    def __init__(self, model: nn.Module, max_decay: float = 0.9999) -> None:
        self.max_decay = max_decay
        self.updates = 0
        self.average: dict[str, Tensor] = {k: p.detach().clone().float() for k, p in _trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, times: int = 1) -> None:
        """Update the average `times` times; the released code updates after every micro-batch."""
        weights = _trained(model)
        average = list(self.average.values())
        new = [weights[k].detach().float() for k in self.average]
        keep = 1.0  # remaining weight of the old average: all updates need only one pass
        for _ in range(times):
            self.updates += 1
            keep *= min(self.max_decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(average, new, 1 - keep)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
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
        return {"updates": self.updates, "average": self.average}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for key, value in state["average"].items():
            self.average[key].copy_(value)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {k: p for k, p in model.named_parameters() if p.requires_grad}
