import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ip2p.base.errors import InputError
from ip2p.pictures.images import (
    EditedImage,
    check_picture_output,
    closest_name,
    contact_sheet,
    fit_size,
    load_image,
    save_image,
    to_bytes,
    to_pil,
    to_tensor,
)
from ip2p.pictures.infotext import read_infotext

ORIENTATION, ARTIST = 0x0112, 0x013B


def noise_image(width=64, height=48, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def png_header(width, height):
    """A PNG with only a header: its size can be read, but decoding fails."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


# --- refused pictures --------------------------------------------------------------------------


def test_a_missing_file_suggests_the_closest_name(tmp_path):
    noise_image().save(tmp_path / "page.png")
    with pytest.raises(InputError, match=r"pgae\.png: no such file\. Did you mean .*page\.png\?"):
        load_image(tmp_path / "pgae.png")


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(InputError, match="the folder .*nowhere does not exist"):
        load_image(tmp_path / "nowhere" / "page.png")


def test_a_folder_is_refused_as_a_picture(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        load_image(tmp_path)


def test_closest_name_returns_a_close_match_or_none():
    assert closest_name("PAGE.PNG", ["page.png", "other.txt"]) == "page.png"
    assert closest_name("zebra", ["page.png"]) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"Dear reader, this is a letter.\n", "contains text"),
        ("naïve text in UTF-8 ".encode() * 400, "contains text"),
        (b"  <!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"<html>moved</html>", "HTML"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"></svg>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "not a picture in a known format"),
        (bytes(range(128, 256)) * 4, "not a picture in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "contains text"),
    ],
)
def test_a_file_that_is_not_a_picture_is_reported_with_its_kind(tmp_path, data, message):
    path = tmp_path / "page.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        load_image(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.code == 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_truncated_picture_is_an_error_and_not_filled_with_gray(kind, share):
    data = encoded(noise_image(), kind)
    with pytest.raises(InputError):
        load_image(data[: int(len(data) * share)])


def test_a_truncated_progressive_jpeg_is_an_error():
    data = encoded(noise_image(), "JPEG", progressive=True)
    with pytest.raises(InputError, match="damaged or truncated"):
        load_image(data[: len(data) // 2])


def test_a_flipped_bit_in_a_png_is_an_error():
    data = bytearray(encoded(noise_image(), "PNG"))
    data[len(data) // 2] ^= 4
    with pytest.raises(InputError, match="damaged"):
        load_image(bytes(data))


def test_too_many_pixels_are_refused_from_the_header_alone():
    with pytest.raises(
        InputError, match=r"144\.0 megapixels \(12000x12000\); the limit is 100.*--max-pixels"
    ):
        load_image(png_header(12000, 12000))


def test_a_decompression_bomb_is_refused_from_the_header_alone():
    with pytest.raises(InputError, match="too large"):
        load_image(png_header(60000, 60000), max_pixels=10**12)


def test_max_pixels_sets_the_limit():
    data = encoded(noise_image(), "PNG")
    with pytest.raises(InputError, match="megapixels"):
        load_image(data, max_pixels=64 * 48 - 1)
    assert load_image(data, max_pixels=64 * 48).size == (64, 48)


@pytest.mark.parametrize("size", [(1, 1), (15, 64), (64, 15)])
def test_a_side_under_16_is_an_error(size):
    with pytest.raises(InputError, match="at least 16"):
        load_image(encoded(Image.new("RGB", size), "PNG"))


@pytest.mark.parametrize(("size", "fine"), [((128, 16), True), ((129, 16), False), ((16, 129), False)])
def test_the_longer_side_is_at_most_8_times_the_other(size, fine):
    image = Image.new("RGB", size)
    if fine:
        assert load_image(image).size == size
    else:
        with pytest.raises(InputError, match="at most 8 times"):
            load_image(image)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_an_error(kind):
    frames = [noise_image(seed=seed) for seed in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    with pytest.raises(InputError, match="has several frames or pages"):
        load_image(data)


def test_a_photo_with_an_embedded_preview_loads():
    photograph, preview = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (32, 24), "blue")
    loaded = load_image(encoded(photograph, "MPO", save_all=True, append_images=[preview]))
    assert loaded.size == (64, 48)
    assert loaded.getpixel((5, 5))[0] > 200


def test_a_still_gif_loads():
    assert load_image(encoded(noise_image(), "GIF")).mode == "RGB"


# --- conversion --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("RGB", "BMP")],
)
def test_other_modes_become_rgb(mode, kind):
    image = noise_image().convert(mode)
    loaded = load_image(encoded(image, kind))
    assert (loaded.mode, loaded.size) == ("RGB", (64, 48))
    if kind != "JPEG":
        assert loaded.tobytes() == image.convert("RGB").tobytes()


def test_16_bit_gray_keeps_its_range():
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    loaded = np.asarray(load_image(encoded(Image.fromarray(values), "PNG")))
    assert (loaded[0, 0, 0], loaded[-1, -1, 0]) == (0, 255)
    np.testing.assert_allclose(loaded[..., 0], values / 257, atol=0.51)


def test_float_gray_is_a_fraction_of_white():
    values = np.full((48, 64), 0.5, np.float32)
    assert np.asarray(load_image(encoded(Image.fromarray(values), "TIFF")))[0, 0, 0] == 128


def test_16_bit_colors_are_reduced_to_their_high_bytes():
    values = np.random.default_rng(0).integers(0, 65536, (48, 64, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    body = b"IHDR" + struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (body, b"IDAT" + zlib.compress(rows), b"IEND"):
        data += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert (np.asarray(load_image(data)) == values >> 8).all()


def test_gray_with_a_profile_is_converted_to_srgb():
    # Half of linear light is 188 of 255 in sRGB.
    white, curve = struct.pack(">4s4x3i", b"XYZ ", 63190, 65536, 54061), struct.pack(">4s4xI", b"curv", 0)
    table = struct.pack(">I", 2)
    start = 128 + 4 + 24
    table += struct.pack(">4sII", b"wtpt", start, 20) + struct.pack(">4sII", b"kTRC", start + 20, 12)
    size = start + 32
    head = struct.pack(
        ">I4sI4s4s4s12s4s", size, b"\0" * 4, 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"\0" * 12, b"acsp"
    )
    head = head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    profile = head.ljust(128, b"\0") + table + white + curve
    loaded = load_image(encoded(Image.new("L", (64, 48), 128), "PNG", icc_profile=profile))
    assert loaded.getpixel((5, 5)) == pytest.approx((188, 188, 188), abs=1)
    assert "icc_profile" not in loaded.info


def test_transparency_can_be_flattened_onto_black():
    with pytest.warns(UserWarning, match="set to black"):
        loaded = load_image(Image.new("RGBA", (32, 32), (255, 255, 255, 0)), background="black")
    assert loaded.getpixel((5, 5)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_can_be_flattened_onto_white_with_a_warning(mode):
    image = Image.new(mode, (32, 32), (0,) * (len(mode) - 1) + (0,))
    with pytest.warns(UserWarning, match="transparent parts; their background is set to white"):
        loaded = load_image(encoded(image, "PNG"), background="white")
    assert loaded.getpixel((5, 5)) == (255, 255, 255)


def test_a_transparent_palette_color_is_flattened_onto_white():
    image = noise_image().convert("P")
    index = image.getpixel((0, 0))
    with pytest.warns(UserWarning, match="white"):
        loaded = load_image(encoded(image, "PNG", transparency=index), background="white")
    assert loaded.getpixel((0, 0)) == (255, 255, 255)


def test_an_opaque_alpha_channel_gives_no_warning():
    image = noise_image()
    image.putalpha(255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(encoded(image, "PNG")).tobytes() == noise_image().tobytes()


def test_a_rotated_photograph_comes_out_upright():
    image = noise_image(64, 48)
    exif = Image.Exif()
    exif[ORIENTATION], exif[ARTIST] = 6, "someone"
    loaded = load_image(encoded(image, "PNG", exif=exif))
    assert loaded.size == (48, 64)
    assert loaded.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()
    kept = Image.Exif()
    kept.load(loaded.info["exif"])
    assert kept.get(ORIENTATION, 1) == 1
    assert kept[ARTIST] == "someone"


def test_loading_does_not_modify_its_input():
    image = noise_image()
    image.info["parameters"] = "mine"
    loaded = load_image(image)
    assert loaded is not image
    assert image.info["parameters"] == "mine"


# --- tensors and sizes -------------------------------------------------------------------------


def test_the_tensor_round_trip_is_exact():
    image = noise_image()
    tensor = to_tensor(image)
    assert tensor.shape == (1, 3, 48, 64)
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    assert to_pil(tensor).tobytes() == image.tobytes()
    assert to_pil(tensor[0]).tobytes() == image.tobytes()


def test_to_pil_clamps_values_out_of_range():
    assert to_pil(torch.tensor([-7.0, 7.0]).view(1, 1, 2).expand(3, 1, 2)).tobytes() == bytes(
        [0] * 3 + [255] * 3
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((3000, 2000), (576, 384)),
        ((4032, 3024), (512, 384)),
        ((2048, 600), (640, 192)),
        ((600, 2048), (192, 640)),
        ((512, 512), (512, 512)),
    ],
)
def test_fit_size_matches_known_sizes_of_the_original_code(given, expected):
    assert fit_size(*given) == expected


def test_fitting_to_the_longer_side_of_a_fit_gives_the_same_fit():
    # So an edit can be reproduced from the size in its settings.
    rng = np.random.default_rng(0)
    for _ in range(500):
        width, height = rng.integers(16, 4000, 2)
        if max(width, height) > 8 * min(width, height):
            continue
        for native, multiple in ((512, 64), (256, 32), (64, 8)):
            fit = fit_size(int(width), int(height), native=native, multiple=multiple)
            assert all(side >= multiple and side % multiple == 0 for side in fit)
            assert fit_size(int(width), int(height), native=max(fit), multiple=multiple) == fit


# --- saving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_exif_and_profile_are_kept(tmp_path, ending):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[ARTIST] = "someone"
    loaded = load_image(encoded(noise_image(), "JPEG", exif=exif, icc_profile=profile))
    path = save_image(loaded, tmp_path / f"out.{ending}")
    with Image.open(path) as again:
        assert again.getexif()[ARTIST] == "someone"
        assert again.info["icc_profile"] == profile


def exif_block(orientation=6):
    exif = Image.Exif()
    exif[ORIENTATION], exif[ARTIST] = orientation, "someone"
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.5)})
    exif.get_ifd(0x8769).update({0x9003: "2026:11:21 04:00:00", 0xA002: 64, 0xA003: 48})
    return exif.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_location_and_time_are_kept_and_the_recorded_size_is_upright(tmp_path, kind, ending):
    loaded = load_image(encoded(noise_image(), kind, exif=exif_block()))
    loaded.info["parameters"] = "make it night\nSteps: 20"
    with Image.open(save_image(loaded, tmp_path / f"out.{ending}")) as file:
        assert file.size == (48, 64)
        exif = file.getexif()
        assert (exif.get(ORIENTATION, 1), exif[ARTIST]) == (1, "someone")
        assert dict(exif.get_ifd(0x8825)) == {1: "N", 2: (52, 31, 12.5)}
        details = exif.get_ifd(0x8769)
        assert (details[0x9003], details[0xA002], details[0xA003]) == ("2026:11:21 04:00:00", 48, 64)


@pytest.mark.parametrize("ending", ["tif", "tiff", "bmp", "png"])
def test_lossless_formats_keep_every_pixel(tmp_path, ending):
    path = save_image(load_image(encoded(noise_image(), "TIFF")), tmp_path / f"out.{ending}")
    assert load_image(path).tobytes() == noise_image().tobytes()


def test_tags_that_describe_a_tiffs_encoding_are_not_copied(tmp_path):
    loaded = load_image(encoded(noise_image(), "TIFF", compression="tiff_lzw"))
    with Image.open(save_image(loaded, tmp_path / "out.jpg")) as file:
        assert not {0x0100, 0x0103, 0x0111} & set(file.getexif())


@pytest.mark.parametrize("block", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\xff\xff", exif_block(1)[:30]])
def test_invalid_exif_is_dropped_with_a_warning(block):
    with pytest.warns(UserWarning, match="EXIF that cannot be kept"):
        assert "exif" not in load_image(encoded(noise_image(), "JPEG", exif=block)).info


def test_an_rgb_profile_of_a_gray_picture_is_dropped():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = noise_image().convert("L")
    assert "icc_profile" not in load_image(encoded(grey, "PNG", icc_profile=profile)).info


def test_a_picture_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def broken(self, target, *_, **__):
        target.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        save_image(Image.new("RGB", (32, 32)), path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.png"]


def test_check_picture_output_refuses_invalid_outputs(tmp_path):
    (tmp_path / "there.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="already exists"):
        check_picture_output(tmp_path / "there.png")
    assert check_picture_output(tmp_path / "there.png", overwrite=True) == tmp_path / "there.png"
    with pytest.raises(InputError, match="folder"):
        check_picture_output(tmp_path / "no" / "out.png")
    with pytest.raises(InputError, match=r"\.png, \.jpg, \.jpeg, \.webp"):
        check_picture_output(tmp_path / "out.docx")


def test_a_contact_sheet_has_room_for_every_picture_and_label():
    rows = [[noise_image(seed=row * 3 + column) for column in range(3)] for row in range(2)]
    plain = contact_sheet(rows)
    assert plain.size == (3 * 64 + 4 * 8, 2 * 48 + 3 * 8)
    assert plain.crop((8, 8, 72, 56)).tobytes() == rows[0][0].tobytes()
    labeled = contact_sheet(rows, ["one", "two"], header=["before", "after", "exact"])
    assert labeled.height > plain.height
    assert labeled.width == plain.width


def test_a_tiff_keeps_its_xmp(tmp_path):
    image = noise_image()
    image.info = {"xmp": b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"}
    with Image.open(save_image(image, tmp_path / "a.tiff")) as read:
        assert read.info["xmp"] == image.info["xmp"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_to_bytes_includes_the_settings_and_the_xmp(kind, tmp_path):
    image = noise_image()
    image.info = {"parameters": "make it snow\nSteps: 2", "xmp": b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"}
    data = to_bytes(image, kind)
    with Image.open(io.BytesIO(data)) as read:
        assert read.format == kind
        xmp = read.info["xmp"]
    assert (xmp.encode() if isinstance(xmp, str) else xmp) == image.info["xmp"]
    (path := tmp_path / "a").write_bytes(data)
    assert read_infotext(path) == image.info["parameters"]
    image.info = {}
    with Image.open(io.BytesIO(to_bytes(image, kind))) as read:
        assert "xmp" not in read.info and not read.getexif()


def test_arrays_and_open_files_are_loaded_as_pictures(tmp_path):
    page = noise_image()
    page.save(tmp_path / "page.png")
    with open(tmp_path / "page.png", "rb") as file:
        assert load_image(file).tobytes() == page.tobytes()
    assert load_image(np.asarray(page)).tobytes() == page.tobytes()
    assert load_image(np.asarray(page) / 255).tobytes() == page.tobytes()
    assert load_image(np.zeros((32, 48), np.uint8)).size == (48, 32)
    with pytest.raises(InputError, match=r"the shape \[3, 32, 32\]"):
        load_image(np.zeros((3, 32, 32), np.uint8))
    with pytest.raises(InputError, match="floats outside 0 to 1"):
        load_image(np.full((32, 32, 3), 255.0))
    with pytest.raises(InputError, match="A list is not a picture"):
        load_image([[0, 1]])
    with open(__file__) as file, pytest.raises(InputError, match="'rb'"):
        load_image(file)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_pillows_save_writes_the_settings_of_a_result(tmp_path, ending):
    image = EditedImage.of(noise_image())
    image.info["parameters"] = "make it snow\nSteps: 3"
    image.save(tmp_path / f"snow.{ending}")
    assert read_infotext(tmp_path / f"snow.{ending}") == "make it snow\nSteps: 3"
    file = io.BytesIO()
    image.save(file, format="PNG")
    assert Image.open(file).info["parameters"] == "make it snow\nSteps: 3"
