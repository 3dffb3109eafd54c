import pytest
import torch

from ip2p.diffusion.guidance import Passes, guide, passes


def three_predictions():
    return torch.randn(3, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("text", "image"), [(7.5, 1.5), (5.0, 0.5), (0.0, 1.2), (1.0, 2.0)])
def test_guide_is_equation_3(text, image):
    full, image_only, neither = three_predictions()
    by_weight = text * full + (image - text) * image_only + (1 - image) * neither
    torch.testing.assert_close(guide(full, image_only, neither, text=text, image=image), by_weight)


def test_scales_of_one_give_the_full_prediction():
    full, image_only, neither = three_predictions()
    torch.testing.assert_close(guide(full, image_only, neither, text=1.0, image=1.0), full)


def test_guiding_noise_and_guiding_x0_agree():
    full, image_only, neither = three_predictions()
    x, sigma = torch.ones_like(full), 3.0
    of_noise = x - sigma * guide(full, image_only, neither, text=7.5, image=1.5)
    of_x0 = guide(*(x - sigma * each for each in (full, image_only, neither)), text=7.5, image=1.5)
    torch.testing.assert_close(of_noise, of_x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "image", "expected"),
    [
        (7.5, 1.5, Passes(True, True, True)),
        (7.5, 1.0, Passes(True, True, False)),
        (3.0, 3.0, Passes(True, False, True)),
        (1.0, 1.0, Passes(True, False, False)),
        (0.0, 1.5, Passes(False, True, True)),
        (0.0, 1.0, Passes(False, True, False)),
        (0.0, 0.0, Passes(False, False, True)),
    ],
)
def test_a_pass_with_zero_weight_is_skipped(text, image, expected):
    assert passes(text=text, image=image) == expected


def test_an_image_scale_below_one_keeps_all_passes():
    assert passes(text=7.5, image=0.8) == Passes(True, True, True)
