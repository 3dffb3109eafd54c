"""The rows that `ip2p evaluate` edits, from data sets of pairs, the storybook, or benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image

from ip2p.data.records import BrokenRow, Pair, Source, open_picture
from ip2p.pictures.images import resized, to_tensor
from ip2p_storybook.captions import caption

if TYPE_CHECKING:
    from torch import Tensor

    from ip2p.evaluation.storybook import Case


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """A picture to edit, and what is known about the answer.

    turns: the instructions, each applied to the previous result. after: the answer, if known. mask: bool
    [h, w], True where the edit may change the picture. group: rows that are not independent and are resampled
    together. kind: of edit; the report has averages for each.
    """

    id: str
    before: Image.Image
    turns: tuple[str, ...]
    after: Image.Image | None = None
    caption: str = ""
    edited_caption: str = ""
    mask: Tensor | None = None
    group: str = ""
    kind: str = ""
    case: Case | None = None


class RowSource(Protocol):
    """Rows by number. It can be pickled. `key` changes with the data."""

    name: str
    key: str

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> EvalRow:
        """Row `row`. Raises BrokenRow for a picture that cannot be read."""
        ...


class PairRows:
    """The rows of a data set of pairs, or the first `count`."""

    def __init__(self, source: Source, count: int | None = None) -> None:
        self.source, self.name, self.key = source, source.name, source.key
        self.count = len(source) if count is None else min(count, len(source))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> EvalRow:
        return row_of_pair(self.source[row])


def row_of_pair(pair: Pair, **more: Any) -> EvalRow:
    """A pair as a row. Raises BrokenRow if it has no instruction or an unreadable picture."""
    if not pair.instruction.strip():
        raise BrokenRow(pair.id, "there is no instruction")
    before = open_picture(pair.before, pair.id)
    values: dict[str, Any] = {
        "id": pair.id,
        "before": before,
        "turns": (pair.instruction,),
        "after": open_picture(pair.after, pair.id),
        "caption": pair.caption,
        "edited_caption": pair.edited_caption,
        "mask": None if pair.mask is None else region_of(pair.mask, before.size, pair.id),
    }
    return EvalRow(**values | more)


def region_of(data: bytes, size: tuple[int, int], id: str) -> Tensor:
    """The edited region in a mask file, bool [h, w]: transparent (MagicBrush), else white."""
    import io

    try:
        with Image.open(io.BytesIO(data)) as picture:
            if "A" in picture.getbands():
                values = 255 - np.asarray(resized(picture.getchannel("A"), size))
            else:
                values = np.asarray(resized(picture.convert("L"), size))
    except (OSError, ValueError) as error:
        raise BrokenRow(id, f"the mask cannot be read ({error})") from None
    return torch.from_numpy(values > 127)


class StorybookRows:
    """Storybook edits with exact answers, the same as in `ip2p storybook score`."""

    def __init__(self, count: int, *, size: int, seed: int = 0, split: str = "test") -> None:
        self.count, self.size, self.seed, self.split = count, size, seed, split
        self.name = "storybook"
        self.key = f"storybook-{split}-{size}-{seed}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> EvalRow:
        from ip2p.evaluation.storybook import find_case

        case = find_case(row, self.seed, self.size, self.split)
        changed = torch.from_numpy(~case.fixed)
        return EvalRow(
            id=f"{self.split}-{self.seed}-{row}",
            before=Image.fromarray(case.page),
            after=Image.fromarray(case.exact),
            turns=(case.edit.instruction,),
            caption=caption(case.edit.before),
            edited_caption=caption(case.edit.after),
            mask=None if bool(changed.all()) else changed,
            kind=case.edit.kind,
            case=case,
        )


class ListedRows:
    """Rows made on demand from records in memory, for the benchmarks."""

    def __init__(
        self, name: str, key: str, records: Sequence[Any], make: Callable[[Any], EvalRow], count: int | None
    ) -> None:
        self.name, self.key, self.make = name, key, make
        self.records = records if count is None else records[:count]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> EvalRow:
        return self.make(self.records[row])


def as_picture(image: Image.Image) -> Tensor:
    """A PIL picture as fp32 [3, h, w] in [0, 1]."""
    return (to_tensor(image)[0] + 1) / 2
