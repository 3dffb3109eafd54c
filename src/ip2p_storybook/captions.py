"""Captions of a page: a canonical one and varied ones."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ip2p_storybook.language import (
    COLOURLESS_STYLES,
    counted,
    noun_of,
    pronoun,
    side_words,
    worn,
)
from ip2p_storybook.scene import KINDS, SLOTS, Scene, Thing, rng_for, stable_hash
from ip2p_storybook.words import (
    PLACE_WORDS,
    SIZE_WORDS,
    STYLE_PHRASES,
    TEMPLATES,
    TIME_PHRASES,
    WEATHER_PHRASES,
)


def phrases() -> list[str]:
    """Fixed phrases of several words in captions, with the space before them; some start a caption."""
    first = (
        *(words[0] for words in PLACE_WORDS.values()),
        *(words for options in STYLE_PHRASES.values() for words in options),
    )
    inside = (
        *first,
        *(side_words(slot)[0] for slot in SLOTS),
        "in the sky",
        *TIME_PHRASES.values(),
        *(words.strip() for options in WEATHER_PHRASES.values() for words in options),
    )
    return [*(f" {text}" for text in inside), *first]


@dataclass(frozen=True, kw_only=True)
class Form:
    """The form of a caption. Captions of two pages in one form differ only where the pages differ."""

    template: str = TEMPLATES[0]
    sizes: bool = True
    sides: bool = True
    weather: int = 0  # index of the word for it
    style: int = 0
    clear: bool = True  # whether a clear sky is mentioned
    noon: bool = True
    shuffled: bool = False  # else the things are listed as on the page, from left to right
    words: int | None = (
        None  # seeds the words and the position of each thing by its uid; None: the plain words
    )


def form_of(rng: random.Random) -> Form:
    """Sample a form. Every scene uses the same number of random draws."""
    draws = [rng.random() for _ in range(8)]
    return Form(
        template=TEMPLATES[int(draws[2] * len(TEMPLATES))],
        sizes=draws[0] < 0.8,
        sides=draws[1] < 0.7,
        weather=int(draws[3] < 0.4),
        style=int(draws[4] < 0.4),
        clear=draws[5] >= 0.5,
        noon=draws[6] >= 0.4,
        shuffled=draws[7] < 0.25,
        words=rng.getrandbits(64),
    )


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The caption of a page.

    Without `rng`, the canonical caption, which mentions every visible field of the record (styles without
    colors show none); with it, a varied one, which may omit sizes, sides, a clear sky or noon.
    """
    return say_page(scene, Form() if rng is None else form_of(rng))


def say_page(scene: Scene, form: Form) -> str:
    """The caption of the page in the given form."""
    things = sorted(scene.things, key=lambda t: (t.in_sky, SLOTS.index(t.slot)))
    if form.shuffled:
        things.sort(key=lambda t: stable_hash("place in the caption", form.words, t.uid))
    weather = (
        "" if scene.weather == "clear" and not form.clear else WEATHER_PHRASES[scene.weather][form.weather]
    )
    time = "" if scene.time == "noon" and not form.noon else TIME_PHRASES[scene.time]
    style = STYLE_PHRASES[scene.style][form.style]
    with_colour = scene.style not in COLOURLESS_STYLES
    names = [_say(t, form, with_colour=with_colour) for t in things]
    listed = (
        names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "nothing"
    )
    text = form.template.format(
        things=listed, place=PLACE_WORDS[scene.place][0], time=time, weather=weather, style=style
    )
    return " ".join(text.split()).replace(" ,", ",").replace(",,", ",")


def captions(scene: Scene, n: int, seed: int) -> list[str]:
    """`n` captions of the page, the canonical one first."""
    rng = rng_for("captions", scene.seed, seed)
    return [caption(scene) if i == 0 else caption(scene, rng) for i in range(n)]


def _say(thing: Thing, form: Form, *, with_colour: bool) -> str:
    # A separate random stream per thing, so that other things do not change its words.
    rng = None if form.words is None else rng_for("words", form.words, thing.uid)
    text = counted(
        thing.count,
        noun_of(thing.kind, rng),
        size=SIZE_WORDS[thing.size] if form.sizes else "",
        colour=thing.colour if with_colour else "",
    )
    wearing, in_sky = (0.0, 0.0) if rng is None else (rng.random(), rng.random())
    if thing.wears is not None:
        wears = worn(thing.wears, thing.count)
        if wearing < 0.6:
            text += f" wearing {wears}"
        elif wearing < 0.8 or thing.kind in KINDS["person"]:  # for persons, "in" refers to the clothes
            text += f" with {wears}"
        else:
            text += f" in {pronoun(thing).p} {wears.removeprefix('a ')}"
    if form.sides:
        text += f" {side_words(thing.slot)[0]}"
    return f"{text} in the sky" if thing.in_sky and in_sky < 0.5 else text
