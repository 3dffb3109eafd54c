"""Read and write EXIF byte for byte: each tag keeps the type and the bytes that the camera wrote.

Pillow reads tags into Python values and guesses their types when it writes them, which changes the type of a
MakerNote or a UserComment. Here an entry is its type and its raw bytes (TIFF 6.0, section 2).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from typing import IO

import numpy as np

EXIF, GPS, INTEROP = 0x8769, 0x8825, 0xA005  # entries that point to subfolders
ORIENTATION, XMP, IPTC = 0x0112, 0x02BC, 0x83BB
MAKER_NOTE, USER_COMMENT, WIDTH, HEIGHT = 0x927C, 0x9286, 0xA002, 0xA003
BYTE, SHORT, LONG, UNDEFINED = 1, 3, 4, 7
MAGIC = {"<": b"II*\0", ">": b"MM\0*"}
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
# Tags that describe the pixels of a TIFF; in another file they would be wrong. The ICC profile, XMP and IPTC
# are copied separately; Photoshop's resources, which contain a preview, are dropped.
OF_PIXELS = (
    *(0x00FE, 0x00FF, 0x0100, 0x0101, 0x0102, 0x0103, 0x0106, 0x010A, 0x0111, 0x0115, 0x0116, 0x0117),
    *(0x0118, 0x0119, 0x011C, 0x0120, 0x0121, 0x013D, 0x0140, 0x0142, 0x0143, 0x0144, 0x0145, 0x014A),
    *(0x0152, 0x0153, 0x0154, 0x0155, 0x015B, 0x0200, 0x0201, 0x0202, 0x0211, 0x0212, 0x0213, 0x0214),
    *(0x8773, 0x8649, XMP, IPTC),
)

Entries = dict[int, tuple[int, bytes]]  # tag → type and bytes


@dataclass
class Tags:
    """The entries of an EXIF block by folder: 0 is the first one, the others are EXIF, GPS and INTEROP.

    order: the byte order as in struct, "<" or ">". maker_at: the offset of the MakerNote, which is kept: in
    the MakerNotes of many cameras, offsets count from the start of the block.
    """

    order: str = ">"
    folders: dict[int, Entries] = field(default_factory=dict)
    maker_at: int = 0

    def __bool__(self) -> bool:
        return any(self.folders.values())

    def of(self, folder: int) -> Entries:
        return self.folders.setdefault(folder, {})

    def number(self, folder: int, tag: int, value: int) -> None:
        """Set a tag to an integer."""
        kind = SHORT if value < 2**16 else LONG
        self.of(folder)[tag] = kind, struct.pack(self.order + ("H" if kind == SHORT else "I"), value)

    def in_order(self, order: str) -> Tags:
        """The same values in another byte order. MakerNotes and comments do not depend on it."""
        if order == self.order:
            return self
        folders = {
            folder: {tag: (kind, _swapped(kind, raw)) for tag, (kind, raw) in entries.items()}
            for folder, entries in self.folders.items()
        }
        return replace(self, order=order, folders=folders)


def read_tags(data: bytes) -> Tags:
    """The tags of an EXIF block or a TIFF file. Raises ValueError for other or truncated data."""
    data = data.removeprefix(b"Exif\0\0")
    order = next((order for order, magic in MAGIC.items() if data.startswith(magic)), None)
    if order is None:
        raise ValueError("it does not start like EXIF")
    tags = Tags(order)

    def read(folder: int, at: int) -> None:
        entries = tags.of(folder)
        (count,) = struct.unpack_from(order + "H", data, at)
        for place in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(order + "HHI", data, place)
            size = SIZES.get(kind, 0) * number
            if size > 4:
                (place,) = struct.unpack_from(order + "I", data, place + 8)
            else:
                place += 8
            if size and place + size <= len(data):  # skip truncated values and unknown types
                entries[tag] = kind, data[place : place + size]
                if (folder, tag) == (EXIF, MAKER_NOTE) and size > 4:
                    tags.maker_at = place
        for pointer in {EXIF, GPS, INTEROP} & set(entries):
            kind, raw = entries.pop(pointer)
            if kind in (LONG, 13) and len(raw) == 4 and pointer not in tags.folders:
                read(pointer, *struct.unpack(order + "I", raw))

    try:
        read(0, *struct.unpack_from(order + "I", data, 4))
    except struct.error:
        raise ValueError("it is truncated") from None
    return tags


def write_tags(tags: Tags) -> bytes:
    """The EXIF block of tags, with its JPEG prefix."""
    first, body = _body(tags, 8, {})
    return b"Exif\0\0" + MAGIC[tags.order] + struct.pack(tags.order + "I", first) + body


def add_tags(file: IO[bytes], tags: Tags) -> None:
    """Add tags to a TIFF file that is open for reading and writing. Existing tags are kept."""
    file.seek(0)
    order = "<" if file.read(4) == MAGIC["<"] else ">"
    file.seek(struct.unpack(order + "I", file.read(4))[0])
    (count,) = struct.unpack(order + "H", file.read(2))
    existing = [file.read(12) for _ in range(count)]
    fixed = {struct.unpack_from(order + "H", entry)[0]: entry for entry in existing}
    end = file.seek(0, 2)
    first, body = _body(replace(tags.in_order(order), maker_at=0), end, fixed)
    file.write(body)
    file.seek(4)
    file.write(struct.pack(order + "I", first))


def _body(tags: Tags, start: int, fixed: dict[int, bytes]) -> tuple[int, bytes]:
    """The offset of the first folder, and the bytes from `start` on: the folders and their values.

    fixed: packed entries of the first folder that already exist.
    """
    order, end = tags.order, start
    maker = tags.of(EXIF).get(MAKER_NOTE)
    reserved = (tags.maker_at, tags.maker_at + len(maker[1])) if maker and tags.maker_at >= start else (0, 0)

    def place(size: int) -> int:
        nonlocal end
        end += end % 2
        if end < reserved[1] and end + size > reserved[0]:
            end = reserved[1] + reserved[1] % 2
        end += size
        return end - size

    parents = {EXIF: 0, GPS: 0, INTEROP: EXIF}
    folders = {folder: dict(tags.of(folder)) for folder in (0, *parents)}
    for folder in (INTEROP, GPS, EXIF):
        if folders[folder]:
            folders[parents[folder]][folder] = LONG, b"\0" * 4
        else:
            del folders[folder]
    packed: dict[int, dict[int, bytes]] = {}
    tables: dict[int, int] = {}
    for folder, entries in folders.items():
        packed[folder] = dict(fixed) if folder == 0 else {}
        tables[folder] = place(2 + 12 * len(packed[folder].keys() | entries.keys()) + 4)
    pieces: list[tuple[int, bytes]] = []
    for folder, entries in folders.items():
        for tag, (kind, raw) in entries.items():
            if tag in packed[folder]:
                continue
            if tag in tables and parents.get(tag) == folder:
                value = struct.pack(order + "I", tables[tag])
            elif len(raw) <= 4:
                value = raw.ljust(4, b"\0")
            else:
                stays = reserved[1] and (folder, tag) == (EXIF, MAKER_NOTE)
                at = reserved[0] if stays else place(len(raw))
                pieces.append((at, raw))
                value = struct.pack(order + "I", at)
            packed[folder][tag] = struct.pack(order + "HHI", tag, kind, len(raw) // SIZES[kind]) + value
        table = b"".join(packed[folder][tag] for tag in sorted(packed[folder]))
        table = struct.pack(order + "H", len(packed[folder])) + table + b"\0" * 4
        pieces.append((tables[folder], table))
    body = bytearray(max(at + len(piece) for at, piece in pieces) - start)
    for at, piece in pieces:
        body[at - start : at - start + len(piece)] = piece
    return tables[0], bytes(body)


def _swapped(kind: int, raw: bytes) -> bytes:
    size = {5: 4, 10: 4}.get(kind, SIZES[kind])  # a rational is two numbers
    return raw if size == 1 else np.frombuffer(raw, f"u{size}").byteswap().tobytes()
