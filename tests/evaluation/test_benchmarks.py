"""Benchmarks on fake data in their layouts, with the faults of the public evaluators as published."""

import io
import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

import ip2p
from ip2p.base.errors import InputError
from ip2p.evaluation import judge as judges
from ip2p.evaluation import metrics
from ip2p.evaluation.benchmarks import BENCHMARKS, pie
from ip2p.evaluation.encoders import Encoders
from ip2p.evaluation.metrics import Shot


def png(seed, side=64):
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.kron(values, np.ones((side // 8, side // 8, 1), np.uint8))).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def settings(tiny_model_dir, tiny_clip_dir):
    """The arguments of every run; the metrics need no network but CLIP."""
    networks = {"clip": str(tiny_clip_dir), "clip_b32": str(tiny_clip_dir), "model": [f"m={tiny_model_dir}"]}
    return networks | {"steps": 1, "device": "cpu", "dtype": "fp32", "workers": 1}


@pytest.fixture()
def magicbrush(tmp_path):
    """Two sessions: one of two turns, one of one."""
    sessions = {"7": 2, "9": 1}
    edit_sessions = {}
    for name, count in sessions.items():
        home = tmp_path / "brush/images" / name
        home.mkdir(parents=True)
        (home / f"{name}-input.png").write_bytes(png(int(name)))
        edit_sessions[name] = []
        for turn in range(1, count + 1):
            (home / f"{name}-output{turn}.png").write_bytes(png(int(name) * 10 + turn))
            mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
            mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
            mask.save(home / f"{name}-mask{turn}.png")
            before = f"{name}-input.png" if turn == 1 else f"{name}-output{turn - 1}.png"
            edit_sessions[name].append(
                {"input": before, "mask": f"{name}-mask{turn}.png", "output": f"{name}-output{turn}.png",
                 "instruction": f"turn {turn}"}
            )  # fmt: skip
    (tmp_path / "brush/edit_sessions.json").write_text(json.dumps(edit_sessions))
    captions = {name: {turn["output"]: "a page" for turn in turns} for name, turns in edit_sessions.items()}
    (tmp_path / "brush/local_descriptions.json").write_text(json.dumps(captions))
    return tmp_path / "brush"


def test_magicbrush_single_turns_start_from_the_previous_target_and_multi_turns_chain(
    magicbrush, settings, tmp_path, tiny_editor
):
    chosen = {"metrics": ["l1,l2,clip_b32_target,clip_b32_text,l1_outside"], "benchmark": "magicbrush"}
    single = ip2p.evaluate(data=str(magicbrush), out=tmp_path / "s", **settings, **chosen)
    rows = pq.read_table(tmp_path / "s/rows.parquet").to_pylist()
    assert [row["id"] for row in rows if row["variant"] == "m"] == ["7-1", "7-2", "9-1"]
    assert {row["group"] for row in rows} == {"7", "9"}
    truth = next(line for line in single["lines"] if line["name"] == "ground truth")
    assert truth["metrics"]["l1"]["value"] == 0
    multi = ip2p.evaluate(
        data=str(magicbrush), out=tmp_path / "m", **settings, **chosen | {"benchmark": "magicbrush-multi"}
    )
    assert multi["rows"] == 2
    row = next(
        row
        for row in pq.read_table(tmp_path / "m/rows.parquet").to_pylist()
        if row["variant"] == "m" and row["id"] == "7"
    )
    home = magicbrush / "images/7"
    chained = Image.open(home / "7-input.png").convert("RGB")
    for instruction in ("turn 1", "turn 2"):
        chained = tiny_editor.edit(chained, instruction, seeds=[row["seed"]], steps=1)[0]
    after = np.asarray(Image.open(home / "7-output2.png"), np.float64)
    error = np.abs(np.asarray(chained, np.float64) - after).mean() / 255
    assert row["l1"] == pytest.approx(error, abs=2e-3)


def test_magicbrushs_transparent_mask_marks_the_editable_region(magicbrush):
    benchmark = BENCHMARKS["magicbrush"]
    row = benchmark.make(benchmark.read(magicbrush, False)[0])
    assert row.mask[:, :32].all() and not row.mask[:, 32:].any()


def test_a_long_caption_fails_magicbrush_as_published_and_is_truncated_as_corrected(
    magicbrush, settings, tmp_path
):
    path = magicbrush / "local_descriptions.json"
    descriptions = json.loads(path.read_text())
    descriptions["9"]["9-output1.png"] = "a page " * 60
    path.write_text(json.dumps(descriptions))
    base = {"data": str(magicbrush), "benchmark": "magicbrush", **settings}
    with pytest.raises(InputError, match="tokens, but MagicBrush's evaluator fails at more than 77"):
        ip2p.evaluate(**base, out=tmp_path / "p", as_published=True, metrics=["magicbrush_clip_t"])
    found = ip2p.evaluate(**base, out=tmp_path / "c", metrics=["clip_b32_text"])
    assert all(line["metrics"]["clip_b32_text"]["count"] == 3 for line in found["lines"])


def test_emu_edit_counts_equal_captions_as_zero_as_published_and_skips_them_as_corrected(settings, tmp_path):
    rows = [
        {"image": {"bytes": png(k), "path": None}, "instruction": f"edit {k}", "task": "global", "idx": k,
         "split": "test", "hash": str(k), "input_caption": "a page",
         "output_caption": "a page" if k == 0 else f"a dark page {k}"}
        for k in range(4)
    ]  # fmt: skip
    (tmp_path / "emu").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "emu/test.parquet", row_group_size=2)
    base = {"data": str(tmp_path / "emu"), "benchmark": "emu-edit", **settings}
    published = ip2p.evaluate(**base, out=tmp_path / "p", as_published=True, metrics=["emu_direction"])
    corrected = ip2p.evaluate(**base, out=tmp_path / "c", metrics=["clip_b32_directional"])
    one, other = (
        {line["name"]: line["metrics"] for line in each["lines"]}["m"] for each in (published, corrected)
    )
    assert one["emu_direction"]["count"] == 4 and other["clip_b32_directional"]["count"] == 3
    assert one["emu_direction"]["value"] == pytest.approx(
        other["clip_b32_directional"]["value"] * 3 / 4, abs=1e-5
    )
    assert "ground truth" not in {line["name"] for line in published["lines"]}, "there is none"


@pytest.fixture()
def pie_folder(tmp_path):
    """Two edits of 64x64: a mask of the first 16 rows, and one of everything."""
    home = tmp_path / "pie/annotation_images/0_random"
    home.mkdir(parents=True)
    mapping = {}
    for k, mask in enumerate(([0, 64 * 16], [0, 64 * 64])):
        (home / f"{k}.jpg").write_bytes(png(k))
        mapping[str(k)] = {
            "image_path": f"0_random/{k}.jpg", "original_prompt": "a [old] page",
            "editing_prompt": "a [new] page",
            "editing_instruction": "renew it", "editing_type_id": str(k), "blended_word": "", "mask": mask,
        }  # fmt: skip
    (tmp_path / "pie/mapping_file.json").write_text(json.dumps(mapping))
    return tmp_path / "pie"


def test_pie_as_published_matches_torchmetrics_over_the_whole_picture(pie_folder):
    """Oracle: torchmetrics on the pictures with the region blacked out, as the public evaluator calls it."""
    published, corrected = (
        BENCHMARKS["pie"].make(BENCHMARKS["pie"].read(pie_folder, yes)[0]) for yes in (True, False)
    )
    assert corrected.caption == "a old page" and corrected.edited_caption == "a new page"
    assert published.mask[-1].all() and not corrected.mask[-1].any(), "the border is added as published"
    before = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    output = (before + 0.1).clamp(0, 1)
    shot = Shot(before=before, output=output, mask=corrected.mask)
    black = [(picture * ~shot.mask)[None] for picture in (before, output)]
    encoders = Encoders()
    expected = peak_signal_noise_ratio(*black, data_range=1.0)
    assert pie.PUBLISHED["pie_psnr"].measure(shot, encoders) == pytest.approx(float(expected), abs=1e-4)
    expected = structural_similarity_index_measure(*black, data_range=1.0)
    assert pie.PUBLISHED["pie_ssim"].measure(shot, encoders) == pytest.approx(float(expected), abs=1e-5)
    # A quarter is masked: the published error is 3/4 of the error outside the mask.
    outside = metrics.METRICS["l2_outside"].measure(shot, encoders)
    assert pie.PUBLISHED["pie_l2"].measure(shot, encoders) == pytest.approx(outside * 0.75, rel=1e-5)
    assert pie.PUBLISHED["pie_psnr"].measure(shot, encoders) > metrics.psnr(before, output, ~shot.mask) + 1


def test_a_pie_row_whose_mask_is_full_has_no_background(pie_folder, settings, tmp_path):
    names = {"p": ["pie_psnr,pie_l2"], "c": ["psnr_outside,clip_text"]}
    for key, chosen in names.items():
        report = ip2p.evaluate(
            data=str(pie_folder), benchmark="pie", out=tmp_path / key, as_published=key == "p",
            metrics=chosen, **settings,
        )  # fmt: skip
        line = next(line for line in report["lines"] if line["name"] == "m")
        assert line["metrics"][chosen[0].split(",")[0]]["count"] == 1 and line["rows"] == 2


def script_judge(monkeypatch, reply):
    monkeypatch.setattr(judges.VisionJudge, "_reply", lambda self, words, pictures: reply(words))


@pytest.fixture()
def gedit(tmp_path):
    rows = [
        {"key": f"k{k}", "task_type": task, "instruction": f"edit {k}", "instruction_language": language,
         "input_image": {"bytes": png(k), "path": None}, "Intersection_exist": True}
        for k, (task, language) in enumerate(
            [("style_change", "en"), ("style_change", "en"), ("text_change", "en"), ("tone_transfer", "en"),
             ("text_change", "cn")]
        )
    ]  # fmt: skip
    (tmp_path / "gedit").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "gedit/train.parquet")
    return tmp_path / "gedit"


def test_gedit_scores_unparsable_replies_randomly_as_published_and_not_as_corrected(
    gedit, settings, tmp_path, monkeypatch
):
    script_judge(monkeypatch, lambda words: "no idea" if "edit 2" in words else '{"score": [6, 8]}')
    judge_settings = {"judge": "http://localhost:1/v1", "judge_model": "scripted", "metrics": ["l1_input"]}
    base = {"data": str(gedit), "benchmark": "gedit", **settings, **judge_settings}
    published = ip2p.evaluate(**base, out=tmp_path / "p", as_published=True)
    corrected = ip2p.evaluate(**base, out=tmp_path / "c")
    one, other = ({line["name"]: line for line in each["lines"]}["m"] for each in (published, corrected))
    assert one["metrics"]["judge_semantics"]["count"] == 3, (
        "the unread reply has a number, and no tone_transfer"
    )
    assert one["judge"]["failures"]["malformed"] == 0
    assert other["judge"]["failures"]["malformed"] == 1 and other["metrics"]["judge_semantics"]["count"] == 3
    assert other["rows"] == 4 and set(other["kinds"]) == {"style_change", "text_change", "tone_transfer"}
    assert other["kinds"]["text_change"]["judge_semantics"] is None
    assert corrected["judge"]["model"] == "scripted" and len(corrected["judge"]["dates"]) == 1


def test_gedit_averages_over_groups_instead_of_rows(gedit, settings, tmp_path, monkeypatch):
    script_judge(monkeypatch, lambda words: '{"score": [2, 9]}' if "edit 3" in words else '{"score": [6, 8]}')
    report = ip2p.evaluate(
        data=str(gedit), benchmark="gedit", judge="http://localhost:1/v1", judge_model="m", out=tmp_path,
        metrics=["l1_input"], **settings,
    )  # fmt: skip
    line = next(line for line in report["lines"] if line["name"] == "m")
    assert line["metrics"]["judge_semantics"]["value"] == pytest.approx((6 + 6 + 2) / 3)


@pytest.fixture()
def imgedit(tmp_path):
    """Three edits of style, and a prompt for their judge."""
    folder = tmp_path / "imgedit"
    (folder / "animal").mkdir(parents=True)
    edits = {}
    for k in range(3):
        (folder / f"animal/{k}.jpg").write_bytes(png(k))
        edits[str(k)] = {"id": f"animal/{k}.jpg", "prompt": f"edit {k}", "edit_type": "style"}
    (folder / "basic_edit.json").write_text(json.dumps(edits))
    (folder / "prompts.json").write_text(json.dumps({"style": "Judge this: <edit_prompt>"}))
    return folder


def test_imgedit_drops_unreadable_replies_as_published_and_counts_them_as_corrected(
    settings, tmp_path, imgedit, monkeypatch
):
    good = "Style Fidelity: 4\nContent Preservation: 3\nRendering Quality: 5"
    replies = {"edit 0": good, "edit 1": "Style Fidelity: 1\nthe rest is fine", "edit 2": "Great picture!"}
    script_judge(monkeypatch, lambda words: next(text for word, text in replies.items() if word in words))
    base = {
        "data": str(imgedit), "benchmark": "imgedit", "judge": "http://localhost:1/v1", "judge_model": "m",
        "metrics": ["l1_input"], **settings,
    }  # fmt: skip
    one, other = (
        {
            line["name"]: line
            for line in ip2p.evaluate(**base, out=tmp_path / str(yes), as_published=yes)["lines"]
        }["m"]
        for yes in (True, False)
    )
    assert one["metrics"]["judge_overall"]["value"] == pytest.approx((4 + 1) / 2), (
        "one of three scores was enough"
    )
    assert other["metrics"]["judge_overall"]["value"] == pytest.approx(4)
    assert other["judge"]["failures"]["malformed"] == 2


@pytest.mark.parametrize("name", ["gedit", "imgedit"])
def test_a_judged_benchmark_needs_a_judge(name, tmp_path, request, settings):
    data = request.getfixturevalue(name)
    with pytest.raises(InputError, match="add --judge URL"):
        ip2p.evaluate(data=str(data), benchmark=name, out=tmp_path / "o", **settings)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_data_that_is_missing_or_has_another_layout_is_refused(name, tmp_path, settings):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/notes.txt").write_text("nothing")
    base = {"benchmark": name, "out": tmp_path / "o", **settings}
    with pytest.raises(InputError, match=r"has no|holds no"):
        ip2p.evaluate(data=str(tmp_path / "data"), **base)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(InputError, match="does not exist"):
        ip2p.evaluate(data=str(tmp_path / "data"), **base)


def test_run_lengths_are_decoded_in_row_major_order():
    mask = pie.decoded_mask([5, 3, 62, 100], 4, 16, border=False)
    expected = torch.zeros(64, dtype=torch.bool)
    expected[[5, 6, 7, 62, 63]] = True
    assert torch.equal(mask.flatten(), expected) and math.prod(mask.shape) == 64
