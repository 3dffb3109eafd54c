"""Edits: exact answers, alternative answers, and splits without leakage."""

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


def sample_edits(kind: str | None, count: int, split: str = "test") -> list[Edit]:
    rng = rng_for("test edits", kind, split)
    return [sample_edit(rng, kind, split) for _ in range(count)]


def changed_thing(edit: Edit) -> tuple[Thing, Thing]:
    assert edit.target is not None
    return edit.before.things[edit.target], edit.after.things[edit.target]


# --- what each kind changes -----------------------------------------------------------------------

ONE_FIELD = {"recolour": "colour", "put_on": "wears", "take_off": "wears", "move": "slot", "count": "count"}


@pytest.mark.parametrize("kind", [*ONE_FIELD, "bigger", "smaller"])
def test_an_edit_of_a_thing_changes_only_one_of_its_fields(kind: str) -> None:
    field = ONE_FIELD.get(kind, "size")
    for edit in sample_edits(kind, 50):
        before, after = changed_thing(edit)
        assert getattr(before, field) != getattr(after, field)
        assert replace(before, **{field: getattr(after, field)}) == after
        assert edit.before.with_thing(edit.target, **{field: getattr(after, field)}) == edit.after


@pytest.mark.parametrize("kind", GLOBAL_KINDS)
def test_a_global_edit_changes_only_one_field_of_the_page(kind: str) -> None:
    for edit in sample_edits(kind, 50):
        assert replace(edit.before, **{kind: getattr(edit.after, kind)}) == edit.after != edit.before


@pytest.mark.parametrize(("kind", "step"), [("bigger", 1), ("smaller", -1)])
def test_bigger_and_smaller_change_the_size_by_one_step(kind: str, step: int) -> None:
    for edit in sample_edits(kind, 50):
        before, after = changed_thing(edit)
        assert SIZES.index(after.size) - SIZES.index(before.size) == step


def test_replace_keeps_every_field_that_the_instruction_does_not_name() -> None:
    kept_colour = 0
    for edit in sample_edits("replace", 200):
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


def test_the_uid_of_an_added_thing_is_determined_by_page_and_slot() -> None:
    for edit in sample_edits("add", 50):
        new = edit.after.things[edit.target]
        assert edit.after.things[:-1] == edit.before.things
        assert new.uid == added_uid(edit.before, new.slot, sky=new.in_sky)
        assert new.kind not in {t.kind for t in edit.before.things}


def test_remove_keeps_all_other_things() -> None:
    for edit in sample_edits("remove", 50):
        remaining = [t for i, t in enumerate(edit.before.things) if i != edit.target]
        assert list(edit.after.things) == remaining


def test_a_double_edit_applies_its_steps_in_order() -> None:
    for edit in sample_edits("two", 100):
        first, second = edit.steps
        assert (first.before, first.after, second.after) == (edit.before, second.before, edit.after)
        assert edit.parts == (first.kind, second.kind)
        assert edit.phrasing.split("+")[1:] == [first.phrasing, second.phrasing]
        assert edit.after not in (edit.before, first.after)


def test_all_kinds_are_sampled_about_equally_often() -> None:
    counts = Counter(edit.kind for edit in sample_edits(None, 3000))
    assert set(counts) == set(EDIT_KINDS)
    assert min(counts.values()) > 0.04 * 3000
    assert max(counts.values()) < 0.12 * 3000


def test_colorless_styles_get_no_recolor_edits() -> None:
    assert not any(e.before.style in COLOURLESS_STYLES for e in sample_edits("recolour", 200))
    page = Scene(place="beach", style="pencil", things=(Thing(kind="cat", colour="red"),))
    assert propose(page, random.Random(1), "recolour", "unseen_combinations") is None


def test_propose_returns_none_for_a_kind_that_does_not_apply() -> None:
    page = Scene(place="beach", things=(Thing(kind="house", colour="white", size="large"),), seed=2)
    assert not has_held_out_combination(page)
    for kind in ("put_on", "take_off", "bigger"):
        assert propose(page, random.Random(1), kind) is None
    assert propose(page, random.Random(1)) is not None


def test_unknown_splits_and_kinds_are_refused() -> None:
    page = Scene(place="beach")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        propose(page, random.Random(1), split="dev")
    with pytest.raises(ValueError, match="unknown kind of edit 'melt'"):
        propose(page, random.Random(1), "melt")


def test_the_same_seed_gives_the_same_edits() -> None:
    for split in SPLITS:
        assert sample_edits(None, 20, split) == sample_edits(None, 20, split)


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_pixels_outside_the_change_mask_are_identical(kind: str) -> None:
    for edit in sample_edits(kind, 12):
        mask = change_mask(edit, SIDE)
        before, after = draw(edit.before, SIDE), draw(edit.after, SIDE)
        assert mask.shape == (SIDE, SIDE)
        assert mask.dtype == bool
        assert np.array_equal(before[~mask], after[~mask]), edit
        if kind in GLOBAL_KINDS:
            assert mask.all()
        elif kind != "two":
            assert 0 < mask.mean() < 0.8


# --- unique answers and alternatives ---------------------------------------------------------------


def test_most_edits_have_a_unique_answer() -> None:
    rng = rng_for("unique")
    assert sum(is_unique(sample_edit(rng)) for _ in range(1000)) > 900


def test_only_vague_recolor_instructions_have_more_than_one_answer() -> None:
    vague = [e for e in sample_edits("recolour", 600) if not is_unique(e)]
    assert vague
    for edit in vague:
        assert phrasing_of(edit.phrasing).vague
        assert edit.after.things[edit.target].colour not in edit.instruction.lower().split()


def test_add_without_a_side_is_unique_only_if_one_slot_is_free() -> None:
    free = {
        (is_unique(e), len(e.before.free_slots(sky=e.after.things[e.target].in_sky)) == 1)
        for e in sample_edits("add", 400)
        if phrasing_of(e.phrasing).variant == "anywhere"
    }
    assert free == {(True, True), (False, False)}


def test_a_style_edit_is_ambiguous_only_from_a_colorless_to_a_colored_style() -> None:
    for edit in sample_edits("style", 200):
        unknown = edit.before.style in COLOURLESS_STYLES and edit.after.style not in COLOURLESS_STYLES
        assert is_unique(edit) != unknown


@pytest.mark.parametrize("split", MEASURED)
@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_every_edit_has_at_least_fifteen_distinct_alternatives(kind: str, split: str) -> None:
    for edit in sample_edits(kind, 12, split):
        others = alternatives(edit)
        assert len(others) >= 15
        assert len(alternatives(edit, 15)) == 15
        assert len({edit.before, edit.after, *others}) == len(others) + 2
        assert others == alternatives(edit)


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_alternatives_look_different(kind: str) -> None:
    for edit in sample_edits(kind, 2):
        scenes = [edit.before, edit.after, *alternatives(edit, 15)]
        pictures = {draw(scene, 64).tobytes() for scene in scenes}
        assert len(pictures) >= len(scenes) - 1, edit


def test_a_page_with_one_sky_thing_in_pencil_still_has_fifteen_alternatives() -> None:
    page = Scene(place="moon", style="pencil", things=(Thing(kind="kite", colour="pink", uid=1),))
    for kind in EDIT_KINDS:
        for seed in range(3):
            edit = propose(page, random.Random(seed), kind, "unseen_combinations") or propose(
                page, random.Random(seed), kind
            )
            if edit is not None:
                assert len(alternatives(edit)) >= 15, kind


# --- splits -----------------------------------------------------------------------------------------


def uses_held_out_combination(scene: Scene, thing: Thing) -> bool:
    return is_held_out_combination(thing.kind, thing.colour, scene.place)


@pytest.mark.parametrize("split", ["train", "test", "unseen_phrasings", "paraphrases"])
def test_no_held_out_combination_appears_before_or_after_the_edit(split: str) -> None:
    for edit in sample_edits(None, 1000, split):
        assert not has_held_out_combination(edit.before)
        assert not has_held_out_combination(edit.after)


@pytest.mark.parametrize("split", SPLITS)
def test_the_unseen_phrasings_split_alone_uses_held_out_phrasings_and_no_others(split: str) -> None:
    for edit in sample_edits(None, 1000, split):
        parts = edit.phrasing.split("+")
        assert [is_held_out_phrasing(p) for p in parts] == [split == "unseen_phrasings"] * len(parts)


def test_every_unseen_combinations_edit_involves_a_held_out_combination() -> None:
    for edit in sample_edits(None, 1000, "unseen_combinations"):
        if edit.kind in ("two", *GLOBAL_KINDS):
            assert has_held_out_combination(edit.before) or has_held_out_combination(edit.after)
            continue
        named = [edit.after.things[edit.target]] if edit.kind == "add" else [edit.before.things[edit.target]]
        if edit.kind not in ("add", "remove"):
            named.append(edit.after.things[edit.target])
        assert any(uses_held_out_combination(edit.before, thing) for thing in named)


@pytest.mark.parametrize("split", SPLITS)
def test_training_pages_have_even_seeds_and_other_splits_odd_ones(split: str) -> None:
    assert all(edit.before.seed % 2 == (split != "train") for edit in sample_edits(None, 100, split))


def test_instructions_outside_training_have_no_typos() -> None:
    words = set(vocabulary())
    for split in MEASURED[:-1]:  # paraphrases use a few other words
        assert all(set(words_of(e.instruction)) <= words for e in sample_edits(None, 300, split))
