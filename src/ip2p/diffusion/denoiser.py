"""Wraps a UNet as a denoiser, `denoise(x, sigma) -> x0`, with and without guidance."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ip2p.diffusion import Denoiser, Latent, Sigma, guidance
from ip2p.diffusion.guidance import embed_scales, guide, passes
from ip2p.diffusion.schedule import Schedule


@runtime_checkable
class Words(Protocol):
    """An encoded text, such as `models.text.Prompt`. A plain tensor is its hidden states only."""

    @property
    def hidden(self) -> Float[Tensor, "text_batch tokens features"]: ...

    @property
    def pooled(self) -> Float[Tensor, "text_batch projected"] | None: ...

    @property
    def time_ids(self) -> Float[Tensor, "text_batch numbers"] | None: ...


Text = Float[Tensor, "text_batch tokens features"] | Words
NullText = Float[Tensor, "null_batch tokens features"] | Words
# The conditioning of a network besides the latents, by diffusers' argument names.
Told = Mapping[str, Tensor]
# Maps noisy latents [batch, channels, h, w], the time [batch] and the conditioning to additional UNet
# arguments. A ControlNet with its picture is one (`models.controlnet.Control`).
Control = Callable[[Tensor, Tensor, Told], dict[str, Any]]


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
    guidance scales.
    """

    unet: nn.Module
    schedule: Schedule
    condition_scale: float = 1.0
    control: Control | None = None
    scales_size: int | None = None

    def __call__(self, x: Latent, sigma: Sigma, text: Text, image: Latent) -> Latent:
        """x0 from x = x0 + sigma · noise."""
        return self.x0(x, self.predict(x, sigma, text, image), sigma)

    def predict(self, x: Latent, sigma: Sigma, text: Text, image: Latent) -> Latent:
        """The UNet's prediction (noise, velocity or x0) at x / sqrt(sigma² + 1)."""
        return self.tell(x, sigma, told(text, len(x)), image)

    def tell(self, x: Latent, sigma: Sigma, told: Told, image: Latent) -> Latent:
        """`predict` with the text given as network arguments."""
        dtype = next(self.unet.parameters()).dtype
        # Sizes go up to thousands, which half precision would round.
        told = {
            name: value.to(x.device, torch.float32 if name == "time_ids" else dtype)
            for name, value in told.items()
        }
        scaled = (x / (sigma**2 + 1).sqrt()).to(dtype)
        # Most editors are trained on unscaled image latents; condition_scale is then 1.
        channels = torch.cat([scaled, (image * self.condition_scale).to(dtype)], dim=1)
        time = self.schedule.told(sigma).to(x.device, torch.float32).expand(len(x))
        more = {} if self.control is None else self.control(scaled, time, told)
        added = {name: told[name] for name in ("text_embeds", "time_ids") if name in told}
        if added:
            more = more | {"added_cond_kwargs": added}
        if "timestep_cond" in told:
            more = more | {"timestep_cond": told["timestep_cond"]}
        hidden = told["encoder_hidden_states"]
        output = self.unet(channels, time, encoder_hidden_states=hidden, return_dict=False, **more)[0]
        return output.to(x.dtype)

    def x0(self, x: Latent, prediction: Latent, sigma: Sigma) -> Latent:
        """x0 from the prediction, guided or not."""
        return X0[self.schedule.prediction](x, prediction, sigma)


def told(text: Text, count: int) -> Told:
    """The network arguments of a text [1 or count, …], each expanded to [count, …]."""
    if isinstance(text, Tensor):
        named = {"encoder_hidden_states": text}
    else:
        fields = {"encoder_hidden_states": text.hidden, "text_embeds": text.pooled, "time_ids": text.time_ids}
        named = {name: value for name, value in fields.items() if value is not None}
    return {name: value.expand(count, *value.shape[1:]) for name, value in named.items()}


def guided(
    model: UNetDenoiser,
    *,
    text: Text,
    null_text: NullText,
    image: Latent | None,
    text_cfg: float,
    image_cfg: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    in_turn: bool = False,
) -> Denoiser:
    """Classifier-free guidance (equation 3) for an edit model: a denoiser with one to three passes per call.

    A distilled model, which takes the scales as an input, needs one. It has no null text and no rescaling.

    text and null_text: [1 or batch, tokens, features] or Prompts. image: [1 or batch, channel, h, w], or None
    to draw from the text alone; the two null branches are then the same. rescale: the strength of
    `guidance.rescale`. interval: the range of noise levels with guidance, as fractions (1 is the noisiest);
    outside it, only the full prediction is used (Kynkäänniemi et al. 2024). in_turn: run the passes one by
    one to save memory.
    """
    low, high = interval

    def denoise(x: Latent, sigma: Sigma) -> Latent:
        count = len(x)
        inside = low <= model.schedule.share(sigma) <= high
        s_text, s_image = (text_cfg, image_cfg) if inside else (1.0, 1.0)
        # Without a picture, e0I = e00, so the image scale has no effect.
        need = passes(text=s_text, image=s_image if image is not None else 1.0)
        if rescale:
            need = need._replace(full=True)  # the reference for its spread
        nothing = torch.zeros_like(x)
        shown = nothing if image is None else image.to(x).expand(count, -1, -1, -1)
        wanted = told(text, count)
        if model.scales_size is not None:
            scales = embed_scales(torch.tensor([[s_text, s_image]]), model.scales_size).expand(count, -1)
            return model.x0(x, model.tell(x, sigma, {**wanted, "timestep_cond": scales}, shown), sigma)
        null = told(null_text, count)
        branches = []
        if need.full:
            branches.append((wanted, shown))
        if need.image_only:
            branches.append((null, shown))
        if need.neither:
            branches.append((null, nothing))
        if in_turn:
            out = [model.tell(x, sigma, words, picture) for words, picture in branches]
        else:
            batched = model.tell(
                x.repeat(len(branches), 1, 1, 1),
                sigma,
                {name: torch.cat([words[name] for words, _ in branches]) for name in branches[0][0]},
                torch.cat([picture for _, picture in branches]),
            )
            out = list(batched.chunk(len(branches)))
        # A skipped pass has weight zero; its neighbor replaces it, so that their difference is exactly zero.
        full = out[0]
        neither = out[-1]
        image_only = out[int(need.full)] if need.image_only else neither
        if not need.full:
            full = image_only
        if not need.neither:
            neither = image_only
        # Equal to mixing x0s, but without the rounding of x, which is far larger at high noise.
        mixed = guide(full, image_only, neither, text=s_text, image=s_image)
        if rescale and len(branches) > 1:
            mixed = guidance.rescale(mixed, full, rescale)
        return model.x0(x, mixed, sigma)

    return denoise
