"""`ip2p data check | convert`: what is wrong with a data set, and the same one in another layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ip2p.base.errors import InputError
from ip2p.base.files import write_text
from ip2p.base.terminal import progress, say
from ip2p.config import run_json
from ip2p.data.check import OF_ENDLESS, sheet
from ip2p.data.check import check as check_rows
from ip2p.data.convert import convert as convert_rows
from ip2p.pictures import images

if TYPE_CHECKING:
    from ip2p.config import DataCheckConfig, DataConvertConfig
    from ip2p.data.records import Source


def check(config: DataCheckConfig) -> None:
    """`ip2p data check`"""
    check_source(config, _open(config))


def convert(config: DataConvertConfig) -> None:
    """`ip2p data convert`"""
    convert_source(config, _open(config))


def check_source(config: DataCheckConfig, source: Source) -> None:
    """Print the report, as lines or JSON, and write the sheet. Raises InputError when there are defects."""
    if config.sheet is not None:
        images.check_output(config.sheet, overwrite=config.overwrite)
    total = min(OF_ENDLESS if source.endless else len(source), config.limit or len(source))
    with progress("rows", total) as advance:
        report = check_rows(source, limit=config.limit, done=advance)
    if config.sheet is not None:
        sheet(source, config.sheet, limit=config.limit)
    print(
        json.dumps(report.to_json(), indent=2, ensure_ascii=False)
        if config.json
        else "\n".join(report.lines())
    )
    if report.defects:
        raise InputError(report.summary())


def convert_source(config: DataConvertConfig, source: Source) -> None:
    """Write the rows into the folder `config.target`, and print its path; say what was left out."""
    if not config.target.strip():
        raise InputError("no folder to write is named; write: ip2p data convert DATA TARGET --to shards")
    target = Path(config.target)
    total = min(config.count or len(source), len(source))
    with progress("rows", total) as advance:

        def done(rows: int) -> None:
            for _ in range(rows):
                advance()

        converted = convert_rows(
            source,
            target,
            config.to,
            count=config.count,
            shard_rows=config.shard_rows,
            overwrite=config.overwrite,
            done=done,
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
    )
