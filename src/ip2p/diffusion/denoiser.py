"""Wraps a UNet as a denoiser of one text and one image; `guidance.guided` combines its predictions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ip2p.diffusion import Latent, Sigma
from ip2p.diffusion.caching import FeatureCache
from ip2p.diffusion.schedule import Schedule


@runtime_checkable
class EncodedText(Protocol):
    """An encoded text, such as `models.text.Prompt`. A plain tensor is its hidden states only."""

    @property
    def hidden(self) -> Float[Tensor, "text_batch tokens features"]: ...

    @property
    def pooled(self) -> Float[Tensor, "text_batch projected"] | None: ...

    @property
    def time_ids(self) -> Float[Tensor, "text_batch numbers"] | None: ...


Text = Float[Tensor, "text_batch tokens features"] | EncodedText
NullText = Float[Tensor, "null_batch tokens features"] | EncodedText
# The conditioning of a network besides the latents, by diffusers' argument names.
TextInputs = Mapping[str, Tensor]
# Maps noisy latents [batch, channels, h, w], the time [batch] and the conditioning to additional UNet
# arguments. A ControlNet with its picture is one (`models.controlnet.Control`).
Control = Callable[[Tensor, Tensor, TextInputs], dict[str, Any]]


def x0_from_epsilon(x: Latent, epsilon: Latent, sigma: Float[Tensor, "*b"]) -> Latent:
    """x0 = x - sigma · epsilon."""
    return x - sigma * epsilon


def x0_from_velocity(x: Latent, velocity: Latent, sigma: Float[Tensor, "*b"]) -> Latent:
    """x0 = x / (sigma² + 1) - velocity · sigma / sqrt(sigma² + 1) (Salimans & Ho 2022, appendix D)."""
    return x / (sigma**2 + 1) - velocity * sigma / (sigma**2 + 1).sqrt()


def x0_from_sample(x: Latent, sample: Latent, sigma: Float[Tensor, "*b"]) -> Latent:
    """The network predicts x0 itself."""
    return sample


X0 = {"epsilon": x0_from_epsilon, "v_prediction": x0_from_velocity, "sample": x0_from_sample}


@dataclass(frozen=True)
class UNetDenoiser:
    """A diffusers UNet that takes noise and picture, as the denoiser of one text and one image.

    x and image are latents [batch, channels, h, w]; text is [batch, tokens, features] or a Prompt; sigma is a
    scalar. The network runs in its own dtype; x stays in fp32. The image latents are multiplied by
    condition_scale. scales_size: of a distilled UNet, the size of `guidance.embed_scales`, its input for the
    guidance scales. cache: of the UNet's deep features, for one sampling run.
    """

    unet: nn.Module
    schedule: Schedule
    condition_scale: float = 1.0
    control: Control | None = None
    scales_size: int | None = None
    cache: FeatureCache | None = None

    def __call__(self, x: Latent, sigma: Sigma, text: Text, image: Latent) -> Latent:
        """x0 from x = x0 + sigma · noise."""
        return self.x0(x, self.predict(x, sigma, text, image), sigma)

    def predict(self, x: Latent, sigma: Sigma, text: Text, image: Latent) -> Latent:
        """The UNet's prediction (noise, velocity or x0) at x / sqrt(sigma² + 1)."""
        return self.predict_from_inputs(x, sigma, text_inputs(text, len(x)), image)

    def predict_from_inputs(self, x: Latent, sigma: Sigma, inputs: TextInputs, image: Latent) -> Latent:
        """`predict` with the text given as network arguments."""
        dtype = next(self.unet.parameters()).dtype
        # Sizes go up to thousands, which half precision would round.
        inputs = {
            name: value.to(x.device, torch.float32 if name == "time_ids" else dtype)
            for name, value in inputs.items()
        }
        scaled = (x / (sigma**2 + 1).sqrt()).to(dtype)
        # Most editors are trained on unscaled image latents; condition_scale is then 1.
        channels = torch.cat([scaled, (image * self.condition_scale).to(dtype)], dim=1)
        time = self.schedule.network_time(sigma).to(x.device, torch.float32).expand(len(x))
        residuals = {} if self.control is None else self.control(scaled, time, inputs)
        unet = self.unet if self.cache is None else self.cache.unet_at(sigma, len(x))
        return self.run(unet, {"sample": channels, "timestep": time, **inputs}, residuals).to(x.dtype)

    def run(self, unet: nn.Module, rows: TextInputs, residuals: Mapping[str, Any]) -> Tensor:
        """The output of the UNet, or of a cache's, for its inputs by name and a ControlNet's residuals."""
        return call_unet(unet, rows, residuals)

    def x0(self, x: Latent, prediction: Latent, sigma: Sigma) -> Latent:
        """x0 from the prediction, guided or not."""
        return X0[self.schedule.prediction](x, prediction, sigma)


def call_unet(unet: nn.Module, rows: TextInputs, residuals: Mapping[str, Any] = {}) -> Tensor:
    """The output of a diffusers UNet for its inputs by name, each [batch, …]."""
    rows = dict(rows)
    added = {name: rows.pop(name) for name in ("text_embeds", "time_ids") if name in rows}
    more = {"added_cond_kwargs": added} if added else {}
    x, time = rows.pop("sample"), rows.pop("timestep")
    output: Tensor = unet(x, time, **rows, **more, **residuals, return_dict=False)[0]
    return output


def text_inputs(text: Text, count: int) -> TextInputs:
    """The network arguments of a text [1 or count, …], each expanded to [count, …]."""
    if isinstance(text, Tensor):
        named = {"encoder_hidden_states": text}
    else:
        fields = {"encoder_hidden_states": text.hidden, "text_embeds": text.pooled, "time_ids": text.time_ids}
        named = {name: value for name, value in fields.items() if value is not None}
    return {name: value.expand(count, *value.shape[1:]) for name, value in named.items()}
