"""Parquet tables of pairs with the columns of the Hugging Face version, of MagicBrush, or similar names."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p.base.errors import InputError, Ip2pError
from ip2p.data import columns, hub
from ip2p.data.handles import Lately
from ip2p.data.records import BrokenRow, MissingPart, Pair

GROUPS_KEPT = 2  # row groups in memory; one may be half a gigabyte
FILES_KEPT = 8
READ_AT_ONCE = 16  # footers read in parallel over the network


class ParquetSource:
    """The rows of parquet files, in file order; a row group is read whole and cached.

    Sequential reads are cheap; a random read loads a row group. `files`: paths, or with `remote` paths in the
    Hub's file system; `chosen`: columns by field. A row without an id is named by its number, a MagicBrush
    row by its picture and turn. Raises InputError for an unreadable file, unknown columns, or no rows.
    """

    endless = False

    def __init__(
        self,
        files: Sequence[Path | str],
        *,
        name: str,
        root: Path | None = None,
        key: str | None = None,
        remote: bool = False,
        chosen: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.remote = name, remote
        self.files = [str(path) for path in files]
        self.root = root  # base folder of pictures given by path
        self.key = key or columns.stamp(
            (Path(path) for path in self.files), "parquet", *sorted((chosen or {}).items())
        )
        self._open: Lately[Any] = Lately(FILES_KEPT)
        self._groups: Lately[Any] = Lately(GROUPS_KEPT)
        with ThreadPoolExecutor(READ_AT_ONCE if remote else 1) as pool:
            footers = list(pool.map(self._footer, self.files))
        # For each row group: its file, its number in the file, and its first row overall.
        self._where: list[tuple[int, int]] = []
        self._starts = [0]
        self._columns: list[dict[str, str]] = []
        for number, (names, sizes) in enumerate(footers):
            self._columns.append(columns.find_columns(names, of=self.files[number], chosen=chosen))
            rest = {"img_id", "turn_index", "scores", *columns.SCORES} & set(names)
            self._columns[-1] |= {name: name for name in sorted(rest)}
            for group, rows in enumerate(sizes):
                if rows:
                    self._where.append((number, group))
                    self._starts.append(self._starts[-1] + rows)
        if not len(self):
            raise InputError(f"{name} has no rows. Choose another data set.")

    def _footer(self, path: str) -> tuple[list[str], list[int]]:
        try:
            with self._opened(path) as file:
                footer = file.metadata
                groups = [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
                return list(file.schema_arrow.names), groups
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, EOFError):
            raise InputError(f"{path} is not a complete parquet file. Download or write it again.") from None
        except OSError as error:
            raise self._unread(path, error) from None

    def _unread(self, path: str, error: Exception) -> Ip2pError:
        if self.remote:
            return hub.refused(self.name, error)
        return InputError(f"{path} cannot be read ({error}). Check the file and its permissions.")

    def _opened(self, path: str) -> Any:
        # Read exact ranges: all ranges of a row group are known in advance.
        file = hub.filesystem().open(path, "rb", cache_type="none") if self.remote else path
        return pq.ParquetFile(file, pre_buffer=self.remote)

    def __len__(self) -> int:
        return self._starts[-1]

    def blocks(self) -> list[range]:
        return [range(a, b) for a, b in zip(self._starts, self._starts[1:], strict=False)]

    def __getitem__(self, row: int) -> Pair:
        if not 0 <= row < len(self):
            raise IndexError(row)
        place = bisect_right(self._starts, row) - 1
        number, group = self._where[place]
        table = self._groups.get(place, lambda: self._read(number, group))
        id = f"{row:07}"
        if isinstance(table, str):  # the error of an unreadable group
            raise BrokenRow(id, table)
        try:
            cells = table.slice(row - self._starts[place], 1).to_pylist()[0]
        except (pa.ArrowException, ValueError) as error:  # a string that is not UTF-8
            raise BrokenRow(id, f"the row cannot be read ({error})") from None
        return self._pair(cells, self._columns[number], id)

    def _read(self, number: int, group: int) -> Any:
        path = self.files[number]
        try:
            file = self._open.get(path, lambda: self._opened(path))
            wanted = list(dict.fromkeys(self._columns[number].values()))
            # Without threads: they do not survive a fork, and there are many workers already.
            return file.read_row_group(group, columns=wanted, use_threads=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, EOFError) as error:
            return f"row group {group} of {path} is damaged ({_first_line(error)})"
        except OSError as error:
            if self.remote:
                raise self._unread(path, error) from None
            return f"row group {group} of {path} cannot be read ({_first_line(error)})"

    def _pair(self, cells: dict[str, Any], names: dict[str, str], id: str) -> Pair:
        cell = {part: cells[name] for part, name in names.items()}
        if cell.get("id") not in (None, ""):
            id = columns.text(cell["id"], "id", id)
        elif cell.get("img_id") is not None:
            turn = cell.get("turn_index")
            id = columns.text(cell["img_id"]) + (f"-{turn}" if turn is not None else "")
        mask = cell.get("mask")
        return Pair(
            id=id,
            before=self._picture(cell["before"], "before", id),
            after=self._picture(cell["after"], "after", id),
            instruction=columns.text(cell["instruction"], "instruction", id),
            caption=columns.text(cell.get("caption"), "caption", id),
            edited_caption=columns.text(cell.get("edited_caption"), "edited_caption", id),
            mask=self._picture(mask, "mask", id) if _holds(mask) else None,
            scores=columns.scores_of(cell),
        )

    def _picture(self, cell: Any, part: str, id: str) -> bytes:
        if isinstance(cell, bytes) and cell:
            return cell
        if isinstance(cell, dict):
            if cell.get("bytes"):
                return bytes(cell["bytes"])
            cell = cell.get("path")
        if isinstance(cell, str) and cell and self.root is not None:
            return columns.read_picture(self.root / cell, part, id)
        raise MissingPart(id, f"{part}: the picture is missing")


def _holds(cell: Any) -> bool:
    return bool(cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else bool(cell)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
