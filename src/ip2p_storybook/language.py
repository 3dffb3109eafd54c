"""How an edit is said: the closed language of the storybook's instructions.

A *phrasing* is one sentence frame of one kind of edit, such as ``turn {t} into {new}``. Frames are
filled with ways to name things (by kind, colour, side, group or pronoun), then made polite, cased,
spelt the British or the American way and, for training only, now and then mistyped.

A tenth of each kind's phrasings is kept out of training by `is_held_out_phrasing`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from ip2p_storybook.scene import (
    ALL_KINDS,
    COLOURS,
    GROUP_OF,
    KINDS,
    SLOTS,
    STYLES,
    TIMES,
    WEARABLES,
    Scene,
    Thing,
    stable_hash,
)

# --- phrasings ----------------------------------------------------------------------------------
# Fields: {t} {s} {p} name the thing as object, subject and owner; {be} agrees with it. The rest is
# filled by the kind of edit. A frame stands under the variant of the edit that it can say.

_FRAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "recolour": {
        "": (
            "make {t} {c}",
            "turn {t} {c}",
            "change the colour of {t} to {c}",
            "change {p} colour to {c}",
            "paint {t} {c}",
            "recolour {t} {c}",
            "colour {t} {c}",
            "{s} should be {c}",
            "let {t} be {c}",
            "have {t} be {c}",
            "give {t} {a_c} colour",
            "make the colour of {t} {c}",
            "i want {t} to be {c}",
            "{s} {be} now {c}",
            "change {t} to {c}",
            "recolour {t} in {c}",
            "make {t} look {c}",
            "set the colour of {t} to {c}",
            "what if {s} were {c}",
            "paint {t} in {c}",
        ),
        "vague": (
            "change the colour of {t}",
            "give {t} another colour",
            "paint {t} in another colour",
        ),
    },
    "replace": {
        "": (
            "turn {t} into {new}",
            "replace {t} with {new}",
            "make {t} look like {new}",
            "swap {t} for {new}",
            "change {t} to {new}",
            "change {t} into {new}",
            "make {t} {new}",
            "have {t} be {new}",
            "{s} should be {new}",
            "{s} {be} now {new}",
            "let {t} become {new}",
            "transform {t} into {new}",
            "put {new} in place of {t}",
            "put {new} where {s} {be}",
            "i want {new} instead of {t}",
            "draw {new} instead of {t}",
            "use {new} instead of {t}",
            "what if {s} were {new}",
            "let {t} turn into {new}",
            "have {new} in place of {t}",
        ),
    },
    "add": {
        "": (
            "add {new} {where}",
            "put {new} {where}",
            "place {new} {where}",
            "draw {new} {where}",
            "i want {new} {where}",
            "there should be {new} {where}",
            "there {be} now {new} {where}",
            "let there be {new} {where}",
            "insert {new} {where}",
            "show {new} {where}",
            "paint {new} {where}",
            "{where} add {new}",
            "make {new} appear {where}",
            "have {new} {where}",
            "what if there were {new} {where}",
            "add {new} to the picture {where}",
            "i want to see {new} {where}",
            "{where} there should be {new}",
        ),
        "anywhere": (
            "add {new}",
            "add {new} to the picture",
            "draw {new} too",
            "there should also be {new}",
            "put {new} in the picture",
            "add {new} to the scene",
        ),
        "vague": (
            "add {new}",
            "add {new} {where}",
            "put {new} {where}",
            "draw {new} {where}",
        ),
    },
    "remove": {
        "": (
            "remove {t}",
            "take away {t}",
            "take {t} away",
            "delete {t}",
            "erase {t}",
            "get rid of {t}",
            "make {t} disappear",
            "take {t} out of the picture",
            "i do not want {t}",
            "leave {t} out",
            "{s} should not be there",
            "{s} should be gone",
            "{s} {be} gone now",
            "let {t} disappear",
            "show the scene without {t}",
            "draw the picture without {t}",
            "remove {t} from the picture",
            "erase {t} from the scene",
        ),
        "kind": ("there should be no {kind}", "i want no {kind} in the picture"),
    },
    "place": {
        "": (
            "put {them} {in_place}",
            "make it {a_place}",
            "change the background to {to_place}",
            "change the place to {to_place}",
            "move {them} to {to_place}",
            "set the scene {in_place}",
            "have {them} be {in_place}",
            "{they} should be {in_place}",
            "take {them} to {to_place}",
            "turn the background into {a_place}",
            "replace the background with {a_place}",
            "make it look like {a_place}",
            "{they} {they_be} now {in_place}",
            "show {them} {in_place}",
            "send {them} to {to_place}",
            "i want to see {them} {in_place}",
            "what if {they} were {in_place}",
            "let {them} be {in_place}",
            "make the background {a_place}",
            "it should be {in_place}",
        ),
    },
    "time": {
        "": (
            "make it {time}",
            "change the time to {time}",
            "change the time of day to {time}",
            "it should be {time}",
            "it is now {time}",
            "set the time to {time}",
            "let it be {time}",
            "make it look like {time}",
            "show it {at_time}",
            "have it be {time}",
            "i want it to be {time}",
            "what if it were {time}",
            "show the scene {at_time}",
            "set the scene {at_time}",
            "turn it into {time}",
            "it is {time} now",
            "draw it {at_time}",
            "the time should be {time}",
            "as if it were {time}",
        ),
    },
    "weather": {
        "": (
            "make it {do}",
            "let it {do_be}",
            "change the weather to {weather}",
            "it should {do_be}",
            "add {weather}",
            "make the weather {adj}",
            "have it {do_be}",
            "turn the weather {adj}",
            "i want it to {do_be}",
            "give it {weather}",
            "it is now {ing}",
            "as if it were {ing}",
            "set the weather to {weather}",
            "make it look {adj}",
            "what if it were {ing}",
            "let there be {weather}",
            "turn it {adj}",
            "i want {weather}",
            "the weather should be {adj}",
            "there should be {weather}",
        ),
        "clear": (
            "clear the sky",
            "remove the {old}",
            "stop the {old}",
            "take away the {old}",
            "make the {old} disappear",
        ),
    },
    "style": {
        "": (
            "change the style to {style}",
            "make it {a_style}",
            "turn it into {a_style}",
            "make it look like {a_style}",
            "draw it as {a_style}",
            "in the style of {a_style}",
            "show it as {a_style}",
            "change the picture into {a_style}",
            "transform it into {a_style}",
            "use the {style} style",
            "set the style to {style}",
            "it should be {a_style}",
            "it should look like {a_style}",
            "i want {a_style}",
            "have it look like {a_style}",
            "what if it were {a_style}",
            "give it the {style} style",
            "make the style {style}",
            "turn the picture into {a_style}",
            "as if it were {a_style}",
        ),
    },
    "put_on": {
        "": (
            "put {w} on {t}",
            "give {t} {w}",
            "have {t} wear {w}",
            "make {t} wear {w}",
            "add {w} to {t}",
            "dress {t} in {w}",
            "let {t} wear {w}",
            "{s} should wear {w}",
            "{s} should have {w}",
            "place {w} on {t}",
            "draw {w} on {t}",
            "{s} {be} now wearing {w}",
            "i want {t} to wear {w}",
            "show {t} wearing {w}",
            "show {t} with {w}",
            "i want to see {t} in {w}",
            "dress {t} with {w}",
            "have {t} put on {w}",
        ),
        "swap": (
            "replace {p} {old} with {w}",
            "swap {p} {old} for {w}",
            "change {p} {old} to {w}",
            "have {t} wear {w} instead",
        ),
    },
    "take_off": {
        "": (
            "take the {w} off {t}",
            "take off {p} {w}",
            "remove {p} {w}",
            "remove the {w} from {t}",
            "take the {w} away from {t}",
            "have {t} take off the {w}",
            "make {t} take off the {w}",
            "get rid of {p} {w}",
            "{s} should not wear the {w}",
            "take away {p} {w}",
            "let {t} take off the {w}",
            "erase {p} {w}",
            "{s} should wear no {w}",
            "show {t} without the {w}",
            "i want {t} without the {w}",
            "draw {t} without the {w}",
            "make {p} {w} disappear",
            "{s} should take off the {w}",
        ),
        "bare": ("take off the {w}", "remove the {w}", "take the {w} away"),
    },
    "bigger": {
        "": (
            "make {t} bigger",
            "make {t} larger",
            "enlarge {t}",
            "grow {t}",
            "increase the size of {t}",
            "increase {p} size",
            "{s} should be bigger",
            "let {t} grow",
            "{s} should be larger",
            "have {t} be bigger",
            "scale {t} up",
            "i want {t} to be bigger",
            "give {t} a bigger size",
            "{s} {be} now bigger",
            "draw {t} bigger",
            "show {t} larger",
            "what if {s} were bigger",
            "let {t} be larger",
        ),
    },
    "smaller": {
        "": (
            "make {t} smaller",
            "make {t} less big",
            "shrink {t}",
            "let {t} shrink",
            "reduce the size of {t}",
            "reduce {p} size",
            "{s} should be smaller",
            "have {t} shrink",
            "{s} should be less big",
            "have {t} be smaller",
            "scale {t} down",
            "i want {t} to be smaller",
            "give {t} a smaller size",
            "{s} {be} now smaller",
            "draw {t} smaller",
            "show {t} smaller",
            "what if {s} were smaller",
            "let {t} be smaller",
        ),
    },
    "move": {
        "": (
            "move {t} {to_side}",
            "put {t} {on_side}",
            "bring {t} {to_side}",
            "shift {t} {to_side}",
            "{s} should be {on_side}",
            "place {t} {on_side}",
            "have {t} {on_side}",
            "{s} {be} now {on_side}",
            "let {t} go {to_side}",
            "have {t} move {to_side}",
            "i want {t} {on_side}",
            "push {t} {to_side}",
            "draw {t} {on_side}",
            "show {t} {on_side}",
            "take {t} {to_side}",
            "what if {s} were {on_side}",
        ),
        "step": (
            "move {t} one step to the {way}",
            "move {t} a bit to the {way}",
            "shift {t} a bit to the {way}",
            "push {t} a bit to the {way}",
            "let {t} go one step to the {way}",
        ),
    },
    "count": {
        "": (
            "make it {some}",
            "turn {t} into {some}",
            "there should be {some}",
            "change the number of {kinds} to {n}",
            "show {some}",
            "i want {some}",
            "have {some}",
            "let there be {some}",
            "make {t} {some}",
            "replace {t} with {some}",
            "i want to see {some}",
            "there {some_be} now {some}",
            "set the number of {kinds} to {n}",
            "draw {some} instead of {old}",
            "what if there were {some}",
            "change {t} to {some}",
            "use {some} instead of {old}",
            "draw {some}",
        ),
        "more": ("add {d} more {kinds_d}", "draw {d} more {kinds_d}", "i want {d} more {kinds_d}"),
        "fewer": ("remove {d} of {t}", "take away {d} of {t}"),
    },
    "two": {
        "": (
            "{a} and {b}",
            "{a}, and {b}",
            "{a} and then {b}",
            "{a}, then {b}",
            "{a}. also {b}",
            "{a} and also {b}",
            "first {a}, then {b}",
            "{a}, {b}",
            "{a}; {b}",
            "{a}, also {b}",
            "{a}. {b}",
            "{a}; also {b}",
            "first {a} and then {b}",
            "{a}. then {b}",
            "{a} and {b} too",
        ),
    },
}
EDIT_KINDS = tuple(_FRAMES)

# Pictures in these styles do not show colours: nothing is named by colour or recoloured there.
COLOURLESS_STYLES = ("pencil", "blueprint")


@dataclass(frozen=True, kw_only=True)
class Phrasing:
    """One sentence frame. `vague` frames leave more than one right answer."""

    id: str
    kind: str
    variant: str
    text: str

    @property
    def vague(self) -> bool:
        return self.variant == "vague"


# The first frames of each kind are the classic templates, which training must see.
_CLASSICS = 4


def _number(kind: str) -> tuple[Phrasing, ...]:
    frames = [(variant, text) for variant, texts in _FRAMES[kind].items() for text in texts]
    return tuple(
        Phrasing(id=f"{kind}/{i}", kind=kind, variant=variant, text=text)
        for i, (variant, text) in enumerate(frames, start=1)
    )


PHRASINGS: dict[str, tuple[Phrasing, ...]] = {kind: _number(kind) for kind in EDIT_KINDS}
_BY_ID = {p.id: p for phrasings in PHRASINGS.values() for p in phrasings}


def phrasing_of(phrasing_id: str) -> Phrasing:
    return _BY_ID[phrasing_id]


@cache
def held_out_phrasings() -> frozenset[str]:
    """The ids that training never sees: in each kind the tenth with the smallest hashes, at least one.

    The classic templates always stay in training; vague frames are never scored and so never held out.
    """
    held: set[str] = set()
    for phrasings in PHRASINGS.values():
        ids = [p.id for p in phrasings[_CLASSICS:] if not p.vague]
        ids.sort(key=lambda i: stable_hash("phrasing", i))
        held.update(ids[: max(1, round(len(phrasings) / 10))])
    return frozenset(held)


def is_held_out_phrasing(phrasing_id: str) -> bool:
    """Whether the phrasing, or any part of a joined one ("two/3+time/1+add/2"), is kept out of training."""
    return any(part in held_out_phrasings() for part in phrasing_id.split("+"))


@cache
def _pool(kind: str, held_out: bool, variants: tuple[str, ...]) -> tuple[Phrasing, ...]:
    return tuple(
        p for p in PHRASINGS[kind] if p.variant in variants and (p.id in held_out_phrasings()) == held_out
    )


def pick_phrasing(
    kind: str, rng: random.Random, *, held_out: bool = False, variants: tuple[str, ...] = ("",)
) -> Phrasing | None:
    """A phrasing of `kind` in one of the `variants`; None if no such phrasing lies in that part."""
    pool = _pool(kind, held_out, variants)
    return pool[int(rng.random() * len(pool))] if pool else None


# --- nouns --------------------------------------------------------------------------------------

_PLURALS = {"bus": "buses", "fox": "foxes", "cactus": "cactuses", "person": "people"}
OTHER_NOUNS = {
    "cat": "kitty",
    "dog": "puppy",
    "rabbit": "bunny",
    "plane": "airplane",
    "truck": "lorry",
    "teddy bear": "teddy",
}
NUMBERS = ("zero", "one", "two", "three", "four")
_MALE, _FEMALE = ("boy", "wizard"), ("girl", "queen")


def plural(noun: str) -> str:
    """The plural of a noun without adjectives."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun if noun == "sunglasses" else noun + "s"


def a(noun: str) -> str:
    """The noun phrase with its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def noun_of(kind: str, rng: random.Random | None = None) -> str:
    """The kind's own noun or, one time in twelve, another one for it."""
    if rng is not None and kind in OTHER_NOUNS and rng.random() < 0.08:
        return OTHER_NOUNS[kind]
    return kind


def nouns_of(kind: str) -> tuple[str, ...]:
    """All nouns for a kind, its own first."""
    return (kind, OTHER_NOUNS[kind]) if kind in OTHER_NOUNS else (kind,)


def described(noun: str, *, size: str = "", colour: str = "", count: int = 1) -> str:
    """``small red ball``, ``green foxes``; people are told by their clothes, ``small girl in red``."""
    is_person = noun in KINDS["person"]
    if count > 1:
        noun = plural(noun)
    if colour:
        noun = f"{noun} in {colour}" if is_person else f"{colour} {noun}"
    return f"{size} {noun}" if size else noun


def counted(count: int, noun: str, *, size: str = "", colour: str = "") -> str:
    """``a small red ball``, ``three cats``."""
    words = described(noun, size=size, colour=colour, count=count)
    return f"{NUMBERS[count]} {words}" if count > 1 else a(words)


def worn(wearable: str, count: int = 1) -> str:
    """``a hat``; for several wearers ``hats``."""
    return plural(wearable) if count > 1 or wearable == "sunglasses" else a(wearable)


# --- naming a thing on the page -----------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """A thing as object ("her"), subject ("she") and owner ("her"), and the "is" or "are" that agrees."""

    t: str
    s: str
    p: str
    be: str


_PRONOUNS = {
    "it": Name("it", "it", "its", "is"),
    "him": Name("him", "he", "his", "is"),
    "her": Name("her", "she", "her", "is"),
    "them": Name("them", "they", "their", "are"),
}


def pronoun(thing: Thing) -> Name:
    if thing.count > 1:
        return _PRONOUNS["them"]
    if thing.kind in _MALE:
        return _PRONOUNS["him"]
    return _PRONOUNS["her"] if thing.kind in _FEMALE else _PRONOUNS["it"]


def noun_phrase(noun: str, count: int, colour: str = "") -> Name:
    text = f"the {described(noun, colour=colour, count=count)}"
    owner = f"{text}'" if count > 1 and text.endswith("s") else f"{text}'s"
    return Name(text, text, owner, "are" if count > 1 else "is")


def name_thing(
    scene: Scene,
    index: int,
    rng: random.Random,
    *,
    owner: bool = False,
    side: bool = True,
    pronouns: bool = True,
    also_in: Scene | None = None,
) -> Name:
    """Name thing `index` so that only it can be meant.

    owner: the name must work as an owner, so none that ends in a place ("the cat on the left").
    side: whether the side may be used; False where the edit itself names a side.
    pronouns: whether "it", "him", "her", "them" may be used where only one thing can be meant.
    also_in: a second scene in which the name must be as clear (the page before an earlier edit).
    """
    thing = scene.things[index]
    lot = rng.random()
    if pronouns and lot < 0.3:
        name = pronoun(thing)
        people = sum(t.kind in KINDS["person"] for t in scene.things)
        if len(scene.things) == 1 or (name.t in ("him", "her") and people == 1):
            return name
    if lot < 0.4:
        group = GROUP_OF[thing.kind]
        everywhere = (*scene.things, *(also_in.things if also_in else ()))
        if group != "sky" and all(GROUP_OF[t.kind] != group or t.uid == thing.uid for t in everywhere):
            return noun_phrase(group, thing.count)
    count = thing.count
    if lot < 0.62 and side and not owner:
        on_side = "in the middle" if thing.slot == "middle" else f"on the {thing.slot}"
        everywhere = (*scene.things, *(also_in.things if also_in else ()))
        alone = all(t.slot != thing.slot or t.uid == thing.uid for t in everywhere)
        noun = "thing" if alone and lot > 0.56 else noun_of(thing.kind, rng)
        text = f"{noun_phrase(noun, count).t} {on_side}"
        return Name(text, text, text, "are" if count > 1 else "is")
    noun = noun_of(thing.kind, rng)
    by_colour = (
        lot < 0.78
        and not (owner and thing.kind in KINDS["person"])
        and scene.style not in COLOURLESS_STYLES
        and (also_in is None or also_in.style not in COLOURLESS_STYLES)
    )
    return noun_phrase(noun, count, thing.colour if by_colour else "")


def clothes(name: Name) -> Name:
    """A person's colour is that of the clothes: "the girl's clothes"."""
    text = f"{name.p} clothes"
    return Name(text, text, f"{text}'", "are")


# --- places, times, weathers, styles ------------------------------------------------------------

# Each place: where things stand ("in …"), where they are taken ("to …"), what it is.
PLACE_WORDS: dict[str, tuple[str, str, str]] = {
    "meadow": ("in the meadow", "the meadow", "a meadow"),
    "beach": ("on the beach", "the beach", "a beach"),
    "desert": ("in the desert", "the desert", "a desert"),
    "forest": ("in the forest", "the forest", "a forest"),
    "city": ("in the city", "the city", "a city"),
    "mountains": ("in the mountains", "the mountains", "mountains"),
    "farm": ("on the farm", "the farm", "a farm"),
    "north pole": ("at the north pole", "the north pole", "the north pole"),
    "moon": ("on the moon", "the moon", "the moon"),
    "volcano": ("at the volcano", "the volcano", "a volcano"),
}
TIME_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "morning": (("morning", "in the morning"), ("sunrise", "at sunrise")),
    "noon": (("noon", "at noon"), ("midday", "at midday")),
    "sunset": (("sunset", "at sunset"), ("evening", "in the evening")),
    "night": (("night", "at night"), ("midnight", "at midnight")),
}
# Each weather: "make it …", "let it …", "add …", "make it look …", "it is now …".
WEATHER_WORDS: dict[str, tuple[tuple[str, str, str, str, str], ...]] = {
    "clear": (
        ("sunny", "be sunny", "sunshine", "sunny", "sunny"),
        ("clear", "be clear", "a clear sky", "clear", "clear"),
    ),
    "cloudy": (("cloudy", "be cloudy", "clouds", "cloudy", "cloudy"),),
    "rain": (("rain", "rain", "rain", "rainy", "raining"), ("rainy", "be rainy", "rain", "rainy", "rainy")),
    "snow": (("snow", "snow", "snow", "snowy", "snowing"), ("snowy", "be snowy", "snow", "snowy", "snowy")),
    "fog": (("foggy", "be foggy", "fog", "foggy", "foggy"),),
}
OLD_WEATHER = {"clear": "sunshine", "cloudy": "clouds", "rain": "rain", "snow": "snow", "fog": "fog"}
# Each style: its name ("change the style to …") and what such a picture is ("make it …").
STYLE_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "plain": (("plain", "a plain picture"), ("normal", "a normal illustration")),
    "pencil": (("pencil", "a pencil drawing"), ("pencil", "a pencil sketch")),
    "watercolour": (("watercolour", "a watercolour painting"), ("watercolour", "a watercolour")),
    "pixel art": (("pixel art", "pixel art"), ("pixel art", "a pixel art picture")),
    "blueprint": (("blueprint", "a blueprint"), ("blueprint", "a blueprint drawing")),
    "comic": (("comic", "a comic"), ("comic book", "a comic book page")),
}


def side_words(slot: str, rng: random.Random | None = None) -> tuple[str, str]:
    """Where a slot is, as ``on the left`` and ``to the left side``."""
    if slot == "middle":
        word = "centre" if rng is not None and rng.random() < 0.2 else "middle"
        return f"in the {word}", f"to the {word}"
    side = " side" if rng is not None and rng.random() < 0.25 else ""
    return f"on the {slot}{side}", f"to the {slot} side"


# --- from a clause to what a person types -------------------------------------------------------

POLITE = (
    "please {x}",
    "please {x}",
    "{x} please",
    "{x}, please",
    "could you {x}",
    "could you please {x}",
    "can you {x}",
    "i want you to {x}",
    "now {x}",
)
# A clause that begins so is a statement or a question; "please" does not go before it.
_STATEMENTS = frozenset(
    ("i", "it", "there", "what", "as", "in", "on", "the", "first", "{s}", "{they}", "{where}", "{a}")
)
_MIN_TYPO_LETTERS = 4
_TYPO_SHARE = 0.024  # of the words of at least four letters: between 1 and 2% of all words


def is_imperative(clause: str) -> bool:
    first = clause.split(" ", 1)[0]
    return first not in _STATEMENTS and first not in ("he", "she", "they", "everything")


def fill(phrasing: Phrasing, fields: Mapping[str, str]) -> str:
    """The clause in lower case, without a final stop."""
    return phrasing.text.format_map(fields)


def finish(clause: str, rng: random.Random, *, typos: bool = False) -> str:
    """Make a clause into an instruction as somebody may type it: politeness, spelling, case, stop, typos."""
    text = clause
    if rng.random() < 0.15 and is_imperative(text):
        text = POLITE[int(rng.random() * len(POLITE))].format(x=text)
    question = text.startswith(("could you", "can you", "what if"))
    if rng.random() < 0.5:
        text = american(text)
    if typos:
        text = _mistype(text, rng)
    lot = rng.random()
    if lot < 0.04:
        text = text.title().replace("'S", "'s")
    elif lot < 0.65:
        text = text[0].upper() + text[1:]
        text = text.replace(" i ", " I ")
        text = re.sub(r"\. ([a-z])", lambda m: ". " + m.group(1).upper(), text)
    elif lot < 0.67:
        text = text.upper()
    if rng.random() < 0.4:
        text += "?" if question else "."
    return text


def american(text: str) -> str:
    return text.replace("colour", "color").replace("centre", "center") if "o" in text or "c" in text else text


def _mistype(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) >= _MIN_TYPO_LETTERS and rng.random() < _TYPO_SHARE and word.isalpha():
            at = rng.randrange(1, len(word) - 1)
            swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
            words[i] = swapped if rng.random() < 0.5 else word[:at] + word[at + 1 :]
    return " ".join(words)


# --- the vocabulary -----------------------------------------------------------------------------

_WORD = re.compile(r"'s|[a-z]+|[0-9]")


def words_of(text: str) -> list[str]:
    """The lower-case words of a text; the owner's ``'s`` is a word of its own."""
    return _WORD.findall(text.lower())


@cache
def _vocabulary() -> tuple[str, ...]:
    from ip2p_storybook import captions  # it builds on this module's nouns

    def texts() -> Iterable[str]:
        for phrasings in PHRASINGS.values():
            yield from (re.sub(r"\{\w+\}", " ", p.text) for p in phrasings)
        yield from (re.sub(r"\{\w+\}", " ", t) for t in (*POLITE, *captions.TEMPLATES))
        nouns: Sequence[str] = (*ALL_KINDS, *OTHER_NOUNS.values(), *KINDS, *WEARABLES, "thing", "clothes")
        yield from nouns
        yield from (plural(n) for n in nouns)
        yield from NUMBERS
        yield "1 2 3 4 a an the is are 's"
        yield from (w for name in _PRONOUNS.values() for w in (name.t, name.s, name.p))
        yield from (
            *COLOURS,
            *SLOTS,
            *TIMES,
            *STYLES,
            "small big large on in to side middle centre everything",
        )
        yield from (w for words in PLACE_WORDS.values() for w in words)
        for pairs in (TIME_WORDS, WEATHER_WORDS, STYLE_WORDS):
            yield from (w for options in pairs.values() for option in options for w in option)
        yield from OLD_WEATHER.values()
        yield from captions.WORDS

    found = {w for text in texts() for spelt in (text, american(text)) for w in words_of(spelt)}
    return tuple(sorted(found))


def vocabulary() -> list[str]:
    """Every lower-case word of instructions and captions (both spellings, no typos), in order."""
    return list(_vocabulary())
