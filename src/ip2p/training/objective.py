"""What a step of training an editor is: noise on the edited picture's latents, conditions, the loss."""

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
    """The paper's loss; all below `snr_clip` are the storybook's additions, off by default."""

    prediction: str = "epsilon"  # or "v_prediction", "sample"
    shares: Shares = field(default_factory=Shares)  # of samples that lose the text, the image, both
    snr_clip: tuple[float, float] | None = None  # of the x0 loss's weight; (0, gamma) is Min-SNR
    timestep_power: float = 1.0
    change_share: float = 0.0  # of a sample's loss for the cells that the edit changes
    change_weight_most: float = 24.0
    caption_share: float = 0.0  # samples with the edited caption and no image


@dataclass(frozen=True)
class Draws:
    """All that is random about a batch of samples; row i depends on its seed and its place alone.

    posterior, noise: [batch, channels, h, w]. timesteps: [batch]. text_null, image_null, caption_only:
    [batch]. scales: for the two guidance scales of a distillation, in [0, 1), [batch, 2].
    """

    posterior: Tensor
    noise: Tensor
    timesteps: Tensor
    text_null: Tensor
    image_null: Tensor
    caption_only: Tensor
    scales: Tensor | None = None


def place_seed(*parts: object) -> int:
    """A seed of 63 bits from numbers and words, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw(places: Sequence[int], seed: int, shape: Sequence[int], objective: Objective) -> Draws:
    """The randomness of the samples at `places` of the run's endless row of samples; latents of `shape`.

    A sample's draws come from a generator of its own, in this order: r for the dropout, u for the
    timestep, one for the caption, the posterior's noise, the noise, the scales. So they do not depend on
    the batch, the process or the moment in which they are made.
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
    # Apart from the dropout: a caption and no image, so that the model also draws from a caption alone.
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
    latents. text: tokens [batch, length] of an encoder that learns along, or hidden states [batch, length,
    features] with SDXL's pooled and time_ids beside; what the dropout takes away is replaced already.
    changed: latent cells in which the pictures differ [batch, 1, h, w]. labels: class numbers of drawn pages.
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
        """The batch with every tensor changed, as in `batch.map(lambda t: t.to(device))`."""

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
    """The UNet, and what learns along with it; called on an `EditBatch` it gives the loss and its numbers.

    alpha_bar: the base's noise schedule [1000]. latent_scale multiplies targets, condition_scale the
    image condition (1 for all editors but CosXL). text_encoder: one that is trained along, for batches that
    bring tokens. aside: a part with parameters of its own whose `loss(task, batch, context)` is added
    (`storybook.perception.Perception`).
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
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.aside = unet, text_encoder, aside
        self.objective = objective
        self.latent_scale, self.condition_scale = latent_scale, condition_scale
        self.register_buffer("alpha_bar", alpha_bar.float(), persistent=False)
        self.alpha_bar: Tensor

    def forward(self, batch: EditBatch) -> tuple[Tensor, dict[str, float]]:
        device = self.alpha_bar.device
        batch = batch.map(lambda tensor: tensor.to(device, non_blocking=True))
        predicted, wanted, a, context = self.predict(batch)
        with torch.autocast(device.type, enabled=False):
            return self._loss(batch, predicted.float(), wanted, a, context)

    def predict(self, batch: EditBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the UNet predicts, what it should, the samples' alpha_bar, and the text's hidden states."""
        draws = batch.draws
        target, image = self.latents(batch)
        a = self.alpha_bar[draws.timesteps]
        noisy = add_noise(target, draws.noise, a)
        context = batch.text
        if self.text_encoder is not None:
            context = self.text_encoder(batch.text).last_hidden_state
        more: dict[str, Any] = {}
        if batch.pooled is not None:
            more["added_cond_kwargs"] = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
        given = torch.cat([noisy, image], dim=1)
        predicted = self.unet(given, draws.timesteps, context, return_dict=False, **more)[0]
        wanted = prediction_target(self.objective.prediction, target, draws.noise, a)
        return predicted, wanted, a, context

    def latents(self, batch: EditBatch) -> tuple[Tensor, Tensor]:
        """The target, sampled and scaled, and the image condition, neither; a missing image is zeros."""
        draws = batch.draws
        target = (batch.mean + batch.std * draws.posterior) * self.latent_scale
        image = torch.where(draws.image_null[:, None, None, None], 0.0, batch.before * self.condition_scale)
        return target, image

    def _loss(
        self, batch: EditBatch, predicted: Tensor, wanted: Tensor, a: Tensor, context: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        chosen = self.objective
        cells = None
        if chosen.change_share and batch.changed is not None:
            changed = torch.where(batch.draws.image_null[:, None, None, None], 1.0, batch.changed)
            cells = change_weights(changed, chosen.change_share, chosen.change_weight_most)
        loss = noise_loss(predicted, wanted, snr_weight(a, chosen.snr_clip, chosen.prediction), cells)
        numbers: dict[str, float] = {}
        if chosen.snr_clip is not None or cells is not None:
            numbers["mse"] = float(F.mse_loss(predicted.detach(), wanted))
        if self.aside is not None:
            extra, more = self.aside.loss(batch, context.float())
            loss, numbers = loss + extra, numbers | more
        return loss, numbers
