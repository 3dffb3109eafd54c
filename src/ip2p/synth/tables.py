"""Streams text tables row by row: JSONL, CSV, TSV, parquet, plain text. Files may exceed the memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ip2p.base.errors import InputError
from ip2p.pictures import images

LINE = "line"  # the column of a plain text file
ENDINGS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
_BATCH = 4096


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a table, by column; lines of a plain text file are in the column `LINE`.

    For a folder: the rows of all its tables, sorted by name. Raises InputError for a file that is missing,
    empty, of an unsupported type, truncated, or not UTF-8.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise images.missing_file(path)
    if path.is_dir():
        files = sorted(
            file
            for pattern in ("*", "*/*")
            for file in path.glob(pattern)
            if file.suffix.lower() in ENDINGS and file.is_file() and not file.name.startswith(".")
        )
        if not files:
            raise InputError(f"{path} contains no tables; choose a folder with {', '.join(ENDINGS)} files.")
    else:
        files = [path]
    for file in files:
        if file.stat().st_size == 0:
            raise InputError(f"{file} is empty (0 bytes). Download or write it again.")
        yield from parquet_rows([file]) if file.suffix.lower() == ".parquet" else _text(file)


def _text(path: Path) -> Iterator[dict[str, Any]]:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise InputError(f"{path} is not a supported table: {', '.join(ENDINGS)}. Rename or convert it.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if ending in (".csv", ".tsv"):
                for cells in csv.DictReader(file, delimiter="\t" if ending == ".tsv" else ","):
                    yield {key: value for key, value in cells.items() if key is not None}
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                yield _object(path, line, number) if ending == ".jsonl" else {LINE: line.strip()}
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a table ({error}). Fix it, or use JSONL.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from None


def _object(path: Path, line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if isinstance(row, str):  # a file of quoted captions
        return {LINE: row}
    if not isinstance(row, dict):
        raise InputError(f"{path}, line {number} is not a JSON object. Fix or remove the line.")
    return row


def parquet_rows(files: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The rows of parquet files (paths or open files)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            table = pq.ParquetFile(file)
            # Skip picture columns: a batch of them could take gigabytes.
            flat = [
                field.name
                for field in table.schema_arrow
                if not (pa.types.is_binary(field.type) or pa.types.is_nested(field.type))
            ]
            for batch in table.iter_batches(batch_size=_BATCH, columns=flat, use_threads=False):
                yield from batch.to_pylist()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, EOFError):
            raise InputError(f"{file} is not a complete parquet file. Download or write it again.") from None
        except OSError as error:
            raise InputError(
                f"{file} cannot be read ({error}). Check the file and its permissions."
            ) from None
