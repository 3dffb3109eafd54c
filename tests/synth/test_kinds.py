"""Kinds of edit, and the quota for edits of the whole picture in pairs and filter."""

import dataclasses

import numpy as np
import pytest

from ip2p.synth.filter import SIMILARITIES, Scored, Thresholds, select
from ip2p.synth.instruct import Answer, EditText, Instruct, parse_answer
from ip2p.synth.kinds import kind_of
from ip2p.synth.records import COLUMNS, Triple, read_triples, write_triples
from ip2p.synth.rounds import Rounds, draw_in_rounds
from ip2p.synth.triples import seed_triples
from ip2p_storybook.edits import GLOBAL_KINDS
from ip2p_storybook.triples import exact_triples

ALL = Thresholds(image=-1, caption=-1, directional=-1)


@pytest.mark.parametrize(
    "instruction, kind",
    [
        ("make it night", "whole"),
        ("turn it into a watercolour", "whole"),
        ("what if it were autumn?", "whole"),
        ("put them in the desert", "whole"),
        ("let it rain", "whole"),
        ("make the dog red", "part"),
        ("add a snowman", "part"),
        ("remove the tree in the park", "part"),
        ("replace the moon with a lamp", "part"),
        ("swap the fox for a cat", "part"),
    ],
)
def test_the_rule_classifies_instructions(instruction, kind):
    assert kind_of(instruction) == kind


def test_a_label_overrides_the_rule():
    assert kind_of("add a snowman", "weather") == kind_of("add a snowman", "Whole") == "whole"
    assert kind_of("make it night", "part") == kind_of("make it night", "color") == "part"


def test_the_rule_mostly_agrees_with_the_exact_and_the_seed_kinds():
    exact = [triple for triple in exact_triples(400, 3) if triple.edit.kind != "two"]
    correct = [(kind_of(t.instruction) == "whole") == (t.edit.kind in GLOBAL_KINDS) for t in exact]
    assert sum(correct) / len(correct) > 0.88
    seeds = seed_triples()
    correct = [kind_of(t.instruction) == t.kind for t in seeds]
    assert sum(correct) / len(correct) > 0.70
    assert 0.3 < sum(t.is_whole for t in seeds) / len(seeds) < 0.5


def test_the_kind_of_a_triple_survives_a_parquet_round_trip(tmp_path):
    triples = [
        Triple(id="1", caption="a", instruction="add a hat", edited_caption="b", kind="whole"),
        Triple(id="2", caption="c", instruction="make it night", edited_caption="d"),
    ]
    write_triples(tmp_path / "t.parquet", triples)
    assert read_triples(tmp_path / "t.parquet") == triples
    assert [triple.is_whole for triple in triples] == [True, True]
    assert COLUMNS[-1] == "kind"


def test_the_writers_kind_is_used_if_given_or_else_the_rules(tmp_path):
    assert parse_answer("make it glow\n%%\na glowing cat\n%%\nwhole") == EditText(
        instruction="make it glow", edited_caption="a glowing cat", kind="whole"
    )
    assert parse_answer("make it glow\n%%\na glowing cat\n%%\nand a dog") is None

    def writer(asks):
        texts = {"a cat": "make it glow\n%%\na glowing cat\n%%\nwhole", "a dog": "add fur\n%%\na furry dog"}
        return [Answer(text=texts[ask.caption]) for ask in asks]

    writer.name = "test"
    written = Instruct(writer)(["a cat", "a dog"])
    assert [each.triples[0].kind for each in written] == ["whole", "part"]


def test_an_edit_of_the_whole_picture_needs_fewer_passing_candidates():
    part = Triple(id="p", caption="a cat", instruction="make the cat red", edited_caption="a red cat")
    whole = Triple(id="w", caption="a cat", instruction="make it night", edited_caption="a cat at night")
    rounds = Rounds(enough=4, enough_whole=2, size=1)
    found = draw_in_rounds([part, whole], rounds, lambda candidates: [True] * len(candidates))
    assert [(len(one.passed), one.ended) for one in found] == [(4, "enough"), (2, "enough")]
    assert rounds.for_triple(dataclasses.replace(whole, kind="part")) == rounds
    all_rounds = Rounds(most=6, enough=None, enough_whole=2, risk=0.0)
    assert [
        len(one.passed)
        for one in draw_in_rounds([whole], all_rounds, lambda candidates: [True] * len(candidates))
    ] == [6]


def scored(instructions, labels=()):
    count = len(instructions)
    return Scored(
        ids=[str(k) for k in range(count)],
        edits=list(instructions),
        instructions=list(instructions),
        hashes=np.zeros((count, 2), np.uint64),
        flaws=[""] * count,
        clips=[""] * count,
        scores={name: np.linspace(0.5, 0.9, count) for name in SIMILARITIES},
        labels=labels,
    )


def kept(rows, **how):
    return [row for row, why in enumerate(select(rows, ALL, **how)) if not why]


def test_the_best_pairs_of_an_edit_are_kept_up_to_the_quota_of_its_kind():
    rows = scored(["make it night"] * 5 + ["make the cat red"] * 5)
    assert kept(rows, top=4, top_whole=1) == [4, 6, 7, 8, 9]
    assert kept(rows, top=4, top_whole=2) == [3, 4, 6, 7, 8, 9]
    assert kept(rows, top=4) == kept(rows, top=4, top_whole=4) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert kept(rows, top=None, top_whole=1) == list(range(10))
    reasons = select(rows, ALL, top=4, top_whole=1)
    assert [why for why in reasons if why] == ["surplus"] * 5


def test_the_quota_never_drops_the_only_pair_of_an_edit():
    rows = scored(["make it night", "let it rain", "make it day"])
    assert kept(rows, top=4, top_whole=1) == [0, 1, 2]


def test_labels_of_the_data_set_override_the_rule():
    rows = scored(["make it shine"] * 4 + ["make it night"] * 4, ["weather"] * 4 + ["part"] * 4)
    assert kept(rows, top=3, top_whole=1) == [3, 5, 6, 7]
