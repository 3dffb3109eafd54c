"""What a page shows, in words: a canonical caption and varied ones."""

from __future__ import annotations

import random

from ip2p.storybook.language import (
    COLOURLESS_STYLES,
    PLACE_WORDS,
    counted,
    noun_of,
    pronoun,
    side_words,
    worn,
)
from ip2p.storybook.scene import KINDS, SLOTS, Scene, Thing, rng_for

# {things} stand {place} {time}{weather}; {style} is what such a picture is.
TEMPLATES = (
    "{style} of {things} {place} {time}{weather}",
    "{things} {place} {time}{weather}, {style}",
    "{things} {place} {time}{weather} in {style}",
    "{style} with {things} {place} {time}{weather}",
    "{place} {time}{weather}, {things}, {style}",
    "{style} {place} {time}{weather} with {things}",
    "{style}: {things} {place} {time}{weather}",
    "{things}, {place}, {time}{weather}, {style}",
)
_SIZES = {"small": "small", "medium": "", "large": "large"}
_TIMES = {"morning": "in the morning", "noon": "at noon", "sunset": "at sunset", "night": "at night"}
_WEATHERS = {
    "clear": (" under a clear sky", " in clear weather"),
    "cloudy": (" under a cloudy sky", " in cloudy weather"),
    "rain": (" in the rain", " in rainy weather"),
    "snow": (" in the snow", " in snowy weather"),
    "fog": (" in the fog", " in foggy weather"),
}
_STYLES = {
    "plain": ("an illustration", "a plain picture"),
    "pencil": ("a pencil drawing", "a pencil sketch"),
    "watercolour": ("a watercolour", "a watercolour painting"),
    "pixel art": ("a pixel art picture", "pixel art"),
    "blueprint": ("a blueprint", "a blueprint drawing"),
    "comic": ("a comic", "a comic book page"),
}
# All words that stand in no template, for the vocabulary.
WORDS = (
    *_SIZES.values(),
    *_TIMES.values(),
    *(w for options in (*_WEATHERS.values(), *_STYLES.values()) for w in options),
    "and wearing in with nothing in the sky",
)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Say what the page shows.

    Without `rng` the canonical caption, which names every field of the record that can be seen (styles
    without colours show none); with it one of several, which may leave out sizes, sides, a clear sky or noon.
    """
    things = sorted(scene.things, key=lambda t: (t.in_sky, SLOTS.index(t.slot)))
    with_size = with_side = True
    template = TEMPLATES[0]
    weather, style, time = _WEATHERS[scene.weather][0], _STYLES[scene.style][0], _TIMES[scene.time]
    if rng is not None:
        # All lots are drawn for every scene, so that two pages with one seed get the same form of caption.
        lots = [rng.random() for _ in range(8)]
        with_size, with_side = lots[0] < 0.8, lots[1] < 0.7
        template = TEMPLATES[int(lots[2] * len(TEMPLATES))]
        weather = _WEATHERS[scene.weather][lots[3] < 0.4]
        style = _STYLES[scene.style][lots[4] < 0.4]
        if scene.weather == "clear" and lots[5] < 0.5:
            weather = ""
        if scene.time == "noon" and lots[6] < 0.4:
            time = ""
        if lots[7] < 0.25:
            rng.shuffle(things)
    with_colour = scene.style not in COLOURLESS_STYLES
    said = [_say(t, rng, with_size=with_size, with_side=with_side, with_colour=with_colour) for t in things]
    listed = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}" if said else "nothing"
    text = template.format(
        things=listed, place=PLACE_WORDS[scene.place][0], time=time, weather=weather, style=style
    )
    return " ".join(text.split()).replace(" ,", ",").replace(",,", ",")


def captions(scene: Scene, n: int, seed: int) -> list[str]:
    """`n` captions of the page, the canonical one first."""
    rng = rng_for("captions", scene.seed, seed)
    return [caption(scene) if i == 0 else caption(scene, rng) for i in range(n)]


def _say(
    thing: Thing, rng: random.Random | None, *, with_size: bool, with_side: bool, with_colour: bool
) -> str:
    text = counted(
        thing.count,
        noun_of(thing.kind, rng),
        size=_SIZES[thing.size] if with_size else "",
        colour=thing.colour if with_colour else "",
    )
    if thing.wears is not None:
        wears = worn(thing.wears, thing.count)
        form = 0.0 if rng is None else rng.random()
        if form < 0.6:
            text += f" wearing {wears}"
        elif form < 0.8 or thing.kind in KINDS["person"]:  # "in" tells a person's clothes
            text += f" with {wears}"
        else:
            text += f" in {pronoun(thing).p} {wears.removeprefix('a ')}"
    if with_side:
        text += f" {side_words(thing.slot)[0]}"
    return f"{text} in the sky" if thing.in_sky and (rng is None or rng.random() < 0.5) else text
