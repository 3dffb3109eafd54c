"""Captions are parsed back to scenes, and edits in words are judged by the rules of the language."""

from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.data_quality.reading import VERDICTS, judge, judge_triple, read, read_caption
from ip2p_storybook.captions import TEMPLATES, Form, caption, form_of, say_page
from ip2p_storybook.edits import alternatives, sample_edit
from ip2p_storybook.language import COLOURLESS_STYLES, phrasing_of
from ip2p_storybook.scene import PLACES, TIMES, WEATHERS, Scene, Thing, rng_for, sample_scene
from ip2p_storybook.triples import exact_triples

PAGE = (
    "an illustration of a red cat wearing a hat on the left and a girl in blue on the right "
    "in the meadow at noon under a clear sky"
)


def as_captioned(scene: Scene) -> Scene:
    """The scene with only what a canonical caption shows."""
    things = sorted(scene.things, key=lambda t: (t.in_sky, ("left", "middle", "right").index(t.slot)))
    colour = {"colour": "white"} if scene.style in COLOURLESS_STYLES else {}
    return replace(scene, seed=0, things=tuple(replace(t, uid=i, **colour) for i, t in enumerate(things)))


def test_a_canonical_caption_is_parsed_back_to_its_scene() -> None:
    for k in range(2000):
        scene = sample_scene(rng_for("canonical", k), held_out=None)
        assert read_caption(caption(scene)) == as_captioned(scene), caption(scene)


def test_read_recovers_every_field_that_a_varied_caption_names() -> None:
    templates = set()
    for k in range(3000):
        rng = rng_for("varied", k)
        scene, form = as_captioned(sample_scene(rng, held_out=None)), form_of(rng)
        text = say_page(scene, form)
        parsed = read(text)
        assert parsed is not None, text
        assert (parsed.place, parsed.time, parsed.weather, parsed.style) == (
            scene.place,
            scene.time,
            scene.weather,
            scene.style,
        ), text
        things = {thing.kind: thing for thing in parsed.things}
        assert len(things) == len(scene.things)
        for thing in scene.things:
            found = things[thing.kind]
            colored = scene.style not in COLOURLESS_STYLES
            assert found.colour == (thing.colour if colored else None), text
            assert found.size == (thing.size if form.sizes else "medium"), text
            assert found.slot == (thing.slot if form.sides else None), text
            assert (found.count, found.wears) == (thing.count, thing.wears), text
        templates.add(form.template)
    assert templates == set(TEMPLATES)


def test_omitted_fields_get_their_default_values() -> None:
    page = read_caption("two cats and a kite on the beach, a pencil sketch")
    assert page == Scene(
        place="beach",
        time="noon",
        weather="clear",
        style="pencil",
        things=(
            Thing(kind="cat", colour="white", slot="left", count=2, uid=0),
            Thing(kind="kite", colour="white", slot="left", uid=1),
        ),
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photograph of a cat",
        "an illustration of a red cat",
        "an illustration of a cat in the meadow at noon under a clear sky",  # a caption would name its color
        "an illustration of a red cats in the meadow at noon",
        "an illustration of two red cat in the meadow at noon",
        "an illustration of a girl in red and a red girl in the meadow at noon",
        "an illustration of a red tree wearing a hat in the meadow at noon",
        "an illustration of a red tree in the sky in the meadow at noon",
        "an illustration of a red cat and a blue cat in the meadow at noon",
        "an illustration of a red cat on the left and a blue dog on the left in the meadow at noon",
        "an illustration of a red cat on the left and a blue dog in the meadow at noon",
        "an illustration of a red cat in the meadow at noon at noon",
    ],
)
def test_other_texts_are_not_captions(text: str) -> None:
    assert read_caption(text) is None


@pytest.mark.parametrize(
    ("instruction", "edited", "why"),
    [
        ("make the cat green", PAGE.replace("red cat", "green cat"), "right"),
        ("Please make the kitty on the left green.", PAGE.replace("red cat", "green cat"), "right"),
        ("COULD YOU CHANGE THE COLOR OF THE RED CAT TO GREEN?", PAGE.replace("red", "green"), "right"),
        ("make her clothes green", PAGE.replace("in blue", "in green"), "right"),
        ("Make it night and take off the cat's hat", "", "right"),
        ("make the cat green", PAGE.replace("red cat", "pink cat"), "other_change"),
        ("make the dog green", PAGE.replace("red cat", "green cat"), "instruction"),
        ("make it green", PAGE.replace("red cat", "green cat"), "instruction"),
        ("make the cat on the right green", PAGE.replace("red cat", "green cat"), "instruction"),
        ("make the blue cat green", PAGE.replace("red cat", "green cat"), "instruction"),
        ("make the cat red", PAGE, "unchanged"),
        ("make the cat green", PAGE.replace("red cat", "green cat").replace("noon", "night"), "other_change"),
        ("move the cat to the middle", PAGE.replace("on the left", "in the middle"), "instruction"),
        ("make it sunny", PAGE.replace("a clear sky", "a cloudy sky"), "instruction"),
        ("make the cat green", "a green cat", "edited_caption"),
        ("remove the hat", PAGE.replace(" wearing a hat", ""), "right"),
        ("add a kite in the sky in the middle", "", "other_change"),
        ("add a tree on the left", "", "instruction"),
    ],
)
def test_judge_returns_the_expected_verdict(instruction: str, edited: str, why: str) -> None:
    if not edited:
        edited = PAGE.replace(" wearing a hat", "").replace("at noon", "at night")
    verdict = judge(PAGE, instruction, edited)
    assert (verdict.why, verdict.right) == (why, why == "right")
    assert why in VERDICTS


def test_an_unreadable_caption_gets_the_verdict_caption() -> None:
    assert judge("a photograph of a cat", "make it night", PAGE).why == "caption"


@pytest.mark.parametrize(("split", "count"), [("train", 1500), ("unseen_phrasings", 1500)])
def test_at_least_99_percent_of_exact_edits_are_right(split: str, count: int) -> None:
    wrong = [
        (triple.caption, triple.instruction, triple.edited_caption)
        for triple in exact_triples(count, 3, split)
        if not judge_triple(triple).right
    ]
    assert len(wrong) < 0.01 * count, wrong[:3]


def test_exact_edits_of_canonical_captions_are_right_in_every_kind() -> None:
    judged: Counter[tuple[str, bool]] = Counter()
    for k in range(400):
        edit = sample_edit(rng_for("every kind", k), split="test")
        if "move" not in (edit.kind, *edit.parts):
            verdict = judge(caption(edit.before), edit.instruction, caption(edit.after))
            judged[edit.kind, verdict.right] += 1
    assert {kind for kind, right in judged if not right} == set()
    assert len(judged) == 14


def test_almost_all_corrupted_edits_are_wrong() -> None:
    """An alternative answer, another page's, an extra change, or none: under 1% are right."""
    triples = list(exact_triples(500, 5))
    right = wrong = 0
    for number, triple in enumerate(triples):
        after, rng = triple.edit.after, rng_for("corrupted", number)
        field, values = rng.choice([("place", PLACES), ("time", TIMES), ("weather", WEATHERS)])
        value = rng.choice([v for v in values if v != getattr(after, field)])
        corrupted = (
            say_page(rng.choice(alternatives(triple.edit)[:12]), triple.form),
            triples[number - 1].edited_caption,
            say_page(replace(after, **{field: value}), triple.form),
            triple.caption,
        )
        for edited in corrupted:
            if edited != triple.edited_caption:
                verdict = judge(triple.caption, triple.instruction, edited)
                right, wrong = right + verdict.right, wrong + (not verdict.right)
    assert wrong > 1900
    assert right < 0.01 * wrong


def test_a_wrong_color_or_thing_is_always_detected() -> None:
    form = Form()
    for number in range(150):
        edit = sample_edit(rng_for("wrong thing", number), kind="recolour", split="test")
        if phrasing_of(edit.phrasing).vague:
            continue  # any color is right
        before = say_page(edit.before, form)
        assert judge(before, edit.instruction, say_page(edit.after, form)).right
        for other in alternatives(edit)[:8]:
            assert not judge(before, edit.instruction, say_page(other, form)).right, edit.instruction
