from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from benchmarks.data_quality.pair_score import (
    CELLS,
    PAIR_KINDS,
    judge_pair,
    make_pair_case,
    pair_triples,
    with_details,
)
from ip2p.evaluation.storybook import OTHER_ANSWERS
from ip2p_storybook.captions import say_page
from ip2p_storybook.draw import draw
from ip2p_storybook.scene import SIZES

SIZE, DETAILS = 64, 6


@pytest.fixture(scope="module")
def triples():
    return list(islice(pair_triples(3, SIZE), len(PAIR_KINDS)))


@pytest.fixture(scope="module")
def some_cases(triples):
    return [make_pair_case(triple, SIZE, DETAILS) for triple in triples]


def answer(case, number, details=0):
    """A picture with the cell means of a drawing."""
    return np.kron(case.drawings[details, number], np.ones((2, 2, 1), np.uint8))


def test_kinds_alternate_without_move_and_every_case_has_enough_alternatives(some_cases):
    assert [case.triple.edit.kind for case in some_cases] == list(PAIR_KINDS)
    assert "move" not in PAIR_KINDS
    assert not any("move" in case.triple.edit.parts for case in some_cases)
    assert all(case.drawings.shape == (DETAILS, OTHER_ANSWERS + 2, CELLS, CELLS, 3) for case in some_cases)


def test_captions_show_sizes_sides_and_the_edit(triples):
    for triple in triples:
        assert triple.caption != triple.edited_caption
        page = triple.edit.before
        for index, thing in enumerate(page.things):
            size = SIZES[SIZES.index(thing.size) - 1]
            assert say_page(page.with_thing(index, size=size), triple.form) != triple.caption
            for slot in page.free_slots(sky=thing.in_sky):
                assert say_page(page.with_thing(index, slot=slot), triple.form) != triple.caption


def test_exact_pairs_are_right_and_keep_the_page(some_cases):
    for case in some_cases:
        edit = case.triple.edit
        verdict = judge_pair(case, draw(edit.before, SIZE), draw(edit.after, SIZE))
        assert verdict.right and verdict.drawn and verdict.edited and verdict.changed
        assert verdict.kept in (None, float("inf"))


def test_exact_pairs_with_other_details_are_right_unless_answers_look_alike(some_cases):
    for case in some_cases:
        for details in range(1, DETAILS):
            verdict = judge_pair(case, answer(case, 0, details), answer(case, 1, details))
            assert (verdict.right and verdict.changed) == (not case._alike[details].any())


def test_pairs_with_details_outside_the_references_are_mostly_right(some_cases):
    verdicts = []
    for case in some_cases:
        edit = with_details(case.triple.edit, 77)
        verdicts.append(judge_pair(case, draw(edit.before, SIZE), draw(edit.after, SIZE)))
    assert sum(verdict.changed for verdict in verdicts) >= 8
    assert sum(verdict.right for verdict in verdicts) >= 6


def test_identical_pictures_count_as_drawn_but_not_changed(some_cases):
    for case in some_cases:
        verdict = judge_pair(case, answer(case, 0), answer(case, 0))
        assert verdict.drawn
        assert not (verdict.changed or verdict.edited or verdict.right)


def test_alternatives_count_as_neither_edited_nor_changed(some_cases):
    for case in some_cases:
        for number in range(2, OTHER_ANSWERS + 2):
            verdict = judge_pair(case, answer(case, 0), answer(case, number))
            assert not (verdict.edited or verdict.changed)


def test_a_reversed_pair_is_wrong(some_cases):
    for case in some_cases:
        verdict = judge_pair(case, answer(case, 1), answer(case, 0))
        assert not (verdict.drawn or verdict.edited or verdict.changed)


def test_pairs_of_other_edits_are_right_about_as_often_as_by_chance(some_cases):
    pairs = [(answer(case, 0), answer(case, 1)) for case in some_cases]
    verdicts = [
        judge_pair(case, *pairs[(place + shift) % len(pairs)])
        for place, case in enumerate(some_cases)
        for shift in range(1, len(pairs))
    ]
    # By chance, 1 of 17 answers is right for each picture.
    assert sum(verdict.edited for verdict in verdicts) / len(verdicts) < 0.15
    assert sum(verdict.right for verdict in verdicts) / len(verdicts) < 0.03


def test_darkening_both_pictures_rarely_affects_changed(some_cases):
    changed_count = 0
    for case in some_cases:
        before, after = (np.maximum(answer(case, k), 30) - 30 for k in (0, 1))
        verdict = judge_pair(case, before, after)
        changed_count += verdict.changed
    assert changed_count >= len(some_cases) - 2


def test_kept_is_psnr_where_nothing_may_change(some_cases):
    case = next(case for case in some_cases if case.fixed.mean() > 0.3)
    page = answer(case, 0).astype(int)
    after = np.where(page >= 128, page - 10, page + 10).astype(np.uint8)
    assert abs(judge_pair(case, answer(case, 0), after).kept - 20 * np.log10(255 / 10)) < 1e-4


def test_kept_is_none_for_an_edit_of_the_whole_page(some_cases):
    case = next(case for case in some_cases if case.triple.edit.kind == "weather")
    assert judge_pair(case, answer(case, 0), answer(case, 1)).kept is None


def test_with_details_changes_only_the_seed_of_the_pages(triples):
    edit = triples[0].edit
    other = with_details(edit, 5)
    assert replace(other.before, seed=edit.before.seed) == edit.before
    assert replace(other.after, seed=edit.after.seed) == edit.after
