"""Edits: exact answers, other answers, and splits that share nothing they should not."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ip2p_storybook.draw import draw
from ip2p_storybook.edits import (
    EDIT_KINDS,
    GLOBAL_KINDS,
    SPLITS,
    Edit,
    added_uid,
    alternatives,
    change_mask,
    is_unique,
    propose,
    sample_edit,
)
from ip2p_storybook.language import (
    COLOURLESS_STYLES,
    colours_of,
    is_held_out_phrasing,
    phrasing_of,
    vocabulary,
    words_of,
)
from ip2p_storybook.scene import (
    SIZES,
    Scene,
    Thing,
    has_held_out_combination,
    is_held_out_combination,
    rng_for,
)

SIDE = 128
MEASURED = [k for k in SPLITS if k != "train"]


def some(kind: str | None, count: int, split: str = "test") -> list[Edit]:
    rng = rng_for("test edits", kind, split)
    return [sample_edit(rng, kind, split) for _ in range(count)]


def changed_thing(edit: Edit) -> tuple[Thing, Thing]:
    assert edit.target is not None
    return edit.before.things[edit.target], edit.after.things[edit.target]


# --- what each kind does --------------------------------------------------------------------------

ONE_FIELD = {"recolour": "colour", "put_on": "wears", "take_off": "wears", "move": "slot", "count": "count"}


@pytest.mark.parametrize("kind", [*ONE_FIELD, "bigger", "smaller"])
def test_an_edit_of_a_thing_changes_one_field_of_it(kind: str) -> None:
    field = ONE_FIELD.get(kind, "size")
    for edit in some(kind, 50):
        before, after = changed_thing(edit)
        assert getattr(before, field) != getattr(after, field)
        assert replace(before, **{field: getattr(after, field)}) == after
        assert edit.before.with_thing(edit.target, **{field: getattr(after, field)}) == edit.after


@pytest.mark.parametrize("kind", GLOBAL_KINDS)
def test_an_edit_of_the_page_changes_one_field_of_it(kind: str) -> None:
    for edit in some(kind, 50):
        assert replace(edit.before, **{kind: getattr(edit.after, kind)}) == edit.after != edit.before


@pytest.mark.parametrize(("kind", "step"), [("bigger", 1), ("smaller", -1)])
def test_bigger_and_smaller_are_one_step(kind: str, step: int) -> None:
    for edit in some(kind, 50):
        before, after = changed_thing(edit)
        assert SIZES.index(after.size) - SIZES.index(before.size) == step


def test_replacing_keeps_all_that_the_instruction_does_not_name() -> None:
    kept_colour = 0
    for edit in some("replace", 200):
        before, after = changed_thing(edit)
        assert (before.uid, before.size, before.slot, before.count) == (
            after.uid,
            after.size,
            after.slot,
            after.count,
        )
        assert after.wears in (before.wears, None)
        kept_colour += before.colour == after.colour
        if before.colour != after.colour:
            assert any(word in edit.instruction.lower() for word in colours_of(after.colour))
    assert 100 < kept_colour < 190


def test_an_added_thing_follows_from_page_and_slot() -> None:
    for edit in some("add", 50):
        new = edit.after.things[edit.target]
        assert edit.after.things[:-1] == edit.before.things
        assert new.uid == added_uid(edit.before, new.slot, sky=new.in_sky)
        assert new.kind not in {t.kind for t in edit.before.things}


def test_removing_leaves_the_others_as_they_are() -> None:
    for edit in some("remove", 50):
        left = [t for i, t in enumerate(edit.before.things) if i != edit.target]
        assert list(edit.after.things) == left


def test_two_edits_are_one_after_the_other() -> None:
    for edit in some("two", 100):
        first, second = edit.steps
        assert (first.before, first.after, second.after) == (edit.before, second.before, edit.after)
        assert edit.parts == (first.kind, second.kind)
        assert edit.phrasing.split("+")[1:] == [first.phrasing, second.phrasing]
        assert edit.after not in (edit.before, first.after)


def test_all_kinds_are_drawn() -> None:
    share = Counter(edit.kind for edit in some(None, 3000))
    assert set(share) == set(EDIT_KINDS)
    assert min(share.values()) > 0.04 * 3000
    assert max(share.values()) < 0.12 * 3000


def test_nothing_is_recoloured_where_the_style_shows_no_colour() -> None:
    assert not any(e.before.style in COLOURLESS_STYLES for e in some("recolour", 200))
    page = Scene(place="beach", style="pencil", things=(Thing(kind="cat", colour="red"),))
    assert propose(page, random.Random(1), "recolour", "unseen_combinations") is None


def test_a_kind_that_does_not_apply_gives_none() -> None:
    page = Scene(place="beach", things=(Thing(kind="house", colour="white", size="large"),), seed=2)
    assert not has_held_out_combination(page)
    for kind in ("put_on", "take_off", "bigger"):
        assert propose(page, random.Random(1), kind) is None
    assert propose(page, random.Random(1)) is not None


def test_unknown_names_are_refused() -> None:
    page = Scene(place="beach")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        propose(page, random.Random(1), split="dev")
    with pytest.raises(ValueError, match="unknown kind of edit 'melt'"):
        propose(page, random.Random(1), "melt")


def test_the_same_lots_give_the_same_edit() -> None:
    for split in SPLITS:
        assert some(None, 20, split) == some(None, 20, split)


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_all_that_the_edit_does_not_name_stays_the_same_to_the_pixel(kind: str) -> None:
    for edit in some(kind, 12):
        mask = change_mask(edit, SIDE)
        before, after = draw(edit.before, SIDE), draw(edit.after, SIDE)
        assert mask.shape == (SIDE, SIDE)
        assert mask.dtype == bool
        assert np.array_equal(before[~mask], after[~mask]), edit
        if kind in GLOBAL_KINDS:
            assert mask.all()
        elif kind != "two":
            assert 0 < mask.mean() < 0.8


# --- one answer, and others -----------------------------------------------------------------------


def test_most_edits_have_one_answer() -> None:
    rng = rng_for("unique")
    assert sum(is_unique(sample_edit(rng)) for _ in range(1000)) > 900


def test_an_instruction_that_leaves_the_colour_open_has_many_answers() -> None:
    vague = [e for e in some("recolour", 600) if not is_unique(e)]
    assert vague
    for edit in vague:
        assert phrasing_of(edit.phrasing).vague
        assert edit.after.things[edit.target].colour not in edit.instruction.lower().split()


def test_adding_without_a_side_has_one_answer_only_where_one_slot_is_free() -> None:
    free = {
        (is_unique(e), len(e.before.free_slots(sky=e.after.things[e.target].in_sky)) == 1)
        for e in some("add", 400)
        if phrasing_of(e.phrasing).variant == "anywhere"
    }
    assert free == {(True, True), (False, False)}


def test_a_page_without_colours_does_not_tell_the_colours_of_another_style() -> None:
    for edit in some("style", 200):
        unknown = edit.before.style in COLOURLESS_STYLES and edit.after.style not in COLOURLESS_STYLES
        assert is_unique(edit) != unknown


@pytest.mark.parametrize("split", MEASURED)
@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_every_edit_has_at_least_fifteen_other_answers(kind: str, split: str) -> None:
    for edit in some(kind, 12, split):
        others = alternatives(edit)
        assert len(others) >= 15
        assert len(alternatives(edit, 15)) == 15
        assert len({edit.before, edit.after, *others}) == len(others) + 2
        assert others == alternatives(edit)


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_other_answers_look_different(kind: str) -> None:
    for edit in some(kind, 2):
        scenes = [edit.before, edit.after, *alternatives(edit, 15)]
        pictures = {draw(scene, 64).tobytes() for scene in scenes}
        assert len(pictures) >= len(scenes) - 1, edit


def test_a_page_with_one_sky_thing_in_pencil_still_has_fifteen_other_answers() -> None:
    page = Scene(place="moon", style="pencil", things=(Thing(kind="kite", colour="pink", uid=1),))
    for kind in EDIT_KINDS:
        for seed in range(3):
            edit = propose(page, random.Random(seed), kind, "unseen_combinations") or propose(
                page, random.Random(seed), kind
            )
            if edit is not None:
                assert len(alternatives(edit)) >= 15, kind


# --- splits -----------------------------------------------------------------------------------------


def held(scene: Scene, thing: Thing) -> bool:
    return is_held_out_combination(thing.kind, thing.colour, scene.place)


@pytest.mark.parametrize("split", ["train", "test", "unseen_phrasings", "paraphrases"])
def test_no_held_out_combination_is_drawn_before_or_after(split: str) -> None:
    for edit in some(None, 1000, split):
        assert not has_held_out_combination(edit.before)
        assert not has_held_out_combination(edit.after)


@pytest.mark.parametrize("split", SPLITS)
def test_only_unseen_phrasings_uses_held_out_phrasings_and_all_its_parts_are(split: str) -> None:
    for edit in some(None, 1000, split):
        parts = edit.phrasing.split("+")
        assert [is_held_out_phrasing(p) for p in parts] == [split == "unseen_phrasings"] * len(parts)


def test_unseen_combinations_names_a_held_out_combination() -> None:
    for edit in some(None, 1000, "unseen_combinations"):
        if edit.kind in ("two", *GLOBAL_KINDS):
            assert has_held_out_combination(edit.before) or has_held_out_combination(edit.after)
            continue
        named = [edit.after.things[edit.target]] if edit.kind == "add" else [edit.before.things[edit.target]]
        if edit.kind not in ("add", "remove"):
            named.append(edit.after.things[edit.target])
        assert any(held(edit.before, thing) for thing in named)


@pytest.mark.parametrize("split", SPLITS)
def test_pages_of_training_have_even_seeds_and_no_others(split: str) -> None:
    assert all(edit.before.seed % 2 == (split != "train") for edit in some(None, 100, split))


def test_typos_are_only_in_training() -> None:
    words = set(vocabulary())
    for split in MEASURED[:-1]:  # paraphrases have a few words of their own
        assert all(set(words_of(e.instruction)) <= words for e in some(None, 300, split))
