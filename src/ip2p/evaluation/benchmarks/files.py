"""Shared by the benchmarks: parquet rows on demand, picture files, and run-length encoded masks."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ip2p.base.errors import InputError
from ip2p.data import columns
from ip2p.data.records import open_picture


@dataclass(frozen=True)
class Cell:
    """A row of a parquet file, read on demand because its pictures may be large."""

    path: str
    group: int
    row: int

    def read(self) -> dict[str, Any]:
        """The columns of the row."""
        return _group(self.path, self.group).slice(self.row, 1).to_pylist()[0]  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=2)
def _group(path: str, group: int) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read_row_group(group, use_threads=False)


def table_cells(path: Path, needed: Sequence[str]) -> list[Cell]:
    """The rows of a parquet file or a folder of them. Raises InputError for missing columns or files."""
    import pyarrow.parquet as pq

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    cells = []
    for file in files:
        try:
            footer = pq.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is not a parquet file ({error}).") from None
        if lacking := [name for name in needed if name not in footer.schema_arrow.names]:
            raise InputError(
                f"{file} does not have the columns {', '.join(lacking)}; it is not of this benchmark."
            )
        for group in range(footer.num_row_groups):
            cells += [Cell(str(file), group, k) for k in range(footer.metadata.row_group(group).num_rows)]
    if not cells:
        raise InputError(f"{path} has no rows in parquet files.")
    return cells


def picture_of(cell: Any, id: str) -> Image.Image:
    """The picture in a cell of a Hugging Face data set. Raises BrokenRow."""
    return open_picture(bytes((cell or {}).get("bytes") or b""), id)


def picture_at(path: Path, id: str) -> Image.Image:
    """The picture in a file. Raises BrokenRow."""
    return open_picture(columns.read_picture(path, "picture", id), id)


def read_object(folder: Path, *names: str) -> dict[str, Any]:
    """The object in the first of these JSON files that exists. Raises InputError if there is none."""
    for name in names:
        path = folder / name
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{path} cannot be read ({error}). Download it again.") from None
            if isinstance(found, dict):
                return found
    raise InputError(f"{folder} has no {names[0]}; pass the benchmark's folder (docs/evaluate.md).")


def decoded_mask(runs: list[int], height: int, width: int, *, border: bool) -> Tensor:
    """[start, length, start, length, …] over the pixels in row order → bool [height, width]."""
    flat = torch.zeros(height * width, dtype=torch.bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        flat[start : start + length] = True
    mask = flat.view(height, width)
    if border:
        mask[[0, -1]] = mask[:, [0, -1]] = True
    return mask
