"""Edits between given pages: exact by drawing, in training's words, and none where the language has none."""

from dataclasses import replace

import numpy as np
import pytest

from ip2p_storybook import language
from ip2p_storybook.draw import draw
from ip2p_storybook.edits import EDIT_KINDS, is_unique, propose, sample_edit
from ip2p_storybook.rewording import reversible, same_page, say_change, say_two_changes
from ip2p_storybook.scene import has_held_out_combination, rng_for, sample_scene

KINDS = [kind for kind in EDIT_KINDS if kind != "two"]


def edits_of(kind, count):
    """Edits of the kind whose answer is unique, on pages whose things can come back."""
    found, number = [], 0
    while len(found) < count:
        rng = rng_for("changes", kind, number)
        number += 1
        page = reversible(sample_scene(rng))
        edit = propose(page, rng, kind)
        if edit is not None and is_unique(edit):
            found.append(edit)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_is_said_again_in_other_words(kind):
    for number, edit in enumerate(edits_of(kind, 12)):
        again = [say_change(edit.before, edit.after, rng_for("again", kind, number, k)) for k in range(4)]
        said = [new for new in again if new is not None]
        assert len(said) >= 3
        for new in said:
            assert new.before == edit.before and same_page(new.after, edit.after)
            assert new.kind == kind and is_unique(new)
        assert len({new.instruction for new in said}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_reversal_of_an_edit_draws_the_first_page_again(kind):
    reversed_edits = 0
    for number, edit in enumerate(edits_of(kind, 12)):
        back = say_change(edit.after, edit.before, rng_for("back", kind, number))
        if back is None:
            continue
        reversed_edits += 1
        np.testing.assert_array_equal(draw(back.after, 64), draw(edit.before, 64))
    # Clothes that the new kind cannot wear, and colors that a style does not show, do not come back.
    assert reversed_edits >= (3 if kind in ("style", "remove") else 8)


def test_two_edits_of_a_page_give_the_way_from_one_to_the_other():
    count = {"one": 0, "two": 0}
    for number in range(60):
        rng = rng_for("across", number)
        page = reversible(sample_scene(rng))
        a, b = propose(page, rng), propose(page, rng)
        if a.steps or b.steps or same_page(a.after, b.after):
            continue
        one = say_change(a.after, b.after, rng)
        two = say_two_changes(a.after, page, b.after, rng)
        for name, edit in (("one", one), ("two", two)):
            if edit is not None:
                count[name] += 1
                np.testing.assert_array_equal(draw(edit.after, 64), draw(b.after, 64))
                assert edit.before == a.after and is_unique(edit)
    assert count["one"] >= 2 and count["two"] >= 20


def test_nothing_held_out_is_said_or_shown():
    held = language.held_out_phrasings()
    for number in range(80):
        rng = rng_for("held", number)
        edit = sample_edit(rng)
        back = say_change(edit.after, edit.before, rng)
        if back is not None:
            assert not held & set(back.phrasing.split("+"))
            assert not has_held_out_combination(back.after)


def test_pages_apart_in_two_ways_or_none_have_no_single_edit():
    edit = edits_of("recolour", 1)[0]
    rng = rng_for("none")
    assert say_change(edit.before, edit.before, rng) is None
    other = replace(edit.after, time="night" if edit.after.time != "night" else "noon")
    assert say_change(edit.before, other, rng) is None
    assert say_change(edit.before, replace(edit.before, seed=edit.before.seed + 2), rng) is None
    assert say_two_changes(edit.before, edit.after, other, rng) is not None


def test_reversible_pages_differ_in_nothing_but_the_things_seeds():
    page = sample_scene(rng_for("page", 1))
    other = reversible(page)
    assert [replace(t, uid=0) for t in other.things] == [replace(t, uid=0) for t in page.things]
    assert reversible(other) == other
