"""Captions describe what a page shows."""

from dataclasses import replace

from ip2p_storybook.captions import caption, captions
from ip2p_storybook.language import vocabulary, words_of
from ip2p_storybook.scene import Scene, Thing, rng_for, sample_scene

PAGE = Scene(
    place="beach",
    time="night",
    weather="snow",
    style="comic",
    things=(
        Thing(kind="balloon", colour="green", slot="middle", uid=3),
        Thing(kind="fox", colour="orange", slot="right", count=2, wears="hat", uid=2),
        Thing(kind="girl", colour="blue", slot="left", size="small", uid=1),
    ),
    seed=5,
)


def test_the_canonical_caption_names_everything_from_left_to_right() -> None:
    assert caption(PAGE) == (
        "a comic of a small girl in blue on the left, two orange foxes wearing hats on the right "
        "and a green balloon in the middle in the sky on the beach at night in the snow"
    )


def test_a_page_without_things_has_a_caption() -> None:
    assert caption(replace(PAGE, things=())) == "a comic of nothing on the beach at night in the snow"


def test_colors_are_named_only_where_the_style_shows_them() -> None:
    assert "orange" not in caption(replace(PAGE, style="pencil"))


def test_captions_vary_but_are_deterministic_for_a_seed() -> None:
    texts = captions(PAGE, 20, seed=1)
    assert texts[0] == caption(PAGE)
    assert len(set(texts)) >= 15
    assert texts == captions(PAGE, 20, seed=1)
    assert texts[1:] != captions(PAGE, 20, seed=2)[1:]
    for text in texts:
        for word in ("girl", "blue", "foxes", "orange", "balloon", "green", "beach", "night", "comic"):
            assert word in text, text


def test_the_same_rng_seed_gives_the_same_caption_form() -> None:
    for k in range(20):
        before, after = (caption(replace(PAGE, time=t), rng_for(k)) for t in ("night", "sunset"))
        assert before.replace("at night", "at sunset") == after


def test_the_vocabulary_covers_all_captions() -> None:
    words, rng = set(vocabulary()), rng_for("captions")
    for _ in range(1500):
        text = caption(sample_scene(rng), rng)
        assert set(words_of(text)) <= words, text
        assert "  " not in text
        assert ",," not in text
        assert " ," not in text
