"""The safety check and the AI-edited mark of every result, applied before any client sees it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont

from ip2p.serve.options import ServeConfig
from ip2p.settings import SettingError

# IPTC's digital source type for a picture edited by a trained model.
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
DESCRIPTION = f"""<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}"/>"""
XMP = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
{DESCRIPTION}
</rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>""".encode()
DECLARED = re.compile(
    rb"""\s(\w+:DigitalSourceType)\s*=\s*("[^"]*"|'[^']*')|<(\w+:DigitalSourceType)>[^<]*</\3>"""
)
WORDS = "AI-edited"

Check = Callable[[Image.Image], None]
Finish = Callable[[Image.Image], Image.Image]


def marker(config: ServeConfig) -> Finish | None:
    """The function that marks results as AI-edited (--mark), or None."""
    if config.mark == "visible":
        return lambda picture: tag(write_words(picture))
    return tag if config.mark == "iptc" else None


def checker(config: ServeConfig) -> Check | None:
    """The function that rejects results that a classifier (`synth.safety`) finds unsafe (--safety), or None.

    Raises ModelError if the model is not a classifier.
    """
    if config.safety is None:
        return None
    from ip2p.synth.safety import Classifier  # imports torch

    safe, one_at_a_time = Classifier(config.safety, device=config.device, batch=1), threading.Lock()

    def check(picture: Image.Image) -> None:
        with one_at_a_time:
            (good,) = safe([picture])
        if not good:
            raise SettingError(
                "instruction: the server's safety checker rejected the result. Try something else.",
                field="instruction",
            )

    return check


def tag(picture: Image.Image) -> Image.Image:
    """Set IPTC's digital source type in the picture's XMP, which `images.to_bytes` writes.

    The rest of the original's XMP is kept.
    """
    kept = DECLARED.sub(b"", picture.info.get("xmp", b""))
    head, end, tail = kept.rpartition(b"</rdf:RDF>")
    picture.info["xmp"] = head + DESCRIPTION.encode() + end + tail if end else XMP
    return picture


def write_words(picture: Image.Image) -> Image.Image:
    """Copy the picture with "AI-edited" in the lower right corner, 1/20 of the shorter side high."""
    marked = picture.copy()
    height = max(8, min(picture.size) // 20)
    font = ImageFont.load_default(height)
    pen = ImageDraw.Draw(marked, "RGBA")
    left, top, right, bottom = pen.textbbox((0, 0), WORDS, font)
    pad = height // 3
    x, y = marked.width - (right - left) - pad, marked.height - (bottom - top) - pad
    pen.rectangle((x - pad, y - pad, marked.width, marked.height), (0, 0, 0, 160))
    pen.text((x - left, y - top), WORDS, (255, 255, 255, 255), font)
    return marked
