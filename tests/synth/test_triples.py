"""The seed triples are many, varied and distinct, and the metrics that show it can fail."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from ip2p.base.errors import InputError
from ip2p.synth.records import Triple, candidate, read_triples, triple_id, write_triples
from ip2p.synth.triples import (
    examples,
    first_word,
    grams_of,
    jaccard,
    measure_diversity,
    near_duplicates,
    seed_triples,
    words_in,
)


def make(caption, instruction, edited, number=0):
    return Triple(
        id=triple_id(caption, number), caption=caption, instruction=instruction, edited_caption=edited
    )


@pytest.fixture(scope="module")
def diversity():
    return measure_diversity(seed_triples())


def test_there_are_700_seeds_with_unique_ids_captions_and_instructions(diversity):
    seeds = seed_triples()
    assert len(seeds) >= 700
    assert len({seed.id for seed in seeds}) == diversity.captions == diversity.instructions == len(seeds)
    for seed in seeds:
        for text in (seed.caption, seed.instruction, seed.edited_caption):
            assert text == " ".join(text.split()) and text
        assert len(words_in(seed.instruction)) <= 20 and len(words_in(seed.edited_caption)) <= 40


def test_the_seeds_are_as_varied_as_the_papers(diversity):
    kinds = "attribute style artist place time weather material add remove replace emotion action era"
    assert set(kinds.split()) <= set(diversity.kinds)
    assert len(diversity.kinds) >= 20 and min(diversity.kinds.values()) >= 10
    assert max(diversity.kinds.values()) <= 0.1 * diversity.count
    assert len(diversity.first_words) >= 200 and diversity.first_word_entropy >= 6
    assert max(diversity.first_words.values()) <= 0.15 * diversity.count
    assert diversity.words >= 2500


def test_the_seeds_differ_from_each_other_and_change_part_of_their_captions(diversity):
    assert not near_duplicates([grams_of(seed) for seed in seed_triples()], 0.4)
    assert not diversity.near and diversity.overlap <= 0.2
    assert diversity.changed == 1 and 0.7 <= diversity.kept <= 0.95


def test_triples_from_a_template_fail_these_bounds():
    things = ["dog", "cat", "cow", "hen", "fox", "owl", "bee", "ant", "elk", "emu"]
    triples = [
        make(f"a photo of a {a} in the park", f"make it a {b}", f"a photo of a {b} in the park")
        for a in things
        for b in things
        if a != b
    ]
    found = measure_diversity(triples)
    assert found.near and found.overlap > 0.5
    assert found.first_words == {"make": 90} and found.first_word_entropy == 0
    unchanged = measure_diversity(
        [replace(triple, edited_caption=triple.caption.upper()) for triple in triples]
    )
    assert unchanged.changed == 0 and unchanged.kept == 1
    assert any("100.0% are unchanged" in line for line in unchanged.lines())


@pytest.mark.parametrize("threshold", [0.2, 0.5, 2 / 3, 1.0])
def test_near_duplicates_equal_a_brute_force_comparison(threshold):
    rng = random.Random(0)
    grams = [frozenset(rng.sample("abcdefghij", rng.randint(1, 6))) for _ in range(80)]
    brute_force = {
        (i, j): jaccard(grams[i], grams[j])
        for j in range(80)
        for i in range(j)
        if jaccard(grams[i], grams[j]) >= threshold
    }
    assert {
        (near.first, near.second): near.likeness for near in near_duplicates(grams, threshold)
    } == brute_force
    assert brute_force


def test_overlap_is_the_mean_similarity_to_the_nearest_triple():
    triples = list(seed_triples()[:40])
    grams = [grams_of(triple) for triple in triples]
    nearest = [max(jaccard(a, b) for j, b in enumerate(grams) if i != j) for i, a in enumerate(grams)]
    assert measure_diversity(triples).overlap == pytest.approx(sum(nearest) / 40)


def test_the_first_word_skips_polite_phrases():
    assert first_word("Could you please paint the door?") == "paint"
    assert first_word("Make it night") == "make"
    assert first_word("please") == "please"


def test_examples_are_deterministic_and_differ_by_number():
    assert examples(4, "a fox", 0) == examples(4, "a fox", 0) != examples(4, "a fox", 1)
    assert len({seed.id for seed in examples(20, "a fox")}) == 20


def test_triples_survive_a_parquet_round_trip(tmp_path):
    triples = [make("a cat", "make it a dog", "a dog"), make("a cat", "add a hat", "a cat in a hat", 1)]
    write_triples(tmp_path / "t.parquet", triples)
    assert read_triples(tmp_path / "t.parquet") == triples
    write_triples(tmp_path / "seeds.parquet", seed_triples())
    assert read_triples(tmp_path / "seeds.parquet") == list(seed_triples())


@pytest.mark.parametrize(
    "row",
    [
        '{"input": "a cat", "edit": "make it a dog", "output": "a dog"}',
        '{"original_prompt": "a cat", "edit_prompt": "make it a dog", "edited_prompt": "a dog"}',
    ],
)
def test_triples_are_read_with_the_papers_and_the_hugging_face_column_names(tmp_path, row):
    path = tmp_path / "t.jsonl"
    path.write_text(row + "\n" + row.replace("dog", "hen") + "\n")
    assert read_triples(path) == [
        make("a cat", "make it a dog", "a dog"),
        make("a cat", "make it a hen", "a hen", 1),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"input": "a cat", "edit": "b"}', "row 1: a triple needs"),
        ('{"id": "x", "input": "a", "edit": "b", "output": "c"}\n' * 2, "row 2: duplicate id x"),
        ("\n", "no triples"),
    ],
)
def test_invalid_triples_are_refused(tmp_path: Path, text, expected):
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(InputError, match=expected):
        read_triples(tmp_path / "t.jsonl")


def test_a_candidate_depends_only_on_its_triple_and_number():
    triple = make("a cat", "make it a dog", "a dog")
    assert candidate(triple, 3) == candidate(triple, 3)
    many = [candidate(triple, number) for number in range(2000)]
    assert len({each.seed for each in many}) == len({each.id for each in many}) == 2000
    for values, low, high in (
        ([each.p for each in many], 0.1, 0.9),
        ([each.scale for each in many], 7.5, 15),
    ):
        assert low <= min(values) < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < max(values) < high
        # 2,000 uniform draws: the mean's standard deviation is 0.0065 of the width.
        assert sum(values) / 2000 == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    fixed = candidate(triple, 0, p=(0.5, 0.5), scale=(3, 3))
    assert (fixed.p, fixed.scale, fixed.seed) == (0.5, 3, many[0].seed)
    # Pinned: an unfinished data set must resume with the same candidates.
    pinned = candidate(make("a cat", "b", "c"), 0)
    assert (pinned.seed, round(pinned.p, 9), round(pinned.scale, 9)) == (3893500683, 0.24830062, 13.785420354)
