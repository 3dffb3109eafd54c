"""Pictures in folders with a table of file names: before/ and after/ next to metadata.csv or .jsonl."""

from __future__ import annotations

import csv
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from ip2p.base.errors import InputError
from ip2p.data import columns
from ip2p.data.records import BrokenRow, Pair

TABLES = (".jsonl", ".csv", ".tsv")
_STEMS = ("metadata", "captions", "pairs", "edits")
_NOT_TABLES = {"manifest", "quarantine"}  # files that our jobs write
# Picture folders for tables with one file name per row.
FOLDERS = (
    *(("before", "after"), ("input", "output"), ("source", "target"), ("original", "edited")),
    *(("inputs", "outputs"), ("sources", "targets"), ("originals", "edits")),
)


def find_table(folder: Path) -> Path | None:
    """The table of a folder: metadata.jsonl or .csv, captions.*, …, or else its only table."""
    tables = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in TABLES and path.stem not in _NOT_TABLES
    )
    for stem in _STEMS:
        for ending in TABLES:
            if (path := folder / f"{stem}{ending}") in tables:
                return path
    return tables[0] if len(tables) == 1 else None


def picture_folders(folder: Path) -> tuple[Path, Path] | None:
    """The picture folders (before, after) inside a folder, or None."""
    for names in FOLDERS:
        before, after = (folder / name for name in names)
        if before.is_dir() and after.is_dir():
            return before, after
    return None


class FolderSource:
    """The rows of a CSV, TSV or JSONL file with columns of picture paths, relative to the file.

    With a single column of file names (`file_name`, `name`, `image`), the files are in two folders next to
    the table. The id is the table's id, or else the row number. Raises InputError for an unreadable table,
    unknown columns, or no rows.
    """

    endless = False

    def __init__(self, table: Path, *, name: str) -> None:
        self.name, self.table = name, table
        self._rows = _read_table(table)
        if not self._rows:
            raise InputError(f"{table} has no rows. Choose another data set.")
        seen = list(dict.fromkeys(key for row in self._rows if isinstance(row, dict) for key in row))
        self._folders: tuple[Path, Path] | None = None
        self._columns = self._find(seen)

    def _find(self, seen: list[str]) -> dict[str, str]:
        try:
            return columns.find_columns(seen, of=str(self.table), paths=True)
        except InputError:
            folders = picture_folders(self.table.parent)
            plain = {name.strip().lower(): name for name in seen}
            file = next(
                (plain[n] for n in ("file_name", "filename", "file", "name", "image") if n in plain), None
            )
            if folders is None or file is None:
                raise
            self._folders = folders
            rest = [name for name in seen if name != file]
            found = columns.find_columns([*rest, "before", "after"], of=str(self.table))
            return found | {"before": file, "after": file}

    @cached_property
    def key(self) -> str:
        files = [path for row in range(len(self)) for path in self._paths(row) if path is not None]
        return columns.stamp([self.table, *files], "folders")

    def _paths(self, row: int) -> list[Path | None]:
        """The paths of the pictures of a row: before, after, mask."""
        cells = self._rows[row]
        found: list[Path | None] = []
        for number, part in enumerate(("before", "after", "mask")):
            name = self._text(cells, part) if isinstance(cells, dict) else ""
            folder = self._folders[number] if self._folders and number < 2 else self.table.parent
            found.append(folder / name if name else None)
        return found

    def _text(self, cells: dict[str, Any], part: str) -> str:
        return columns.text(cells.get(self._columns.get(part, "")))

    def __len__(self) -> int:
        return len(self._rows)

    def blocks(self) -> list[range]:
        return [range(len(self))]

    def __getitem__(self, row: int) -> Pair:
        cells, id = self._rows[row], f"{row:07}"
        if isinstance(cells, str):
            raise BrokenRow(id, cells)
        id = self._text(cells, "id") or id
        before, after, mask = self._paths(row)
        return Pair(
            id=id,
            before=columns.read_picture(before, "before", id),
            after=columns.read_picture(after, "after", id),
            mask=None if mask is None else columns.read_picture(mask, "mask", id),
            scores=columns.scores_of(cells),
            instruction=self._text(cells, "instruction"),
            caption=self._text(cells, "caption"),
            edited_caption=self._text(cells, "edited_caption"),
        )


def _read_table(path: Path) -> list[dict[str, Any] | str]:
    """The rows by column; an unreadable row is replaced by the reason."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() != ".jsonl":
                tab = path.suffix.lower() == ".tsv"
                return [dict(row) for row in csv.DictReader(file, delimiter="\t" if tab else ",")]
            return [_object(line, number) for number, line in enumerate(file, 1) if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a table ({error}). Fix it, or use JSONL.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from None


def _object(line: str, number: int) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    return row if isinstance(row, dict) else f"line {number} of the table is not a JSON object"
