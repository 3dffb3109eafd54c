"""Classification heads for several fields, on the features of a network in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class Heads(nn.Module):
    """Class logits from features, with one hidden layer; the classes of all fields are concatenated."""

    def __init__(self, features: int, sizes: Sequence[int], hidden: int = 192) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, sum(sizes)))

    def forward(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch classes"]:
        return self.layers(features)


def class_loss(
    logits: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch fields"], sizes: Sequence[int]
) -> Float[Tensor, ""]:
    """The mean cross-entropy of the fields; fields without a label (-100) are ignored."""
    losses = []
    for field, part in enumerate(logits.float().split(list(sizes), dim=-1)):
        own = labels[..., field].reshape(-1)
        if (own >= 0).any():
            losses.append(F.cross_entropy(part.reshape(-1, part.shape[-1]), own))
    return torch.stack(losses).mean() if losses else logits.float().sum() * 0
