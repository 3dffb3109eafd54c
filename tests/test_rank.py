"""Ranking results with CLIP: the scores, where the CLIP comes from, and what is kept."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from ip2p.base.errors import ModelError
from ip2p.cli import main as cli
from ip2p.editing import rank

pytestmark = pytest.mark.usefixtures("here")


class FakeClip:
    """A CLIP with known embeddings: a picture's mean color, and a text's color words."""

    def images(self, pictures):
        return pictures.mean(dim=(2, 3))

    def texts(self, texts):
        words = ("red", "green", "blue")
        return torch.tensor([[0.1 + (word in text) for word in words] for text in texts])


def flat(*color: int) -> Image.Image:
    return Image.new("RGB", (32, 32), color)


def test_the_result_that_follows_the_text_ranks_first() -> None:
    before = flat(200, 60, 60)
    right, untouched, wrong = flat(140, 120, 60), flat(200, 60, 60), flat(140, 60, 120)
    for captions in ({}, {"caption": "red"}, {"caption": "red", "edited_caption": "red and green"}):
        scores = rank.rank_results(
            FakeClip(), before, [wrong, untouched, right], instruction="make it green", **captions
        )
        order = sorted(range(3), key=lambda k: -scores[k].total)
        assert order == [2, 1, 0]
        assert scores[1].directional == pytest.approx(0, abs=1e-6)
        assert scores[1].image_similarity == pytest.approx(1, abs=1e-6)


def test_captions_set_the_direction_instead_of_the_instruction() -> None:
    results = [flat(140, 120, 60), flat(140, 60, 120)]
    scores = rank.rank_results(
        FakeClip(),
        flat(200, 60, 60),
        results,
        instruction="make it green",
        caption="red",
        edited_caption="red and blue",
    )
    assert scores[1].directional > scores[0].directional


def test_large_pictures_are_downscaled_with_averaging() -> None:
    noise = Image.effect_noise((2048, 1024), 200).convert("RGB")
    assert rank.clip_pixels(noise).shape == (1, 3, 256, 512)
    assert rank.clip_pixels(noise).std() < 0.1  # averages, not single pixels


def test_the_clip_comes_from_the_option_or_the_model_folder(
    here: Path, tiny_model_dir: Path, tiny_clip_dir: Path
) -> None:
    assert rank.find_clip(str(tiny_clip_dir), "nowhere") == tiny_clip_dir
    with pytest.raises(
        ModelError, match="does not include a CLIP model.*hf download openai/clip-vit-large-patch14"
    ):
        rank.find_clip(None, str(tiny_model_dir))
    with pytest.raises(ModelError, match="./none: no such folder"):
        rank.find_clip("./none", str(tiny_model_dir))
    model = shutil.copytree(tiny_model_dir, here / "model")
    shutil.copytree(tiny_clip_dir, here / "model" / "clip")
    assert rank.find_clip(None, str(model)) == model / "clip"


def test_an_uncached_clip_is_reported_with_the_download_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def absent(*args: object, **settings: object) -> None:
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(ModelError, match="someone/clip is not in the cache.*: hf download someone/clip"):
        rank.find_clip("someone/clip", "nowhere")


def test_the_command_keeps_the_best_in_order_and_prints_the_scores(
    page: Image.Image, tiny_model_dir: Path, tiny_clip_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page.save("page.png")
    words = ["edit", "page.png", "make it night", "--model", str(tiny_model_dir), "--dtype", "fp32"]
    words += ["--steps", "1", "-o", "out.png", "--clip", str(tiny_clip_dir), "--count", "4", "--best"]
    assert cli.main([*words, "2", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    scores = [row["score"] for row in report["candidates"]]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    assert [row.get("file") for row in report["candidates"]] == ["out-1.png", "out-2.png", None, None]
    assert [row["seed"] for row in report["outputs"]] == [row["seed"] for row in report["candidates"][:2]]
    assert all(
        row["score"] == pytest.approx(row["directional"] + row["image_similarity"])
        for row in report["candidates"]
    )
    assert sorted(os.listdir()) == ["out-1.png", "out-2.png", "page.png"]
    assert captured.err.count("\n") == 5 and "directional + image similarity = score" in captured.err
    assert cli.main([*words, "1"]) == 0  # a single result has no number in its name
    assert capsys.readouterr().out == "out.png\n"
    assert Path("out.png").read_bytes() == Path("out-1.png").read_bytes()
