"""Chained edits: each step's input, its drift from the start, and the animation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ip2p.cli import main as cli
from ip2p.editing import chain
from ip2p.pictures.infotext import parse_infotext

pytestmark = pytest.mark.usefixtures("here")


class Darker:
    """An editor that halves every pixel value and records its calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str, list[int]]] = []

    def edit(self, picture, instruction, *, seeds, **settings):
        self.asked.append((picture.getpixel((0, 0))[0], instruction, seeds))
        return [Image.eval(picture, lambda level: level // 2)]


GRAY = Image.new("RGB", (32, 32), (200, 200, 200))
INSTRUCTIONS = ["make it night", "make it snow", "add a hat"]


def test_each_step_edits_the_result_of_the_previous_step() -> None:
    editor = Darker()
    steps = list(chain.edit_chain(editor, GRAY, INSTRUCTIONS, seed=5))
    assert editor.asked == [
        (200, INSTRUCTIONS[0], [5]),
        (100, INSTRUCTIONS[1], [6]),
        (50, INSTRUCTIONS[2], [7]),
    ]
    assert [step.image.getpixel((0, 0))[0] for step in steps] == [100, 50, 25]


def test_from_original_edits_the_original_with_the_instructions_joined() -> None:
    editor = Darker()
    steps = list(chain.edit_chain(editor, GRAY, INSTRUCTIONS, seed=5, from_original=True))
    assert [asked[0] for asked in editor.asked] == [200, 200, 200]
    assert [step.instruction for step in steps] == [
        "make it night",
        "make it night, make it snow",
        "make it night, make it snow, add a hat",
    ]
    assert {step.seed for step in steps} == {5}


def test_drift_is_psnr_and_clip_cosine_similarity(tiny_clip_dir: Path) -> None:
    from ip2p.models.clip import Clip

    clip = Clip.load(tiny_clip_dir)
    darker = Image.eval(GRAY, lambda level: level - 51)  # a fifth of the range: 20 log10 5 dB
    assert chain.measure_drift(GRAY, darker, None).psnr == pytest.approx(20 * np.log10(5), abs=1e-3)
    assert chain.measure_drift(GRAY, darker, None).clip is None
    assert chain.measure_drift(GRAY, GRAY, clip).clip == pytest.approx(1, abs=1e-5)
    assert chain.measure_drift(GRAY, darker, clip).clip < 1


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_animation_has_every_frame_and_its_duration(ending: str) -> None:
    frames = [Image.new("RGB", (20, 16), color) for color in ("red", "lime", "blue")]
    chain.save_animation(frames, Path(f"chain.{ending}"), frame_ms=300)
    with Image.open(f"chain.{ending}") as moving:
        shown = [(frame.convert("RGB"), frame.info["duration"]) for frame in ImageSequence.Iterator(moving)]
        assert moving.info["loop"] == 0
    assert [milliseconds for _, milliseconds in shown] == [300, 300, 600]
    for (picture, _), frame in zip(shown, frames, strict=True):
        assert np.abs(np.asarray(picture, int) - np.asarray(frame, int)).max() < 12
    assert os.listdir() == [f"chain.{ending}"]


def test_the_command_saves_each_step_prints_the_drift_and_writes_the_animation(
    page: Image.Image, tiny_model_dir: Path, tiny_clip_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page.save("page.png")
    words = ["edit", "page.png", *("make it night", "--then", "make it snow", "--then", "add a hat")]
    words += [
        "--model",
        str(tiny_model_dir),
        "--dtype",
        "fp32",
        "--steps",
        "1",
        "-o",
        "out.png",
        "--seed",
        "3",
    ]
    words += ["--animation", "out.webp"]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == ["out-1.png", "out-2.png", "out-3.png", "out.webp"]
    assert "drift from the start" in captured.err and "out-3.png" in captured.err and " dB" in captured.err
    assert "does not include a CLIP model" in captured.err and "hf download" in captured.err
    records = [parse_infotext(Image.open(f"out-{k}.png").info["parameters"]) for k in (1, 2, 3)]
    assert [(record.instruction, record.seed) for record in records] == [
        ("make it night", 3),
        ("make it snow", 4),
        ("add a hat", 5),
    ]
    # A step equals a separate edit of the previous result.
    again = ["edit", "out-1.png", "--from-settings", "out-2.png", "--model", str(tiny_model_dir)]
    assert cli.main([*again, "--dtype", "fp32", "-o", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("out-2.png").read_bytes()

    capsys.readouterr()
    assert cli.main([*words, "--overwrite", "--json", "--clip", str(tiny_clip_dir), "--from-original"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["animation"] == "out.webp"
    assert report["outputs"][1]["instruction"] == "make it night, make it snow"
    assert all(-1 <= row["drift"]["clip"] <= 1 and row["drift"]["psnr"] > 0 for row in report["outputs"])
