"""Metadata of photos and results, as read by other programs: piexif, sd-parsers, sd-prompt-reader."""

import io
import struct
from xml.etree import ElementTree

import numpy as np
import piexif
import piexif.helper
import pytest
from PIL import Image, IptcImagePlugin
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from sd_parsers import ParserManager
from sd_prompt_reader.image_data_reader import ImageDataReader

from ip2p.pictures import exif
from ip2p.pictures.images import load_image, save_image

TEXT = """make it snow, "softly": 雪 ❄
Negative prompt: blurry
Steps: 50, Sampler: Euler a, CFG scale: 7.5, Image CFG scale: 1.5, Seed: 42, Size: 64x48, Model: x, \
Version: ip2p 0.1"""
EXIF, GPS = 0x8769, 0x8825


def picture(mode="RGB"):
    values = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def camera(order=">"):
    """A camera's EXIF, with a preview and a MakerNote whose offsets count from the block's start."""
    block = piexif.dump(
        {
            "0th": {0x010F: b"Maker", 0x0112: 6, 0x011A: (300, 1), 0x9C9B: (65, 0, 66, 0)},
            "Exif": {
                0x829A: (1, 250),
                0x9003: b"2026:11:21 04:00:00",
                0x9101: b"\1\2\3\0",
                0x927C: bytes(range(200)),
                0x9286: b"ASCII\0\0\0of the camera",
                0xA002: 64,
                0xA003: 48,
                0xA300: b"\3",
                0xA301: b"\1",
                0xA404: (0, 0),
            },
            "GPS": {0: (2, 3, 0, 0), 1: b"N", 2: ((52, 1), (31, 1), (25, 2))},
            "Interop": {1: b"R98\0"},
            "1st": {0x0201: 0, 0x0202: 0},
            "thumbnail": encoded(picture().resize((16, 12))),
        }
    )
    return block if order == ">" else exif.write_tags(exif.read_tags(block).in_order("<"))


def entries(data):
    """(folder, tag) → type and bytes, read by Pillow from a file or an EXIF block."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            data = image.info["exif"].removeprefix(b"Exif\0\0")
    file, found = io.BytesIO(data), {}

    def read(folder, at):
        file.seek(at)
        ifd = ImageFileDirectory_v2(data[:8], group=folder or None)
        ifd.load(file)
        raw, types = dict(ifd._tagdata), dict(ifd.tagtype)
        found.update({(folder, tag): (types[tag], raw[tag]) for tag in types})
        for pointer in {EXIF, GPS, 0xA005} & set(types):
            read(pointer, ifd[pointer])

    read(0, struct.unpack_from("<I" if data[:2] == b"II" else ">I", data, 4)[0])
    pointers = {EXIF, GPS, 0xA005}
    return {key: value for key, value in found.items() if key[1] not in pointers}, data


@pytest.mark.parametrize("order", [">", "<"])
@pytest.mark.parametrize("source", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_tags_keep_their_types_and_bytes(tmp_path, source, ending, order):
    block = camera(order)
    before, _ = entries(block.removeprefix(b"Exif\0\0"))
    loaded = load_image(encoded(picture(), source, exif=block))
    loaded.info["parameters"] = TEXT
    after, written = entries(save_image(loaded, tmp_path / f"out.{ending}").read_bytes())
    changed = {(0, 0x0112), (EXIF, 0x9286), (EXIF, 0xA002), (EXIF, 0xA003)}  # upright, so the size differs
    for key in set(before) - changed:
        kind, raw = before[key]
        if ending == "tif" and order == ">":  # Pillow's TIFF has the other byte order
            raw = exif._swapped(kind, raw)
        assert after[key] == (kind, raw), key
    assert (0, 0x0112) not in after
    if ending != "tif":
        at = block.removeprefix(b"Exif\0\0").index(bytes(range(200)))
        assert written.index(bytes(range(200))) == at  # a MakerNote may have offsets from the block's start
        assert b"\xff\xd8\xff" not in written  # no preview of the unedited picture


@pytest.mark.parametrize("ending", ["jpg", "webp", "tif"])
def test_piexif_reads_the_settings_and_every_tag(tmp_path, ending):
    loaded = load_image(encoded(picture(), exif=camera()))
    loaded.info["parameters"] = TEXT
    read = piexif.load(str(save_image(loaded, tmp_path / f"out.{ending}")))
    assert piexif.helper.UserComment.load(read["Exif"][0x9286]) == TEXT
    before = piexif.load(camera())
    for folder in ("Exif", "GPS", "Interop"):
        left_out = {0x9286, 0xA002, 0xA003, 0x8769, 0x8825, 0xA005}
        for tag in set(before[folder]) - left_out:
            assert read[folder][tag] == before[folder][tag], (folder, tag)
    assert (read["Exif"][0xA002], read["Exif"][0xA003]) == (48, 64)
    assert read["thumbnail"] is None


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_sd_parsers_and_sd_prompt_reader_read_the_settings(tmp_path, ending):
    image = load_image(encoded(picture(), exif=camera(), kind="JPEG"))
    image.info["parameters"] = TEXT
    path = save_image(image, tmp_path / f"out.{ending}")
    info = ParserManager().parse(path)
    assert info.full_prompt == TEXT.splitlines()[0]
    assert info.full_negative_prompt == "blurry"
    (sampler,) = info.samplers
    assert (sampler.name, sampler.parameters["seed"], sampler.parameters["steps"]) == ("Euler a", "42", "50")
    read = ImageDataReader(str(path))
    assert read.status.name == "READ_SUCCESS" and read.tool == "A1111 webUI"
    assert (read.positive, read.negative) == (TEXT.splitlines()[0], "blurry")
    assert (read.parameter["seed"], read.parameter["cfg"]) == ("42", "7.5")


def test_exif_too_long_for_a_jpeg_loses_its_makernote_with_a_warning(tmp_path):
    tags = exif.read_tags(camera())
    tags.of(EXIF)[0x927C] = 7, bytes(64_900)
    image = load_image(encoded(picture(), "PNG", exif=exif.write_tags(tags)))
    image.info["parameters"] = TEXT
    with pytest.warns(UserWarning, match="too long for a JPEG; the MakerNote"):
        path = save_image(image, tmp_path / "out.jpg")
    assert piexif.load(str(path))["Exif"][0x829A] == (1, 250)


XMP = b"""<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
 xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:Container="http://ns.google.com/photos/1.0/container/" xmlns:Item="http://ns.google.com/photos/1.0/x/"
 hdrgm:Version="1.0"><dc:rights>Anna</dc:rights><Container:Directory><rdf:Seq><rdf:li
 rdf:parseType="Resource"><Container:Item Item:Semantic="GainMap" Item:Length="12"/></rdf:li></rdf:Seq>
</Container:Directory></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""
PLAIN = XMP.replace(b' \n hdrgm:Version="1.0"', b"").replace(b'hdrgm:Version="1.0"', b"")
PLAIN = PLAIN[: PLAIN.index(b"<Container:Dir")] + PLAIN[PLAIN.index(b"</rdf:Description") :]


@pytest.mark.parametrize("source", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_xmp_is_kept(tmp_path, source, ending):
    image = picture()
    image.info["xmp"] = PLAIN
    first = save_image(image, tmp_path / f"in.{ {'JPEG': 'jpg', 'TIFF': 'tif'}.get(source, source.lower()) }")
    with Image.open(save_image(load_image(first), tmp_path / f"out.{ending}")) as read:
        xmp = read.info.get("xmp")
        assert (xmp.encode() if isinstance(xmp, str) else xmp) == PLAIN


def test_a_gain_map_is_dropped_with_a_warning_and_removed_from_the_xmp(tmp_path):
    file = io.BytesIO()
    picture().save(file, "MPO", save_all=True, append_images=[picture("L")], xmp=XMP)
    with pytest.warns(UserWarning, match="second picture"):
        loaded = load_image(file.getvalue())
    path = save_image(loaded, tmp_path / "out.jpg")
    with Image.open(path) as read:
        assert read.format == "JPEG" and "mp" not in read.info
        tree = ElementTree.fromstring(read.info["xmp"])
    assert tree.find(".//{http://purl.org/dc/elements/1.1/}rights").text == "Anna"
    assert b'hdrgm:Version="' not in path.read_bytes() and b"GainMap" not in path.read_bytes()


IPTC = b"\x1c\x02\x78\x00\x05A ped" + b"\x1c\x02\x50\x00\x04Anna"


@pytest.mark.parametrize("source", ["jpg", "tif"])
@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_iptc_is_kept(tmp_path, source, ending):
    image = picture()
    image.info["iptc"] = IPTC
    first = save_image(image, tmp_path / f"in.{source}")
    with Image.open(save_image(load_image(first), tmp_path / f"out.{ending}")) as read:
        assert IptcImagePlugin.getiptcinfo(read) == {(2, 120): b"A ped", (2, 80): b"Anna"}


def test_iptc_that_a_format_cannot_store_gives_a_warning(tmp_path):
    image = picture()
    image.info["iptc"] = IPTC
    with pytest.warns(UserWarning, match="PNG cannot store IPTC"):
        save_image(image, tmp_path / "out.png")


@pytest.mark.parametrize(
    ("bits", "kind"), [(10, "PNG"), (12, "PNG"), (12, "TIFF"), (14, "TIFF"), (16, "PNG")]
)
def test_gray_that_uses_few_of_its_16_bits_is_scaled_to_the_full_range(bits, kind):
    ramp = np.linspace(0, 2**bits - 1, 64 * 48).round().astype(np.uint16).reshape(48, 64)
    data = encoded(Image.fromarray(ramp), kind)
    if bits < 16:
        with pytest.warns(UserWarning, match=f"uses {bits} of its 16 bits"):
            loaded = load_image(data)
    else:
        loaded = load_image(data)
    expected = (ramp.astype(float) * 255 / (2**bits - 1)).round()
    assert np.abs(np.asarray(loaded)[..., 0] - expected).max() <= 1


def test_corrupted_exif_is_refused_or_rewritten_at_a_bounded_size():
    rng, block = np.random.default_rng(0), bytearray(camera().removeprefix(b"Exif\0\0"))
    for _ in range(3000):
        data = bytearray(block)
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(256)
        try:
            tags = exif.read_tags(bytes(data))
        except ValueError:
            continue
        assert len(exif.write_tags(tags)) < 70_000
