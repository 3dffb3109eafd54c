"""Carrying an edit over to the full photo: unedited parts stay, and edited parts keep their detail."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ip2p.pictures import carry as photos
from ip2p.pictures.carry import carry

SMALL = (512, 384)


def psnr(a, b):
    error = np.mean((np.asarray(a, np.float32) - np.asarray(b, np.float32)) ** 2)
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


def photograph(width, height, seed=0):
    """Smooth colors with texture at two scales; the finer one is lost at the model's size."""
    rng = np.random.default_rng(seed)

    def layer(step):
        noise = rng.standard_normal((height // step, width // step)).astype(np.float32)
        return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR))

    colors = Image.fromarray(rng.integers(40, 215, (6, 8, 3), dtype=np.uint8))
    ground = np.asarray(colors.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return (ground + (18 * layer(2) + 14 * layer(16))[..., None]).clip(0, 255).round().astype(np.uint8)


def seen(pixels):
    """Pixels as the model returns them: small, and softened as by an autoencoder."""
    small = Image.fromarray(pixels).resize(SMALL, Image.Resampling.LANCZOS)
    return small.filter(ImageFilter.GaussianBlur(0.8))


def carried(before, after, where):
    """PSNR of the carried edit and of the upscaled one, inside and outside `where`."""
    shown, edited = seen(before), seen(after)
    result = np.asarray(carry(Image.fromarray(before), shown, edited))
    plain = np.asarray(edited.resize(before.shape[1::-1], Image.Resampling.LANCZOS))
    return [[psnr(x[part], after[part]) for part in (where, ~where)] for x in (result, plain)]


def test_nothing_changes_where_the_model_returns_its_reconstruction():
    photo = photograph(1600, 1200)
    shown = seen(photo)
    assert carry(Image.fromarray(photo), shown, shown).tobytes() == photo.tobytes()


def test_a_12_megapixel_photo_keeps_its_detail_under_a_color_change():
    photo = photograph(4000, 3000)
    rows, columns = np.ogrid[0:3000, 0:4000]
    ball = (columns - 1500) ** 2 + (rows - 1400) ** 2 < 800**2
    red, blue = photo.copy(), photo.copy()
    red[ball] = (photo[ball] * [1, 0.35, 0.3]).round()
    blue[ball] = (photo[ball] * [0.3, 0.35, 1]).round()
    (inside, outside), (plain_inside, plain_outside) = carried(red, blue, ball)
    assert outside > 45 > 30 > plain_outside
    assert inside > plain_inside + 6


def test_replaced_content_is_the_upscaled_result_without_a_ghost():
    photo = photograph(1600, 1200)
    ball = np.zeros((1200, 1600), bool)
    ball[300:900, 400:1000] = True
    flat = photo.copy()
    flat[ball] = (200, 180, 60)
    (inside, outside), (plain_inside, plain_outside) = carried(photo, flat, ball)
    assert outside > plain_outside + 12
    assert inside > plain_inside - 3
    center = np.s_[550:650, 650:750]
    result = np.asarray(carry(Image.fromarray(photo), seen(photo), seen(flat)))
    assert result[center].std(axis=(0, 1)).max() < photo[center].std(axis=(0, 1)).min() / 5


def test_the_models_noise_is_not_carried_over():
    photo = photograph(1600, 1200)
    noise = np.random.default_rng(1).normal(0, 0.7, (*SMALL[::-1], 3))
    noisy = Image.fromarray((np.asarray(seen(photo)) + noise).round().clip(0, 255).astype(np.uint8))
    assert psnr(carry(Image.fromarray(photo), seen(photo), noisy), photo) > 55


def test_a_dimmed_photograph_keeps_its_detail():
    photo = photograph(1200, 900)
    night = (photo * [0.3, 0.35, 0.5]).round().astype(np.uint8)
    result = carry(Image.fromarray(photo), seen(photo), seen(night))
    plain = seen(night).resize((1200, 900), Image.Resampling.LANCZOS)
    assert psnr(result, night) > psnr(plain, night) + 5


def test_strips_meet_without_a_seam(monkeypatch):
    photo = photograph(900, 700)
    other = photograph(900, 700, seed=3)
    expected = np.asarray(carry(Image.fromarray(photo), seen(photo), seen(other)), int)
    monkeypatch.setattr(photos, "STRIP", 900 * 37)
    assert abs(np.asarray(carry(Image.fromarray(photo), seen(photo), seen(other)), int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(100, 70), (512, 384), (300, 900)])
def test_a_picture_of_any_size_keeps_its_size(size):
    photo = photograph(*size)
    shown = Image.fromarray(photo).resize(SMALL)
    result = carry(Image.fromarray(photo), shown, shown.point(lambda level: level // 2))
    assert result.size == size
    assert psnr(result, photo // 2) > 30
