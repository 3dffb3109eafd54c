import pytest
import torch
from torch import nn

from ip2p.diffusion.denoiser import UNetDenoiser, guided, x0_from_epsilon, x0_from_velocity
from ip2p.diffusion.guidance import guide
from ip2p.diffusion.schedule import schedule_from_config

SIGMA = torch.tensor(2.0)


class ToyUNet(nn.Module):
    """A fixed function of all that a UNet is given; keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.calls = []

    def forward(self, x, time, encoder_hidden_states, return_dict):
        self.calls.append((x, time, encoder_hidden_states))
        noisy, image = x.chunk(2, dim=1)
        words = encoder_hidden_states.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return (torch.sin(self.scale * noisy + image * words + 0.5 * words + 0.1 * image),)


@pytest.fixture
def model():
    return UNetDenoiser(ToyUNet(), schedule_from_config({"beta_schedule": "scaled_linear"}))


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return {
        "text": torch.randn(1, 5, 8) + 1,
        "null_text": torch.randn(1, 5, 8) - 1,
        "image": torch.randn(1, 4, 6, 7),
    }


X = torch.randn(3, 4, 6, 7, generator=torch.Generator().manual_seed(1))


def by_hand(model, inputs, text_cfg, image_cfg):
    """Equation 3 from three calls and three x0s."""
    text, null = (inputs[name].expand(3, -1, -1) for name in ("text", "null_text"))
    image = inputs["image"].expand(3, -1, -1, -1)
    nothing = torch.zeros_like(image)
    return guide(
        model(X, SIGMA, text, image),
        model(X, SIGMA, null, image),
        model(X, SIGMA, null, nothing),
        text=text_cfg,
        image=image_cfg,
    )


@pytest.mark.parametrize(
    ("text_cfg", "image_cfg", "count"),
    [(7.5, 1.5, 3), (7.5, 0.6, 3), (7.5, 1.0, 2), (2.0, 2.0, 2), (1.0, 1.0, 1), (0.0, 1.5, 2), (0.0, 0.0, 1)],
)
def test_the_fewest_passes_in_one_call_give_equation_3(model, inputs, text_cfg, image_cfg, count):
    expected = by_hand(model, inputs, text_cfg, image_cfg)
    model.unet.calls.clear()
    actual = guided(model, **inputs, text_cfg=text_cfg, image_cfg=image_cfg)(X, SIGMA)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)
    assert [len(x) for x, _, _ in model.unet.calls] == [3 * count]


def test_image_cfg_one_needs_two_passes(model, inputs):
    guided(model, **inputs, text_cfg=7.5, image_cfg=1.0)(X, SIGMA)
    ((x, _, _),) = model.unet.calls
    assert len(x) == 2 * len(X)


def test_the_null_image_is_a_zero_latent(model, inputs):
    guided(model, **inputs, text_cfg=7.5, image_cfg=1.5)(X, SIGMA)
    ((x, _, words),) = model.unet.calls
    _, image = x.chunk(2, dim=1)
    assert (image[6:] == 0).all()
    torch.testing.assert_close(image[3:6], inputs["image"].expand(3, -1, -1, -1))
    torch.testing.assert_close(words[6:], inputs["null_text"].expand(3, -1, -1))


def test_the_unet_sees_scaled_noise_and_unscaled_image(model, inputs):
    model(X, SIGMA, inputs["text"].expand(3, -1, -1), inputs["image"].expand(3, -1, -1, -1))
    ((x, time, _),) = model.unet.calls
    torch.testing.assert_close(x[:, :4], X / 5**0.5)
    torch.testing.assert_close(x[:, 4:], inputs["image"].expand(3, -1, -1, -1))
    assert model.schedule.sigma(time.double())[0].item() == pytest.approx(2, abs=1e-5)


def test_without_an_image_two_passes_draw_from_the_text(model, inputs):
    text, null = inputs["text"].expand(3, -1, -1), inputs["null_text"].expand(3, -1, -1)
    nothing = torch.zeros_like(X)
    without, having = model(X, SIGMA, null, nothing), model(X, SIGMA, text, nothing)
    model.unet.calls.clear()
    denoise = guided(model, **(inputs | {"image": None}), text_cfg=4.0, image_cfg=1.5)
    torch.testing.assert_close(denoise(X, SIGMA), without + 4 * (having - without), rtol=1e-5, atol=2e-5)
    assert len(model.unet.calls[0][0]) == 6


def test_both_kinds_of_prediction_give_x0_back():
    noise = torch.randn_like(X)
    x = X + SIGMA * noise
    torch.testing.assert_close(x0_from_epsilon(x, noise, SIGMA), X)
    # v = α noise - s x0, with α = 1 / sqrt(1 + sigma²) and s = sigma · α.
    velocity = (noise - SIGMA * X) / (1 + SIGMA**2).sqrt()
    torch.testing.assert_close(x0_from_velocity(x, velocity, SIGMA), X)
