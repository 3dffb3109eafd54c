"""`open_source` opens a local path or a Hugging Face data set as rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ip2p.base.errors import InputError
from ip2p.base.files import is_hub_name
from ip2p.data import hub
from ip2p.data.columns import of_split
from ip2p.data.folders import TABLES, FolderSource, find_table, picture_folders, sidecar_rows
from ip2p.data.original import OriginalSource, is_original
from ip2p.data.records import Source
from ip2p.pictures import images
from ip2p.settings import parse_columns

MANIFEST = "manifest.jsonl"  # written by conversions (`data.convert`) and jobs
_READS = (
    "a parquet file or a folder of them, tar shards, the paper's folders, or a table (.csv, .json, .jsonl) "
    "of pictures"
)


def open_source(
    path: str,
    *,
    stream: bool = False,
    revision: str | None = None,
    split: str = "train",
    columns: str | None = None,
) -> Source:
    """Open the rows of a data set: a local file or folder, or a Hugging Face data set, owner/name.

    `stream`: read a Hugging Face data set one row group at a time, without downloading it. `revision`: of a
    Hugging Face data set. `split`: which files to read, if their names contain splits. `columns`: the
    names of columns, "original=src,instruction=edit,edited=tgt"; None: the known names. Raises InputError for
    a missing, empty or unsupported input, and ModelError if the Hub is needed and cannot be reached.
    """
    if not path.strip():
        raise InputError(f"no data set given; choose {_READS}, or a Hugging Face owner/name.")
    try:
        chosen = parse_columns(columns) if columns else {}
    except ValueError as error:
        raise InputError(f"--columns {columns}: {error}.") from None
    here = Path(path).expanduser()
    if not here.exists():
        if is_hub_name(path):
            return _from_hub(path, stream=stream, revision=revision, split=split, chosen=chosen)
        raise images.missing_file(here)
    for flag, given in (("--revision", revision is not None), ("--stream", stream)):
        if given:
            raise InputError(f"{path} is a local path, so {flag} does not apply; remove it.")
    return _file(here, path, chosen) if here.is_file() else _folder(here, path, split, chosen)


def _from_hub(
    name: str, *, stream: bool, revision: str | None, split: str, chosen: Mapping[str, str]
) -> Source:
    from ip2p.data.parquet import ParquetSource

    named = "".join(f"&{part}={column}" for part, column in sorted(chosen.items()))
    if stream:
        paths, commit = hub.remote_files(name, split, revision)
        key = f"{name}@{commit}/{split}{named}"
        return ParquetSource(paths, name=name, key=key, remote=True, chosen=chosen)
    files, commit = hub.cached_files(name, split, revision)
    return ParquetSource(files, name=name, key=f"{name}@{commit}/{split}{named}", chosen=chosen)


def _file(path: Path, name: str, chosen: Mapping[str, str]) -> Source:
    ending = path.suffix.lower()
    if path.stat().st_size == 0:
        raise InputError(f"{name} is empty (0 bytes). Download or write it again.")
    if ending == ".parquet":
        from ip2p.data.parquet import ParquetSource

        return ParquetSource([path], name=name, root=path.parent, chosen=chosen)
    if ending == ".tar":
        from ip2p.data.shards import ShardSource

        return ShardSource([path], name=name, chosen=chosen)
    if ending in TABLES:
        return FolderSource(path, name=name, chosen=chosen)
    raise InputError(f"{name} is not a supported data set: {_READS}.")


def _folder(folder: Path, name: str, split: str, chosen: Mapping[str, str]) -> Source:
    _check_finished(folder)
    if is_original(folder):
        return OriginalSource(folder, name=name, chosen=chosen)
    for ending in (".parquet", ".tar"):
        if files := _files(folder, ending, split):
            if ending == ".tar":
                from ip2p.data.shards import ShardSource

                return ShardSource(files, name=name, chosen=chosen)
            from ip2p.data.parquet import ParquetSource

            return ParquetSource(files, name=name, root=folder, chosen=chosen)
    if table := find_table(folder):
        return FolderSource(table, name=name, chosen=chosen)
    if rows := sidecar_rows(folder):
        return FolderSource(folder, name=name, rows=rows)
    if not any(folder.iterdir()):
        raise InputError(f"{name} is an empty folder. Choose {_READS}.")
    if picture_folders(folder):
        raise InputError(
            f"{name} has pictures but no table; write {folder / 'metadata.csv'} "
            "with the columns file_name and instruction, or a text file for each pair: before/001.txt."
        )
    raise InputError(f"{name} contains no supported data set: {_READS}.")


def _files(folder: Path, ending: str, split: str) -> list[Path]:
    # In the folder, in data/ (as on the Hub), or in one folder per split; not deeper.
    there = sorted(
        path.relative_to(folder).as_posix()
        for pattern in (f"*{ending}", f"*/*{ending}", f"data/*/*{ending}")
        for path in folder.glob(pattern)
        if not path.name.startswith(".")
    )
    return [folder / file for file in of_split(there, split, of=str(folder))] if there else []


def _check_finished(folder: Path) -> None:
    """Raise InputError for an unfinished conversion or job, whose rows are incomplete."""
    try:
        with open(folder / MANIFEST, encoding="utf-8") as file:
            first = json.loads(file.readline())
            if any('"done"' in line for line in file):
                return
            if "job" in first:
                raise InputError(
                    f"{folder} is not finished: its job was stopped or is still running. "
                    "Run the same command again."
                )
            if "convert" in first:
                source, to = first["convert"]["source"], first["convert"]["to"]
                raise InputError(
                    f"{folder} is an unfinished conversion. "
                    f"Resume it: ip2p data convert {source} {folder} --to {to}"
                )
    except (OSError, ValueError, KeyError, TypeError):
        return  # a manifest of another tool
