"""WebDataset tar shards: the files of one key are one row. Headers are read once, rows by offset."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ip2p.base.errors import InputError
from ip2p.data import columns
from ip2p.data.handles import Lately
from ip2p.data.records import BrokenRow, MissingPart, Pair

FILES_KEPT = 8
# The possible files of a row, each with an offset and a size in its shard.
_PARTS = ("before", "after", "mask", "json", "instruction", "caption", "edited_caption")
_NAMES = {
    name: part
    for part, names in (columns.PICTURES | columns.WORDS).items()
    if part in _PARTS
    for name in names
}


class ShardSource:
    """The rows of tar files, in file order: `0001.before.png 0001.after.jpg 0001.json`.

    Texts come from `.json` (with the names of `columns`), or from `.txt` (the instruction) and
    `.caption.txt`. The id is the one in the JSON file, or else the key, prefixed with the shard's name if
    keys repeat across shards. Raises InputError for a file that is not a tar file, and for shards without
    pairs.
    """

    endless = False

    def __init__(self, files: Sequence[Path], *, name: str, chosen: Mapping[str, str] | None = None) -> None:
        self.name, self.files, self._chosen = name, list(files), dict(chosen or {})
        self.key = columns.stamp(self.files, "shards", *sorted(self._chosen.items()))
        parts = {stem: part for stem, part in _NAMES.items() if part not in self._chosen}
        parts |= {stem.lower(): part for part, stem in self._chosen.items()}
        self._open: Lately[Any] = Lately(FILES_KEPT)
        self._keys: list[str] = []
        self._shards: list[int] = []
        self._broken: dict[int, str] = {}  # row: why the shard is truncated there
        places: list[list[int]] = []
        seen: dict[str, None] = {}
        self._blocks: list[range] = []
        for number, path in enumerate(self.files):
            first = len(self._keys)
            rows, why = _index(path, seen, parts)
            for key, members in rows.items():
                self._keys.append(key)
                places.append([value for part in _PARTS for value in members.get(part, (-1, 0))])
            if why:
                self._broken[len(self._keys)] = why
                self._keys.append(path.stem)
                places.append([-1, 0] * len(_PARTS))
            self._shards += [number] * (len(self._keys) - first)
            if len(self._keys) > first:
                self._blocks.append(range(first, len(self._keys)))
        self._places = np.array(places, dtype=np.int64).reshape(-1, len(_PARTS), 2)
        lacking = [
            part
            for part in ("before", "after")
            if not (self._places[:, _PARTS.index(part), 0] >= 0).any() and not self._broken
        ]
        if not self._keys:
            raise InputError(f"{name} has no rows. Choose another data set.")
        for part in set(lacking) & self._chosen.keys():
            columns.pick(self._chosen[part], list(seen), part, of=name, what="file of a key")
        if lacking:
            raise columns.unknown_columns(name, list(seen), lacking, what="files of a key")
        self._repeated = len(set(self._keys)) < len(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def blocks(self) -> list[range]:
        return list(self._blocks)

    def __getitem__(self, row: int) -> Pair:
        if not 0 <= row < len(self):
            raise IndexError(row)
        id = self._keys[row]
        if self._repeated:
            id = f"{self.files[self._shards[row]].stem}/{id}"
        if row in self._broken:
            raise BrokenRow(id, self._broken[row])
        metadata: Any = {}
        if (data := self._read(row, "json", id)) is not None:
            try:
                metadata = json.loads(data)
            except ValueError as error:
                raise BrokenRow(id, f"its JSON cannot be read ({error})") from None
            if not isinstance(metadata, dict):
                raise BrokenRow(id, "its JSON is not an object")
        words = columns.row_texts(metadata, chosen=self._chosen, id=id)
        id = words.pop("id") or id
        for part in words:
            if not words[part] and (data := self._read(row, part, id)) is not None:
                words[part] = data.decode("utf-8", "replace").strip()
        if not words["instruction"] and (key := self._chosen.get("instruction")):
            raise MissingPart(id, f"instruction: there is no {key} in its JSON and no .{key}.txt")
        pictures = {part: self._read(row, part, id) for part in ("before", "after", "mask")}
        for part in ("before", "after"):
            if not pictures[part]:
                raise MissingPart(id, f"{part}: the picture is missing")
        return Pair(
            id=id,
            before=pictures["before"] or b"",
            after=pictures["after"] or b"",
            instruction=words["instruction"],
            caption=words["caption"],
            edited_caption=words["edited_caption"],
            mask=pictures["mask"],
            scores=columns.scores_of(metadata),
        )

    def _read(self, row: int, part: str, id: str) -> bytes | None:
        offset, size = map(int, self._places[row, _PARTS.index(part)])
        if offset < 0:
            return None
        path = self.files[self._shards[row]]
        try:
            file = self._open.get(path, partial(path.open, "rb"))
            file.seek(offset)
            data = file.read(size)
        except OSError as error:
            raise BrokenRow(id, f"{part}: {path} cannot be read ({error.strerror})") from None
        if len(data) < size:
            raise BrokenRow(id, f"{part}: {path} is cut short")
        return data


def _index(
    path: Path, seen: dict[str, None], parts: Mapping[str, str]
) -> tuple[dict[str, dict[str, tuple[int, int]]], str]:
    """Key → field → offset and size, in file order; and why the file is truncated, if it is.

    `seen` collects the name endings of all files, known or not; `parts`: the fields by name.
    """
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, _, file = member.name.removeprefix("./").rpartition("/")
                    key, _, ending = file.partition(".")
                    seen[ending] = None
                    if part := _part(ending, parts):
                        whole = f"{folder}/{key}" if folder else key
                        place = (member.offset_data, member.size)
                        rows.setdefault(whole, {}).setdefault(part, place)
            except tarfile.TarError as error:
                return rows, f"{path} is damaged or cut short ({error})"
    except tarfile.TarError:
        kind = "compressed; unpack it to .tar first" if _is_packed(path) else "not a tar file"
        raise InputError(f"{path} ({size:,} bytes) is {kind}. Shards are read by offset.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from None
    return rows, ""


def _is_packed(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))


def _part(ending: str, parts: Mapping[str, str]) -> str | None:
    """The field of a file name ending: before.png → before, json → json, txt → instruction."""
    stem, _, kind = ending.lower().rpartition(".")
    if f".{kind}" in columns.PICTURE_ENDINGS:
        part = parts.get(stem)
        return part if part in columns.PICTURES else None
    if kind == "json":
        return "json" if not stem else None
    if kind == "txt":
        part = parts.get(stem) if stem else "instruction"
        return part if part in columns.WORDS else None
    return None
