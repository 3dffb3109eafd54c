"""Paraphrases are frozen, share no wording with phrasings, and have one exact answer each."""

import hashlib
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.data_quality import reading
from ip2p_storybook import language, words
from ip2p_storybook.edits import EDIT_KINDS, GLOBAL_KINDS, Edit, is_unique, propose, sample_edit
from ip2p_storybook.paraphrases import PARAPHRASES_FILE, is_paraphrase, paraphrases_of, read_paraphrases
from ip2p_storybook.scene import (
    ALL_KINDS,
    COLOURS,
    PLACES,
    SIZES,
    SLOTS,
    WEARABLES,
    Scene,
    Thing,
    has_held_out_combination,
    rng_for,
)


def test_the_paraphrase_file_is_frozen() -> None:
    # A change here invalidates earlier scores on paraphrases: note it in the changelog.
    assert (
        hashlib.sha256(PARAPHRASES_FILE.read_bytes()).hexdigest()
        == "f42a8119848147bf1c8b8f76c2168c52cc6c64c5a8c6e6287bca52f9f45bafd6"
    )


def test_every_kind_has_at_least_20_distinct_paraphrases() -> None:
    count = Counter(p.kind for p in read_paraphrases())
    assert set(count) == set(EDIT_KINDS)
    assert min(count.values()) >= 20
    assert count.total() >= 330
    assert len({p.instruction.lower() for p in read_paraphrases()}) == count.total()
    for kind in EDIT_KINDS:
        assert [p.id for p in paraphrases_of(kind)] == [f"{kind}/p{n}" for n in range(1, count[kind] + 1)]


# --- the wording ------------------------------------------------------------------------------------


def test_no_phrasing_matches_a_paraphrase_or_a_clause_of_it() -> None:
    for paraphrase in read_paraphrases():
        text = paraphrase.instruction
        assert reading.edit_kind(text) == "none", text
        for clause in re.split(r"[.,;:?!]|\b(?:and|then|but|so)\b", text.lower()):
            if len(clause.split()) > 2:  # "a black cat" is just a thing
                assert reading.edit_kind(clause.strip()) == "none", text


def field_values() -> list[str]:
    """Everything that can fill a field of a phrasing, longest first."""
    nouns = [noun for kind in ALL_KINDS for noun in language.nouns_of(kind)]
    nouns += [noun for group in words.GROUP_NOUNS.values() for noun in group]
    nouns += [word for wearable in WEARABLES for word in language.wearables_of(wearable)]
    nouns += [
        *words.THING_NOUNS,
        "clothes",
        "everything",
        *language.NUMBERS,
        "it",
        "him",
        "her",
        "them",
        "she",
        "he",
    ]
    found = {*nouns, *map(language.plural, nouns), "his", "its", "their", "they", "1", "2", "3", "4"}
    found |= {word for colour in COLOURS for word in language.colours_of(colour)}
    for slot in SLOTS:
        found |= {*words.ON_SIDE[slot], *words.TO_SIDE[slot], f"to the {slot}", slot}
    found |= {word for place in PLACES for of in language.places_of(place) for word in of}
    for table in (words.TIME_WORDS, words.WEATHER_WORDS, words.STYLE_WORDS):
        found |= {word for options in table.values() for of in options for word in of}
    return sorted(map(language.american, found), key=len, reverse=True)


NAMES = re.compile(rf"\b(?:{'|'.join(map(re.escape, field_values()))})\b(?:'s?)?")
ARTICLES = re.compile(r"\b(?:an?|the|this|that|these|those|my|some)\b")


def wording(text: str) -> str:
    """The text with X for each field's value, without articles and punctuation."""
    text = NAMES.sub("X", re.sub(r"\{\w+\}", "X", language.american(text.lower())))
    text = re.sub(r"[^\w' ]", " ", ARTICLES.sub(" ", text))
    return re.sub(r"X(?: X)+", "X", " ".join(text.split()))


def test_no_paraphrase_has_the_wording_of_a_phrasing() -> None:
    known = {wording(p.text) for phrasings in language.PHRASINGS.values() for p in phrasings}
    assert wording("Put a hat on the red cat!") in known
    for paraphrase in read_paraphrases():
        wordings = {wording(clause) for clause in reading._clauses(paraphrase.instruction)}
        assert wordings.isdisjoint(known), paraphrase.instruction


def test_few_words_are_outside_the_vocabulary() -> None:
    vocabulary = set(language.vocabulary())
    known = Counter(w in vocabulary for p in read_paraphrases() for w in language.words_of(p.instruction))
    assert known[False] <= 0.015 * known.total()


# --- the answers ------------------------------------------------------------------------------------


def sample_paraphrases(kind: str | None, count: int) -> list[Edit]:
    rng = rng_for("paraphrases", kind)
    return [sample_edit(rng, kind, "paraphrases") for _ in range(count)]


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_every_paraphrase_is_sampled_with_a_unique_answer(kind: str) -> None:
    sampled = set()
    for edit in sample_paraphrases(kind, 400):
        sampled.add(edit.instruction)
        assert edit.kind == kind
        assert is_unique(edit)
        assert edit.before != edit.after
        assert edit.before.seed % 2 == 1
        assert not has_held_out_combination(edit.before)
        assert not has_held_out_combination(edit.after)
        assert all(is_paraphrase(part) for part in edit.phrasing.split("+"))
    assert sampled == {p.instruction for p in paraphrases_of(kind)}


FIELDS = {
    "recolour": "colour", "put_on": "wears", "take_off": "wears", "bigger": "size", "smaller": "size",
    "move": "slot", "count": "count",
}  # fmt: skip


def check_rules(edit: Edit) -> None:
    """Check that the answer follows the rules of its kind in `edits`."""
    before, after = edit.before, edit.after
    if edit.kind in GLOBAL_KINDS:
        assert replace(before, **{edit.kind: getattr(after, edit.kind)}) == after
        return
    assert edit.target is not None
    if edit.kind == "add":
        assert after.things[:-1] == before.things
        return
    rest = [t for i, t in enumerate(before.things) if i != edit.target]
    if edit.kind == "remove":
        assert list(after.things) == rest
        return
    was, now = before.things[edit.target], after.things[edit.target]
    assert [t for i, t in enumerate(after.things) if i != edit.target] == rest
    if edit.kind == "replace":
        assert (was.uid, was.size, was.slot, was.count) == (now.uid, now.size, now.slot, now.count)
        return
    field = FIELDS[edit.kind]
    assert replace(was, **{field: getattr(now, field)}) == now
    if field == "size":
        step = 1 if edit.kind == "bigger" else -1
        assert SIZES.index(now.size) - SIZES.index(was.size) == step


def test_answers_follow_the_rules_of_their_kind() -> None:
    for edit in sample_paraphrases(None, 1500):
        for step in edit.steps or (edit,):
            check_rules(step)
        if edit.steps:
            first, second = edit.steps
            assert (first.before, first.after, second.after) == (edit.before, second.before, edit.after)


def test_the_free_place_is_named_only_if_exactly_one_is_free() -> None:
    edits = [e for e in sample_paraphrases("add", 500) if "free place" in e.instruction]
    assert edits
    assert all(len(e.before.free_slots(sky=False)) == 1 for e in edits)


def test_he_is_used_only_if_the_one_person_on_the_page_is_male() -> None:
    for edit in sample_paraphrases("take_off", 400):
        if edit.instruction.startswith("he "):
            people = [t for t in edit.before.things if t.kind in ("girl", "boy", "queen", "wizard")]
            assert [t.kind in ("boy", "wizard") for t in people] == [True]


def test_a_page_gets_a_paraphrase_that_fits_it_or_none() -> None:
    page = Scene(place="beach", things=(Thing(kind="cat", colour="red", uid=1),), seed=3)
    sampled = (propose(page, random.Random(k), "recolour", "paraphrases") for k in range(20))
    instructions = {edit.instruction for edit in sampled if edit is not None}
    assert instructions == {"that cat must turn orange"}
    assert propose(page, random.Random(1), None, "paraphrases") is not None
    assert propose(page, random.Random(1), "take_off", "paraphrases") is None
    with pytest.raises(ValueError, match="unknown kind of edit 'melt'"):
        propose(page, random.Random(1), "melt", "paraphrases")


def test_training_never_samples_a_paraphrase() -> None:
    rng = rng_for("no paraphrase")
    assert not any(is_paraphrase(sample_edit(rng, split="train").phrasing) for _ in range(500))
