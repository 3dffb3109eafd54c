"""Pictures in folders with a table of file names, or with a text file beside each pair."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ip2p.base.errors import InputError
from ip2p.data import columns
from ip2p.data.records import BrokenRow, MissingPart, Pair

TABLES = (".jsonl", ".csv", ".tsv", ".json")
_STEMS = ("metadata", "captions", "pairs", "edits")
_NOT_TABLES = {"manifest", "quarantine"}  # files that our jobs write
# Picture folders for tables with one file name per row.
FOLDERS = (
    *(("before", "after"), ("input", "output"), ("source", "target"), ("original", "edited")),
    *(("inputs", "outputs"), ("sources", "targets"), ("originals", "edits")),
)
# Folders of text files, one instruction each.
TEXT_FOLDERS = ("instruction", "instructions", "prompt", "prompts", "edit", "edits", "text", "texts")
_SIDES = {name: number for names in FOLDERS for number, name in enumerate(names)}
_FLAT = re.compile(rf"(.+)[._-]({'|'.join(_SIDES)})", re.IGNORECASE)  # 001_before


def find_table(folder: Path) -> Path | None:
    """The table of a folder: metadata.jsonl or .csv, captions.*, …, or else its only table."""
    tables = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in TABLES and path.stem not in _NOT_TABLES
    )
    arrays = [path for path in tables if path.suffix.lower() == ".json"]
    tables = [path for path in tables if path not in arrays] or [path for path in arrays if _is_array(path)]
    for stem in _STEMS:
        for ending in TABLES:
            if (path := folder / f"{stem}{ending}") in tables:
                return path
    return tables[0] if len(tables) == 1 else None


def _is_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def picture_folders(folder: Path) -> tuple[Path, Path] | None:
    """The picture folders (before, after) inside a folder, or None."""
    for names in FOLDERS:
        before, after = (folder / name for name in names)
        if before.is_dir() and after.is_dir():
            return before, after
    return None


def sidecar_rows(folder: Path) -> list[dict[str, Any] | str]:
    """The pairs of a folder without a table, whose instructions are in text files; [] if there are none.

    The pictures of a pair have one name in two folders (before/001.jpg, after/001.png), or lie together as
    001_before.jpg and 001_after.png. A name that stands for several pictures gives the reason as its row.
    """
    sides: tuple[dict[str, list[Path]], dict[str, list[Path]]] = (defaultdict(list), defaultdict(list))
    folders = picture_folders(folder)
    for number, inner in enumerate(folders or (folder,)):
        for path in sorted(inner.iterdir()):
            if path.suffix.lower() not in columns.PICTURE_ENDINGS or path.name.startswith("."):
                continue
            if folders:
                sides[number][path.stem].append(path)
            elif match := _FLAT.fullmatch(path.stem):
                sides[_SIDES[match[2].lower()]][match[1]].append(path)
    places = (folder, *(folders or ()), *(folder / name for name in TEXT_FOLDERS))
    stems = sorted(sides[0].keys() | sides[1].keys())
    if not stems or not any(next(place.glob("*.txt"), None) for place in places):
        return []
    rows: list[dict[str, Any] | str] = []
    for stem in stems:
        before, after = sides[0].get(stem, []), sides[1].get(stem, [])
        if len(before) > 1 or len(after) > 1:
            listed = ", ".join(str(path.relative_to(folder)) for path in [*before, *after])
            rows.append(f"two pictures are the same half of the pair {stem}: {listed}")
            continue
        names = {"before": before, "after": after}
        rows.append(
            {"id": stem} | {part: str(path[0].relative_to(folder)) for part, path in names.items() if path}
        )
    return rows


class FolderSource:
    """The rows of a CSV, TSV, JSON or JSONL file with columns of picture paths, relative to the file.

    Paths may also start at a folder above, or at an `images` folder beside these, as in published sets. With
    a single column of file names (`file_name`, `name`, `image`), the files are in two folders next to the
    table, or it is the picture that no other column names. Without a column of instructions, they are in
    text files with the pictures' names. The id is the table's id, or else the row number. `chosen`: columns
    by field; `rows`: those of `sidecar_rows`, with a folder as the table. Raises InputError for an unreadable
    table, unknown columns, or no rows.
    """

    endless = False

    def __init__(
        self,
        table: Path,
        *,
        name: str,
        chosen: Mapping[str, str] | None = None,
        rows: list[dict[str, Any] | str] | None = None,
    ) -> None:
        self.name, self.table, self._chosen = name, table, dict(chosen or {})
        self._root = table.parent if rows is None else table
        self._rows = _read_table(table) if rows is None else rows
        if not self._rows:
            raise InputError(f"{table} has no rows. Choose another data set.")
        seen = list(dict.fromkeys(key for row in self._rows if isinstance(row, dict) for key in row))
        self._folders: tuple[Path, Path] | None = None
        self._columns = self._find(seen)
        self._root = self._find_root()
        if lacking := [part for part in columns.NEEDED if part not in self._columns]:
            sidecars = (self._sidecar(row) for row in range(min(len(self), 100)))
            if lacking != ["instruction"] or not any(sidecars):
                raise columns.unknown_columns(str(table), seen, lacking)

    def _find(self, seen: list[str]) -> dict[str, str]:
        found = columns.match_columns(seen, of=str(self.table), paths=True, chosen=self._chosen)
        free = {name.strip().lower(): name for name in seen if name not in found.values()}
        file = next((free[n] for n in ("file_name", "filename", "file", "name", "image") if n in free), None)
        lacking = [part for part in ("before", "after") if part not in found]
        if file is not None and len(lacking) == 1:
            return found | {lacking[0]: file}
        if file is not None and lacking and (folders := picture_folders(self._root)):
            self._folders = folders
            return found | {"before": file, "after": file}
        return found

    def _find_root(self) -> Path:
        """The folder that the paths of pictures start at, by the first row that names one."""
        names = (self._file(row, "before") for row in self._rows if isinstance(row, dict))
        name = next(filter(None, names), "")
        above = [self._root, *self._root.absolute().parents[:3]]
        places = [place for folder in above for place in (folder, folder / "images")]
        return next((place for place in places if name and (place / name).is_file()), self._root)

    @cached_property
    def key(self) -> str:
        files = [path for row in range(len(self)) for path in self._paths(row) if path is not None]
        if "instruction" not in self._columns:
            files += [path for row in range(len(self)) if (path := self._sidecar(row))]
        return columns.stamp([self.table, *files], "folders", *sorted(self._chosen.items()))

    def _paths(self, row: int) -> list[Path | None]:
        """The paths of the pictures of a row: before, after, mask."""
        cells = self._rows[row]
        found: list[Path | None] = []
        for number, part in enumerate(("before", "after", "mask")):
            name = self._file(cells, part) if isinstance(cells, dict) else ""
            folder = self._folders[number] if self._folders and number < 2 else self._root
            found.append(folder / name if name else None)
        return found

    def _sidecar(self, row: int) -> Path | None:
        """The text file with the instruction of a row, if there is one."""
        cells = self._rows[row]
        pictures = [path for path in self._paths(row)[:2] if path is not None]
        id = self._file(cells, "id") if isinstance(cells, dict) else ""
        stems = dict.fromkeys(filter(None, (id, *(path.stem for path in pictures))))
        places = (*(self._root / name for name in TEXT_FOLDERS), self._root)
        paths = [path.with_suffix(".txt") for path in pictures]
        paths += [place / f"{stem}.txt" for stem in stems for place in places]
        return next((path for path in paths if path.is_file()), None)

    def _instruction(self, row: int, cells: dict[str, Any], id: str) -> str:
        if "instruction" in self._columns:
            return self._text(cells, "instruction", id)
        path = self._sidecar(row)
        if path is None:
            stem = next((path.stem for path in self._paths(row)[:2] if path is not None), id)
            raise MissingPart(id, f"there is no {stem}.txt with its instruction")
        try:
            return path.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BrokenRow(id, f"{path} cannot be read as UTF-8 text ({error})") from None

    def _text(self, cells: dict[str, Any], part: str, id: str = "") -> str:
        return columns.text(cells.get(self._columns.get(part, "")), part, id)

    def _file(self, cells: dict[str, Any], part: str) -> str:
        """The name of a file; "" for none. An object's is its `path`, as in the rows of `datasets`."""
        cell = cells.get(self._columns.get(part, ""))
        cell = cell.get("path") if isinstance(cell, Mapping) else cell
        return "" if isinstance(cell, Mapping) else columns.text(cell)

    def __len__(self) -> int:
        return len(self._rows)

    def blocks(self) -> list[range]:
        return [range(len(self))]

    def __getitem__(self, row: int) -> Pair:
        cells, id = self._rows[row], f"{row:07}"
        if isinstance(cells, str):
            raise BrokenRow(id, cells)
        id = self._text(cells, "id", id) or id
        before, after, mask = self._paths(row)
        return Pair(
            id=id,
            before=columns.read_picture(before, "before", id),
            after=columns.read_picture(after, "after", id),
            mask=None if mask is None else columns.read_picture(mask, "mask", id),
            scores=columns.scores_of(cells),
            instruction=self._instruction(row, cells, id),
            caption=self._text(cells, "caption", id),
            edited_caption=self._text(cells, "edited_caption", id),
        )


def _read_table(path: Path) -> list[dict[str, Any] | str]:
    """The rows by column; an unreadable row is replaced by the reason."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            ending = path.suffix.lower()
            if ending in (".csv", ".tsv"):
                return [
                    dict(row) for row in csv.DictReader(file, delimiter="\t" if ending == ".tsv" else ",")
                ]
            if ending == ".jsonl":
                rows = [_object(line, number) for number, line in enumerate(file, 1) if line.strip()]
            else:
                rows = _array(file.read(), path)
            return [turn for row in rows for turn in _turns(row)]
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


def _array(text: str, path: Path) -> list[dict[str, Any] | str]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}). Fix it, or download it again.") from None
    if not isinstance(rows, list):
        raise InputError(f"{path} is not a JSON array of objects, one for each pair. Write it as one.")
    return [
        row if isinstance(row, dict) else f"entry {n} is not a JSON object" for n, row in enumerate(rows, 1)
    ]


def _turns(row: dict[str, Any] | str) -> Iterator[dict[str, Any] | str]:
    """The pairs of a row; several for the chains of SEED-Data-Edit: source_image, edit_image_1, …"""
    if isinstance(row, str) or "edit_image_1" not in row or "instruction_1" not in row:
        yield row
        return
    before, number = row.get("source_image"), 1
    while (after := row.get(f"edit_image_{number}")) is not None:
        yield {"source_image": before, "target_image": after, "instruction": row.get(f"instruction_{number}")}
        before, number = after, number + 1
