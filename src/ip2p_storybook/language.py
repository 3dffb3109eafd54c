"""The closed language of storybook instructions.

A *phrasing* is one sentence frame of one kind of edit, such as ``turn {t} into {new}``. Frames are
filled with names of things (by kind, color, side, group or pronoun), then varied in politeness, case,
British or American spelling and, for training only, occasional typos.

A tenth of the phrasings of each kind are held out from training by `is_held_out_phrasing`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from ip2p_storybook.scene import (
    ALL_KINDS,
    COLOURS,
    GROUP_OF,
    KINDS,
    PLACES,
    SLOTS,
    STYLES,
    TIMES,
    WEARABLES,
    Scene,
    Thing,
    stable_hash,
)
from ip2p_storybook.words import (
    ADDED_SIZES,
    ALWAYS_PLURAL,
    CAPTION_WORDS,
    GROUP_NOUNS,
    IN_SKY,
    MORE_NOUNS,
    OLD_WEATHER,
    ON_SIDE,
    OTHER_COLOURS,
    OTHER_NOUNS,
    OTHER_PLACES,
    OTHER_WEARABLES,
    PLACE_WORDS,
    STYLE_WORDS,
    TEMPLATES,
    THING_NOUNS,
    TIME_WORDS,
    TO_SIDE,
    WEATHER_WORDS,
)

# --- phrasings ----------------------------------------------------------------------------------
# `phrasings.txt` contains the frames, grouped by the variants they can express. Fields: {t} {s} {p} are the
# thing as object, subject and owner; {be} agrees with it. The kind of edit fills the other fields.

PHRASINGS_FILE = Path(__file__).with_name("phrasings.txt")
_HEADING = re.compile(r"\[(\w+)(?: (\w+))?\]")


# Pictures in these styles show no colors: colors are not used in names or edits.
COLOURLESS_STYLES = ("pencil", "blueprint")


@dataclass(frozen=True, kw_only=True)
class Phrasing:
    """One sentence frame. `vague` frames have more than one right answer."""

    id: str
    kind: str
    variant: str
    text: str

    @property
    def vague(self) -> bool:
        return self.variant == "vague"


# The first frames of each kind are the classic templates, which are always in training.
_CLASSICS = 4


def _read_phrasings() -> dict[str, tuple[Phrasing, ...]]:
    found: dict[str, list[Phrasing]] = {}
    kind = variant = ""
    for line in PHRASINGS_FILE.read_text(encoding="utf-8").splitlines():
        heading = _HEADING.fullmatch(line)
        if heading:
            kind, variant = heading[1], heading[2] or ""
        elif line and not line.startswith("#"):
            frames = found.setdefault(kind, [])
            frames.append(Phrasing(id=f"{kind}/{len(frames) + 1}", kind=kind, variant=variant, text=line))
    return {kind: tuple(frames) for kind, frames in found.items()}


PHRASINGS: dict[str, tuple[Phrasing, ...]] = _read_phrasings()
EDIT_KINDS = tuple(PHRASINGS)
_BY_ID = {p.id: p for phrasings in PHRASINGS.values() for p in phrasings}


def phrasing_of(phrasing_id: str) -> Phrasing:
    return _BY_ID[phrasing_id]


@cache
def held_out_phrasings() -> frozenset[str]:
    """The held-out ids: in each kind the tenth with the smallest hashes, at least one.

    The classic templates are always in training. Vague frames are never scored and so never held out.
    """
    held: set[str] = set()
    for phrasings in PHRASINGS.values():
        ids = [p.id for p in phrasings[_CLASSICS:] if not p.vague]
        ids.sort(key=lambda i: stable_hash("phrasing", i))
        held.update(ids[: max(1, round(len(phrasings) / 10))])
    return frozenset(held)


def is_held_out_phrasing(phrasing_id: str) -> bool:
    """Whether the phrasing, or any part of a joined one ("two/3+time/1+add/2"), is held out."""
    return any(part in held_out_phrasings() for part in phrasing_id.split("+"))


@cache
def _pool(kind: str, held_out: bool, variants: tuple[str, ...]) -> tuple[Phrasing, ...]:
    return tuple(
        p for p in PHRASINGS[kind] if p.variant in variants and (p.id in held_out_phrasings()) == held_out
    )


def pick_phrasing(
    kind: str, rng: random.Random, *, held_out: bool = False, variants: tuple[str, ...] = ("",)
) -> Phrasing | None:
    """A phrasing of `kind` in one of the `variants`; None if that part has no such phrasing."""
    pool = _pool(kind, held_out, variants)
    return pool[int(rng.random() * len(pool))] if pool else None


# --- words --------------------------------------------------------------------------------------

NUMBERS = ("zero", "one", "two", "three", "four")
MALE_KINDS, FEMALE_KINDS = ("boy", "wizard"), ("girl", "queen")
_OTHER_SHARE = 0.2  # how often instructions use a word other than the plain one
_Words = TypeVar("_Words")


def choose_words(options: Sequence[_Words], rng: random.Random, share: float = _OTHER_SHARE) -> _Words:
    """The first option or, with probability `share`, one of the others."""
    lot = rng.random()
    if lot >= share or len(options) == 1:
        return options[0]
    return options[1 + int(lot / share * (len(options) - 1))]


def plural(noun: str) -> str:
    """The plural of a noun without adjectives."""
    if noun == "person":
        return "people"
    if noun in ALWAYS_PLURAL:
        return noun
    if noun.endswith("f") and not noun.endswith("scarf"):
        return noun[:-1] + "ves"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def a(noun: str) -> str:
    """The noun phrase with its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def noun_of(kind: str, rng: random.Random | None = None) -> str:
    """A noun for the kind in captions: the plain one or, with probability 1/12, another one."""
    if rng is not None and kind in OTHER_NOUNS and rng.random() < 0.08:
        return OTHER_NOUNS[kind]
    return kind


@cache
def nouns_of(kind: str) -> tuple[str, ...]:
    """All nouns for a kind, the plain one first."""
    other = (OTHER_NOUNS[kind],) if kind in OTHER_NOUNS else ()
    return (kind, *other, *MORE_NOUNS[kind])


def vary_noun(kind: str, rng: random.Random) -> str:
    """A noun for the kind in instructions, usually the plain one."""
    return choose_words(nouns_of(kind), rng)


def colours_of(colour: str) -> tuple[str, ...]:
    """All words for a color, the plain one first; no words for ""."""
    return (colour, *OTHER_COLOURS[colour]) if colour else ("",)


def vary_colour(colour: str, rng: random.Random) -> str:
    return choose_words(colours_of(colour), rng, 0.15)


def wearables_of(wearable: str) -> tuple[str, ...]:
    """All words for a wearable, the plain one first."""
    return (wearable, *OTHER_WEARABLES[wearable])


_PERSON_NOUNS = frozenset(noun for kind in KINDS["person"] for noun in nouns_of(kind))


def described(noun: str, *, size: str = "", colour: str = "", count: int = 1) -> str:
    """``small red ball``, ``green foxes``; people are described by their clothes, ``small girl in red``."""
    is_person = noun in _PERSON_NOUNS
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
    return plural(wearable) if count > 1 or wearable in ALWAYS_PLURAL else a(wearable)


def worn_in_words(wearable: str, count: int = 1) -> tuple[str, ...]:
    """All phrases for a wearable to put on, the plain one first."""
    words = wearables_of(wearable)
    pairs = (f"a pair of {word}" for word in words if word in ALWAYS_PLURAL and count == 1)
    return (*(worn(word, count) for word in words), *pairs)


def bare_in_words(wearable: str, count: int = 1) -> tuple[str, ...]:
    """All words for a worn wearable, without an article, the plain one first."""
    return tuple(plural(word) if count > 1 else word for word in wearables_of(wearable))


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
    if thing.kind in MALE_KINDS:
        return _PRONOUNS["him"]
    return _PRONOUNS["her"] if thing.kind in FEMALE_KINDS else _PRONOUNS["it"]


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
    """An unambiguous name of thing `index`.

    owner: the name must work as an owner, so it must not end in a place ("the cat on the left").
    side: whether the side may be used; False if the edit itself names a side.
    pronouns: whether "it", "him", "her", "them" may be used if they are unambiguous.
    also_in: a second scene in which the name must be unambiguous (the page before an earlier edit).
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
            return noun_phrase(choose_words(GROUP_NOUNS[group], rng), thing.count)
    count = thing.count
    if lot < 0.62 and side and not owner:
        on_side = choose_words(ON_SIDE[thing.slot], rng)
        everywhere = (*scene.things, *(also_in.things if also_in else ()))
        alone = all(t.slot != thing.slot or t.uid == thing.uid for t in everywhere)
        noun = choose_words(THING_NOUNS, rng, 0.4) if alone and lot > 0.56 else vary_noun(thing.kind, rng)
        text = f"{noun_phrase(noun, count).t} {on_side}"
        return Name(text, text, text, "are" if count > 1 else "is")
    noun = vary_noun(thing.kind, rng)
    by_colour = (
        lot < 0.78
        and not (owner and thing.kind in KINDS["person"])
        and scene.style not in COLOURLESS_STYLES
        and (also_in is None or also_in.style not in COLOURLESS_STYLES)
    )
    return noun_phrase(noun, count, vary_colour(thing.colour, rng) if by_colour else "")


def clothes(name: Name) -> Name:
    """The name for the color of a person: "the girl's clothes"."""
    text = f"{name.p} clothes"
    return Name(text, text, f"{text}'", "are")


# --- places, times, weathers, styles ------------------------------------------------------------


def places_of(place: str) -> tuple[tuple[str, str, str], ...]:
    """All words for a place from `PLACE_WORDS`, the plain ones first."""
    return (PLACE_WORDS[place], *OTHER_PLACES[place])


def weathers_of(weather: str, time: str) -> tuple[tuple[str, str, str, str, str], ...]:
    """All words for a weather from `WEATHER_WORDS`, without the sun at night."""
    options = WEATHER_WORDS[weather]
    return tuple(words for words in options if time != "night" or not names_sun(words[3]))


def names_sun(text: str) -> bool:
    """Whether the text requests sunshine."""
    return "sunny" in text.lower() or "sunshine" in text.lower()


def without_article(noun: str) -> str:
    return noun.removeprefix("a ")


def side_words(slot: str, rng: random.Random | None = None) -> tuple[str, str]:
    """Phrases for a slot: ``on the left`` and ``to the left side``."""
    if rng is None:
        return ON_SIDE[slot][0], TO_SIDE[slot][0]
    return choose_words(ON_SIDE[slot], rng, 0.3), choose_words(TO_SIDE[slot], rng)


# --- from a clause to what a person types -------------------------------------------------------

# Phrases around an imperative. The first few are the most frequent.
_PLEASE = (
    "please {x}",
    "{x} please",
    "{x}, please",
    "could you {x}",
    "could you please {x}",
    "can you {x}",
    "can you please {x}",
    "would you {x}",
    "i want you to {x}",
    "i'd like you to {x}",
    "now {x}",
)
_ASIDES = (
    "will you {x}",
    "would you please {x}",
    "i need you to {x}",
    "you should {x}",
    "you could {x}",
    "you have to {x}",
    "we have to {x}",
    "we should {x}",
    "someone should {x}",
    "somebody please {x}",
    "i want to {x}",
    "i'd like to {x}",
    "i think you should {x}",
    "i was thinking you could {x}",
    "i was going to ask you to {x}",
    "all i want is to {x}",
    "what you need to do is {x}",
    "it would be nice to {x}",
    "it would be fun to {x}",
    "it might be good to {x}",
    "it is time to {x}",
    "time to {x}",
    "is it possible to {x}",
    "any chance you could {x}",
    "your job is to {x}",
    "the idea is to {x}",
    "the next step is to {x}",
    "my wish: {x}",
    "the only change: {x}",
    "nothing else, only {x}",
    "here is what i have in mind: {x}",
    "as i said before, {x}",
    "one more time: {x}",
    "something is wrong here, {x}",
    "go ahead and {x}",
    "try to {x}",
    "ok now {x}",
    "just {x}",
    "maybe {x}",
    "so {x}",
    "well, {x}",
    "yes, {x}",
    "oh, {x}",
    "hey, {x}",
    "hi, {x}",
    "{x} thanks",
    "{x}, thanks",
    "{x}, thank you",
    "{x} for me",
    "{x} if you can",
    "{x} right away",
    "{x}, will you",
    "{x} in my picture",
    "{x}, that would be great",
    "{x}, it looks wrong",
    "{x} and leave the rest",
    "{x} and keep everything else",
    "{x}, everything else is fine",
    "{x} because it is more fun",
    "{x}, that is all",
)
POLITE = (*_PLEASE * 6, *_ASIDES)
# A clause that starts like this is a statement or a question; "please" cannot precede it.
_STATEMENTS = frozenset(
    (
        *(
            "i",
            "i'd",
            "it",
            "there",
            "what",
            "how",
            "why",
            "can",
            "could",
            "would",
            "we",
            "let's",
            "as",
            "in",
        ),
        *(
            "on",
            "at",
            "up",
            "off",
            "the",
            "this",
            "that",
            "like",
            "no",
            "not",
            "without",
            "also",
            "same",
            "now",
        ),
        *("don't", "besides", "first", "first,", "1.", "1)", "one:", "two", "both", "a", "an", "plus"),
    )
)
_QUESTIONS = ("could", "can", "would", "will", "what", "how", "why", "is", "any")
_MIN_TYPO_LETTERS = 4
_TYPO_SHARE = 0.024  # of words with at least four letters; 1 to 2% of all words
# Shares for `loosen`.
_DROPPED = {True: 0.35, False: 0.08}  # of function words and of all other words
_INSERTED, _FUNCTION_SHARE = 0.2, 0.7
_SWAPPED = 0.25  # of texts


@cache
def _imperatives() -> frozenset[str]:
    """The verbs that frames start with."""
    firsts = {p.text.split(" ", 1)[0] for phrasings in PHRASINGS.values() for p in phrasings}
    return frozenset(first for first in firsts if "{" not in first) - _STATEMENTS


def is_imperative(clause: str) -> bool:
    return clause.split(" ", 1)[0] in _imperatives()


def fill_phrasing(phrasing: Phrasing, fields: Mapping[str, str]) -> str:
    """The clause in lower case, without a final period."""
    return phrasing.text.format_map(fields)


def finish(clause: str, rng: random.Random, *, typos: bool = False) -> str:
    """Turn a clause into an instruction as typed: politeness, spelling, case, period, typos."""
    text = clause
    if rng.random() < 0.18 and is_imperative(text):
        text = POLITE[int(rng.random() * len(POLITE))].format(x=text)
    question = text.split(" ", 1)[0] in _QUESTIONS
    if rng.random() < 0.5:
        text = american(text)
    if typos:
        text = _mistype(text, rng)
    lot = rng.random()
    if lot < 0.04:
        text = re.sub(r"'[A-Z]", lambda m: m.group().lower(), text.title())
    elif lot < 0.65:
        text = text[0].upper() + text[1:]
        text = re.sub(r"\bi\b", "I", text)
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


@cache
def frame_words() -> dict[str, bool]:
    """The words of the training phrasings, without their fields, and whether each is a function word.

    A function word is in the phrasings of at least half of the kinds, so it says little about the edit.
    """
    kinds: dict[str, set[str]] = {}
    for phrasing in (p for phrasings in PHRASINGS.values() for p in phrasings):
        if not is_held_out_phrasing(phrasing.id):
            for word in re.findall(r"[a-z']+", re.sub(r"\{\w+\}", " ", phrasing.text)):
                kinds.setdefault(word, set()).add(phrasing.kind)
    return {word: 2 * len(found) >= len(PHRASINGS) for word, found in sorted(kinds.items())}


def loosen(text: str, rng: random.Random) -> str:
    """An instruction with loose grammar, for training.

    Words are dropped and inserted, most of them function words, and sometimes the two parts of the text are
    swapped. A network then relies less on the phrasings that it knows, and understands other wordings better.
    """
    all_words, function_words = _insertable()
    words = []
    for word in text.split():
        if rng.random() < _INSERTED:
            words.append(rng.choice(function_words if rng.random() < _FUNCTION_SHARE else all_words))
        dropped = _DROPPED[frame_words().get(word.lower().strip(".,:;!?"), False)]
        if rng.random() >= dropped:
            words.append(word)
    if len(words) > 2 and rng.random() < _SWAPPED:
        at = rng.randrange(1, len(words))
        words = words[at:] + words[:at]
    return " ".join(words) or text


@cache
def _insertable() -> tuple[tuple[str, ...], tuple[str, ...]]:
    known = frame_words()
    return tuple(known), tuple(word for word in known if known[word])


# --- the vocabulary -----------------------------------------------------------------------------

_WORD = re.compile(r"'(?:s|t|d)\b|[a-z]+|[0-9]")


def words_of(text: str) -> list[str]:
    """The lower-case words of a text; the endings ``'s``, ``'d`` and ``'t`` are separate words."""
    return _WORD.findall(text.lower())


def _texts() -> Iterator[str]:
    """Texts that contain every word of the language."""
    for phrasings in PHRASINGS.values():
        yield from (re.sub(r"\{\w+\}", " ", p.text) for p in phrasings)
    yield from (re.sub(r"\{\w+\}", " ", t) for t in (*POLITE, *TEMPLATES))
    nouns = [noun for kind in ALL_KINDS for noun in nouns_of(kind)]
    nouns += [noun for group in GROUP_NOUNS.values() for noun in group]
    nouns += [*KINDS, *THING_NOUNS, *(word for w in WEARABLES for word in wearables_of(w))]
    yield from nouns
    yield from (plural(noun) for noun in nouns)
    yield from NUMBERS
    yield "1 2 3 4 a an the is are 's everything clothes a pair of"
    yield from (w for name in _PRONOUNS.values() for w in (name.t, name.s, name.p))
    yield from (word for colour in COLOURS for word in colours_of(colour))
    yield from (*SLOTS, *TIMES, *STYLES, *IN_SKY)
    for words in (ADDED_SIZES, ON_SIDE, TO_SIDE, OLD_WEATHER):
        yield from (word for options in words.values() for word in options)
    yield from (word for place in PLACES for words in places_of(place) for word in words)
    for options_of in (TIME_WORDS, WEATHER_WORDS, STYLE_WORDS):
        yield from (word for options in options_of.values() for words in options for word in words)
    yield from CAPTION_WORDS


@cache
def _vocabulary() -> tuple[str, ...]:
    found = {w for text in _texts() for spelt in (text, american(text)) for w in words_of(spelt)}
    return tuple(sorted(found))


def vocabulary() -> list[str]:
    """Every lower-case word of instructions and captions (both spellings, no typos), in order."""
    return list(_vocabulary())
