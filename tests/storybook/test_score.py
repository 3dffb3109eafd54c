import json

import numpy as np
import pytest

from ip2p.cli import main as cli
from ip2p.evaluation.storybook import (
    BASELINES,
    OTHER_ANSWERS,
    SPLITS,
    as_text,
    blurred_answer,
    cases,
    hedged_answer,
    judge,
    summarize,
)
from ip2p.settings import EditSettings
from ip2p_storybook import edits
from ip2p_storybook.edits import EDIT_KINDS

SIZE = 64


@pytest.fixture(scope="module")
def some_cases():
    return list(cases(30, seed=0, size=SIZE, split="test"))


def test_kinds_alternate_and_every_case_has_enough_alternatives(some_cases):
    assert [c.edit.kind for c in some_cases] == [*EDIT_KINDS, *EDIT_KINDS]
    assert all(len(c.others) >= OTHER_ANSWERS for c in some_cases)


def test_the_exact_answer_succeeds_and_keeps_the_page(some_cases):
    for case in some_cases:
        verdict = judge(case, case.exact)
        assert verdict.nearest and verdict.strict
        assert verdict.gain == pytest.approx(1) and verdict.edges == verdict.exact_edges
        assert verdict.preservation in (None, float("inf"))


def test_copying_the_page_never_succeeds(some_cases):
    assert not any(judge(case, case.page).nearest for case in some_cases)


def test_each_other_answer_fails(some_cases):
    for case in some_cases:
        assert not any(judge(case, other).nearest for other in case.others)


def test_small_noise_does_not_change_the_verdict(some_cases):
    rng = np.random.default_rng(0)
    for case in some_cases:
        noisy = case.exact + rng.normal(0, 2, case.exact.shape)
        assert judge(case, noisy.clip(0, 255).round().astype(np.uint8)).nearest


def test_pixels_outside_the_region_do_not_count(some_cases):
    case = next(c for c in some_cases if not c.region.all())
    output = case.exact.copy()
    output[~case.region] = 0
    assert judge(case, output).nearest


def test_preservation_is_psnr_where_nothing_may_change(some_cases):
    case = next(c for c in some_cases if c.fixed.mean() > 0.3)
    output = case.page.astype(int)
    output = np.where(output >= 128, output - 10, output + 10).astype(np.uint8)
    kept = judge(case, output).preservation
    assert abs(kept - 20 * np.log10(255 / 10)) < 1e-4


def test_the_same_seed_gives_the_same_cases():
    for split in SPLITS:
        first, second = (list(cases(3, seed=4, size=32, split=split)) for _ in range(2))
        assert [c.edit for c in first] == [c.edit for c in second]


def test_half_the_change_is_never_strict(some_cases):
    halves = [
        ((case.page.astype(np.float32) + case.exact) / 2).round().astype(np.uint8) for case in some_cases
    ]
    verdicts = [judge(case, half) for case, half in zip(some_cases, halves, strict=True)]
    assert not any(verdict.strict for verdict in verdicts)
    assert all(verdict.gain == pytest.approx(0.5, abs=0.05) for verdict in verdicts)


def test_hedging_lowers_nearest_and_strict_but_not_preservation(some_cases):
    row = summarize([judge(case, hedged_answer(case)) for case in some_cases])["overall"]
    assert row["strict"]["value"] <= row["nearest"]["value"] < 0.5
    assert row["preservation"]["value"] > 50


def test_blur_is_caught_by_sharpness_alone(some_cases):
    row = summarize([judge(case, blurred_answer(case)) for case in some_cases])["overall"]
    assert row["nearest"]["value"] > 0.9 and row["strict"]["value"] > 0.7
    assert row["sharpness"]["value"] < 0.7
    assert row["preservation"]["value"] == 60  # dB: kept to the byte


def test_summary_counts_shares(some_cases):
    verdicts = [judge(c, c.exact if i % 2 else c.page) for i, c in enumerate(some_cases)]
    rows = summarize(verdicts)
    assert set(rows) == {*EDIT_KINDS, "overall"}
    assert rows["overall"]["count"] == 30
    assert rows["overall"]["nearest"]["value"] == rows["overall"]["strict"]["value"] == 0.5
    assert rows["overall"]["nearest"]["low"] == pytest.approx(0.3315, abs=1e-4)
    assert rows["time"]["preservation"] is None and rows["move"]["preservation"]["count"] == 2


@pytest.fixture(scope="module")
def result(tiny_model_dir):
    from ip2p.editing.editor import Editor
    from ip2p.evaluation.storybook import score

    editor = Editor.load(tiny_model_dir, device="cpu", dtype="fp32")
    return score(editor, count=3, settings=EditSettings(steps=1), size=64, batch_size=2)


def test_score_of_a_random_model_has_every_table(result):
    assert tuple(result["splits"]) == SPLITS == tuple(s for s in edits.SPLITS if s != "train")
    for tables in result["splits"].values():
        assert {"model", *BASELINES} <= set(tables)
        assert tables["copy"]["overall"]["nearest"]["value"] == 0
        assert tables["copy"]["overall"]["gain"]["value"] == 0
        assert tables["model"]["overall"]["count"] == 3 == len(tables["edits"])
        assert tables["reconstruction"] == tables["ceiling"]["overall"]["distance"]
    json.dumps(result, allow_nan=False)


def test_text_has_counts_and_intervals_beside_every_share(result):
    lines = as_text(result).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("hedger") for line in lines) == len(SPLITS)
    for line in lines:
        assert line.count("%") == line.count("/") or "percentage" in line
    [row, *_] = [line for line in lines if line.startswith("copy")]
    assert "0/3   0%   (0-56)" in row


def test_text_with_large_numbers_fits_in_100_columns(result):
    base_row = result["splits"]["test"]["model"]["overall"]
    full = {"value": 1.0, "low": 0.9999, "high": 1.0, "count": 9999}
    sharp = {"value": 1.0, "low": 0.99, "high": 1.01, "count": 9999}
    kept = {"value": 60.0, "low": 60.0, "high": 60.0, "count": 9999}
    row = {**base_row, "nearest": full, "strict": full, "sharpness": sharp, "preservation": kept}
    tables = {"model": {"recolour": row}, **{name: {"overall": row} for name in BASELINES}}
    text = as_text({**result, "splits": {"unseen_combinations": tables}})
    assert max(map(len, text.splitlines())) <= 100


def test_command_scores_the_named_splits(tiny_model_dir, tmp_path, capsys):
    out = tmp_path / "score.json"
    args = ["--model", tiny_model_dir, "--count", "2", "--steps", "1", "--size", "32", "--device", "cpu"]
    args += ["--split", "unseen_phrasings", "--split", "train", "-o", out, "--sheet", tmp_path / "rows.png"]
    assert cli.main(["storybook", "score", *map(str, args)]) == 0
    assert set(json.loads(out.read_text())["splits"]) == {"unseen_phrasings", "train"}
    output = capsys.readouterr().out
    assert "unseen_phrasings" in output and "unseen_combinations" not in output
    assert (tmp_path / "rows.png").is_file()


def test_an_unknown_split_is_reported_with_the_known_ones(capsys):
    assert cli.main(["storybook", "score", "--split", "tset"]) == 2
    error = capsys.readouterr().err
    assert "tset" in error and all(split in error for split in edits.SPLITS)
