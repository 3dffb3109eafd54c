"""Exact edits of the storybook as parquet tables: pairs of pictures, and triples of texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ip2p.base.files import replacing
from ip2p.data.convert import encoded, hub_schema
from ip2p_storybook.captions import caption
from ip2p_storybook.draw import draw
from ip2p_storybook.edits import Edit
from ip2p_storybook.scene import rng_for
from ip2p_storybook.triples import SOURCE, TRIPLE_COLUMNS, ExactTriple

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAIR_COLUMNS = ("original_image", "original_prompt", "edit_prompt", "edited_prompt", "edited_image")
_ROWS_A_GROUP = 100


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """One row: both pictures uint8 [size, size, 3], both captions, and the instruction between them."""

    original_image: NDArray[np.uint8]
    original_prompt: str
    edit_prompt: str
    edited_prompt: str
    edited_image: NDArray[np.uint8]


def draw_pair_row(edit: Edit, size: int = 256) -> PairRow:
    """Draw both pages of an edit and write captions of the same form."""

    def prompt(of: str) -> str:
        return caption(getattr(edit, of), rng_for("pair", edit.before.seed))

    return PairRow(
        original_image=draw(edit.before, size),
        original_prompt=prompt("before"),
        edit_prompt=edit.instruction,
        edited_prompt=prompt("after"),
        edited_image=draw(edit.after, size),
    )


def write_pairs(edits: Iterable[Edit], path: Path, *, size: int = 256) -> int:
    """Write pairs as one parquet file, atomically, and return their number.

    Pictures are PNG bytes in Hugging Face `Image` columns, which `datasets.load_dataset("parquet", ...)`
    decodes. At most 100 rows are held in memory.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = hub_schema(
        {column: "Image" if column.endswith("_image") else "string" for column in PAIR_COLUMNS}
    )
    rows = (_cells(draw_pair_row(edit, size), number) for number, edit in enumerate(edits))
    count = 0
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while group := list(islice(rows, _ROWS_A_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema))
            count += len(group)
    return count


def _cells(row: PairRow, number: int) -> dict[str, Any]:
    return {
        name: value
        if isinstance(value, str)
        else {"bytes": encoded(value), "path": f"{number:07}_{int(name == 'edited_image')}.png"}
        for name, value in vars(row).items()
    }


def write_exact_triples(triples: Iterable[ExactTriple], path: Path) -> int:
    """Write triples as parquet with the columns of `ip2p synth`, atomically, and return their number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in TRIPLE_COLUMNS])
    rows = [
        {
            "id": triple.id,
            "caption": triple.caption,
            "instruction": triple.instruction,
            "edited_caption": triple.edited_caption,
            "source": SOURCE,
        }
        for triple in triples
    ]
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary)
    return len(rows)
