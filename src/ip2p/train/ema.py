"""An exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ema:
    """Keeps `decay * average + (1 - decay) * weights`, with decay min(max_decay, (1 + n) / (10 + n)).

    The warm-up of the decay is the released code's: early averages forget the random start.
    """

    def __init__(self, model: nn.Module, max_decay: float = 0.9999) -> None:
        self.max_decay = max_decay
        self.updates = 0
        self.average: dict[str, Tensor] = {
            k: v.detach().clone().float() for k, v in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.max_decay, (1 + self.updates) / (10 + self.updates))
        weights = model.state_dict()
        average = list(self.average.values())
        torch._foreach_lerp_(average, [weights[k].float() for k in self.average], 1 - decay)

    def copy_to(self, model: nn.Module) -> None:
        model.load_state_dict(self.average)

    def state_dict(self) -> dict[str, object]:
        return {"updates": self.updates, "average": self.average}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for key, value in state["average"].items():
            self.average[key].copy_(value)
