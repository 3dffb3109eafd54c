"""Muon, an optimizer that orthogonalizes the updates of matrices (Jordan et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

# The quintic polynomial of the Newton-Schulz iteration, from the authors' implementation.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalized(
    matrix: Float[Tensor, "rows columns"], iterations: int = 5
) -> Float[Tensor, "rows columns"]:
    """Approximately U V^T for the singular value decomposition U S V^T, in bf16.

    The singular values of the result lie between about 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


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
                for weight in trained:
                    self._muon(weight, group)
            elif trained:
                self._adamw(trained, group)

    def _muon(self, weight: Tensor, group: dict[str, Any]) -> None:
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        average, momentum = state["momentum"], group["momentum"]
        average.lerp_(weight.grad, 1 - momentum)
        nesterov = weight.grad.lerp(average, momentum)
        update = orthogonalized(nesterov.flatten(1))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update.view(weight.shape), alpha=-0.2 * math.sqrt(max(update.shape)) * group["lr"])

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
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        first, second = [s["first"] for s in states], [s["second"] for s in states]
        torch._foreach_add_([s["step"] for s in states], 1)
        step = float(states[0]["step"])
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        scales = torch._foreach_sqrt(second)
        torch._foreach_div_(scales, math.sqrt(1 - beta2**step))
        torch._foreach_add_(scales, 1e-8)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(weights, first, scales, -group["lr"] / (1 - beta1**step))
