from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ip2p.diffusion.denoiser import UNetDenoiser, x0_from_epsilon, x0_from_velocity
from ip2p.diffusion.guidance import guide, guided
from ip2p.diffusion.schedule import schedule_from_config

SIGMA = torch.tensor(2.0)


class ToyUNet(nn.Module):
    """A fixed function of all inputs of a UNet; records its calls."""

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
    null_image = torch.zeros_like(image)
    return guide(
        model(X, SIGMA, text, image),
        model(X, SIGMA, null, image),
        model(X, SIGMA, null, null_image),
        text=text_cfg,
        image=image_cfg,
    )


@pytest.mark.parametrize(
    ("text_cfg", "image_cfg", "count"),
    [(7.5, 1.5, 3), (7.5, 0.6, 3), (7.5, 1.0, 2), (2.0, 2.0, 2), (1.0, 1.0, 1), (0.0, 1.5, 2), (0.0, 0.0, 1)],
)
def test_the_minimum_number_of_passes_in_one_call_gives_equation_3(model, inputs, text_cfg, image_cfg, count):
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


def test_without_an_image_guidance_needs_two_text_passes(model, inputs):
    text, null = inputs["text"].expand(3, -1, -1), inputs["null_text"].expand(3, -1, -1)
    null_image = torch.zeros_like(X)
    unconditional, conditional = model(X, SIGMA, null, null_image), model(X, SIGMA, text, null_image)
    model.unet.calls.clear()
    denoise = guided(model, **(inputs | {"image": None}), text_cfg=4.0, image_cfg=1.5)
    torch.testing.assert_close(
        denoise(X, SIGMA), unconditional + 4 * (conditional - unconditional), rtol=1e-5, atol=2e-5
    )
    assert len(model.unet.calls[0][0]) == 6


def test_reused_guidance_adds_the_last_difference_to_one_pass(model, inputs):
    """Oracle: the predictions of both calls, mixed by hand."""
    text, image = inputs["text"].expand(3, -1, -1), inputs["image"].expand(3, -1, -1, -1)
    later, lower = X.flip(0), SIGMA / 2
    exact = guided(model, **inputs, text_cfg=7.5, image_cfg=1.5)
    full = model.predict(X, SIGMA, text, image)
    difference = (X - exact(X, SIGMA)) / SIGMA - full  # of noise, from x0
    expected = model.x0(later, model.predict(later, lower, text, image) + difference, lower)
    third = exact(X, SIGMA)
    model.unet.calls.clear()
    denoise = guided(model, **inputs, text_cfg=7.5, image_cfg=1.5, every=2)
    denoise(X, SIGMA)
    torch.testing.assert_close(denoise(later, lower), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(denoise(X, SIGMA), third)
    assert [len(x) for x, _, _ in model.unet.calls] == [9, 3, 9]


def test_guidance_reuse_starts_inside_its_interval(model, inputs):
    denoise = guided(model, **inputs, text_cfg=7.5, image_cfg=1.5, every=2, interval=(0.0, 0.5))
    for sigma in (50.0, 1.0, 0.9, 0.8):
        denoise(X, torch.tensor(sigma))
    assert [len(x) // 3 for x, _, _ in model.unet.calls] == [1, 3, 1, 3]


def test_epsilon_and_velocity_predictions_recover_x0():
    noise = torch.randn_like(X)
    x = X + SIGMA * noise
    torch.testing.assert_close(x0_from_epsilon(x, noise, SIGMA), X)
    # v = α noise - s x0, with α = 1 / sqrt(1 + sigma²) and s = sigma · α.
    velocity = (noise - SIGMA * X) / (1 + SIGMA**2).sqrt()
    torch.testing.assert_close(x0_from_velocity(x, velocity, SIGMA), X)


@dataclass(frozen=True)
class Prompt:
    """Like `models.text.Prompt`, which `diffusion` does not import."""

    hidden: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None


class WideUNet(ToyUNet):
    """Takes the extra inputs of SDXL and of a ControlNet."""

    def forward(self, x, time, encoder_hidden_states, return_dict, added_cond_kwargs=None, plus=0.0):
        (out,) = super().forward(x, time, encoder_hidden_states, return_dict)
        if added_cond_kwargs:
            out = out * added_cond_kwargs["text_embeds"].mean(dim=1)[:, None, None, None]
            out = out + 0.01 * added_cond_kwargs["time_ids"].sum(dim=1)[:, None, None, None]
        return (out + plus,)


def test_passes_in_turn_give_the_same_result_with_smaller_batches(model, inputs):
    at_once = guided(model, **inputs, text_cfg=7.5, image_cfg=1.5)(X, SIGMA)
    model.unet.calls.clear()
    in_turn = guided(model, **inputs, text_cfg=7.5, image_cfg=1.5, in_turn=True)(X, SIGMA)
    assert [len(x) for x, _, _ in model.unet.calls] == [3, 3, 3]
    torch.testing.assert_close(in_turn, at_once)


def test_outside_its_interval_guidance_makes_only_the_full_pass(model, inputs):
    sigmas = [
        model.schedule.sigma(torch.tensor(999.0 * share).double()).float() for share in (0.1, 0.5, 0.95)
    ]
    denoise = guided(model, **inputs, text_cfg=7.5, image_cfg=1.5, interval=(0.2, 0.9))
    plain = guided(model, **inputs, text_cfg=7.5, image_cfg=1.5)
    full = model(X, sigmas[0], inputs["text"].expand(3, -1, -1), inputs["image"].expand(3, -1, -1, -1))
    model.unet.calls.clear()
    results = [denoise(X, sigma) for sigma in sigmas]
    assert [len(x) for x, _, _ in model.unet.calls] == [3, 9, 3]
    torch.testing.assert_close(results[0], full)
    torch.testing.assert_close(results[1], plain(X, sigmas[1]))


def test_the_default_interval_includes_both_ends(model, inputs):
    denoise = guided(model, **inputs, text_cfg=7.5, image_cfg=1.5)
    for sigma in (model.schedule.levels[0].float(), model.schedule.levels[-1].float()):
        denoise(X, sigma)
    assert [len(x) for x, _, _ in model.unet.calls] == [9, 9]


def test_full_rescaling_gives_the_standard_deviation_of_the_full_prediction(model, inputs):
    plain = guided(model, **inputs, text_cfg=7.5, image_cfg=1.5)(X, SIGMA)
    half, rescaled = (
        guided(model, **inputs, text_cfg=7.5, image_cfg=1.5, rescale=share)(X, SIGMA) for share in (0.5, 1.0)
    )
    torch.testing.assert_close(half, (plain + rescaled) / 2, rtol=1e-4, atol=1e-4)
    full = model.predict(X, SIGMA, inputs["text"], inputs["image"].expand(3, -1, -1, -1))
    noise = (X - rescaled) / SIGMA
    torch.testing.assert_close(noise.std(dim=(1, 2, 3)), full.std(dim=(1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_rescaling_needs_the_full_pass_even_if_its_weight_is_zero(model, inputs):
    model.unet.calls.clear()
    guided(model, **inputs, text_cfg=0.0, image_cfg=1.5, rescale=0.5)(X, SIGMA)
    assert len(model.unet.calls[0][0]) == 9
    one = guided(model, **inputs, text_cfg=1.0, image_cfg=1.0)(X, SIGMA)
    assert torch.equal(guided(model, **inputs, text_cfg=1.0, image_cfg=1.0, rescale=0.5)(X, SIGMA), one)


@pytest.mark.parametrize("in_turn", [False, True])
def test_each_pass_gets_the_pooled_text_and_sizes_of_its_prompt(model, inputs, in_turn):
    wide = UNetDenoiser(WideUNet(), model.schedule)
    pooled, sizes = torch.rand(1, 6), torch.tensor([[32.0, 64, 0, 0, 32, 64]])
    prompts = {
        "text": Prompt(inputs["text"], pooled, sizes),
        "null_text": Prompt(inputs["null_text"], torch.zeros(1, 6), sizes),
    }
    image = inputs["image"]
    shown, null_image = image.expand(3, -1, -1, -1), torch.zeros_like(X)
    expected = guide(
        wide(X, SIGMA, prompts["text"], shown),
        wide(X, SIGMA, prompts["null_text"], shown),
        wide(X, SIGMA, prompts["null_text"], null_image),
        text=7.5,
        image=1.5,
    )
    denoise = guided(wide, **prompts, image=image, text_cfg=7.5, image_cfg=1.5, in_turn=in_turn)
    torch.testing.assert_close(denoise(X, SIGMA), expected, rtol=1e-5, atol=1e-4)


def test_a_prompt_with_only_hidden_states_equals_a_plain_tensor(model, inputs):
    plain = guided(model, **inputs, text_cfg=7.5, image_cfg=1.5)(X, SIGMA)
    prompts = {name: Prompt(inputs[name]) for name in ("text", "null_text")}
    torch.testing.assert_close(
        guided(model, **(inputs | prompts), text_cfg=7.5, image_cfg=1.5)(X, SIGMA), plain
    )


def test_control_is_added_to_every_pass(model, inputs):
    seen = []

    def control(noisy, time, text):
        seen.append((noisy.shape, time.shape, text["encoder_hidden_states"].shape))
        return {"plus": 0.5}

    wide = UNetDenoiser(WideUNet(), model.schedule, control=control)
    plain = guided(UNetDenoiser(wide.unet, wide.schedule), **inputs, text_cfg=7.5, image_cfg=1.5)(X, SIGMA)
    # The weights of equation 3 sum to one, so a term added to all three passes is added once.
    added = guided(wide, **inputs, text_cfg=7.5, image_cfg=1.5)(X, SIGMA)
    torch.testing.assert_close(added, plain - 0.5 * SIGMA, rtol=1e-4, atol=1e-4)
    assert seen == [((9, 4, 6, 7), (9,), (9, 5, 8))]


def test_condition_scale_multiplies_the_image(model, inputs):
    scaled = UNetDenoiser(model.unet, model.schedule, condition_scale=0.5)
    text, image = inputs["text"], inputs["image"].expand(3, -1, -1, -1)
    torch.testing.assert_close(scaled(X, SIGMA, text, image), model(X, SIGMA, text, image / 2))
