"""The grid: each cell's settings, and the labels beside the cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ip2p.base.errors import InputError
from ip2p.cli import main as cli
from ip2p.editing import grid
from ip2p.editing.grid import parse_axis
from ip2p.settings import EditSettings

pytestmark = pytest.mark.usefixtures("here")


class Painter:
    """An editor whose results are colored by their settings."""

    def edit(self, picture, *, settings):
        seed, steps, text_cfg, image_cfg = (
            getattr(settings, name) for name in ("seed", "steps", "text_cfg", "image_cfg")
        )
        assert settings.instruction == "make it night"
        assert isinstance(seed, int) and isinstance(steps, int)
        return [Image.new("RGB", picture.size, (int(text_cfg * 10), int(image_cfg * 10), seed * 10 + steps))]


def test_each_cell_has_the_settings_of_its_row_and_column() -> None:
    calls = []
    picture = grid.draw_grid(
        Painter(),
        Image.new("RGB", (300, 150), "red"),
        "make it night",
        columns=grid.Axis(setting="text_cfg", values=(2.0, 7.5)),
        rows=grid.Axis(setting="seed", values=(0, 1, 2)),
        cell=100,
        on_result=lambda: calls.append(1),
        seed=9,
        image_cfg=1.5,
        steps=5,
    )
    assert len(calls) == 6
    colors = {color for _, color in picture.getcolors(2**20)}
    expected = {(int(text * 10), 15, seed * 10 + 5) for text in (2.0, 7.5) for seed in (0, 1, 2)}
    assert expected <= colors and (255, 0, 0) in colors  # and the input
    pixels = np.asarray(picture)
    places = {color: np.argwhere((pixels == color).all(axis=-1)) for color in [*expected, (255, 0, 0)]}
    assert all(len(found) == 100 * 50 for found in places.values())  # scaled, not cropped, and none overlap
    assert places[(20, 15, 5)][0][0] == places[(75, 15, 5)][0][0] < places[(20, 15, 15)][0][0]
    assert places[(20, 15, 5)][0][1] < places[(75, 15, 5)][0][1]


def test_labels_are_above_the_columns_and_left_of_the_rows() -> None:
    cells = [[Image.new("RGB", (40, 40), "blue")] * 2] * 2
    bare = np.asarray(grid.draw_sheet(cells, columns=["", ""], rows=["", ""]))
    labeled = np.asarray(
        grid.draw_sheet(cells, columns=["text CFG 5", "text CFG 7.5"], rows=["a", "b"], title="“x”")
    )
    dark = (labeled.max(axis=-1) < 100) & (labeled[..., 2] < 100)
    blue = (labeled == (0, 0, 255)).all(axis=-1)
    top, left = np.argwhere(blue).min(axis=0)
    assert dark[:top].any() and dark[top:, :left].any()
    assert not dark[top:, left:].any()
    assert not (bare.max(axis=-1) < 100).any()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("text-cfg", ("text_cfg", None)),
        ("text_cfg=3,7.5", ("text_cfg", (3.0, 7.5))),
        ("seed=0, 4", ("seed", (0, 4))),
        ("steps=5", ("steps", (5,))),
    ],
)
def test_an_axis_is_a_setting_with_or_without_values(text: str, found: tuple) -> None:
    assert parse_axis("--rows", text) == found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "size=3"], "--rows is 'size=3'; choose one of: steps, text-cfg, image-cfg, seed, "),
        (["--columns", "steps=5,x"], "--columns steps is 'x'; it must be a whole number"),
        (["--columns", "steps=0"], "--columns steps is 0; it must be 1 to 1000"),
        (["--rows", "image-cfg=nan"], "--rows image-cfg is nan"),
        (["--rows", "text-cfg"], "--columns and --rows are both text-cfg"),
        (["--cell", "8"], "--cell is 8"),
        (["-o", "grid.psd"], "grid.psd"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(
    words: list[str], said: str, page: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    page.save("page.png")
    assert cli.main(["grid", "page.png", "make it night", "--model", "nowhere", *words]) == 2
    assert said in capsys.readouterr().err


def test_too_many_cells_are_refused() -> None:
    listed = ",".join(map(str, range(1, 41)))
    config = cli.parse("grid", ["a", "b", "--columns", f"seed={listed}", "--rows", f"steps={listed}"])
    with pytest.raises(InputError, match="at most 1000 pictures"):
        config.check()


def test_the_command_draws_a_grid_around_the_models_guidance_scales(
    page: Image.Image, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page.save("page.png")
    words = ["grid", "page.png", "make it night", "--model", str(tiny_model_dir), "--steps", "1"]
    assert cli.main([*words, "--rows", "seed=1,2"]) == 0
    assert capsys.readouterr().out == "page-grid.png\n"
    with Image.open("page-grid.png") as sheet:
        assert sheet.width > 5 * 64 and sheet.height > 2 * 64
    assert cli.main([*words, "--rows", "seed=1,2"]) == 2  # already exists
    assert grid.default_values("text_cfg", EditSettings(text_cfg=7.5)) == [3.75, 5.62, 7.5, 11.25]
    assert grid.default_values("seed", EditSettings(seed=4)) == [4, 5, 6, 7]
