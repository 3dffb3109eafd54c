"""Hugging Face data sets: parquet files from the cache, or streamed without a download."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ip2p.base.errors import InputError, Ip2pError, ModelError, hub_error
from ip2p.data.columns import of_split

CONVERTED = "refs/convert/parquet"  # the parquet version that the Hub keeps of most data sets


def download_command(name: str, revision: str | None) -> str:
    more = f" --revision {revision}" if revision else ""
    return f"hf download --repo-type dataset {name}{more} --include '*.parquet'"


def cached_files(name: str, split: str, revision: str | None = None) -> tuple[list[Path], str]:
    """The cached parquet files of a split, downloaded if needed, and their commit.

    Raises ModelError if the Hub is needed and cannot be reached, or has no such data set or revision, and
    InputError for a missing split.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(files: Sequence[str], *, local: bool) -> Path:
        return Path(
            snapshot_download(
                name,
                repo_type="dataset",
                revision=revision,
                allow_patterns=list(files),
                local_files_only=local,
            )
        )

    offline = constants.HF_HUB_OFFLINE
    with contextlib.suppress(LocalEntryNotFoundError):
        folder = fetch(["*.parquet"], local=True)
        there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
        # The cache may be incomplete after a partial or interrupted download.
        if there and (chosen := _chosen(there, split, name, offline)):
            return [folder / file for file in chosen], folder.name
    if offline:
        raise ModelError(
            f"The data set {name} is not complete in the cache and HF_HUB_OFFLINE is set. "
            f"Download it: {download_command(name, revision)}"
        )
    files, _ = _listed(name, split, revision)
    try:
        folder = fetch(files, local=False)
    except Exception as error:
        raise refused(name, error, revision) from None
    return [folder / file for file in files], folder.name


def _chosen(there: Sequence[str], split: str, name: str, offline: bool) -> list[str]:
    """The files of a split, if they are complete according to their names; else none."""
    try:
        chosen = of_split(there, split, of=name)
    except InputError:
        return []  # only another split is cached
    parts = [re.search(r"-(\d+)-of-(\d+)\.parquet$", file) for file in chosen]
    if all(parts):
        wholes = {
            (file[: part.start()], int(part[2])) for file, part in zip(chosen, parts, strict=True) if part
        }
        return chosen if sum(count for _, count in wholes) == len(chosen) else []
    return chosen if offline else []  # these names do not contain the number of files


def remote_files(name: str, split: str, revision: str | None = None) -> tuple[list[str], str]:
    """The paths of a split's parquet files in the Hub's file system, and their commit."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"The data set {name} cannot be streamed: HF_HUB_OFFLINE is set. "
            f"Download it with network access, then omit --stream: {download_command(name, revision)}"
        )
    files, commit = _listed(name, split, revision)
    return [f"datasets/{name}@{commit}/{file}" for file in files], commit


def _listed(name: str, split: str, revision: str | None) -> tuple[list[str], str]:
    from huggingface_hub import HfApi

    try:
        known = HfApi().dataset_info(name, revision=revision)
    except Exception as error:
        raise refused(name, error, revision) from None
    files = sorted(entry.rfilename for entry in known.siblings or () if entry.rfilename.endswith(".parquet"))
    if not files:
        raise InputError(
            f"The data set {name} has no parquet files"
            + (f" at {revision}." if revision else f"; try the Hub's parquet version: --revision {CONVERTED}")
        )
    return of_split(files, split, of=name), str(known.sha)


def filesystem() -> Any:
    """The Hugging Face Hub as an fsspec file system."""
    from huggingface_hub import HfFileSystem

    return HfFileSystem()


def refused(name: str, error: Exception, revision: str | None = None) -> Ip2pError:
    """What the hub's client raised for a data set, in a line."""
    return hub_error(error, name, download_command(name, revision), what="data set", revision=revision)
