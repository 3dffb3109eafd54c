"""Converts any source to any supported layout, in parts. It can be killed at any point and resumed.

A part is a range of rows; the `ledger` commits its files. The index files (`seeds.json`, `metadata.jsonl`)
are written last, from the manifest alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image

from ip2p.base.errors import InputError
from ip2p.base.files import make_folder, replacing, write_text
from ip2p.base.ledger import Files, Ledger, Line, open_ledger, parse_lines
from ip2p.data.original import METADATA, PROMPT, SEEDS
from ip2p.data.records import BrokenRow, Pair, Source, open_picture

if TYPE_CHECKING:
    from numpy.typing import NDArray

Layout = Literal["parquet", "magicbrush", "original", "shards", "folders"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
KIND = "convert"
QUARANTINE = "quarantine.jsonl"
ROWS_A_GROUP = 100
MAX_BROKEN = 0.01
# Fields that a layout cannot hold. Class labels (`Pair.labels`) are generated on the fly and never written.
HOLDS_NO: dict[Layout, tuple[str, ...]] = {
    "parquet": ("mask", "labels"),
    "magicbrush": ("caption", "edited_caption", "scores", "labels"),
    "original": ("mask", "labels"),
    "shards": ("labels",),
    "folders": ("labels",),
}
# Files that the layouts write to a folder and may therefore remove.
_OURS = (
    "data/*.parquet",
    "*.tar",
    SEEDS,
    METADATA,
    QUARANTINE,
    "before/*",
    "after/*",
    "mask/*",
    f"*/{PROMPT}",
)


@dataclass(frozen=True)
class Converted:
    """The result of `convert`. left_out: the number of rows with a field that the layout cannot hold."""

    rows: int
    broken: tuple[tuple[str, str], ...]  # id, reason
    left_out: dict[str, int]

    def lines(self, to: Layout) -> list[str]:
        """Warnings for display."""
        lines = []
        if self.left_out:
            lost = ", ".join(f"{name} ({rows:,} rows)" for name, rows in self.left_out.items())
            lines.append(f"not written, because the layout {to} cannot hold it: {lost}")
        if self.broken:
            lines.append(f"{len(self.broken):,} broken rows were skipped and are listed in {QUARANTINE}")
        return lines


def convert(
    source: Source,
    target: Path,
    to: Layout,
    *,
    count: int | None = None,
    shard_rows: int = 1000,
    overwrite: bool = False,
    max_broken: float = MAX_BROKEN,
    done: Callable[[int], None] = lambda rows: None,
) -> Converted:
    """Write the rows of `source`, or the first `count`, to the folder `target` in the layout `to`.

    Encoded pictures are copied byte for byte; pixels are encoded as PNG. A call after an interruption writes
    the missing parts. Broken rows are skipped and listed in quarantine.jsonl. `done` is called with the
    number of rows of each part. Raises InputError for an endless source without a count; for a folder that
    holds something else, was started with other settings or is locked by another process; and if more than
    the fraction `max_broken` of the rows are broken.
    """
    if source.endless and count is None:
        raise InputError(f"{source.name} is endless; set a number of rows, such as --count 10000.")
    total = len(source) if count is None else min(count, len(source))
    header = {"source": source.name, "key": source.key, "to": to, "rows": total, "shard_rows": shard_rows}
    if target.suffix in (".parquet", ".tar", ".csv", ".jsonl"):
        raise InputError(f"{target} must be a folder; remove {target.suffix} from its name.")
    make_folder(target)
    with open_ledger(
        target, KIND, header, remove=_remove_written, overwrite=overwrite, phrase=_phrase
    ) as ledger:
        writer = _WRITERS[to](ledger)
        for part, start in enumerate(range(0, total, shard_rows)):
            rows = range(start, min(start + shard_rows, total))
            if part not in ledger.done:
                ledger.append({"part": part} | _write_part(source, rows, writer, part, HOLDS_NO[to]))
            broken = [row for line in ledger.done.values() for row in line["broken"]]
            if len(broken) > max_broken * total:
                first = "; ".join(f"{id}: {reason}" for id, reason in broken[:3])
                raise InputError(
                    f"{len(broken):,} of the first {rows.stop:,} rows of {source.name} are broken; the "
                    f"limit is {max_broken:.0%} of {total:,}. {first}. Check the data: ip2p data check"
                )
            done(len(rows))
        broken = [row for _, line in sorted(ledger.done.items()) for row in line["broken"]]
        if broken:
            lines = (json.dumps({"id": id, "reason": why}, ensure_ascii=False) + "\n" for id, why in broken)
            write_text(target / QUARANTINE, "".join(lines))
        writer.finish()
        ledger.finish()
    lost: Counter[str] = Counter()
    for line in ledger.done.values():
        lost.update(line["left_out"])
    return Converted(total - len(broken), tuple((id, why) for id, why in broken), dict(lost))


def _write_part(source: Source, rows: range, writer: _Writer, part: int, holds_no: Sequence[str]) -> Line:
    """Write the rows of a part and return its manifest line."""
    broken: list[tuple[str, str]] = []
    lost: Counter[str] = Counter()

    def whole() -> Iterator[tuple[int, Pair]]:
        for row in rows:
            try:
                pair = source[row]
                for picture in (pair.before, pair.after):
                    open_picture(picture, pair.id)
            except BrokenRow as error:
                broken.append((error.id, error.reason))
                continue
            lost.update(name for name in holds_no if getattr(pair, name))
            yield row, pair

    files, index = writer.write(part, whole())
    return {"files": files, "index": index, "broken": broken, "left_out": dict(lost)}


def encoded(picture: bytes | NDArray[np.uint8]) -> bytes:
    """The file bytes of a picture; pixels are encoded as PNG."""
    if isinstance(picture, bytes):
        return picture
    buffer = io.BytesIO()
    # Higher levels take several times as long as drawing the picture and save only 10%.
    Image.fromarray(picture).save(buffer, "PNG", compress_level=2)
    return buffer.getvalue()


def _remove_written(folder: Path) -> None:
    """Remove the output of a conversion in any layout."""
    for pattern in _OURS:
        for path in list(folder.glob(pattern)):
            if path.name == PROMPT:
                shutil.rmtree(path.parent)
            else:
                path.unlink()


def _phrase(name: str, before: object, now: object) -> tuple[str, str]:
    texts = {"source": "from {}", "key": "from other data", "to": "with --to {}", "rows": "with {} rows"}
    text = (texts | {"shard_rows": "with --shard-rows {}"})[name]
    return text.format(before), text.removeprefix("with ").format(now)


# --- the layouts ----------------------------------------------------------------------------------


class _Writer:
    """Writes the rows of a part; returns its files and the index entries that `finish` needs."""

    def __init__(self, ledger: Ledger) -> None:
        self.folder, self.ledger = ledger.folder, ledger

    def write(self, part: int, rows: Iterator[tuple[int, Pair]]) -> tuple[Files, list[Any]]:
        raise NotImplementedError

    def finish(self) -> None:
        """Write the index files."""

    def index(self) -> Iterator[Any]:
        """The index entries of all parts, in order."""
        for _, line in sorted(self.ledger.done.items()):
            yield from line["index"]

    def put(self, files: Files, name: str, data: bytes) -> str:
        # Not synced, since there are thousands. A file lost in a power failure has another size than in the
        # manifest.
        with self.ledger.write(name, files, sync=False) as temporary:
            temporary.write_bytes(data)
        return name


class _Parquet(_Writer):
    """The five columns of the Hugging Face version, plus ids and scores."""

    def schema(self) -> Any:
        return hub_schema(
            {
                "original_image": "Image",
                "original_prompt": "string",
                "edit_prompt": "string",
                "edited_prompt": "string",
                "edited_image": "Image",
                "id": "string",
                "scores": "string",
            }
        )

    def cells(self, row: int, pair: Pair) -> dict[str, object]:
        return {
            "original_image": _image(pair.before, f"{row:07}_0"),
            "original_prompt": pair.caption,
            "edit_prompt": pair.instruction,
            "edited_prompt": pair.edited_caption,
            "edited_image": _image(pair.after, f"{row:07}_1"),
            "id": pair.id,
            "scores": _json(dict(pair.scores)).decode(),
        }

    def write(self, part: int, rows: Iterator[tuple[int, Pair]]) -> tuple[Files, list[Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        # Not next to the manifest: Arrow and the Hugging Face tools treat every file in a folder as parquet.
        files: Files = {}
        schema = self.schema()
        with (
            self.ledger.write(f"data/train-{part:05}.parquet", files) as temporary,
            pq.ParquetWriter(temporary, schema) as writer,
        ):
            group: list[dict[str, object]] = []
            for row, pair in rows:
                group.append(self.cells(row, pair))
                if len(group) == ROWS_A_GROUP:
                    writer.write_table(pa.Table.from_pylist(group, schema))
                    group = []
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema))
        return files, []


class _MagicBrush(_Parquet):
    """MagicBrush's columns, plus ids."""

    def schema(self) -> Any:
        return hub_schema(
            {
                "img_id": "string",
                "turn_index": "int32",
                "source_img": "Image",
                "mask_img": "Image",
                "instruction": "string",
                "target_img": "Image",
                "id": "string",
            }
        )

    def cells(self, row: int, pair: Pair) -> dict[str, object]:
        turn = re.fullmatch(r"(.+)-(\d{1,6})", pair.id)
        return {
            "img_id": turn[1] if turn else pair.id,
            "turn_index": int(turn[2]) if turn else 1,
            "source_img": _image(pair.before, f"{row:07}-input"),
            "mask_img": None if pair.mask is None else _image(pair.mask, f"{row:07}-mask"),
            "instruction": pair.instruction,
            "target_img": _image(pair.after, f"{row:07}-output"),
            "id": pair.id,
        }


class _Shards(_Writer):
    """Tar files of `0000001.before.jpg .after.jpg .mask.png .json`."""

    def write(self, part: int, rows: Iterator[tuple[int, Pair]]) -> tuple[Files, list[Any]]:
        files: Files = {}
        with (
            self.ledger.write(f"train-{part:06}.tar", files) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for row, pair in rows:
                members = {}
                for part_name, data in _pictures(pair):
                    members[f"{part_name}{ending(data)}"] = data
                members["json"] = _json(_words(pair))
                for name, data in members.items():
                    member = tarfile.TarInfo(f"{row:07}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return files, []


class _Folders(_Writer):
    """before/, after/ and mask/, then metadata.jsonl: an imagefolder of Hugging Face's `datasets`.

    Each picture is a column that ends in `_file_name`; `datasets` calls it before, after and mask.
    """

    def write(self, part: int, rows: Iterator[tuple[int, Pair]]) -> tuple[Files, list[Any]]:
        files: Files = {}
        index = []
        for row, pair in rows:
            line = {
                f"{name}_file_name": self.put(files, f"{name}/{row:07}{ending(data)}", data)
                for name, data in _pictures(pair)
            }
            index.append(line | _words(pair))
        return files, index

    def finish(self) -> None:
        write_text(self.folder / METADATA, "".join(_json(line).decode() + "\n" for line in self.index()))


class _Original(_Writer):
    """The layout of the paper's code; rows of one prompt share a folder if their ids are NAME/SEED.

    Pictures are named .jpg regardless of their format, because that code opens them by this name. A row
    without a seed uses its row number.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self.taken: dict[str, tuple[str, set[int]]] = {}  # folder: its prompt and seeds
        for name, seed, prompt in self.index():
            self.taken.setdefault(name, (prompt, set()))[1].add(seed)

    def write(self, part: int, rows: Iterator[tuple[int, Pair]]) -> tuple[Files, list[Any]]:
        files: Files = {}
        index = []
        for row, pair in rows:
            words = {"caption": pair.caption, "input": pair.caption}
            words |= {"edit": pair.instruction, "output": pair.edited_caption}
            prompt = _json(words)
            digest = hashlib.sha256(prompt).hexdigest()[:16]
            name, seed = self._place(row, pair, digest)
            index.append((name, seed, digest))
            inner = self.folder / name
            inner.mkdir(exist_ok=True)
            # This file may already contain scores of other seeds, possibly from another part.
            scores = [line for line in _lines_of(inner / METADATA) if line.get("seed") != seed]
            scores.append({"seed": seed} | {k: v for k, v in pair.scores.items() if k != "seed"})
            if pair.id != f"{name}/{seed}":
                scores[-1]["id"] = pair.id
            write = {PROMPT: prompt, METADATA: b"".join(_json(line) + b"\n" for line in scores)}
            for file, data in write.items():
                with replacing(inner / file, sync=False) as temporary:
                    temporary.write_bytes(data)
            self.put(files, f"{name}/{seed}_0.jpg", encoded(pair.before))
            self.put(files, f"{name}/{seed}_1.jpg", encoded(pair.after))
        return files, index

    def _place(self, row: int, pair: Pair, prompt: str) -> tuple[str, int]:
        known = re.fullmatch(r"(\d{7})/(\d+)", pair.id)
        seed = int(known[2]) if known else int(pair.scores.get("seed", row))
        first = name = known[1] if known else f"{row:07}"
        number = 1
        while name in self.taken and (self.taken[name][0] != prompt or seed in self.taken[name][1]):
            number += 1
            name = f"{first}-{number}"
        self.taken.setdefault(name, (prompt, set()))[1].add(seed)
        return name, seed

    def finish(self) -> None:
        seeds: dict[str, list[int]] = {}
        for name, seed, _ in self.index():
            seeds.setdefault(name, []).append(seed)
        write_text(self.folder / SEEDS, json.dumps(list(seeds.items())))


_WRITERS: dict[Layout, type[_Writer]] = {
    "parquet": _Parquet,
    "magicbrush": _MagicBrush,
    "original": _Original,
    "shards": _Shards,
    "folders": _Folders,
}


def hub_schema(kinds: dict[str, str]) -> Any:
    """A schema with the Hugging Face metadata for images. kinds: Image, string or int32 by column."""
    import pyarrow as pa

    types = {"Image": pa.struct([("bytes", pa.binary()), ("path", pa.string())])}
    types |= {"string": pa.string(), "int32": pa.int32()}
    features = {
        name: {"_type": "Image"} if kind == "Image" else {"dtype": kind, "_type": "Value"}
        for name, kind in kinds.items()
    }
    note = json.dumps({"info": {"features": features}})
    return pa.schema([(name, types[kind]) for name, kind in kinds.items()], metadata={"huggingface": note})


def _image(picture: bytes | NDArray[np.uint8], stem: str) -> dict[str, object]:
    data = encoded(picture)
    return {"bytes": data, "path": stem + ending(data)}


def ending(data: bytes) -> str:
    """The file name extension of a picture, from its first bytes."""
    heads = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif"}
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return next((name for head, name in heads.items() if data.startswith(head)), ".png")


def _pictures(pair: Pair) -> list[tuple[str, bytes]]:
    pictures = [("before", encoded(pair.before)), ("after", encoded(pair.after))]
    return pictures if pair.mask is None else [*pictures, ("mask", pair.mask)]


def _words(pair: Pair) -> dict[str, Any]:
    words = {"id": pair.id, "instruction": pair.instruction}
    words |= {"caption": pair.caption, "edited_caption": pair.edited_caption}
    return {k: v for k, v in words.items() if v} | ({"scores": dict(pair.scores)} if pair.scores else {})


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=float).encode()  # also for NumPy numbers


def _lines_of(path: Path) -> list[Line]:
    return list(parse_lines(path.read_bytes(), path)) if path.exists() else []
