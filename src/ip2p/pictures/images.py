"""Load and check pictures, convert them to and from tensors, save them with their settings."""

from __future__ import annotations

import difflib
import io
import re
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from ip2p.base.errors import InputError, ResourceError
from ip2p.base.files import check_output, replacing
from ip2p.pictures import exif
from ip2p.pictures.address import fetch_picture, is_url
from ip2p.settings import MAX_PIXELS

if TYPE_CHECKING:
    from torch import Tensor

# A path, the bytes of a file, an open file, a PIL image, or an array [height, width(, channels)].
Picture = str | Path | bytes | IO[bytes] | Image.Image | NDArray[Any]

MIN_SIDE = 16
NEUTRAL = "#808080"  # the background of transparent parts for the model; 0 in [-1, 1]
MAX_ASPECT = 8
# Only formats with a plain decoder: some of Pillow's other decoders start programs or load fonts.
READS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "PPM")
HEIC_BRANDS = (b"ftypheic", b"ftypheix", b"ftypheim", b"ftypheis", b"ftyphevc", b"ftypmif1")
WRITES = {
    **{".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"},
    **{".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"},
}
WRITE_OPTIONS: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "TIFF": {},  # uncompressed: libtiff cannot write EXIF folders with compression
    "BMP": {},
}
SECOND_PICTURE = re.compile(  # XMP elements that describe a gain map or another picture in the file
    r'\s(?:hdrgm|GCamera|HDRGainMap|apdi):[\w.]+="[^"]*"'
    r"|<(Container|GContainer|hdrgm|HDRGainMap|apdi):(\w+)\b[^>]*(?:/>|>.*?</\1:\2>)",
    re.DOTALL,
)
JPEG_SEGMENT = 65533  # the longest EXIF block of a JPEG, with its prefix


# --- paths -------------------------------------------------------------------------------------


def closest_name(name: str, names: Sequence[str]) -> str | None:
    """The one of `names` that is most similar to `name`, or None."""
    folded = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def closest_file(path: Path) -> Path | None:
    """The entry in the folder of `path` with the most similar name, or None."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    close = closest_name(path.name, names)
    return path.parent / close if close else None


def missing_file(path: Path) -> InputError:
    """The error for a file that does not exist; it suggests the file with the closest name."""
    folder = path.parent
    if not folder.is_dir():
        return InputError(f"{path}: the folder {folder} does not exist. Check the path.")
    close = closest_file(path)
    hint = f"Did you mean {close}?" if close else "Check the path."
    return InputError(f"{path}: no such file. {hint}")


def check_picture_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """Check, before any work, that a picture can be written to `path`. Returns it as a Path.

    Raises InputError for an unsupported extension, and as `files.check_output` does.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITES:
        raise InputError(
            f"{path}: supported picture formats are {', '.join(WRITES)}. Change the file extension."
        )
    check_output(path, overwrite=overwrite)
    return path


# --- loading -----------------------------------------------------------------------------------


def load_image(
    source: Picture,
    *,
    max_pixels: int | None = MAX_PIXELS,
    background: str | None = None,
    warn: Callable[[str], object] | None = None,
) -> Image.Image:
    """Load a picture as upright 8-bit RGB or RGBA; `info` keeps its metadata (exif, icc_profile, xmp, iptc).

    source: a path, an http(s) address (`address.fetch_picture`), the bytes of a file, an open file, a PIL
    image, or an array [height, width] or [height, width, 1, 3 or 4] of uint8 or of floats from 0 to 1. HEIC
    needs the extra `heic`. max_pixels: checked in the header, before anything is decoded; ignored for images
    and arrays, which are in memory already. background: a color to put behind transparent parts, with a
    warning; None returns a picture with transparent parts as RGBA. warn: called with each warning instead of
    `warnings.warn`. Raises InputError for anything that cannot be edited, ModelError for an address that
    cannot be downloaded.
    """
    warn = warn or (lambda message: warnings.warn(message, stacklevel=3))
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or "The picture"
        return _upright_rgb(_checked(source, str(name), None), str(name), background, warn)
    if isinstance(source, bytes):
        name, data = "The picture", source
    elif is_url(source):
        name, data = str(source), fetch_picture(str(source))
    elif isinstance(source, str | Path):
        name, data = str(source), _read(Path(source))
    elif hasattr(source, "read"):
        name, data = str(getattr(source, "name", "") or "The picture"), source.read()
        if not isinstance(data, bytes):
            raise InputError(f"{name} is open as text. Open it with mode 'rb'.")
    else:
        raise InputError(
            f"A {type(source).__name__} is not a picture. Give a path, bytes, an open file, a PIL image or "
            "a NumPy array."
        )
    if not data:
        raise InputError(f"{name} is empty (0 bytes). Give a picture, or download this one again.")
    try:
        with warnings.catch_warnings():
            # `_checked` applies our own limit instead of Pillow's warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_formats(data, name)) as image:
                _checked(image, name, max_pixels)
                image.load()
                return _upright_rgb(image, name, background, warn, data if image.format == "TIFF" else None)
    except InputError:
        raise
    except MemoryError:
        raise ResourceError(f"{name} does not fit in memory. Make it smaller first.") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{name} {_what_is(data)}") from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        size = f"{int(pixels[0]) / 1e6:,.0f}" if pixels else "too many"
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise InputError(
            f"{name} is too large: {size} megapixels by its header, and at most {most:.0f} are read. "
            "Make it smaller first."
        ) from None
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, zlib.error, …
        raise InputError(
            f"{name} is damaged or truncated ({str(error).rstrip('.') or type(error).__name__}). "
            "Download it again, or open it in a viewer and save it again."
        ) from None


def _from_array(array: NDArray[Any]) -> Image.Image:
    """A PIL image from an array [height, width(, 1, 3 or 4)] of uint8 or floats from 0 to 1."""
    values = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise InputError(
            f"The array has the shape {list(array.shape)}. Give [height, width] or [height, width, 3 or 4]."
        )
    if np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all() or values.min(initial=0) < 0 or values.max(initial=0) > 1:
            raise InputError("The array has floats outside 0 to 1. Scale it, or give uint8.")
        values = (values * 255).round().astype(np.uint8)
    if values.dtype != np.uint8:
        raise InputError(f"The array has the type {values.dtype}. Give uint8, or floats from 0 to 1.")
    return Image.fromarray(np.ascontiguousarray(values))


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path} is a folder. Give a picture in it.")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise missing_file(path) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from None


def _formats(data: bytes, name: str) -> tuple[str, ...]:
    """The formats to try. Raises InputError for HEIC if its decoder is not installed."""
    if data[4:12] not in HEIC_BRANDS:
        return READS
    try:
        import pillow_heif
    except ImportError:
        raise InputError(
            f"{name} is a HEIC photograph, and the HEIC decoder is not installed. Run: pip install "
            "'ip2p[heic]' (or save the photograph as JPEG)."
        ) from None
    pillow_heif.register_heif_opener()
    return ("HEIF",)


def _what_is(data: bytes) -> str:
    """A guess at what an undecodable file is, and the next step."""
    head = data[:512].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "is a web page (HTML), not a picture. Save the picture itself, not the page around it."
    if head.startswith((b"<svg", b"<?xml")) and b"<svg" in data[:4096].lower():
        return "is an SVG drawing. Export it as PNG first."
    try:
        text = data[:4096].decode("utf-8", "strict" if len(data) <= 4096 else "ignore")
        if all(letter.isprintable() or letter in "\r\n\t" for letter in text):
            return "contains text, not a picture. Give a PNG, JPEG or WebP file."
    except UnicodeDecodeError:
        pass
    return "is not a picture in a known format. Give a PNG, JPEG, WebP or AVIF file."


def _checked(image: Image.Image, name: str, max_pixels: int | None) -> Image.Image:
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise InputError(
            f"{name} has {width * height / 1e6:.1f} megapixels ({width}x{height}); the limit is "
            f"{max_pixels / 1e6:g}. Make it smaller, or raise the limit with --max-pixels."
        )
    if min(width, height) < MIN_SIDE:
        raise InputError(
            f"{name} is {width}x{height} pixels; each side needs at least {MIN_SIDE}. Give a larger picture."
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"{name} is {width}x{height} pixels; one side may be at most {MAX_ASPECT} times the other. "
            "Crop it first."
        )
    # An MPO is a JPEG photograph with previews; its first picture is the photograph.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        # Frames are not counted: that would scan the whole file, which may have millions.
        raise InputError(f"{name} has several frames or pages. Save the one to edit as PNG.")
    return image


def flattened(image: Image.Image, background: str = NEUTRAL) -> Image.Image:
    """An RGBA picture as RGB on a background color (a name or #rrggbb); other pictures are unchanged."""
    if image.mode != "RGBA":
        return image
    rgb = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    rgb.info = dict(image.info)
    return rgb


def with_alpha(edited: Image.Image, original: Image.Image) -> Image.Image:
    """`edited` (RGB) with the transparency of `original` (RGBA, same size), which the model saw `flattened`.

    The change of the flattened color is added to each pixel. Unchanged and invisible pixels keep all four
    bytes of the original.
    """
    result = np.array(original)
    rows = max(1, 2**20 // original.width)  # in strips, because the differences would fill gigabytes
    for top in range(0, original.height, rows):
        box = (0, top, original.width, min(top + rows, original.height))
        before = original.crop(box)
        change = np.asarray(edited.crop(box), np.int16) - np.asarray(flattened(before), np.int16)
        strip = result[top : top + rows]
        visible = strip[..., 3:] > 0
        strip[..., :3] = (strip[..., :3] + change * visible).clip(0, 255)
    return Image.fromarray(result)


def _upright_rgb(
    image: Image.Image,
    name: str,
    background: str | None,
    warn: Callable[[str], object],
    block: bytes | None = None,
) -> Image.Image:
    """Upright 8-bit RGB or RGBA, on a background. `info` has exif, xmp, iptc and a matching ICC profile.

    block: the bytes that contain the EXIF, if Pillow does not expose them.
    """
    info: dict[str | tuple[int, int], Any] = {}
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # Pillow cannot read the EXIF; `_exif_and_iptc` warns
        upright = image
    info.update(_exif_and_iptc(image, name, warn, block))
    info.update(_xmp(upright, name, warn))
    profile = upright.info.get("icc_profile")
    rgb = upright
    if upright.has_transparency_data:
        rgb = layer = upright.convert("RGBA")
        opaque = np.asarray(layer.getchannel("A")).min() == 255
        if background is not None and not opaque:
            warn(f"{name} has transparent parts; their background is set to {background}.")
        if background is not None or opaque:
            rgb = flattened(layer, background or "white")
        # The profile of a palette or RGBA picture is an RGB profile; a gray profile does not match RGB.
        profile = profile if upright.mode not in ("LA", "La", "L") else None
    elif upright.mode in ("CMYK", "L"):
        rgb, profile = _to_srgb(upright, profile), None
    elif upright.mode.startswith("I") or upright.mode == "F":
        rgb, profile = _deep_gray_to_rgb(upright, name, warn), None
    elif upright.mode != "RGB":
        rgb = upright.convert("RGB")
        profile = profile if upright.mode == "P" else None
    if rgb is image:
        rgb = image.copy()
    if profile:
        info["icc_profile"] = profile
    rgb.info = info
    return rgb


def _exif_and_iptc(
    image: Image.Image, name: str, warn: Callable[[str], object], block: bytes | None
) -> dict[str, bytes]:
    """The EXIF that is valid for the upright picture, without its preview, and the IPTC."""
    found: dict[str, bytes] = {}
    iptc = image.info.get("photoshop", {}).get(0x0404) or image.info.get("iptc")
    try:
        block = block or image.info.get("exif") or image.getexif().tobytes()
        if block.removeprefix(b"Exif\0\0"):
            tags = exif.read_tags(block)
            iptc = iptc or tags.of(0).get(exif.IPTC, (0, b""))[1]
            for tag in (exif.ORIENTATION, *exif.OF_PIXELS):
                tags.of(0).pop(tag, None)
            if tags:
                found["exif"] = exif.write_tags(tags)
    except Exception as error:  # malformed EXIF does not affect the pixels
        warn(f"{name} has EXIF that cannot be kept ({error}); it is dropped.")
    return found | ({"iptc": iptc} if iptc else {})


def _xmp(image: Image.Image, name: str, warn: Callable[[str], object]) -> dict[str, bytes]:
    """The XMP, without its description of a second picture in the file, which is dropped with a warning."""
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    text = xmp if isinstance(xmp, str) else xmp.decode("utf-8", "replace")
    text, parts = SECOND_PICTURE.subn("", text.rstrip("\0"))
    if parts or "mp" in image.info or image.info.get("aux"):
        warn(f"{name} contains a second picture (a gain map or a preview); it is dropped.")
    try:
        if text and "<!DOCTYPE" not in text:
            ElementTree.fromstring(text)
            return {"xmp": text.encode()}
    except ElementTree.ParseError as error:
        warn(f"{name} has XMP that cannot be kept ({error}); it is dropped.")
    return {}


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """CMYK or gray converted to sRGB, by the ICC profile if it is of the same kind."""
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if converted is not None:
                return converted
        except ImageCms.PyCMSError:
            pass  # a broken or mismatched profile: convert as viewers do
    return image.convert("RGB")


def _deep_gray_to_rgb(image: Image.Image, name: str, warn: Callable[[str], object]) -> Image.Image:
    """16-bit or float grayscale to 8-bit RGB; Pillow's own conversion would clip at 255.

    White is the largest value of the smallest bit depth (8, 10, 12, 14, 16) that holds all values: 12-bit
    pictures are often stored in 16 bits. If all floats are at most 1, white is 1.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    most = values.max()
    whites = [2.0**bits - 1 for bits in (8, 10, 12, 14, 16)]
    if image.mode == "F":
        whites.insert(0, 1.0)
    white = next((white for white in whites if most <= white), most)
    if image.mode != "F" and white < 2**16 - 1:
        warn(f"{name} uses {np.log2(white + 1):.0f} of its 16 bits; {white:.0f} is used as white.")
    gray = (values * (255 / white)).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(gray).convert("RGB")


# --- tensors and sizes -------------------------------------------------------------------------


def to_tensor(image: Image.Image) -> Tensor:
    """RGB (or RGBA, `flattened`) picture → fp32 [1, 3, height, width] in [-1, 1]."""
    import torch

    values = torch.from_numpy(np.array(flattened(image).convert("RGB"), dtype=np.float32))
    # The same operations and memory layout as diffusers, so that the latents are identical to the last bit.
    return 2 * (values[None].permute(0, 3, 1, 2) / 255) - 1


def to_pil(tensor: Tensor) -> Image.Image:
    """[3, height, width] or [1, 3, height, width] in [-1, 1] (clamped) → RGB picture."""
    if tensor.ndim == 4:
        (tensor,) = tensor
    levels = ((tensor.detach().float().cpu() + 1) * 127.5).clamp(0, 255).round()
    return Image.fromarray(levels.byte().permute(1, 2, 0).numpy())


def signed_psnr(squared_error: Tensor) -> Tensor:
    """PSNR in dB from the mean squared error of pictures in [-1, 1]; at most 106 dB."""
    return 10 * (4 / squared_error.clamp_min(1e-10)).log10()


def fit_size(width: int, height: int, *, native: int = 512, multiple: int = 64) -> tuple[int, int]:
    """The working size of the model for a picture of width x height (the rule of the original code).

    f = native / longer; f' = ceil(shorter · f / multiple) · multiple / shorter; each side is scaled by f' and
    rounded down to a multiple. The longer side can exceed `native`: 2048x600 → 640x192 at 512.
    """
    longer, shorter = max(width, height), min(width, height)
    units = -(-shorter * native // (longer * multiple))
    return tuple(side * units // shorter * multiple for side in (width, height))  # type: ignore[return-value]


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at `size` (width, height); the same object if it already has that size."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


# --- saving ------------------------------------------------------------------------------------


class EditedImage(Image.Image):
    """A picture whose `save` also writes its settings and metadata, like `save_image`."""

    @classmethod
    def of(cls, image: Image.Image) -> EditedImage:
        """An EditedImage that shares the pixels and `info` of `image`."""
        edited = cls()
        edited.__dict__.update(image.__dict__)
        return edited

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """`PIL.Image.Image.save`, plus the metadata in `info` unless `params` overrides it."""
        name = fp if isinstance(fp, str | Path) else getattr(fp, "name", "")
        kind = format.upper() if format else WRITES.get(Path(str(name)).suffix.lower(), "")
        kind = {"JPG": "JPEG"}.get(kind, kind)
        if kind not in WRITES.values():
            super().save(fp, format, **params)
            return
        data = to_bytes(self, kind, **params)
        Path(fp).write_bytes(data) if isinstance(fp, str | Path) else fp.write(data)


def save_image(image: Image.Image, path: str | Path, *, overwrite: bool = True) -> Path:
    """Write a picture and its `info` atomically, in the format of the file extension.

    `info["parameters"]` (the settings) is written to the PNG text chunk of that name, or to the EXIF
    UserComment in JPEG, WebP and TIFF; exif, icc_profile, xmp and iptc are kept. BMP stores pixels only.
    Raises InputError as `check_picture_output` does.
    """
    path = check_picture_output(path, overwrite=overwrite)
    kind = WRITES[path.suffix.lower()]
    with replacing(path) as partial, open(partial, "w+b") as file:
        _write(image, file, kind)
    return path


def to_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of the file that `save_image` would write; `options` are passed to Pillow."""
    file = io.BytesIO()
    _write(image, file, kind, options)
    return file.getvalue()


def _write(image: Image.Image, file: IO[bytes], kind: str, options: Mapping[str, Any] = {}) -> None:
    """Write a picture and its `info` to a file that is open for reading and writing."""
    if image.mode == "RGBA" and kind not in ("PNG", "WEBP", "TIFF"):
        warnings.warn(
            f"{kind} has no transparency; the result is on white. Write a .png to keep the transparency.",
            stacklevel=3,
        )
        image = flattened(image, "white")
    tags = _tags(image, kind)
    given = {**WRITE_OPTIONS.get(kind, {}), **_metadata(image, kind, tags), **options}
    Image.Image.save(image, file, kind, **given)  # `EditedImage.save` calls this function
    if kind == "TIFF" and "exif" not in options and tags:
        exif.add_tags(file, tags)


def _tags(image: Image.Image, kind: str) -> exif.Tags:
    """The EXIF to write: that of `info` with the current size, and the settings unless the file is a PNG."""
    block = image.info.get("exif")
    tags = exif.read_tags(block) if block else exif.Tags()
    details = tags.of(exif.EXIF)
    details.pop(exif.USER_COMMENT, None)  # settings of an earlier edit, from the input
    # Cameras also write the size here; the picture may have been rotated or scaled since.
    for tag, side in zip((exif.WIDTH, exif.HEIGHT), image.size, strict=True):
        if tag in details:
            tags.number(exif.EXIF, tag, side)
    if kind != "PNG" and (settings := image.info.get("parameters")):
        details[exif.USER_COMMENT] = exif.UNDEFINED, b"UNICODE\0" + settings.encode("utf-16-be")
    if kind == "TIFF":
        for key, tag, type in (("xmp", exif.XMP, exif.BYTE), ("iptc", exif.IPTC, exif.UNDEFINED)):
            if image.info.get(key):
                tags.of(0)[tag] = type, image.info[key]
    if kind == "JPEG" and tags and len(exif.write_tags(tags)) > JPEG_SEGMENT:
        warnings.warn("The EXIF is too long for a JPEG; the MakerNote is dropped.", stacklevel=4)
        details.pop(exif.MAKER_NOTE, None)
    return tags


def _metadata(image: Image.Image, kind: str, tags: exif.Tags) -> dict[str, Any]:
    """The options of Pillow's writer for the metadata."""
    options: dict[str, Any] = {}
    if image.info.get("icc_profile"):
        options["icc_profile"] = image.info["icc_profile"]
    if tags and kind != "TIFF":
        options["exif"] = exif.write_tags(tags)
    xmp, iptc = image.info.get("xmp"), image.info.get("iptc")
    if kind == "PNG":
        options["pnginfo"] = text = PngImagePlugin.PngInfo()
        if image.info.get("parameters"):
            text.add_text("parameters", image.info["parameters"])
        if xmp:
            text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    elif xmp and kind in ("JPEG", "WEBP"):
        options["xmp"] = xmp
    if iptc and kind == "JPEG":
        # A Photoshop resource: number 0x0404, no name, even length.
        resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc + b"\0" * (len(iptc) % 2)
        segment = b"Photoshop 3.0\0" + resource
        options["extra"] = b"\xff\xed" + struct.pack(">H", 2 + len(segment)) + segment
    elif iptc and kind != "TIFF":
        warnings.warn(
            f"{kind} cannot store IPTC; it is dropped. Write a .jpg or .tif to keep it.", stacklevel=4
        )
    return options


# --- contact sheets ----------------------------------------------------------------------------


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str] | None = None,
    *,
    header: Sequence[str] | None = None,
    gap: int = 8,
    font_size: int = 14,
) -> Image.Image:
    """Arrange pictures in rows on white, with optional labels below the rows and headers above the columns.

    All pictures are scaled to the size of the first one; rows may differ in length.
    """
    assert rows and rows[0], "a contact sheet needs a picture"
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    font = ImageFont.load_default(font_size)
    line = font_size + font_size // 2
    top = gap + (line if header else 0)
    step = height + gap + (line if labels else 0)
    sheet = Image.new("RGB", (gap + columns * (width + gap), top + len(rows) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for column, word in enumerate(header or ()):
        pen.text((gap + column * (width + gap), gap // 2), word, "black", font)
    for number, row in enumerate(rows):
        y = top + number * step
        for column, image in enumerate(row):
            shown = resized(flattened(image, "white").convert("RGB"), (width, height))
            sheet.paste(shown, (gap + column * (width + gap), y))
        if labels:
            pen.text((gap, y + height + 2), labels[number], "black", font)
    return sheet
