"""What a row of training data is: two pictures, the words of the edit, and what else is known of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from ip2p.base.errors import InputError
from ip2p.pictures import images

if TYPE_CHECKING:
    from numpy.typing import NDArray


class BrokenRow(Exception):
    """A row that cannot be used: its `id`, and the `reason` in a few words."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(id, reason)  # both, so that it crosses a process border whole
        self.id = id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


class MissingPart(BrokenRow):
    """A row that lacks a picture, or its words."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One edit: the pictures before and after, and the instruction that leads from one to the other.

    `before`, `after`: the bytes of a picture file, or pixels, uint8 [height, width, 3], sRGB.
    """

    id: str  # unique in its data set, and the same at every read
    before: bytes | NDArray[np.uint8]
    after: bytes | NDArray[np.uint8]
    instruction: str
    caption: str = ""  # of before
    edited_caption: str = ""  # of after
    mask: bytes | None = None  # MagicBrush's: the region that was edited is transparent
    # clip_sim_0, clip_sim_1, clip_sim_dir, clip_sim_image, p2p_threshold, cfg_scale, seed …, if known
    scores: Mapping[str, float] = field(default_factory=dict)
    # class numbers that only drawn pages have: before, after, edit
    labels: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)


def open_picture(data: bytes | NDArray[np.uint8], id: str) -> Image.Image:
    """A row's picture as upright RGB, decoded whole.

    Raises BrokenRow, naming the row `id`, for what `images.load_image` refuses: a truncated, unreadable,
    oversized or tiny picture.
    """
    if not isinstance(data, bytes):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3:
            raise BrokenRow(id, f"pixels are {data.dtype} {list(data.shape)}, not uint8 [height, width, 3]")
        return Image.fromarray(np.ascontiguousarray(data))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of thousands of pictures nobody reads that one is transparent
            return images.load_image(data)
    except InputError as error:
        raise BrokenRow(id, str(error).removeprefix("The picture ")) from None


class Source(Protocol):
    """Rows of edit pairs with random access.

    A source can be pickled: it opens its files when they are first read, so that every worker process
    can have a copy with handles of its own.
    """

    name: str  # as the user gave it
    endless: bool  # only the storybook drawn on the fly, whose len is 2**31

    @property
    def key(self) -> str:
        """Changes when the data change: a hash of names, sizes, modification times; or the hub's revision."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Pair:
        """Row `row`, 0 to len - 1. Bad content raises BrokenRow and nothing else."""
        ...

    def blocks(self) -> list[range]:
        """All rows, in runs that are cheap to read one after the other (row groups, tar shards)."""
        ...
