"""Edits between two given pages: drawn exactly, in training phrasings, or None where there is no phrasing."""

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
    """Edits of the kind with a unique answer, on reversible pages."""
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
def test_an_edit_can_be_reworded(kind):
    for number, edit in enumerate(edits_of(kind, 12)):
        attempts = [say_change(edit.before, edit.after, rng_for("again", kind, number, k)) for k in range(4)]
        reworded = [new for new in attempts if new is not None]
        assert len(reworded) >= 3
        for new in reworded:
            assert new.before == edit.before and same_page(new.after, edit.after)
            assert new.kind == kind and is_unique(new)
        assert len({new.instruction for new in reworded}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_reversal_of_an_edit_restores_the_page_pixel_for_pixel(kind):
    reversed_edits = 0
    for number, edit in enumerate(edits_of(kind, 12)):
        back = say_change(edit.after, edit.before, rng_for("back", kind, number))
        if back is None:
            continue
        reversed_edits += 1
        np.testing.assert_array_equal(draw(back.after, 64), draw(edit.before, 64))
    # Clothes that the new kind cannot wear, and colors that a style does not show, cannot be restored.
    assert reversed_edits >= (3 if kind in ("style", "remove") else 8)


def test_two_edits_of_a_page_give_an_edit_from_one_result_to_the_other():
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


def test_reversed_edits_use_no_held_out_phrasing_or_combination():
    held_out = language.held_out_phrasings()
    for number in range(80):
        rng = rng_for("held", number)
        edit = sample_edit(rng)
        back = say_change(edit.after, edit.before, rng)
        if back is not None:
            assert not held_out & set(back.phrasing.split("+"))
            assert not has_held_out_combination(back.after)


def test_pages_with_no_or_two_differences_have_no_single_edit():
    edit = edits_of("recolour", 1)[0]
    rng = rng_for("none")
    assert say_change(edit.before, edit.before, rng) is None
    other = replace(edit.after, time="night" if edit.after.time != "night" else "noon")
    assert say_change(edit.before, other, rng) is None
    assert say_change(edit.before, replace(edit.before, seed=edit.before.seed + 2), rng) is None
    assert say_two_changes(edit.before, edit.after, other, rng) is not None


def test_reversible_changes_only_the_uids_of_things():
    page = sample_scene(rng_for("page", 1))
    other = reversible(page)
    assert [replace(t, uid=0) for t in other.things] == [replace(t, uid=0) for t in page.things]
    assert reversible(other) == other
