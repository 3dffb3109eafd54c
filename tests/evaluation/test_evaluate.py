"""`ip2p evaluate` end to end on tiny models: reports, resuming, two processes, sweeps, baselines."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import ip2p
from ip2p.base.errors import InputError
from ip2p.cli.main import main
from ip2p.evaluation import report as reports
from ip2p.evaluation.baselines import CaptionPainter
from ip2p.evaluation.metrics import METRICS, chosen_metrics
from ip2p.evaluation.settings import EvaluateConfig, sweep_values
from ip2p.settings import COMMAND_LINE, EditSettings
from ip2p_storybook import metrics as storybook_metrics

FILES = ("report.json", "rows.parquet", "index.html")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Nine pairs of 64x64 in folders; one has a broken picture, one no instruction."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    folder.mkdir()
    lines = []
    for k in range(9):
        rng = np.random.default_rng(k)
        for name in ("before", "after"):
            values = np.kron(rng.integers(0, 256, (8, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
            Image.fromarray(values).save(folder / f"{k}-{name}.png")
        words = {"instruction": "make it night", "caption": "a page", "edited_caption": f"a dark page {k}"}
        if k == 4:
            words["instruction"] = ""
        lines.append({"id": f"p{k}", "before": f"{k}-before.png", "after": f"{k}-after.png", **words})
    (folder / "6-before.png").write_bytes((folder / "6-before.png").read_bytes()[:60])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def words(pairs, tiny_model_dir, tiny_clip_dir):
    """The command line without -o."""
    metrics = "clip_image,clip_directional,l1,psnr,ssim"
    return [
        *("evaluate", str(pairs), "--model", f"tiny={tiny_model_dir}", "--clip", str(tiny_clip_dir)),
        *("--metrics", metrics, "--steps", "2", "--device", "cpu", "--sweep", "image_cfg=1:2:1"),
        *("--baseline", "sdedit", "--shown", "3"),
    ]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The report of one uninterrupted run in one process."""
    out = tmp_path_factory.mktemp("whole") / "report"
    assert main([*words, "-o", str(out), "--workers", "1"]) == 0
    return out


def file_hashes(folder):
    names = [*FILES, *(path.name for path in sorted(folder.glob("curves-*")))]
    assert len(names) == 6
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


# --- the report -----------------------------------------------------------------------------------


def test_the_report_has_copy_truth_models_and_baselines_with_intervals(whole):
    report = json.loads((whole / "report.json").read_text())
    lines = {(line["name"], line["point"]): line for line in report["lines"]}
    assert [line["name"] for line in report["lines"][:2]] == ["copy the input", "ground truth"]
    assert ("tiny", 1) in lines and ("tiny", 2) in lines and len(report["lines"]) == 2 + 2 + 7
    copy, truth = lines["copy the input", None]["metrics"], lines["ground truth", None]["metrics"]
    assert copy["clip_image"]["value"] == pytest.approx(1, abs=1e-5) and truth["l1"]["value"] == 0
    for line in report["lines"]:
        assert (line["rows"], line["flawed"]) == (7, 2)
        for found in line["metrics"].values():
            assert found["low"] <= found["value"] + 1e-9 and found["value"] <= found["high"] + 1e-9
    assert report["metrics"]["clip_image"]["encoders"] == ["clip"]


def test_every_row_is_in_the_table_with_its_seed_settings_and_flaw(whole):
    rows = pq.read_table(whole / "rows.parquet").to_pylist()
    assert len(rows) == 9 * 11
    tiny_rows = [row for row in rows if row["variant"] == "tiny"]
    flaws = {row["row"]: row["flaw"] for row in tiny_rows if row["flaw"]}
    assert set(flaws) == {4, 6} and "no instruction" in flaws[4]
    good = [row for row in tiny_rows if not row["flaw"]]
    assert {json.loads(row["settings"])["image_cfg"] for row in good} == {1.0, 2.0}
    assert len({row["seed"] for row in good}) == 7, "a seed for each row, the same at all points"
    assert all(row["clip_image"] is not None for row in good)


def test_l1_matches_an_edit_made_directly_with_the_editor(whole, pairs, tiny_editor):
    rows = pq.read_table(whole / "rows.parquet").to_pylist()
    row = next(row for row in rows if row["variant"] == "tiny" and row["id"] == "p5" and row["point"] == 2)
    out = tiny_editor.edit(
        pairs / "5-before.png", "make it night", seeds=[row["seed"]], steps=2, image_cfg=2.0
    )[0]
    after = np.asarray(Image.open(pairs / "5-after.png"), np.float64)
    error = np.abs(np.asarray(out, np.float64) - after).mean() / 255
    assert row["l1"] == pytest.approx(error, abs=2e-3)


def test_the_page_embeds_pictures_and_every_metric(whole):
    page = (whole / "index.html").read_text()
    assert page.count("<article") == 3 and page.count("data:image/jpeg") == 3 * (1 + 1 + 2 + 7)
    data = json.loads(page.split("const data = ")[1].split(";\nconst")[0])
    assert data["higher"]["l1"] is False and set(data["rows"]) == {"0", "1", "2"}
    assert set(data["rows"]["0"]["tiny 2"]) == {"clip_image", "clip_directional", "l1", "psnr", "ssim"}
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_curves_are_saved_as_images_with_their_table(whole):
    table = (whole / "curves-clip_directional-clip_image.csv").read_text().splitlines()
    assert len(table) == 1 + 11 and table[0].startswith("name,point,clip_directional,")
    svg = (whole / "curves-clip_directional-clip_image.svg").read_text()
    assert svg.count("<circle") == 11 + 4 and "SDEdit" in svg
    with Image.open(whole / "curves-clip_directional-clip_image.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


# --- resuming -------------------------------------------------------------------------------------


def test_two_processes_give_the_same_bytes_as_one(words, whole, tmp_path):
    assert main([*words, "-o", str(tmp_path / "two"), "--workers", "2"]) == 0
    assert file_hashes(tmp_path / "two") == file_hashes(whole)


def test_killed_and_resumed_gives_the_same_bytes(words, whole, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "ip2p", *words, "-o", str(out), "--workers", "1"]
    manifest = out / "edits/manifest.jsonl"
    kills = 0
    for commits in (3, 20, 40):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if manifest.exists() and manifest.read_bytes().count(b"\n") >= commits:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
            time.sleep(0.002)
        assert not (out / "report.json").exists()
    assert kills == 3
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert file_hashes(out) == file_hashes(whole)


def test_a_changed_setting_is_refused_by_name_on_resume(words, whole, capsys):
    output_args = ["-o", str(whole), "--workers", "1"]
    assert main([*words, *output_args, "--seed", "5"]) == 2
    assert "seed 0, but it is now 5; add --overwrite" in capsys.readouterr().err
    assert main([*words, *output_args]) == 0, "and the same ones find all done"


# --- sweeps, baselines, the script ----------------------------------------------------------------


def test_sweeps_include_both_ends():
    assert sweep_values("image_cfg=1.0:2.2:0.2") == ("image_cfg", (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2))
    assert sweep_values("steps=5,10") == ("steps", (5.0, 10.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sweep": "seeds=1:2:1"}, "choose one of: steps, text_cfg, image_cfg"),
        ({"sweep": "image_cfg=1:2:0"}, "has no values"),
        ({"sweep": "image_cfg=one"}, "has no values"),
        ({"sweep": "image_cfg=-1,2"}, "image_cfg is -1"),
        ({"as_published": True}, "--as-published needs --benchmark"),
        ({"judge": "http://localhost"}, "--judge and --judge-model go together"),
        ({"baseline": ["sdedit"]}, "--baseline needs --base or --model"),
    ],
)
def test_invalid_settings_are_refused_with_a_reason(values, message):
    with pytest.raises(InputError, match=message):
        EvaluateConfig.read({"data": "x", "out": "y", **values}, COMMAND_LINE)


def test_two_models_with_the_same_name_are_refused(tmp_path, tiny_model_dir, capsys):
    args = ["evaluate", "storybook", "--model", str(tiny_model_dir), "--model", str(tiny_model_dir)]
    assert main([*args, "-o", str(tmp_path / "o")]) == 2
    assert "two models are called tiny" in capsys.readouterr().err


def test_sdedit_at_full_strength_is_close_to_text_to_image(tiny_model_dir, page):
    painter = CaptionPainter(tiny_model_dir, device="cpu", dtype="fp32")
    settings = EditSettings(steps=4)
    draw_args = {"seeds": [3], "settings": settings}
    text_only = painter.draw([page], ["a page"], strength=None, **draw_args)[0]
    full = painter.draw([page], ["a page"], strength=1.0, **draw_args)[0]
    weak = painter.draw([page], ["a page"], strength=0.25, **draw_args)[0]

    def mean_difference(one, other):
        return np.abs(np.asarray(one, int) - np.asarray(other, int)).mean()

    assert mean_difference(text_only, full) < mean_difference(text_only, page) / 3
    assert mean_difference(weak, page) < mean_difference(full, page)


def test_sdedit_matches_diffusers_image_to_image_on_the_same_base(tmp_path, page):
    """Oracle: StableDiffusionImg2ImgPipeline with Euler and the same noise."""
    from conftest import make_model
    from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline

    from ip2p.base.devices import NoiseStream
    from ip2p.pictures.images import to_tensor

    base = make_model(tmp_path / "base", in_channels=4)
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(base, safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    with torch.no_grad():
        latent = pipe.vae.encode(to_tensor(page)).latent_dist.mode() * pipe.vae.config.scaling_factor
        noise = NoiseStream([7], latent.shape[1:], torch.device("cpu"))()
    pipe.scheduler.set_timesteps(10)
    start = latent + noise * pipe.scheduler.sigmas[4]

    # The pipeline draws its own noise, so its latents are replaced by ours.
    pipe.prepare_latents = lambda *args, **more: start
    expected = pipe("a page", image=page, strength=0.6, num_inference_steps=10, guidance_scale=4.0).images[0]
    painter = CaptionPainter(base, device="cpu", dtype="fp32")
    settings = EditSettings(steps=10, sampler="euler", text_cfg=4.0)
    (found,) = painter.draw([page], ["a page"], seeds=[7], settings=settings, strength=0.6)
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1


def test_as_code_matches_the_clip_arithmetic_of_the_released_script(
    pairs, tiny_model_dir, tiny_clip_dir, tmp_path
):
    """Oracle: the script's arithmetic, spelled out: pictures in [-1, 1], unclamped, squeezed."""
    from transformers import CLIPModel, CLIPTokenizer

    from ip2p.editing.editor import Editor
    from ip2p.evaluation.storybook import edit_tensors
    from ip2p.models.clip import MEAN, STD, pooled_features
    from ip2p.pictures.images import to_tensor

    report = ip2p.evaluate(
        data=str(pairs),
        model=[f"tiny={tiny_model_dir}"],
        out=tmp_path / "code",
        as_code=True,
        clip=str(tiny_clip_dir),
        steps=2,
        size=64,
        device="cpu",
        dtype="fp32",
        workers=1,
    )
    assert report["protocol"] == "as code"
    rows = pq.read_table(tmp_path / "code/rows.parquet").to_pylist()
    row = next(row for row in rows if row["variant"] == "tiny" and row["id"] == "p2")
    editor = Editor.load(tiny_model_dir, device="cpu", dtype="fp32")
    before = to_tensor(Image.open(pairs / "2-before.png"))
    after = edit_tensors(
        editor,
        before,
        ["make it night"],
        seeds=[row["seed"]],
        settings=EditSettings(
            steps=2, sampler="euler_ancestral", schedule="linspace", text_cfg=7.5, image_cfg=1.5
        ),
    )
    assert after.abs().max() > 1, "beyond white and black, and kept so"
    clip, tokenizer = CLIPModel.from_pretrained(tiny_clip_dir), CLIPTokenizer.from_pretrained(tiny_clip_dir)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))

    def embedded(picture):
        square = torch.nn.functional.interpolate(picture, size=32, mode="bicubic", align_corners=False)
        found = pooled_features(clip.get_image_features(pixel_values=(square - mean) / std))
        return found / found.norm(dim=1, keepdim=True)

    with torch.no_grad():
        tokens = tokenizer(["a page", "a dark page 2"], padding=True, return_tensors="pt")
        texts = pooled_features(clip.get_text_features(**tokens))
        a, b = embedded(before)[0], embedded(after)[0]
    s, t = texts / texts.norm(dim=1, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity
    assert row["clip_image"] == pytest.approx(float(cosine(a, b, dim=0)), abs=1e-4)
    assert row["clip_directional"] == pytest.approx(float(cosine(b - a, t - s, dim=0)), abs=1e-3)


# --- intervals ------------------------------------------------------------------------------------


def test_bootstrap_intervals_match_manual_resampling():
    rng = np.random.default_rng(3)
    values = rng.normal(1, 2, 60)
    names = [f"g{k}" for k in range(60)]
    found = reports.summarize_rows({"l1": values}, names, chosen_metrics(["l1"]), resamples=20_000)["l1"]
    draws = [values[rng.integers(0, 60, 60)].mean() for _ in range(20_000)]
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(np.percentile(draws, 2.5), abs=0.03)
    assert found["high"] == pytest.approx(np.percentile(draws, 97.5), abs=0.03)


def test_rows_of_a_group_are_resampled_together():
    values = np.repeat(np.random.default_rng(0).normal(size=20), 50)
    metrics = chosen_metrics(["l1"])
    ungrouped = reports.summarize_rows({"l1": values}, [str(k) for k in range(1000)], metrics, resamples=2000)
    grouped = reports.summarize_rows(
        {"l1": values}, [str(k // 50) for k in range(1000)], metrics, resamples=2000
    )

    def width(found):
        return found["l1"]["high"] - found["l1"]["low"]

    assert width(grouped) == pytest.approx(width(ungrouped) * 50**0.5, rel=0.15)


def test_sharpness_matches_the_ratio_of_sums_of_the_storybook_score():
    rng = np.random.default_rng(1)
    edges, exact = rng.random(40) * 100, rng.random(40) * 100
    numbers = {"sharpness": edges / exact, "exact_edges": exact}
    found = reports.summarize_rows(
        numbers, [str(k) for k in range(40)], chosen_metrics(["sharpness"]), resamples=500
    )
    assert set(found) == {"sharpness"}
    expected = storybook_metrics.ratio(edges, exact)
    assert found["sharpness"]["value"] == pytest.approx(expected.value)
    assert found["sharpness"]["low"] == pytest.approx(expected.low, abs=0.1)


def test_rows_without_a_value_do_not_count():
    numbers = {"l1": np.array([1.0, np.nan, 3.0]), "l2": np.full(3, np.nan)}
    found = reports.summarize_rows(numbers, list("abc"), chosen_metrics(["l1", "l2"]), resamples=100)
    assert found["l1"]["value"] == 2 and found["l1"]["count"] == 2 and found["l2"] is None


def test_correlation_matches_numpy_and_its_interval_manual_resampling():
    rng = np.random.default_rng(5)
    x = rng.normal(size=80)
    y = (x + rng.normal(size=80) > 0).astype(float)
    found = reports.correlation(x, y, [str(k) for k in range(80)], resamples=5000)
    assert found["value"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    draws = [np.corrcoef(x[k], y[k])[0, 1] for k in rng.integers(0, 80, (5000, 80))]
    assert found["low"] == pytest.approx(np.percentile(draws, 2.5), abs=0.03)
    assert found["high"] == pytest.approx(np.percentile(draws, 97.5), abs=0.03)
    assert reports.correlation(x, np.ones(80), [str(k) for k in range(80)], resamples=100) is None


# --- the storybook --------------------------------------------------------------------------------


def test_storybook_rows_match_storybook_score_and_the_ground_truth_is_strict(tiny_model_dir, tmp_path):
    from ip2p.editing.editor import Editor
    from ip2p.evaluation.storybook import score

    report = ip2p.evaluate(
        data="storybook",
        model=[f"t={tiny_model_dir}"],
        count=6,
        steps=1,
        out=tmp_path / "o",
        workers=1,
        device="cpu",
    )
    lines = {line["name"]: line for line in report["lines"]}
    assert lines["ground truth"]["metrics"]["strict"]["value"] == 1
    assert lines["copy the input"]["metrics"]["nearest"]["value"] == 0
    assert lines["ground truth"]["metrics"]["sharpness"]["value"] == pytest.approx(1)
    assert set(lines["t"]["correlations"]) == {
        f"clip_directional and {n}" for n in ("strict", "nearest", "gain")
    }
    assert report["metrics"]["clip_image"]["encoders"] == ["storybook"]
    editor = Editor.load(tiny_model_dir, device="cpu")
    scored = score(
        editor, count=6, settings=EditSettings(steps=1), size=64, splits=("test",), baselines=("copy",)
    )
    expected = scored["splits"]["test"]["copy"]["overall"]["sharpness"]["value"]
    assert lines["copy the input"]["metrics"]["sharpness"]["value"] == pytest.approx(expected)
    assert [row["instruction"] for row in pq.read_table(tmp_path / "o/rows.parquet").to_pylist()[:6]] == [
        edit["instruction"] for edit in scored["splits"]["test"]["edits"]
    ]


def test_the_list_has_every_visible_metric(capsys):
    assert main(["evaluate", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name, metric in METRICS.items() if not metric.hidden)
    assert "exact_edges" not in out
