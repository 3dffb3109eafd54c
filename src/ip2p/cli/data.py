"""`ip2p data check | convert`: find problems in a data set, convert it to another layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ip2p.base.errors import InputError
from ip2p.base.files import write_text
from ip2p.base.terminal import progress, say
from ip2p.pictures import images
from ip2p.settings import (
    COMMON,
    MAX_SEED,
    ColumnSettings,
    HubDataSettings,
    OverwriteSettings,
    RunSettings,
    run_json,
    setting,
)

if TYPE_CHECKING:
    from ip2p.data.records import Source

LayoutName = Literal["parquet", "magicbrush", "original", "shards", "folders"]


class _AnyData(HubDataSettings, ColumnSettings):
    """A data set of any layout, or storybook pairs."""

    data: str = setting(
        "",
        "a folder, a parquet, tar, CSV or JSONL file, a Hugging Face data set, or storybook",
        positional=1,
        metavar="DATA",
    )
    size: int = setting(256, "size of storybook pages, in pixels", ge=32, le=1024, group="Data")
    seed: int = setting(0, "seed of storybook pages", ge=0, le=MAX_SEED, example=7, group="Data")


class DataCheckConfig(RunSettings, OverwriteSettings, _AnyData):
    """Report the contents and problems of a data set: ip2p data check pairs --sheet sheet.png"""

    limit: int | None = setting(
        None,
        "check only the first N rows; default: all, or 1000 for storybook",
        ge=1,
        le=10**9,
        example=1000,
        group=COMMON,
    )
    sheet: Path | None = setting(
        None, "save a contact sheet with pairs from the whole data set", group=COMMON, metavar="FILE"
    )
    print_json: bool = setting(False, "print the report as JSON", group=COMMON, name="json")


class DataConvertConfig(RunSettings, OverwriteSettings, _AnyData):
    """Convert a data set to another layout: ip2p data convert pairs shards --to shards"""

    target: str = setting(
        "", "output folder; run the same command again to resume", positional=2, metavar="TARGET"
    )
    to: LayoutName = setting("parquet", "layout to write", group=COMMON)
    count: int | None = setting(
        None,
        "convert only the first N rows; required for storybook",
        ge=1,
        le=10**9,
        example=1000,
        group=COMMON,
    )
    shard_rows: int = setting(1000, "rows per file", ge=1, le=1_000_000, hidden=True)


def run_data_check(config: DataCheckConfig) -> None:
    """`ip2p data check`"""
    check_source(config, _open(config))


def run_data_convert(config: DataConvertConfig) -> None:
    """`ip2p data convert`"""
    convert_source(config, _open(config))


def check_source(config: DataCheckConfig, source: Source) -> None:
    """Print the report as text or JSON, and write the sheet. Raises InputError if there are defects."""
    from ip2p.data.check import OF_ENDLESS, sheet  # imports pyarrow
    from ip2p.data.check import check as check_rows

    if config.sheet is not None:
        images.check_picture_output(config.sheet, overwrite=config.overwrite)
    total = min(OF_ENDLESS if source.endless else len(source), config.limit or len(source))
    with progress("rows", total) as advance:
        report = check_rows(source, limit=config.limit, done=advance)
    if config.sheet is not None:
        sheet(source, config.sheet, limit=config.limit)
    print(
        json.dumps(report.to_json(), indent=2, ensure_ascii=False)
        if config.print_json
        else "\n".join(report.lines())
    )
    if report.defects:
        raise InputError(report.summary())


def convert_source(config: DataConvertConfig, source: Source) -> None:
    """Convert the rows into the folder `config.target`, report skipped rows and print the path."""
    from ip2p.data.convert import convert as convert_rows  # imports pyarrow

    if not config.target.strip():
        raise InputError("no output folder is given; write: ip2p data convert DATA TARGET --to shards")
    target = Path(config.target)
    total = min(config.count or len(source), len(source))
    with progress("rows", total) as advance:
        converted = convert_rows(
            source,
            target,
            config.to,
            count=config.count,
            shard_rows=config.shard_rows,
            overwrite=config.overwrite,
            done=advance,
        )
    write_text(target / "run.json", run_json(config))
    for line in converted.lines(config.to):
        say(line)
    print(target)


def _open(config: DataCheckConfig | DataConvertConfig) -> Source:
    from ip2p.training.trainer import find_source

    return find_source(
        config.data,
        config.size,
        seed=config.seed,
        split=config.split,
        stream=config.stream,
        revision=config.revision,
        columns=config.columns,
    )
