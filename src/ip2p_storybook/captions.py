"""What a page shows, in words: a canonical caption and varied ones."""

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
    STYLE_SAID,
    TEMPLATES,
    TIME_SAID,
    WEATHER_SAID,
)


def phrases() -> list[str]:
    """What captions say in several words that never part, with the space before; some begin a caption."""
    first = (
        *(words[0] for words in PLACE_WORDS.values()),
        *(words for options in STYLE_SAID.values() for words in options),
    )
    inside = (
        *first,
        *(side_words(slot)[0] for slot in SLOTS),
        "in the sky",
        *TIME_SAID.values(),
        *(words.strip() for options in WEATHER_SAID.values() for words in options),
    )
    return [*(f" {text}" for text in inside), *first]


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a caption is said. Two pages in one form differ in their captions by what differs on the pages."""

    template: str = TEMPLATES[0]
    sizes: bool = True
    sides: bool = True
    weather: int = 0  # which of the words for it
    style: int = 0
    clear: bool = True  # whether a clear sky is named
    noon: bool = True
    shuffled: bool = False  # else the things stand as on the page, from left to right
    words: int | None = None  # seeds the words and the place of each thing, by its uid; None: the plain ones


def form_of(rng: random.Random) -> Form:
    """Draw a form; every scene takes as many lots."""
    lots = [rng.random() for _ in range(8)]
    return Form(
        template=TEMPLATES[int(lots[2] * len(TEMPLATES))],
        sizes=lots[0] < 0.8,
        sides=lots[1] < 0.7,
        weather=int(lots[3] < 0.4),
        style=int(lots[4] < 0.4),
        clear=lots[5] >= 0.5,
        noon=lots[6] >= 0.4,
        shuffled=lots[7] < 0.25,
        words=rng.getrandbits(64),
    )


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Say what the page shows.

    Without `rng` the canonical caption, which names every field of the record that can be seen (styles
    without colours show none); with it one of several, which may leave out sizes, sides, a clear sky or noon.
    """
    return say_page(scene, Form() if rng is None else form_of(rng))


def say_page(scene: Scene, form: Form) -> str:
    """The caption of the page in this form."""
    things = sorted(scene.things, key=lambda t: (t.in_sky, SLOTS.index(t.slot)))
    if form.shuffled:
        things.sort(key=lambda t: stable_hash("place in the caption", form.words, t.uid))
    weather = "" if scene.weather == "clear" and not form.clear else WEATHER_SAID[scene.weather][form.weather]
    time = "" if scene.time == "noon" and not form.noon else TIME_SAID[scene.time]
    style = STYLE_SAID[scene.style][form.style]
    with_colour = scene.style not in COLOURLESS_STYLES
    said = [_say(t, form, with_colour=with_colour) for t in things]
    listed = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}" if said else "nothing"
    text = form.template.format(
        things=listed, place=PLACE_WORDS[scene.place][0], time=time, weather=weather, style=style
    )
    return " ".join(text.split()).replace(" ,", ",").replace(",,", ",")


def captions(scene: Scene, n: int, seed: int) -> list[str]:
    """`n` captions of the page, the canonical one first."""
    rng = rng_for("captions", scene.seed, seed)
    return [caption(scene) if i == 0 else caption(scene, rng) for i in range(n)]


def _say(thing: Thing, form: Form, *, with_colour: bool) -> str:
    # Lots of its own, so that a thing is said alike beside others than before.
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
        elif wearing < 0.8 or thing.kind in KINDS["person"]:  # "in" tells a person's clothes
            text += f" with {wears}"
        else:
            text += f" in {pronoun(thing).p} {wears.removeprefix('a ')}"
    if form.sides:
        text += f" {side_words(thing.slot)[0]}"
    return f"{text} in the sky" if thing.in_sky and in_sky < 0.5 else text
