"""The plain functions of the pair benchmark; its full-size runs are not tests."""

import argparse
import json
import math
from random import Random

import numpy as np
import pytest

from benchmarks.data_quality import pairs, stats
from ip2p.synth.filter import PRESETS, SIMILARITIES, Thresholds
from ip2p.synth.records import Triple
from ip2p.synth.rounds import Rounds, draw_in_rounds


@pytest.fixture
def tool():
    return pairs


def row(edit="a", number=0, right=False, half=0.9, cost=80, **scores):
    similarities = dict.fromkeys(SIMILARITIES, 0.9) | scores
    fields = {"edit": edit, "kind": "add", "number": number, "fate": "made", "evaluations": cost}
    fields |= {"steps": 20, "half_step": 10, "right": right, "changed": right, "kept": None}
    return fields | similarities | {f"half_{name}": half for name in similarities}


def test_wilson_matches_the_published_interval(tool):
    low, high = stats.wilson(0.5, 10)
    assert (round(low, 4), round(high, 4)) == (0.2366, 0.7634)
    assert stats.wilson(0.0, 20)[0] == 0
    assert stats.wilson(0.0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    assert math.isnan(stats.wilson(0.5, 0)[0])


def test_agreeing_candidates_of_one_edit_count_once(tool):
    flags = [True] * 8 + [False] * 8
    alone = tool.share_of(flags)
    together = tool.share_of(flags, ["a"] * 8 + ["b"] * 8)
    assert (alone.low, alone.high) == stats.wilson(0.5, 16)
    assert (together.low, together.high) == stats.wilson(0.5, 2)
    apart = tool.share_of(flags, range(16))
    assert apart == alone


def test_auc_matches_the_share_of_pairs_where_the_true_one_scores_higher(tool):
    random = Random(0)
    scores = [random.choice([0.1, 0.2, 0.3, 0.4]) for _ in range(60)]
    flags = [random.random() < 0.4 for _ in range(60)]
    true, false = ([s for s, flag in zip(scores, flags, strict=True) if flag == kind] for kind in (1, 0))
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in true for b in false]
    assert tool.auc(scores, flags) == pytest.approx(sum(wins) / len(wins))
    assert math.isnan(tool.auc([1.0], [True]))


def test_curve_gives_the_kept_share_and_its_precision(tool):
    points = tool.curve([0.1, 0.2, 0.3, 0.4], [False, True, False, True], [0.0, 0.2, 0.35, 0.5])
    assert points[:3] == [(0.0, 1.0, 0.5), (0.2, 0.75, 2 / 3), (0.35, 0.25, 1.0)]
    assert points[3][1] == 0 and math.isnan(points[3][2])


def test_ratio_is_the_ratio_of_the_sums(tool):
    value, low, high = tool.ratio([10, 30, 20], [1, 2, 1])
    assert value == 15
    assert 10 <= low <= 15 <= high <= 20


def test_overflows_are_dropped_and_the_best_of_an_edit_are_kept(tool):
    rows = [row(number=k, clip_sim_dir=0.2 + 0.1 * k) for k in range(6)]
    rows[5]["fate"] = "overflow"
    kept = tool.filtered(rows, PRESETS["paper"], 2)
    assert sorted(each["number"] for each in kept) == [3, 4]


def test_replay_matches_draw_in_rounds(tool):
    triples = [Triple(id=f"{k}", caption="c", instruction="i", edited_caption="e") for k in range(40)]
    random = Random(1)
    way = tool.Way()
    rows = {}
    for triple in triples:
        rate = random.choice([0.02, 0.1, 0.5])
        for number in range(32):
            good = random.random() < rate
            rows[triple.id, number] = row(triple.id, number, clip_sim_dir=0.9 if good else 0.0)
    plan, thresholds = Rounds(most=32, enough=3, size=8), PRESETS["paper"]
    judged_keys = []

    def judge(candidates):
        judged_keys.extend((one.triple.id, one.number) for one in candidates)
        return [
            True if rows[one.triple.id, one.number]["clip_sim_dir"] >= thresholds.directional else None
            for one in candidates
        ]

    real = draw_in_rounds(triples, plan, judge, new=way.candidate)
    replayed = tool.replay(
        triples, plan, thresholds, lambda one: rows[one.triple.id, one.number], new=way.candidate
    )
    assert {prompt.ended for prompt in real} == {"enough", "hopeless", "most"}
    for one, (two, drawn) in zip(real, replayed, strict=True):
        assert (one.tried, one.ended) == (two.tried, two.ended)
        assert [c.id for c, _ in one.passed] == [c.id for c, _ in two.passed]
        assert len(drawn) == two.tried
    assert {key for _, drawn in replayed for key in ((r["edit"], r["number"]) for r in drawn)} == set(
        judged_keys
    )


def test_a_candidate_refused_halfway_costs_half_and_does_not_pass(tool):
    early = tool.Early(PRESETS["paper"], margin=0.05, at=0.5)
    near, far = row(half=0.72), row(number=1, half=0.65)
    assert not early.refuses(near) and early.refuses(far)
    assert tool.evaluations(near, early) == 80
    assert tool.evaluations(far, early) == 40
    assert tool.evaluations(far) == 80
    triple = Triple(id="a", caption="c", instruction="i", edited_caption="e")
    rows = [near, far]
    [(prompt, _)] = tool.replay(
        [triple],
        Rounds(most=2, enough=None, risk=0.0),
        PRESETS["paper"],
        lambda one: rows[one.number],
        new=tool.Way().candidate,
        early=early,
    )
    assert [each["number"] for _, each in prompt.passed] == [0]


def test_the_best_thresholds_separate_right_from_wrong(tool):
    rng = np.random.default_rng(0)
    rows = [
        row(f"{k}", right=bool(k % 2), clip_sim_dir=(0.5 if k % 2 else 0.2) + rng.uniform(-0.1, 0.1))
        for k in range(200)
    ]
    [(recall, (thresholds, share, precision))] = tool.best_thresholds(rows, recalls=[0.9])
    assert recall == 0.9
    assert 0.3 <= thresholds.directional <= 0.45
    assert (share, precision) == (0.5, 1.0)


def test_a_truncated_line_is_dropped_and_complete_rows_are_not_drawn_again(tool, tmp_path):
    measured = object.__new__(tool.Measured)
    measured.folder, measured.rows = tmp_path, {}
    way = tool.Way()
    complete_rows = [row(number=0), row(number=1)]
    path = tmp_path / way.file
    path.write_text("".join(json.dumps(each) + "\n" for each in complete_rows) + '{"edit": "a", "num')
    triple = Triple(id="a", caption="c", instruction="i", edited_caption="e")
    drawn_numbers = []

    def draw(way, candidates):
        drawn_numbers.extend(one.number for one in candidates)
        return [row(number=one.number) for one in candidates]

    measured._draw = draw
    got = measured.of(way, [way.candidate(triple, number) for number in range(3)])
    assert drawn_numbers == [2]
    assert [each["number"] for each in got] == [0, 1, 2]
    again = object.__new__(tool.Measured)
    again.folder, again.rows = tmp_path, {}
    assert sorted(number for _, number in again._known(way)) == [0, 1, 2]


def test_a_way_is_named_after_its_differences_from_the_default(tool):
    assert tool.Way().name == "default"
    assert tool.Way(steps=100, per_source=4).name == "steps 100, per_source 4"
    files = {tool.Way(steps=steps, attention=a).file for steps in (10, 20) for a in ("self", "self+refine")}
    assert len(files) == 4


def test_command_line_options_set_the_way_and_the_thresholds(tool):
    names = [*tool.asdict(tool.Way()), "image", "caption", "directional"]
    args = argparse.Namespace(**dict.fromkeys(names) | {"steps": 10, "p": [0.2, 0.4], "directional": 0.3})
    assert tool._way(args) == tool.Way(steps=10, p=(0.2, 0.4))
    defaults = PRESETS["storybook"]
    assert tool._thresholds(args) == Thresholds(
        image=defaults.image, caption=defaults.caption, directional=0.3
    )


def test_the_plot_shows_all_four_similarities(tool):
    rng = np.random.default_rng(0)
    rows = [
        row(right=bool(rng.random() < 0.4), **{name: float(rng.random()) for name in SIMILARITIES})
        for _ in range(100)
    ]
    picture = tool.plot(rows)
    assert picture.size == (3 * tool.PANEL[0], 2 * tool.PANEL[1])
    colors = {color for _, color in picture.convert("RGB").getcolors(10**6)}
    for ink in tool.INKS:
        assert tuple(bytes.fromhex(ink[1:])) in colors
