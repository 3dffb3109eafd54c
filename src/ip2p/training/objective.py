"""One step of training an editor: noise on the edited picture's latents, conditions, and the loss."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip2p.training.loss import (
    Shares,
    add_noise,
    change_weights,
    noise_loss,
    null_conditions,
    prediction_target,
    random_timesteps,
    snr_weight,
)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The paper's loss; what follows `snr_clip` is for the storybook, and off by default."""

    prediction: str = "epsilon"  # or "v_prediction", "sample"
    shares: Shares = field(default_factory=Shares)  # of samples that drop the text, the image, or both
    snr_clip: tuple[float, float] | None = None  # limits of the x0 loss's weight; (0, gamma): Min-SNR
    timestep_power: float = 1.0
    change_share: float = 0.0  # of a sample's loss, for the cells that the edit changes
    change_weight_most: float = 24.0
    caption_share: float = 0.0  # of samples with the edited caption and no image


@dataclass(frozen=True)
class Draws:
    """The random part of a batch of samples; each row depends only on the seed and its position.

    posterior, noise: [batch, channels, h, w]. timesteps: [batch]. text_null, image_null, caption_only:
    [batch]. scales: uniform in [0, 1), for the two guidance scales of a distillation, [batch, 2].
    """

    posterior: Tensor
    noise: Tensor
    timesteps: Tensor
    text_null: Tensor
    image_null: Tensor
    caption_only: Tensor
    scales: Tensor | None = None


def place_seed(*parts: object) -> int:
    """A 63-bit seed from numbers and strings, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def random_draws(places: Sequence[int], seed: int, shape: Sequence[int], objective: Objective) -> Draws:
    """The draws of the samples at some positions of the run's sequence; `shape`: of a latent.

    Each sample has its own generator, which draws in this order: the dropout, the timestep, the caption, the
    posterior's noise, the noise, the scales. So a draw does not depend on the batch or the process.
    """
    uniform, gauss, scales = [], [], []
    for place in places:
        generator = torch.Generator().manual_seed(place_seed("sample", seed, place))
        uniform.append(torch.rand(3, generator=generator))
        gauss.append(torch.randn((2, *shape), generator=generator))
        scales.append(torch.rand(2, generator=generator))
    r, u, c = torch.stack(uniform).unbind(1)
    posterior, noise = torch.stack(gauss).unbind(1)
    text_null, image_null = null_conditions(r, objective.shares)
    # In addition to the dropout: a caption without an image, to train generation from a caption.
    caption_only = c < objective.caption_share
    return Draws(
        posterior.contiguous(),
        noise.contiguous(),
        random_timesteps(u, objective.timestep_power),
        text_null,
        image_null | caption_only,
        caption_only,
        torch.stack(scales),
    )


@dataclass(frozen=True)
class EditBatch:
    """Samples of one micro-batch.

    before: the image condition, unscaled modes [batch, channels, h, w]. mean, std: of the edited picture's
    latents. text: with dropout applied; tokens [batch, length] for an encoder that is also trained, or hidden
    states [batch, length, features], for SDXL with pooled and time_ids. changed: latent cells where the
    pictures differ [batch, 1, h, w]. labels: class numbers of drawn pages.
    """

    before: Tensor
    mean: Tensor
    std: Tensor
    draws: Draws
    text: Tensor
    ids: Sequence[str]
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    changed: Tensor | None = None
    labels: Mapping[str, Tensor] | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> EditBatch:
        """Apply a function to every tensor, for example `batch.map(lambda t: t.to(device))`."""

        def each(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, Mapping):
                return {k: each(v) for k, v in value.items()}
            if isinstance(value, Draws):
                return Draws(**{k: each(v) for k, v in vars(value).items()})
            return value

        return replace(self, **{k: each(v) for k, v in vars(self).items()})


class EditTask(nn.Module):
    """The UNet and what is trained with it; maps an `EditBatch` to (loss, metrics).

    alpha_bar: the base's noise schedule [1000]. latent_scale multiplies targets, condition_scale the image
    condition (1 for all editors except CosXL). text_encoder: one that is also trained, for batches of tokens.
    aside: an auxiliary module whose `loss(batch, context)` is added (`storybook.perception.Perception`).
    channel_weights: of the latent channels in the loss [channels].
    """

    def __init__(
        self,
        unet: Any,
        alpha_bar: Tensor,
        objective: Objective,
        *,
        latent_scale: float,
        condition_scale: float = 1.0,
        text_encoder: Any = None,
        aside: Any = None,
        channel_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.aside = unet, text_encoder, aside
        self.objective = objective
        self.latent_scale, self.condition_scale = latent_scale, condition_scale
        self.register_buffer("alpha_bar", alpha_bar.float(), persistent=False)
        self.alpha_bar: Tensor
        roots = None if channel_weights is None else channel_weights.sqrt()[:, None, None]
        self.register_buffer("channel_roots", roots, persistent=False)
        self.channel_roots: Tensor | None

    def forward(self, batch: EditBatch) -> tuple[Tensor, dict[str, float]]:
        device = self.alpha_bar.device
        batch = batch.map(lambda tensor: tensor.to(device, non_blocking=True))
        predicted, target, a, context = self.predict(batch)
        with torch.autocast(device.type, enabled=False):
            predicted = predicted.float()
            if self.channel_roots is not None:
                predicted, target = predicted * self.channel_roots, target * self.channel_roots
            return self._loss(batch, predicted, target, a, context)

    def predict(self, batch: EditBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The UNet's prediction, its target, the samples' alpha_bar, and the text's hidden states."""
        draws = batch.draws
        clean, image = self.latents(batch)
        a = self.alpha_bar[draws.timesteps]
        context = batch.text
        if self.text_encoder is not None:
            context = self.text_encoder(batch.text).last_hidden_state
        added: dict[str, Any] = {}
        if batch.pooled is not None:
            added["added_cond_kwargs"] = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
        inputs = torch.cat([add_noise(clean, draws.noise, a), image], dim=1)
        predicted = self.unet(inputs, draws.timesteps, context, return_dict=False, **added)[0]
        target = prediction_target(self.objective.prediction, clean, draws.noise, a)
        return predicted, target, a, context

    def latents(self, batch: EditBatch) -> tuple[Tensor, Tensor]:
        """The edited picture's latents, sampled and scaled, and the image condition (zeros if dropped)."""
        draws = batch.draws
        clean = (batch.mean + batch.std * draws.posterior) * self.latent_scale
        image = torch.where(draws.image_null[:, None, None, None], 0.0, batch.before * self.condition_scale)
        return clean, image

    def _loss(
        self, batch: EditBatch, predicted: Tensor, target: Tensor, a: Tensor, context: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        objective = self.objective
        cells = None
        if objective.change_share and batch.changed is not None:
            changed = torch.where(batch.draws.image_null[:, None, None, None], 1.0, batch.changed)
            cells = change_weights(changed, objective.change_share, objective.change_weight_most)
        loss = noise_loss(predicted, target, snr_weight(a, objective.snr_clip, objective.prediction), cells)
        metrics: dict[str, float] = {}
        if objective.snr_clip is not None or cells is not None:
            metrics["mse"] = float(F.mse_loss(predicted.detach(), target))
        if self.aside is not None:
            extra, more = self.aside.loss(batch, context.float())
            loss, metrics = loss + extra, metrics | more
        return loss, metrics
