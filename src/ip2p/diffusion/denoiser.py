"""From a UNet's prediction to the denoiser contract, `denoise(x, sigma) -> x0`, with and without guidance."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ip2p.diffusion import Denoiser, Latent, Sigma
from ip2p.diffusion.guidance import guide, passes
from ip2p.diffusion.schedule import Schedule

Text = Float[Tensor, "text_batch tokens features"]
NullText = Float[Tensor, "null_batch tokens features"]


def x0_from_epsilon(x: Latent, epsilon: Latent, sigma: Float[Tensor, "*b"]) -> Latent:
    """x0 = x - sigma · epsilon."""
    return x - sigma * epsilon


def x0_from_velocity(x: Latent, velocity: Latent, sigma: Float[Tensor, "*b"]) -> Latent:
    """x0 = x / (sigma² + 1) - velocity · sigma / sqrt(sigma² + 1) (Salimans & Ho 2022, appendix D)."""
    return x / (sigma**2 + 1) - velocity * sigma / (sigma**2 + 1).sqrt()


X0 = {"epsilon": x0_from_epsilon, "v_prediction": x0_from_velocity}


@dataclass(frozen=True)
class UNetDenoiser:
    """A diffusers UNet of 8 channels; called, it is the denoiser of one text and one image.

    x and image are latents [batch, 4, h, w], text is [batch, tokens, features]; sigma is one number.
    The network runs in its own dtype, x stays in fp32.
    """

    unet: nn.Module
    schedule: Schedule

    def __call__(self, x: Latent, sigma: Sigma, text: Text, image: Latent) -> Latent:
        """x0 from x = x0 + sigma · noise."""
        return self.x0(x, self.predict(x, sigma, text, image), sigma)

    def predict(self, x: Latent, sigma: Sigma, text: Text, image: Latent) -> Latent:
        """What the UNet was trained to predict, noise or velocity, at x / sqrt(sigma² + 1)."""
        dtype = next(self.unet.parameters()).dtype
        scaled = x / (sigma**2 + 1).sqrt()
        # The input image's latents stay unscaled: training saw them so.
        channels = torch.cat([scaled, image], dim=1)
        time = self.schedule.time(sigma).to(x.device, torch.float32).expand(len(x))
        output = self.unet(channels.to(dtype), time, encoder_hidden_states=text.to(dtype), return_dict=False)[
            0
        ]
        return output.to(x.dtype)

    def x0(self, x: Latent, prediction: Latent, sigma: Sigma) -> Latent:
        """x0 from the prediction, guided or not."""
        return X0[self.schedule.prediction](x, prediction, sigma)


def guided(
    model: UNetDenoiser,
    *,
    text: Text,
    null_text: NullText,
    image: Latent | None,
    text_cfg: float,
    image_cfg: float,
) -> Denoiser:
    """Equation 3 around an edit model: a denoiser that makes its one to three passes in one call.

    text and null_text: [1 or batch, tokens, features]; image: [1 or batch, channel, h, w], or None to
    draw from the text alone, where the two null branches are one.
    """
    # Without a picture e0I = e00, so the image scale has no part: any value gives the same mix.
    need = passes(text=text_cfg, image=image_cfg if image is not None else 1.0)

    def denoise(x: Latent, sigma: Sigma) -> Latent:
        count = len(x)
        nothing = torch.zeros_like(x)
        shown = nothing if image is None else image.to(x).expand(count, -1, -1, -1)
        wanted = text.expand(count, -1, -1)
        null = null_text.expand(count, -1, -1)
        branches = []
        if need.full:
            branches.append((wanted, shown))
        if need.image_only:
            branches.append((null, shown))
        if need.neither:
            branches.append((null, nothing))
        out = model.predict(
            x.repeat(len(branches), 1, 1, 1),
            sigma,
            torch.cat([words for words, _ in branches]),
            torch.cat([picture for _, picture in branches]),
        ).chunk(len(branches))
        # A pass left out has weight zero; its neighbour stands in, so that their difference is exactly zero.
        full = out[0]
        neither = out[-1]
        image_only = out[int(need.full)] if need.image_only else neither
        if not need.full:
            full = image_only
        if not need.neither:
            neither = image_only
        # Mixing predictions equals mixing x0s, without the rounding of x, which is far larger at first.
        return model.x0(x, guide(full, image_only, neither, text=text_cfg, image=image_cfg), sigma)

    return denoise
