"""Oracle: the original's sampler, transcribed from k-diffusion and its CFGDenoiser, in fp32."""

import pytest
import torch

from ip2p.base.devices import NoiseStream
from ip2p.diffusion.schedule import linspace_sigmas
from ip2p.pictures.images import to_tensor


class Original:
    """DiscreteSchedule, CompVisDenoiser and CFGDenoiser over a diffusers UNet, times not rounded."""

    def __init__(self, unet):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        kept = torch.cumprod(1 - betas, dim=0).float()
        self.log_sigmas = ((1 - kept) / kept).sqrt().log()
        self.unet = unet

    def get_sigmas(self, steps):
        t = torch.linspace(len(self.log_sigmas) - 1, 0, steps)
        low, high, part = t.floor().long(), t.ceil().long(), t.frac()
        sigmas = ((1 - part) * self.log_sigmas[low] + part * self.log_sigmas[high]).exp()
        return torch.cat([sigmas, torch.zeros(1)])

    def sigma_to_t(self, sigma):
        dists = sigma.log() - self.log_sigmas[:, None]
        low = dists.ge(0).cumsum(dim=0).argmax(dim=0).clamp(max=len(self.log_sigmas) - 2)
        high = low + 1
        part = (self.log_sigmas[low] - sigma.log()) / (self.log_sigmas[low] - self.log_sigmas[high])
        part = part.clamp(0, 1)
        return (1 - part) * low + part * high

    def denoised(self, x, sigma, text, image):
        """x - sigma · eps(x / sqrt(sigma² + 1), t)."""
        column = sigma[:, None, None, None]
        channels = torch.cat([x / (column**2 + 1) ** 0.5, image], dim=1)
        t = self.sigma_to_t(sigma)
        eps = self.unet(channels, t, encoder_hidden_states=text, return_dict=False)[0]
        return x - eps * column

    def guided(self, z, sigma, cond, uncond, text_cfg, image_cfg):
        """Equation 3 in terms of x0."""
        (text, image), (no_text, no_image) = cond, uncond
        out_cond, out_img_cond, out_uncond = self.denoised(
            torch.cat([z] * 3),
            torch.cat([sigma] * 3),
            torch.cat([text, no_text, no_text]),
            torch.cat([image, image, no_image]),
        ).chunk(3)
        return out_uncond + text_cfg * (out_cond - out_img_cond) + image_cfg * (out_img_cond - out_uncond)

    def sample_euler_ancestral(self, x, sigmas, noise, **guidance):
        for number in range(len(sigmas) - 1):
            here, there = sigmas[number], sigmas[number + 1]
            denoised = self.guided(x, here * x.new_ones([len(x)]), **guidance)
            up = min(there, (there**2 * (here**2 - there**2) / here**2) ** 0.5)
            down = (there**2 - up**2) ** 0.5
            x = x + (x - denoised) / here * (down - here)
            if there > 0:
                x = x + noise() * up
        return x


@pytest.fixture
def pulling_unet(tiny_editor):
    """The tiny UNet with its noisy channels added to its output, so that x shrinks towards data.

    Untrained, it would leave x at the size of the noise, near 20, where 1e-4 is fp32's own rounding.
    """

    def add_noisy(module, inputs, output):
        return (output[0] + inputs[0][:, :4],)

    hook = tiny_editor.bundle.unet.register_forward_hook(add_noisy)
    yield tiny_editor.bundle.unet
    hook.remove()


def test_100_steps_of_euler_ancestral_match_the_original(tiny_editor, pulling_unet, page):
    steps = 100
    original = Original(pulling_unet)
    image = tiny_editor.encode_image(to_tensor(page))
    text, null_text = tiny_editor.encode_text("make it night"), tiny_editor.encode_text("")
    sigmas = original.get_sigmas(steps)
    own = linspace_sigmas(tiny_editor.schedule, steps)
    torch.testing.assert_close(own, sigmas, rtol=0, atol=1e-4)
    assert sigmas[0].item() == pytest.approx(14.6146, abs=1e-4)
    noise = NoiseStream([5], image.shape[1:])
    with torch.inference_mode():
        expected = original.sample_euler_ancestral(
            noise() * sigmas[0],
            sigmas,
            noise,
            cond=(text, image),
            uncond=(null_text, torch.zeros_like(image)),
            text_cfg=7.5,
            image_cfg=1.5,
        )
    *_, actual = tiny_editor.edit_latents(
        image, text, null_text, noise=NoiseStream([5], image.shape[1:]), sigmas=own
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
