"""The `ip2p data` commands: what they print, write and refuse."""

import json

import pytest
from layouts import Rows, make_pair, make_pairs
from PIL import Image

from ip2p.base.errors import InputError
from ip2p.cli import data as command
from ip2p.cli.data import DataCheckConfig, DataConvertConfig
from ip2p.data.loading import open_source
from ip2p.data.records import BrokenRow


def Check(**settings: object) -> DataCheckConfig:
    return DataCheckConfig(data="rows", **settings)


def Convert(target: str = "", **settings: object) -> DataConvertConfig:
    return DataConvertConfig(data="rows", target=target, **settings)


def test_a_clean_data_set_gives_a_report_and_a_sheet(tmp_path, capsys):
    command.check_source(Check(sheet=tmp_path / "sheet.png"), Rows(make_pairs()))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["data", "rows,", "5", "rows"] and lines[-1].endswith("no problems")
    assert Image.open(tmp_path / "sheet.png").width > 100


def test_defects_are_reported_before_the_summary_is_raised(capsys):
    rows = [*make_pairs(2), BrokenRow("lost", "before: gone")]
    with pytest.raises(InputError, match="rows has defects: broken picture 1. Fix or remove") as error:
        command.check_source(Check(), Rows(rows))
    assert error.value.code == 2
    assert "lost (before: gone)" in capsys.readouterr().out
    command.check_source(Check(limit=2), Rows(rows))  # the first two are correct


def test_warnings_alone_are_not_an_error(capsys):
    pair = make_pair(0)
    command.check_source(Check(), Rows([pair, make_pair(1, before=pair.before, after=pair.before)]))
    assert "identical pictures" in capsys.readouterr().out


def test_the_report_can_be_printed_as_json(capsys):
    with pytest.raises(InputError):
        command.check_source(Check(print_json=True), Rows([make_pair(0, instruction="")]))
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["findings"][0]["name"]) == (1, "empty instruction")


class Unreadable(Rows):
    def __getitem__(self, row):
        raise AssertionError("a row was read")


def test_an_existing_sheet_is_refused_before_any_row_is_read(tmp_path):
    (tmp_path / "sheet.png").write_bytes(b"x")
    with pytest.raises(InputError, match="already exists; add --overwrite"):
        command.check_source(Check(sheet=tmp_path / "sheet.png"), Unreadable(make_pairs()))


def test_a_conversion_prints_its_folder_and_the_dropped_fields(tmp_path, capsys):
    target = str(tmp_path / "out")
    command.convert_source(Convert(target=target, to="magicbrush", count=3), Rows(make_pairs()))
    captured = capsys.readouterr()
    assert captured.out == f"{target}\n"
    assert "the layout magicbrush cannot hold it: caption (3 rows)" in captured.err
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert (settings["to"], settings["count"]) == ("magicbrush", 3)
    assert len(open_source(target)) == 3


def test_a_conversion_needs_a_target():
    with pytest.raises(InputError, match="no output folder is given"):
        command.convert_source(Convert(), Rows(make_pairs()))
