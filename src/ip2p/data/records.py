"""A row of training data: two pictures, the texts of the edit, and metadata."""

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
    """An unusable row: its `id` and a short `reason`."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(id, reason)  # both arguments, so that it can be pickled
        self.id = id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


class MissingPart(BrokenRow):
    """A row without a picture or without its texts."""


class NotText(BrokenRow):
    """A row with something else than text, such as a JSON object, in a column of texts."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One edit: the pictures before and after, and the instruction.

    `before`, `after`: the bytes of a picture file, or pixels, uint8 [height, width, 3], sRGB.
    """

    id: str  # unique in its data set and stable
    before: bytes | NDArray[np.uint8]
    after: bytes | NDArray[np.uint8]
    instruction: str
    caption: str = ""  # of before
    edited_caption: str = ""  # of after
    mask: bytes | None = None  # as in MagicBrush: the edited region is transparent
    # clip_sim_0, clip_sim_1, clip_sim_dir, clip_sim_image, p2p_threshold, cfg_scale, seed …, if known
    scores: Mapping[str, float] = field(default_factory=dict)
    # class numbers, only for drawn pages: before, after, edit
    labels: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)


def open_picture(data: bytes | NDArray[np.uint8], id: str) -> Image.Image:
    """A row's picture as upright RGB, fully decoded.

    Raises BrokenRow with the row's `id` for pictures that `images.load_image` rejects: truncated, unreadable,
    oversized or tiny ones.
    """
    if not isinstance(data, bytes):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3:
            raise BrokenRow(id, f"pixels are {data.dtype} {list(data.shape)}, not uint8 [height, width, 3]")
        return Image.fromarray(np.ascontiguousarray(data))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning per transparent picture would be noise
            return images.load_image(data, background="white")
    except InputError as error:
        raise BrokenRow(id, str(error).removeprefix("The picture ")) from None


class Source(Protocol):
    """Rows of edit pairs with random access.

    A source can be pickled: it opens files on first use, so each worker process has its own handles.
    """

    name: str  # as given by the user
    endless: bool  # only the storybook drawn on the fly, whose len is 2**31

    @property
    def key(self) -> str:
        """Changes with the data: a hash of names, sizes and modification times, or the Hub's revision."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Pair:
        """Row `row`, 0 to len - 1. Bad content raises BrokenRow and nothing else."""
        ...

    def blocks(self) -> list[range]:
        """All rows, in ranges that are cheap to read sequentially (row groups, tar shards)."""
        ...
