"""Masks: reading, feathering, cropping, holding latents, and detecting a mask with the model."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ip2p.base.errors import InputError
from ip2p.diffusion.samplers import SAMPLERS
from ip2p.pictures import masks
from ip2p.pictures.masks import feather, load_mask


def disc(size=(96, 64), middle=(40, 30), radius=20):
    mask = Image.new("L", size)
    x, y = middle
    ImageDraw.Draw(mask).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16", "CMYK"])
def test_a_mask_of_any_mode_is_read(tmp_path, mode):
    mask = disc()
    if mode == "I;16":
        mask = Image.fromarray(np.asarray(mask).astype(np.uint16) * 257)
    path = tmp_path / ("mask.tif" if mode == "CMYK" else "mask.png")
    (mask if mode == "I;16" else mask.convert(mode)).save(path)
    assert (np.asarray(load_mask(path, (96, 64))) == np.asarray(disc())).mean() > 0.99


def test_transparent_parts_of_a_mask_are_not_edited():
    mask = Image.new("RGBA", (96, 64), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (10, 10, 30, 30))
    with pytest.warns(UserWarning, match="set to black"):
        assert load_mask(mask, (96, 64)).getbbox() == (10, 10, 30, 30)


def test_a_mask_of_a_different_size_reports_both_sizes():
    with pytest.raises(
        InputError, match=r"mask is 96x64 pixels and the picture 64x96.*the same size"
    ) as error:
        load_mask(disc(), (64, 96))
    assert error.value.code == 2


def test_a_black_mask_is_an_error():
    with pytest.raises(InputError, match="all black.*Paint the region to edit white"):
        load_mask(Image.new("L", (96, 64)), (96, 64))


@pytest.mark.parametrize(
    ("data", "message"), [(b"", "empty"), (b"not a mask at all", "contains text"), (b"<html></html>", "HTML")]
)
def test_a_mask_has_the_same_checks_as_a_picture(tmp_path, data, message):
    path = tmp_path / "mask.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        load_mask(path, (96, 64))
    with pytest.raises(InputError, match=r"mask2\.png: no such file\. Did you mean"):
        load_mask(tmp_path / "mask2.png", (96, 64))


# --- feathering ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0, 1, 4, 8.5, 15, 300])
def test_the_soft_edge_is_inside_the_mask(width):
    mask = np.asarray(disc())
    soft = np.asarray(feather(disc(), width))
    assert (soft[mask == 0] == 0).all()
    assert soft.max() == 255
    assert (soft > 0).sum() == (mask > 0).sum() or width > 254
    if 0 < width < 15:
        assert (soft < 255).sum() > (mask < 255).sum()


def test_the_soft_edge_rises_with_the_distance():
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 0, 60, 40))  # touches the border on three sides, which is not an edge
    row = np.asarray(feather(mask, 4))[20]
    assert row[9:16].tolist() == [0, 51, 102, 153, 204, 255, 255]
    assert row[-1] == 255


def test_distances_match_brute_force_euclidean_distances():
    inside = np.zeros((40, 50), bool)
    inside[5:35, 5:45] = True
    inside[12:15, 20:23] = False
    rows, columns = np.indices(inside.shape)
    outside = np.argwhere(~inside)
    distances = np.hypot(rows[..., None] - outside[:, 0], columns[..., None] - outside[:, 1])
    exact = distances.min(axis=-1)
    np.testing.assert_allclose(masks._depth(inside, 9), exact.clip(max=9), atol=1e-5)


def test_a_feathered_crop_equals_a_crop_of_the_feathered_mask():
    mask = disc()
    box = mask.getbbox()
    assert masks.feathered_part(mask, box, 4).tobytes() == feather(mask, 4).crop(box).tobytes()
    full_box = (0, 0, *mask.size)
    assert masks.feathered_part(mask, full_box, 4).tobytes() == feather(mask, 4).tobytes()


def test_feathering_keeps_gray_levels():
    half = disc().point(lambda level: level // 2)
    assert np.asarray(feather(half, 3)).max() == 127
    assert feather(half, 0).tobytes() == half.tobytes()


# --- the crop ------------------------------------------------------------------------------------


def test_the_crop_is_padded_and_stays_inside_the_picture():
    assert masks.padded_box(disc(), 5) == (15, 5, 66, 56)
    assert masks.padded_box(disc(), 500) == (0, 0, 96, 64)


def test_a_sliver_is_cropped_with_its_surroundings():
    sliver = Image.new("L", (2000, 1000))
    sliver.paste(255, (100, 990, 1100, 994))
    left, top, right, bottom = masks.padded_box(sliver, 0)
    assert (right - left, bottom - top) == (1000, 500)
    assert bottom == 1000


@pytest.mark.parametrize("shape", [(512, 512), (640, 192), (192, 640), (512, 384)])
@pytest.mark.parametrize("box", [(0, 0, 30, 30), (900, 500, 1000, 700), (300, 100, 310, 400)])
def test_the_crop_is_widened_to_the_models_aspect_ratio(box, shape):
    left, top, right, bottom = masks.widened_box(box, shape, (1000, 700))
    assert left >= 0 and top >= 0 and right <= 1000 and bottom <= 700
    assert left <= box[0] and top <= box[1] and right >= box[2] and bottom >= box[3]
    assert (right - left) * shape[1] == pytest.approx((bottom - top) * shape[0], abs=max(shape))


# --- the latents ---------------------------------------------------------------------------------


def test_a_latent_is_free_if_any_of_its_pixels_is():
    mask = Image.new("L", (64, 32))
    mask.putpixel((9, 9), 1)
    free = masks.free_cells(mask, (64, 32), 8)
    assert free.shape == (1, 1, 4, 8)
    assert free.nonzero().tolist() == [[0, 0, 1, 1]]
    assert masks.free_cells(mask, (32, 16), 8).nonzero().tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_held_latents_follow_the_noised_picture_and_end_at_the_picture(sampler):
    generator = torch.Generator().manual_seed(0)
    known, noise = torch.randn(2, 1, 4, 8, 8, generator=generator)
    free = torch.zeros(1, 1, 8, 8)
    free[..., 4:] = 1
    sigmas = torch.tensor([14.0, 6.0, 2.0, 0.5, 0.0])
    denoise = masks.hold_known(lambda x, sigma: torch.full_like(x, 7.0), known, free)
    start = noise * sigmas[0] + (1 - free) * known
    noises = iter(torch.randn(9, 1, 4, 8, 8, generator=generator))
    seen = list(SAMPLERS[sampler](denoise, start, sigmas, lambda: next(noises)))
    for x, sigma in zip(seen, sigmas[1:], strict=True):
        difference = (x - known)[..., :4]
        assert difference.std().item() == pytest.approx(sigma.item(), rel=0.25, abs=1e-5)
    torch.testing.assert_close(seen[-1][..., :4], known[..., :4])
    torch.testing.assert_close(seen[-1][..., 4:], torch.full((1, 4, 8, 4), 7.0))


# --- detection -----------------------------------------------------------------------------------


def bump(height=16, width=16, rows=slice(4, 8), columns=slice(9, 13), quiet=0.02, loud=1.0, seed=0):
    values = quiet * torch.randn(4, height, width, generator=torch.Generator().manual_seed(seed)).abs()
    values[:, rows, columns] += loud
    return values


def test_a_detected_region_is_where_prediction_and_result_agree():
    predicted = bump()[None, None].expand(1, 2, -1, -1, -1)
    stained = bump(seed=1) + bump(rows=slice(12, 15), columns=slice(1, 4), seed=2)
    (mask,) = masks.detect_masks(predicted, stained[None], 0.5, (64, 64))
    values = np.asarray(mask)
    assert (values[16:32, 36:52] > 127).all()
    assert (values[44:] == 0).all(), "the stain is not what the instruction is about"
    assert (values > 0).mean() < 0.35


def test_a_change_everywhere_gives_a_full_mask():
    everywhere = 0.5 + 0.2 * torch.rand(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    (mask,) = masks.detect_masks(everywhere[:, None], everywhere, 0.5, (64, 48))
    assert mask.size == (64, 48)
    assert mask.getextrema() == (255, 255)


def test_a_lower_threshold_selects_more():
    predicted, result = bump()[None, None], bump(seed=1)[None]
    ramp = torch.linspace(0, 0.8, 16).expand(1, 4, 16, 16)
    areas = [
        (
            np.asarray(masks.detect_masks(predicted + ramp[:, None], result + ramp, threshold, (64, 64))[0])
            > 0
        ).mean()
        for threshold in (0.0, 0.3, 0.6, 1.0)
    ]
    assert areas[0] == 1.0
    assert areas == sorted(areas, reverse=True)
    assert areas[-1] > 0


def test_the_result_decides_if_it_disagrees_with_the_prediction():
    predicted, result = bump(rows=slice(0, 2))[None, None], bump(rows=slice(12, 14), seed=1)[None]
    (mask,) = masks.detect_masks(predicted, result, 0.5, (64, 64))
    assert mask.getbbox() is not None
    assert mask.getbbox()[1] > 32
