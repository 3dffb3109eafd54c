"""Pictures with transparency: results keep the alpha, and the model sees the picture on gray."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from ip2p.base.errors import InputError
from ip2p.editing.chain import save_animation
from ip2p.pictures.images import flattened, load_image, save_image, to_bytes, to_tensor, with_alpha
from ip2p.pictures.infotext import parse_infotext
from ip2p.settings import EditSettings

FAST = {"steps": 2}


def cutout(width=96, height=64, seed=0):
    """Random straight colors with all values of alpha, including 0 and 255."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    values[: height // 4, :, 3] = 0
    values[-height // 4 :, :, 3] = 255
    return Image.fromarray(values)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "fit"), [((96, 64), "original"), ((150, 90), "original"), ((150, 90), "model")]
)
def test_a_cutout_keeps_its_alpha(tiny_editor, size, fit):
    picture = cutout(*size)
    [result] = tiny_editor.edit(encoded(picture), "make it night", fit=fit, **FAST)
    assert result.mode == "RGBA"
    expected = picture if fit == "original" else picture.resize(result.size, Image.Resampling.LANCZOS)
    assert result.getchannel("A").tobytes() == expected.getchannel("A").tobytes()
    assert np.asarray(result)[..., :3].tobytes() != np.asarray(expected)[..., :3].tobytes()


def test_the_model_sees_a_cutout_on_gray(tiny_editor):
    picture = cutout()
    gray = Image.new("RGB", picture.size, (128, 128, 128))
    gray.paste(picture, mask=picture.getchannel("A"))  # the same picture, composed by Pillow
    assert (to_tensor(picture) - to_tensor(gray)).abs().max() <= 2 / 255 + 1e-6
    [result] = tiny_editor.edit(picture, "make it night", **FAST)
    [on_gray] = tiny_editor.edit(flattened(picture), "make it night", **FAST)
    solid = np.asarray(picture)[..., 3] == 255
    assert np.array_equal(np.asarray(result)[solid][:, :3], np.asarray(on_gray)[solid])


def test_a_background_gives_an_opaque_result(tiny_editor):
    picture = cutout()
    blue = Image.alpha_composite(Image.new("RGBA", picture.size, "#2040ff"), picture).convert("RGB")
    [result] = tiny_editor.edit(picture, "make it night", background="#2040ff", **FAST)
    [expected] = tiny_editor.edit(blue, "make it night", **FAST)
    assert result.mode == "RGB" and result.tobytes() == expected.tobytes()
    assert parse_infotext(result.info["parameters"]).background == "#2040ff"


@pytest.mark.parametrize("color", ["mauvish", "#12", "#ff000080"])
def test_a_background_that_is_not_an_opaque_color_is_refused(color):
    with pytest.raises(InputError, match="background"):
        EditSettings(background=color)


def test_a_masked_edit_keeps_every_byte_of_a_cutout_outside_the_mask(tiny_editor):
    picture = cutout()
    mask = Image.new("L", picture.size)
    mask.paste(255, (10, 8, 50, 56))
    [result] = tiny_editor.edit(picture, "make it night", mask=mask, **FAST)
    before, after, black = np.asarray(picture), np.asarray(result), np.asarray(mask) == 0
    assert np.array_equal(before[black], after[black]) and not np.array_equal(before, after)


def test_unchanged_pixels_keep_their_straight_color():
    picture = cutout()
    assert with_alpha(flattened(picture), picture).tobytes() == picture.tobytes()


def test_a_chain_and_a_batch_keep_the_alpha(tiny_editor):
    picture = cutout()
    [first] = tiny_editor.edit_batch([picture], "make it night", seeds=[1], **FAST)
    [second] = tiny_editor.edit(first, "make it snow", **FAST)
    assert second.getchannel("A").tobytes() == picture.getchannel("A").tobytes()


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_an_animation_keeps_the_alpha_or_warns(tmp_path, ending, recwarn):
    picture, path = cutout(), tmp_path / f"a.{ending}"
    save_animation([picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)], path, frame_ms=100)
    with Image.open(path) as moving:
        first = moving.convert("RGBA")
    messages = [str(warning.message) for warning in recwarn]
    if ending == "webp":
        assert first.getchannel("A").tobytes() == picture.getchannel("A").tobytes() and not messages
    else:
        assert first.getchannel("A").getextrema() == (255, 255)
        assert len(messages) == 1 and "the animation is on white. Write a .webp" in messages[0]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_formats_with_alpha_keep_the_transparency(tmp_path, kind):
    path = save_image(cutout(), tmp_path / f"a.{kind.lower()}")
    with Image.open(path) as saved:
        assert saved.mode == "RGBA"
        assert saved.getchannel("A").tobytes() == cutout().getchannel("A").tobytes()


@pytest.mark.parametrize("name", ["a.jpg", "a.bmp"])
def test_formats_without_alpha_get_a_white_background_and_a_warning(tmp_path, tiny_editor, name):
    [result] = tiny_editor.edit(cutout(), "make it night", **FAST)
    with pytest.warns(UserWarning, match=r"no transparency.*white.*\.png"):
        save_image(result, tmp_path / name)
    with pytest.warns(UserWarning, match="no transparency"):
        result.save(tmp_path / f"b{name}")
    for saved in (tmp_path / name, tmp_path / f"b{name}"):
        with Image.open(saved) as image:
            assert image.mode == "RGB" and min(image.getpixel((5, 5))) > 240  # alpha 0 there
    with pytest.warns(UserWarning, match="no transparency"):
        assert to_bytes(result, "JPEG")


@pytest.mark.parametrize("mode", ["LA", "P", "L"])
def test_every_kind_of_transparency_is_read(mode):
    gray = Image.fromarray(np.arange(64 * 48, dtype=np.uint32).reshape(48, 64).astype(np.uint8) % 250)
    options = {}
    if mode == "LA":
        gray.putalpha(Image.linear_gradient("L").resize(gray.size))
    else:
        gray, options = gray.convert(mode), {"transparency": 7}
    data = encoded(gray, **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = image.convert("RGBA")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data).tobytes() == expected.tobytes()
