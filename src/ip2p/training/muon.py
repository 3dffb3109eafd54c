"""Muon, an optimizer that orthogonalizes the updates of matrices (Jordan et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

# The quintic polynomial of the Newton-Schulz iteration, from the authors' implementation.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalized(
    matrices: Float[Tensor, "count rows columns"], iterations: int = 5
) -> Float[Tensor, "count rows columns"]:
    """Approximately U V^T of each matrix, for the singular value decomposition U S V^T, in bf16.

    The singular values of the result lie between about 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(Optimizer):
    """Muon for the groups with `matrices: True`, and AdamW for the others.

    A convolution's weight counts as a matrix of [out, in * height * width]. The learning rate is the same for
    both: the update of a matrix is scaled to the root mean square that AdamW's has, 0.2 (Liu et al. 2025,
    "Muon is scalable for LLM training", eq. 4). On two-dimensional weights it equals `torch.optim.Muon` with
    `adjust_lr_fn="match_rms_adamw"`, which refuses convolutions.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "momentum": momentum, "weight_decay": 0.0, "matrices": False}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if group["matrices"]:
                by_shape: dict[torch.Size, list[Tensor]] = {}  # one call for many small matrices is faster
                for weight in trained:
                    by_shape.setdefault(weight.flatten(1).shape, []).append(weight)
                for weights in by_shape.values():
                    self._muon(weights, group)
            elif trained:
                self._adamw(trained, group)

    def _muon(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        momentum, moved = group["momentum"], []
        for weight in weights:
            assert weight.grad is not None
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].lerp_(weight.grad, 1 - momentum)
            moved.append(weight.grad.lerp(state["momentum"], momentum).flatten(1))  # Nesterov's
        updates = orthogonalized(torch.stack(moved))
        rate = 0.2 * math.sqrt(max(updates.shape[1:])) * group["lr"]
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update.reshape(weight.shape), alpha=-rate)

    def _adamw(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight].update(
                    step=torch.zeros(()),
                    first=torch.zeros_like(weight),
                    second=torch.zeros_like(weight),
                )
        states = [self.state[weight] for weight in weights]
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            [weight.grad for weight in weights if weight.grad is not None],
            [state["first"] for state in states],
            [state["second"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )
