import io

import numpy as np
import pytest
import torch
from PIL import Image

from ip2p.base.errors import InputError
from ip2p.data.records import BrokenRow, Pair
from ip2p.pictures.images import resized
from ip2p.training.transform import Transform


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth noise without repeated regions."""
    values = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC))


def pair(before: np.ndarray, after: np.ndarray | None = None, id: str = "a") -> Pair:
    return Pair(id=id, before=before, after=before if after is None else after, instruction="make it night")


def test_a_picture_of_the_target_size_is_kept_and_its_odd_variant_is_mirrored():
    pixels = picture(64, 48)
    transform = Transform(size=(64, 48))
    assert transform.variants == 2
    for variant, expected in enumerate([pixels, pixels[:, ::-1]]):
        before, after = transform(pair(pixels), variant)
        assert before.dtype == torch.uint8 and before.shape == (3, 48, 64)
        assert torch.equal(before, torch.from_numpy(expected.transpose(2, 0, 1).copy()))
        assert torch.equal(before, after)


def test_without_crops_the_picture_is_resized_to_cover_and_center_cropped():
    pixels = picture(128, 64)
    before, _ = Transform(size=(32, 32), flip=False)(pair(pixels), 0)
    expected = np.asarray(resized(Image.fromarray(pixels), (64, 32)))[:, 16:48]
    assert torch.equal(before, torch.from_numpy(expected.transpose(2, 0, 1).copy()))


@pytest.mark.parametrize("pixels", [(100, 64), (64, 100), (33, 32), (31, 90)])
@pytest.mark.parametrize("size", [(32, 32), (48, 32), (32, 64)])
def test_any_shape_covers_any_size(pixels, size):
    for resize_to in (None, min(size), min(size) + 8):
        versions = Transform(size=size, resize_to=resize_to, crops=4).versions(pair(picture(*pixels)))
        assert versions.shape == (2 if resize_to is None else 4, 2, 3, *size[::-1])


def test_crops_are_the_same_for_both_pictures_and_depend_on_id_and_variant():
    pixels = picture(64, 64)
    # The second picture is the first, inverted: so must be every crop of it.
    both = pair(pixels, 255 - pixels)
    transform = Transform(size=(32, 32), resize_to=48, crops=6)
    versions = transform.versions(both)
    assert np.abs(versions[:, 0].astype(int) + versions[:, 1] - 255).max() <= 1
    assert len({version.tobytes() for version in versions[:, 0]}) == 6
    assert np.array_equal(versions, transform.versions(both))
    assert not np.array_equal(versions, transform.versions(pair(pixels, 255 - pixels, id="b")))
    one = torch.stack(transform(both, 3))
    assert torch.equal(one, torch.from_numpy(versions[3]))


def test_crops_reach_every_size_and_both_edges():
    # A ramp shows where a crop starts and how much of the picture it covers.
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    transform = Transform(size=(32, 32), resize_to=36, flip=False, crops=200)
    rows = transform.versions(pair(np.ascontiguousarray(ramp)))[:, 0, 0, 0].astype(float)
    widths = np.round(256 / ((rows[:, -1] - rows[:, 0]) / 31))
    assert set(widths) == {32, 33, 34, 35, 36}
    widest = rows[widths == 36]
    assert len(set(np.round((widest[:, 0] - 3) / (256 / 36)))) == 5


def test_the_second_picture_is_resized_to_the_first_or_broken_if_its_shape_differs():
    pixels = picture(64, 64)
    larger = np.asarray(Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC))
    before, after = Transform(size=(64, 64), flip=False)(pair(pixels, larger), 0)
    assert (before.int() - after.int()).abs().float().mean() < 4
    with pytest.raises(BrokenRow, match="a: its aspect ratios differ: 64x64 before and 64x48 after"):
        Transform(size=(64, 64))(pair(pixels, picture(64, 48)), 0)


def test_a_truncated_picture_is_a_broken_row():
    buffer = io.BytesIO()
    Image.fromarray(picture(64, 64)).save(buffer, "PNG")
    row = Pair(id="x7", before=buffer.getvalue()[:900], after=buffer.getvalue(), instruction="a")
    with pytest.raises(BrokenRow) as caught:
        Transform(size=(64, 64))(row, 0)
    assert caught.value.id == "x7"


def test_a_crop_larger_than_the_picture_is_refused():
    with pytest.raises(InputError, match="Resize to at least 256"):
        Transform(size=(256, 256), resize_to=255)
