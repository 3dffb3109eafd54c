"""`open_source`: what lies at a path, or under a hub's name, as rows."""

from __future__ import annotations

import json
from pathlib import Path

from ip2p.base.errors import InputError
from ip2p.data import hub
from ip2p.data.columns import of_split
from ip2p.data.folders import TABLES, FolderSource, find_table, picture_folders
from ip2p.data.original import OriginalSource, is_original
from ip2p.data.records import Source
from ip2p.pictures import images

MANIFEST = "manifest.jsonl"  # of a conversion (`data.convert`)
_READS = (
    "a parquet file or a folder of them, tar shards, the paper's folders, or a .csv or .jsonl of pictures"
)


def open_source(
    path: str, *, stream: bool = False, revision: str | None = None, split: str = "train"
) -> Source:
    """The rows of a data set: of a file or folder here, or of a hub's data set, owner/name.

    `stream`: read a hub's data set where it lies, a row group at a time, without fetching it whole.
    `revision`: of a hub's data set. `split`: which files, where names tell of several. Raises InputError for
    what is missing, empty or of another kind, ModelError when the hub is needed and cannot be reached.
    """
    if not path.strip():
        raise InputError(f"no data set is named; name {_READS}, or a hub's owner/name.")
    here = Path(path).expanduser()
    if not here.exists():
        if hub.is_hub_name(path):
            return _from_hub(path, stream=stream, revision=revision, split=split)
        raise images.missing_file(here)
    for flag, given in (("--revision", revision is not None), ("--stream", stream)):
        if given:
            raise InputError(f"{path} lies here, so {flag} means nothing for it; leave it out.")
    return _file(here, path) if here.is_file() else _folder(here, path, split)


def _from_hub(name: str, *, stream: bool, revision: str | None, split: str) -> Source:
    from ip2p.data.parquet import ParquetSource

    if stream:
        paths, commit = hub.remote_files(name, split, revision)
        return ParquetSource(paths, name=name, key=f"{name}@{commit}/{split}", remote=True)
    files, commit = hub.cached_files(name, split, revision)
    return ParquetSource(files, name=name, key=f"{name}@{commit}/{split}")


def _file(path: Path, name: str) -> Source:
    ending = path.suffix.lower()
    if path.stat().st_size == 0:
        raise InputError(f"{name} is empty (0 bytes). Fetch or write it again.")
    if ending == ".parquet":
        from ip2p.data.parquet import ParquetSource

        return ParquetSource([path], name=name, root=path.parent)
    if ending == ".tar":
        from ip2p.data.shards import ShardSource

        return ShardSource([path], name=name)
    if ending in TABLES:
        return FolderSource(path, name=name)
    raise InputError(f"{name} is no data set that is read: {_READS}.")


def _folder(folder: Path, name: str, split: str) -> Source:
    _check_finished(folder)
    if is_original(folder):
        return OriginalSource(folder, name=name)
    for ending in (".parquet", ".tar"):
        if files := _files(folder, ending, split):
            if ending == ".tar":
                from ip2p.data.shards import ShardSource

                return ShardSource(files, name=name)
            from ip2p.data.parquet import ParquetSource

            return ParquetSource(files, name=name, root=folder)
    if table := find_table(folder):
        return FolderSource(table, name=name)
    if not any(folder.iterdir()):
        raise InputError(f"{name} is an empty folder. Name {_READS}.")
    if picture_folders(folder):
        raise InputError(
            f"{name} has pictures but no table; write {folder / 'metadata.csv'} "
            "with the columns file_name and instruction."
        )
    raise InputError(f"{name} holds no data set that is read: {_READS}.")


def _files(folder: Path, ending: str, split: str) -> list[Path]:
    # In the folder, in data/ as the hub has it, or in a folder a split; not in whatever lies deeper.
    there = sorted(
        path.relative_to(folder).as_posix()
        for pattern in (f"*{ending}", f"*/*{ending}", f"data/*/*{ending}")
        for path in folder.glob(pattern)
        if not path.name.startswith(".")
    )
    return [folder / file for file in of_split(there, split, of=str(folder))] if there else []


def _check_finished(folder: Path) -> None:
    """Raise InputError for a conversion or a job that was stopped: it lacks rows, and nothing else tells."""
    try:
        with open(folder / MANIFEST, encoding="utf-8") as file:
            first = json.loads(file.readline())
            if any('"done"' in line for line in file):
                return
            if "job" in first:
                raise InputError(
                    f"{folder} is not finished: what makes it was stopped, or is at work. "
                    "Run the command that makes it again."
                )
            if "convert" in first:
                source, to = first["convert"]["source"], first["convert"]["to"]
                raise InputError(
                    f"{folder} is a conversion that was stopped. "
                    f"Go on with it: ip2p data convert {source} {folder} --to {to}"
                )
    except (OSError, ValueError, KeyError, TypeError):
        return  # another tool's
