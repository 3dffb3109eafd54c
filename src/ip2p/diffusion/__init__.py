"""The mathematics of sampling as plain functions.

A denoiser is a function `denoise(x, sigma) -> x0` for x = x0 + sigma · noise (the variance-exploding form).
A sampler is a generator over sigmas that yields x after each step.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

Latent: TypeAlias = Float[Tensor, "batch channel height width"]
Sigma: TypeAlias = Float[Tensor, ""]
Denoiser: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Noise: TypeAlias = Callable[[], Tensor]
Steps: TypeAlias = Iterator[Tensor]
