"""A folder with the files that people have: each is edited or reported, and the counts add up."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from ip2p.cli import main as cli
from ip2p.editing.batch import looks_like_picture

pillow_heif.register_heif_opener()
SIZE = (64, 48)


def noise(mode="RGB", size=SIZE):
    numbers = np.random.default_rng(0)
    image = Image.fromarray(numbers.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size)
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(size))
        return image
    return image.convert(mode)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def deep_tiff(kind):
    ramp = np.linspace(0, 4095, SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0])
    return encoded(Image.fromarray(ramp.astype("float32" if kind == "float" else "uint16")), "TIFF")


def animation(kind):
    frames = [noise(), noise().rotate(180)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)


def bomb(width=60_000, height=60_000):
    """A PNG of a few bytes whose header promises 3.6 gigapixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def palette():
    image = noise().quantize(8)
    return encoded(image, "PNG", transparency=0)


def rotated():
    tags = Image.Exif()
    tags[0x0112] = 6
    return encoded(noise(), "JPEG", exif=tags)


EDITED = {
    "avif.avif": lambda: encoded(noise(), "AVIF"),
    "bmp.bmp": lambda: encoded(noise(), "BMP"),
    "cmyk.jpg": lambda: encoded(noise("CMYK"), "JPEG"),
    "float.tif": lambda: deep_tiff("float"),
    "grey-alpha.png": lambda: encoded(noise("LA"), "PNG"),
    "grey16.png": lambda: encoded(Image.open(io.BytesIO(deep_tiff("16 bit"))), "PNG"),
    "grey16.tif": lambda: deep_tiff("16 bit"),
    "heic.heic": lambda: encoded(noise(), "HEIF"),
    "lossless.webp": lambda: encoded(noise("RGBA"), "WEBP", lossless=True),
    "no-ending": lambda: encoded(noise(), "PNG"),
    "one-bit.png": lambda: encoded(noise("1"), "PNG"),
    "palette-alpha.png": palette,
    "ppm.ppm": lambda: encoded(noise(), "PPM"),
    "progressive.jpeg": lambda: encoded(noise(), "JPEG", progressive=True),
    "rgba.png": lambda: encoded(noise("RGBA"), "PNG"),
    "rotated.jpg": rotated,
    "two-pictures.jpg": lambda: encoded(noise(), "MPO", save_all=True, append_images=[noise("L")]),
    "unicode-ünï-雪 .png": lambda: encoded(noise(), "PNG"),
    "UPPER.JPG": lambda: encoded(noise(), "JPEG"),
}
REFUSED = {
    "anim.gif": (lambda: animation("GIF"), "has several frames or pages"),
    "anim.png": (lambda: animation("PNG"), "has several frames or pages"),
    "anim.webp": (lambda: animation("WEBP"), "has several frames or pages"),
    "bomb.png": (bomb, "is too large: 3,600 megapixels by its header"),
    "bomb-without-ending": (bomb, "is too large: 3,600 megapixels by its header"),
    "cut.jpg": (lambda: encoded(noise(), "JPEG")[:500], "is damaged or truncated"),
    "drawing.svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing"),
    "empty.png": (lambda: b"", "is empty (0 bytes)"),
    "html.png": (lambda: b"<!doctype html><html></html>", "is a web page (HTML)"),
    "icon.ico": (lambda: encoded(noise(), "ICO"), "is not a picture in a known format"),
    "jpeg2000.jp2": (lambda: encoded(noise(), "JPEG2000"), "is not a picture in a known format"),
    "pages.tif": (lambda: animation("TIFF"), "has several frames or pages"),
    "strip.png": (lambda: encoded(noise(size=(400, 20)), "PNG"), "times the other"),
    "targa.tga": (lambda: encoded(noise(), "TGA"), "is not a picture in a known format"),
    "text.png": (lambda: b"not a picture", "contains text, not a picture"),
    "tiny.png": (lambda: encoded(noise(size=(8, 8)), "PNG"), "each side needs at least 16"),
}
LINKS = {
    "gone.jpg": "no such file",
    "loop.png": "Too many levels of symbolic links",
    "folder.png": "is a folder",
}
HIDDEN = ("._resource.jpg", ".hidden.png")
OTHER = {"notes.txt": b"a text", "page.html": b"<html></html>", "table.csv": b"a,b\n", "Makefile": b"all:\n"}


def test_each_of_forty_files_is_edited_or_reported_and_the_counts_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("photos")
    folder.mkdir()
    for name, make in EDITED.items():
        (folder / name).write_bytes(make())
    for name, (make, _) in REFUSED.items():
        (folder / name).write_bytes(make())
    for name in HIDDEN:
        (folder / name).write_bytes(encoded(noise(), "PNG"))
    for name, data in OTHER.items():
        (folder / name).write_bytes(data)
    (folder / "folder.png").mkdir()
    os.symlink("loop.png", folder / "loop.png")
    os.symlink("nowhere.jpg", folder / "gone.jpg")
    words = ["edit", str(folder), "make it night", "-o", "out", "--steps", "1", "--dtype", "fp32"]
    assert cli.main([*words, "--model", str(tiny_model_dir), "--batch-size", "8"]) == 2

    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if "error: " in line]
    failed = {name: reason for name, (_, reason) in REFUSED.items()} | LINKS
    for name, reason in failed.items():
        [line] = [line for line in errors if f"photos/{name}" in line]
        assert reason in line, line
    assert len(errors) == len(failed)
    total = len(EDITED) + len(failed)
    assert total >= 38
    assert f"{len(failed)} of {total} pictures could not be edited" in err
    assert "2 hidden files of photos are left out: ._resource.jpg, .hidden.png" in err
    rows = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    results = {row["name"] for row in rows if "plan" not in row}
    expected = {name if Path(name).suffix.lower() in WRITTEN else f"{name}.png" for name in EDITED}
    assert results == expected
    for name in results:
        source = Path("photos", name if name in EDITED else name.removesuffix(".png"))
        size = SIZE[::-1] if name == "rotated.jpg" else SIZE
        with Image.open(Path("out", name)) as result:
            result.load()
            assert result.size == size, source
            assert (result.mode == "RGBA") == (name in TRANSPARENT), name


WRITTEN = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
TRANSPARENT = ("grey-alpha.png", "lossless.webp", "palette-alpha.png", "rgba.png")


def test_a_decompression_bomb_without_an_extension_looks_like_a_picture(tmp_path, recwarn):
    for name, size in {"a": 60_000, "b": 12_000}.items():  # over Pillow's error and warning limits
        (tmp_path / name).write_bytes(bomb(size, size))
        assert looks_like_picture(tmp_path / name)
    assert not recwarn.list
