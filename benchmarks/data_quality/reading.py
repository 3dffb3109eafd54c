"""Captions read back, and edits in words judged.

`read` is the inverse of `captions.caption`: the record that a caption names. `interpret` is the inverse of
`edits.propose`: what an instruction of the storybook's language makes of such a record. `judge` puts them
together: is the edited caption the caption after exactly the edit that the instruction asks for?
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import product
from typing import Protocol

from ip2p_storybook import language as say
from ip2p_storybook.scene import (
    ALL_KINDS,
    COLOURS,
    GROUP_OF,
    KINDS,
    MAX_COUNT,
    PLACES,
    SIZES,
    SKY_KINDS,
    SLOTS,
    STYLES,
    TIMES,
    WEARABLES,
    WEARER_KINDS,
    WEATHERS,
    Scene,
    Thing,
)
from ip2p_storybook.words import (
    ADDED_SIZES,
    GROUP_NOUNS,
    IN_SKY,
    OLD_WEATHER,
    ON_SIDE,
    PLACE_WORDS,
    SIZE_WORDS,
    STYLE_PHRASES,
    STYLE_WORDS,
    TEMPLATES,
    THING_NOUNS,
    TIME_PHRASES,
    TIME_WORDS,
    WEATHER_PHRASES,
    WEATHER_WORDS,
)

# --- what a caption says --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SaidThing:
    """A thing as a caption tells it. colour, slot: None where it does not."""

    kind: str
    colour: str | None = None
    size: str = "medium"
    slot: str | None = None
    count: int = 1
    wears: str | None = None

    @property
    def in_sky(self) -> bool:
        return self.kind in SKY_KINDS


@dataclass(frozen=True, kw_only=True)
class Said:
    """A page as a caption tells it. What captions leave out is noon, a clear sky and a medium size."""

    place: str
    time: str = "noon"
    weather: str = "clear"
    style: str = "plain"
    things: tuple[SaidThing, ...] = ()

    @property
    def sided(self) -> bool:
        """Whether it says where across the page things are."""
        return any(thing.slot is not None for thing in self.things)

    @property
    def coloured(self) -> bool:
        return self.style not in say.COLOURLESS_STYLES

    def scene(self) -> Scene | None:
        """A scene of which the caption is true; None where there is no room for all things.

        What is not said is white and stands in the free places from left to right, as it is listed.
        """
        things: list[Thing] = []
        free = {
            sky: [s for s in SLOTS if all(t.slot != s or t.in_sky != sky for t in self.things)]
            for sky in (False, True)
        }
        for uid, thing in enumerate(self.things):
            if thing.slot is None and not free[thing.in_sky]:
                return None
            things.append(
                Thing(
                    kind=thing.kind,
                    colour=thing.colour or "white",
                    size=thing.size,
                    slot=thing.slot or free[thing.in_sky].pop(0),
                    count=thing.count,
                    wears=thing.wears,
                    uid=uid,
                )
            )
        return Scene(
            place=self.place, time=self.time, weather=self.weather, style=self.style, things=tuple(things)
        )


def read_caption(text: str) -> Scene | None:
    """A scene of which the caption is true (`Said.scene`), or None for what is no storybook caption."""
    said = read(text)
    return None if said is None else said.scene()


def read(text: str) -> Said | None:
    """What a caption of the storybook says, in whatever form and case; None for any other text.

    So it is for a page with two things of a kind or in one place, which is no storybook page.
    """
    text = " ".join(text.lower().split()).rstrip(".").replace("watercolor", "watercolour")
    match = next((m for pattern in _captions() if (m := pattern.fullmatch(text))), None)
    if match is None:
        return None
    style = _STYLE_OF[match["style"]]
    listed = match["things"]
    texts = [] if listed == "nothing" else re.split(r", | and ", listed)
    found = [_read_thing(t) for t in texts]
    things = tuple(thing for thing in found if thing is not None)
    spots = [(t.in_sky, t.slot) for t in things if t.slot is not None]
    if (
        len(things) != len(texts)
        or len({t.kind for t in things}) != len(things)
        or len(set(spots)) != len(spots)
        or (spots and len(spots) != len(things))
        or any((t.colour is None) != (style in say.COLOURLESS_STYLES) for t in things)
        or any(sum(t.in_sky == sky for t in things) > len(SLOTS) for sky in (False, True))
    ):
        return None
    return Said(
        place=_PLACE_OF[match["place"]],
        time=_TIME_OF[match["time"]] if match["time"] else "noon",
        weather=_WEATHER_OF[match["weather"]] if match["weather"] else "clear",
        style=style,
        things=things,
    )


_STYLE_OF = {words: style for style, options in STYLE_PHRASES.items() for words in options}
_PLACE_OF = {words[0]: place for place, words in PLACE_WORDS.items()}
_TIME_OF = {words: time for time, words in TIME_PHRASES.items()}
_WEATHER_OF = {words.strip(): weather for weather, options in WEATHER_PHRASES.items() for words in options}
_SIZE_OF = {words: size for size, words in SIZE_WORDS.items()}
_SLOT_OF = {say.side_words(slot)[0]: slot for slot in SLOTS}
_COUNT_OF = {word: number for number, word in enumerate(say.NUMBERS)}


def _one_of(words: Iterable[str]) -> str:
    """A pattern of alternatives, the longest first, so that none hides another."""
    return "(?:" + "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True)) + ")"


@cache
def _nouns() -> dict[str, tuple[str, bool]]:
    """Each noun, and the plural of each: its kind, and whether it is the plural."""
    singular = {noun: kind for kind in ALL_KINDS for noun in say.nouns_of(kind)}
    return {
        **{noun: (kind, False) for noun, kind in singular.items()},
        **{say.plural(noun): (kind, True) for noun, kind in singular.items()},
    }


@cache
def _worn() -> dict[str, str]:
    """Each wearable as "a hat", "hat" and "hats"."""
    return {
        form: wearable
        for wearable in WEARABLES
        for word in say.wearables_of(wearable)
        for form in (say.worn(word), word, say.plural(word), f"a pair of {word}")
    }


@cache
def _thing() -> re.Pattern[str]:
    colour = _one_of(COLOURS)
    return re.compile(
        rf"(?P<count>an?|{_one_of(say.NUMBERS[2:])}) (?:(?P<size>small|large) )?(?:(?P<colour>{colour}) )?"
        rf"(?P<noun>{_one_of(_nouns())})(?: in (?P<clothes>{colour}))?"
        rf"(?: (?:wearing|with|in (?:its|his|her|their)) (?P<wears>{_one_of(_worn())}))?"
        rf"(?: (?P<side>{_one_of(_SLOT_OF)}))?(?P<sky> in the sky)?"
    )


def _read_thing(text: str) -> SaidThing | None:
    match = _thing().fullmatch(text)
    if match is None:
        return None
    kind, many = _nouns()[match["noun"]]
    person = kind in KINDS["person"]
    count = 1 if match["count"] in ("a", "an") else _COUNT_OF[match["count"]]
    wears = _worn()[match["wears"]] if match["wears"] else None
    if (
        many != (count > 1)
        or (match["colour"] and person)
        or (match["clothes"] and not person)
        or (wears and kind not in WEARER_KINDS)
        or (match["sky"] and kind not in SKY_KINDS)
    ):
        return None
    return SaidThing(
        kind=kind,
        colour=match["colour"] or match["clothes"],
        size=_SIZE_OF[match["size"] or ""],
        slot=_SLOT_OF[match["side"]] if match["side"] else None,
        count=count,
        wears=wears,
    )


@cache
def _captions() -> tuple[re.Pattern[str], ...]:
    # No noun, side or wearable holds a comma or "and", so that the list of things ends by itself.
    time = rf"(?P<time>{_one_of(_TIME_OF)})?"
    weather = rf"(?P<weather>{_one_of(_WEATHER_OF)})?"
    fields = {
        "style": rf"(?P<style>{_one_of(_STYLE_OF)})",
        "things": r"(?P<things>.+?(?<!,))",
        "place": rf"(?P<place>{_one_of(_PLACE_OF)})",
    }

    def pattern(template: str) -> re.Pattern[str]:
        # The words that may be missing take the blank or comma before them along.
        text = template.replace(" {time}{weather}", "{when}")
        commas = ", {time}{weather}" in template
        text = text.replace(", {time}{weather}", "{when}").replace(",{when}", "{when}")
        when = rf"(?:{',' if commas else ''} {time[:-1]})?(?:{',?' if commas else ''} {weather[:-1]})?"
        return re.compile(text.format(when=when, **fields))

    return tuple(pattern(template) for template in TEMPLATES)


# --- what an instruction makes of a page ------------------------------------------------------------


def interpret(instruction: str, page: Said) -> Iterator[Said]:
    """All pages that the instruction may make of this one, in the storybook's language; none if it is not.

    Every phrasing counts, those kept out of training too, and so do case, a final stop, politeness and
    spelling; mistakes of typing do not. Only what an edit of the storybook may do counts: it changes the
    page, names one thing that is there, and never moves one. Where the instruction leaves a colour or a
    side open, it is None.
    """
    for clause in _clauses(instruction):
        yield from _interpret(clause, page, pronouns=True)
        for first, second in _all_parts(clause):
            for between in _interpret(first, page, pronouns=False):
                yield from _interpret(second, between, pronouns=False, since=page)


def edit_kind(instruction: str) -> str:
    """The kind of edit whose phrasing this is, whatever the page; "two" for a pair, "none" for no phrasing.

    Some sentences are of more than one kind ("make it {new}"): then the first of `language.PHRASINGS`.
    """
    for clause in _clauses(instruction):
        for phrasing, _ in _heard_as(clause):
            return phrasing.kind
    for clause in _clauses(instruction):
        for first, second in _all_parts(clause):
            if _heard_as(first) and _heard_as(second):
                return "two"
    return "none"


def _clauses(instruction: str) -> list[str]:
    """The instruction in lower case and the American spelling, with and without its politeness."""
    text = " ".join(say.american(instruction.lower()).split())
    text = text.removesuffix(".").removesuffix("?")
    clauses = [text]
    for polite in dict.fromkeys(say.POLITE):
        before, after = polite.split("{x}")
        if text.startswith(before) and text.endswith(after):
            clauses.append(text[len(before) : len(text) - len(after)])
    return clauses


def _all_parts(clause: str) -> set[tuple[str, str]]:
    """All ways to part a clause in two, as any of the joints joins them."""
    return {parts for joint in say.PHRASINGS["two"] for parts in _parts(joint.text, clause)}


def _parts(joint: str, clause: str) -> Iterator[tuple[str, str]]:
    """All ways to part a clause in two, as "{a}, then {b}" joins them."""
    before, rest = joint.split("{a}")
    between, after = rest.split("{b}")
    if not clause.startswith(before) or not clause.endswith(after):
        return
    text = clause[len(before) : len(clause) - len(after)]
    at = text.find(between)
    while at >= 0:
        yield text[:at], text[at + len(between) :]
        at = text.find(between, at + 1)


@dataclass(frozen=True, kw_only=True)
class _Heard:
    """A clause in one of the phrasings, and the page that it is said of."""

    phrasing: say.Phrasing
    fields: dict[str, str]
    page: Said
    pronouns: bool
    since: Said | None  # the page before an earlier edit

    def says(self, **accepted: str | Collection[str]) -> bool:
        """Whether each of these fields that the phrasing has is one of the accepted texts."""
        for name, texts in accepted.items():
            said = self.fields.get(name)
            options = (texts,) if isinstance(texts, str) else texts
            if said is not None and said not in map(say.american, options):
                return False
        return True

    def things(self, *, of_people: bool = False) -> Iterator[tuple[int, SaidThing]]:
        """The things that may be meant: those of which a name agrees with all fields.

        of_people: a person is named by the clothes.
        """
        for index, thing in enumerate(self.page.things):
            dress = of_people and thing.kind in KINDS["person"]
            owner = dress or "p" in self.fields
            for name in _names(self, index, owner=owner):
                name = say.clothes(name) if dress else name
                if self.says(t=name.t, s=name.s, p=name.p, be=name.be):
                    yield index, thing
                    break


def _names(heard: _Heard, index: int, *, owner: bool) -> Iterator[say.Name]:
    """The names of a thing by which only it can be meant, as `language.name_thing` gives them."""
    page, thing = heard.page, heard.page.things[index]
    count = thing.count
    pronoun = say.pronoun(Thing(kind=thing.kind, colour="white", count=count))
    people = sum(t.kind in KINDS["person"] for t in page.things)
    alone = len(page.things) == 1 or (pronoun.t in ("him", "her") and people == 1)
    # Of two edits the second may call that of the first by a pronoun, and only that.
    if alone if heard.pronouns else heard.since is not None and thing not in heard.since.things:
        yield pronoun
    group = GROUP_OF[thing.kind]
    if group != "sky" and sum(GROUP_OF[t.kind] == group for t in page.things) == 1:
        yield from (say.noun_phrase(noun, count) for noun in GROUP_NOUNS[group])
    nouns = say.nouns_of(thing.kind)
    for noun in nouns:
        yield say.noun_phrase(noun, count)
        if thing.colour is not None and page.coloured and not (owner and thing.kind in KINDS["person"]):
            yield from (say.noun_phrase(noun, count, word) for word in say.colours_of(thing.colour))
    if owner:
        return
    others = [t for t in page.things if t is not thing]
    for slot in SLOTS:
        if thing.slot not in (None, slot):
            continue
        # Without sides, a caption does not say enough to call anything "the thing on the left".
        clear = not others or (thing.slot is not None and all(t.slot != slot for t in others))
        for noun, side in product((*nouns, *THING_NOUNS) if clear else nouns, ON_SIDE[slot]):
            text = f"{say.noun_phrase(noun, count).t} {side}"
            yield say.Name(text, text, text, "are" if count > 1 else "is")


def _interpret(clause: str, page: Said, *, pronouns: bool, since: Said | None = None) -> Iterator[Said]:
    for phrasing, fields in _heard_as(clause):
        if phrasing.kind in _MEANINGS:
            heard = _Heard(phrasing=phrasing, fields=fields, page=page, pronouns=pronouns, since=since)
            yield from _MEANINGS[phrasing.kind](heard)


@lru_cache(maxsize=4096)
def _heard_as(clause: str) -> tuple[tuple[say.Phrasing, dict[str, str]], ...]:
    """The phrasings of one edit that the clause can be, and what stands in their fields."""
    found = []
    for phrasing, fixed in _phrasings():
        # Few phrasings have all their fixed words in a clause; the others' patterns are never made.
        if clause.startswith(fixed[0]) and clause.endswith(fixed[-1]) and all(t in clause for t in fixed):
            match = _pattern(phrasing.text).fullmatch(clause)
            if match is not None:
                found.append((phrasing, match.groupdict()))
    return tuple(found)


@cache
def _phrasings() -> tuple[tuple[say.Phrasing, tuple[str, ...]], ...]:
    """The phrasings of one edit, and of each the texts between its fields."""
    return tuple(
        (phrasing, tuple(re.split(r"\{\w+\}", say.american(phrasing.text))))
        for kind, phrasings in say.PHRASINGS.items()
        if kind != "two"
        for phrasing in phrasings
    )


@cache
def _pattern(phrasing: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", say.american(phrasing))
    texts = [re.escape(t) if i % 2 == 0 else f"(?P<{t}>{_fields()[t]})" for i, t in enumerate(parts)]
    return re.compile("".join(texts))


@cache
def _fields() -> dict[str, str]:
    """What may stand in each field of a phrasing, as a pattern; what is right there its meaning says."""
    number = _one_of((*say.NUMBERS, *(str(n) for n in range(MAX_COUNT + 1))))
    noun = _one_of((*_nouns(), *KINDS, *map(say.plural, KINDS)))
    colour = _one_of(word for c in COLOURS for word in say.colours_of(c))
    sizes = _one_of(word for words in ADDED_SIZES.values() for word in words if word)
    name = r"(?:it|him|her|them|he|she|they|everything|(?:his|her|their) clothes|the .+?)"
    new = (
        rf"(?:(?:an?|{_one_of(say.NUMBERS[2:])}) )?(?:{sizes} )?"
        rf"(?:{colour} )?{noun}(?: in {colour})?"
    )
    weather = list(zip(*(o for options in WEATHER_WORDS.values() for o in options), strict=True))
    places = list(zip(*(words for place in PLACES for words in say.places_of(place)), strict=True))
    times = list(zip(*(o for options in TIME_WORDS.values() for o in options), strict=True))
    styles = list(zip(*(o for options in STYLE_WORDS.values() for o in options), strict=True))
    where = _one_of(words for slot in SLOTS for words in ON_SIDE[slot])
    old = (*_worn(), *(word for words in OLD_WEATHER.values() for word in words))
    fields = {
        **dict.fromkeys(("t", "s", "them", "they"), name),
        "p": r"(?:its|his|her|their|(?:his|her|their) clothes'|the .+?'s?)",
        **dict.fromkeys(("be", "they_be", "some_be"), "(?:is|are)"),
        "c": colour,
        "a_c": rf"an? {colour}",
        "new": new,
        "where": rf"(?:{_one_of(IN_SKY)} )?{where}",
        "on_side": where,
        "to_side": r"to the (?:left|right|middle|centre)(?: side|-hand side)?",
        "way": "(?:left|right)",
        **dict.fromkeys(("kind", "kinds", "kinds_d"), noun),
        **_patterns(("in_place", "to_place", "a_place"), places),
        **_patterns(("time", "at_time"), times),
        **_patterns(_WEATHER_FIELDS, weather),
        "weather_some": _one_of({say.without_article(noun) for noun in weather[2]}),
        **_patterns(("style", "a_style"), styles),
        "w": _one_of(_worn()),
        "old": rf"(?:{_one_of(old)}|{number} {noun})",
        **dict.fromkeys(("n", "d"), number),
        "some": rf"{number} {noun}",
    }
    return {key: say.american(text) for key, text in fields.items()}


def _patterns(fields: Sequence[str], words: Sequence[Collection[str]]) -> dict[str, str]:
    return {field: _one_of(set(options)) for field, options in zip(fields, words, strict=True)}


_WEATHER_FIELDS = ("do", "do_be", "weather", "adj", "ing")


@cache
def _described(count: int) -> dict[str, tuple[str, str | None]]:
    """What may be put in the place of so many things, such as "green foxes": kind and colour."""
    found = {}
    for kind in ALL_KINDS:
        for noun in say.nouns_of(kind):
            for colour in ("", *COLOURS):
                for word in say.colours_of(colour):
                    words = say.american(say.described(noun, colour=word, count=count))
                    found[words if count > 1 else say.a(words)] = (kind, colour or None)
    return found


@cache
def _counted() -> dict[str, SaidThing]:
    """What may be added, such as "two small red balls"."""
    return {
        say.counted(count, noun, size=size_word, colour=colour_word): SaidThing(
            kind=kind, colour=colour or None, size=size, count=count
        )
        for kind in ALL_KINDS
        for noun in say.nouns_of(kind)
        for colour in ("", *COLOURS)
        for colour_word in say.colours_of(colour)
        for size, size_words in ADDED_SIZES.items()
        for size_word in size_words
        for count in (1, 2, 3)
    }


def _set(page: Said, index: int, thing: SaidThing) -> Said:
    return replace(page, things=(*page.things[:index], thing, *page.things[index + 1 :]))


def _recolour(heard: _Heard) -> Iterator[Said]:
    if not heard.page.coloured:
        return
    for index, thing in heard.things(of_people=True):
        for colour in COLOURS:
            words = say.colours_of(colour)
            if colour != thing.colour and heard.says(c=words, a_c=[say.a(word) for word in words]):
                yield _set(heard.page, index, replace(thing, colour=colour))


def _replace(heard: _Heard) -> Iterator[Said]:
    present = {thing.kind for thing in heard.page.things}
    for index, thing in heard.things():
        kind, colour = _described(thing.count).get(heard.fields["new"], ("", None))
        if kind and kind not in present and (kind in SKY_KINDS) == thing.in_sky:
            if colour is not None and not heard.page.coloured:
                continue
            wears = thing.wears if kind in WEARER_KINDS else None
            yield _set(
                heard.page, index, replace(thing, kind=kind, colour=colour or thing.colour, wears=wears)
            )


def _add(heard: _Heard) -> Iterator[Said]:
    page, new = heard.page, _counted().get(heard.fields["new"])
    if new is None or any(thing.kind == new.kind for thing in page.things):
        return
    # Only a vague phrasing leaves a colour open that the page would show.
    if (new.colour is not None) != (page.coloured and not heard.phrasing.vague):
        return
    if not heard.says(be="are" if new.count > 1 else "is"):
        return
    taken = [thing.slot for thing in page.things if thing.in_sky == new.in_sky]
    if len(taken) == len(SLOTS):
        return
    where = heard.fields.get("where")
    if where is not None:
        in_sky = next((f"{words} " for words in IN_SKY if where.startswith(words)), "")
        if in_sky and not new.in_sky:
            return
        side = where.removeprefix(in_sky)
        slot = next(slot for slot, words in ON_SIDE.items() if side in map(say.american, words))
        if slot in taken:
            return
        new = replace(new, slot=slot)
    yield replace(page, things=(*page.things, new))


def _remove(heard: _Heard) -> Iterator[Said]:
    for index, thing in heard.things():
        kinds = [say.plural(n) if thing.count > 1 else n for n in say.nouns_of(thing.kind)]
        if heard.says(kind=kinds):
            things = heard.page.things
            yield replace(heard.page, things=things[:index] + things[index + 1 :])


def _place(heard: _Heard) -> Iterator[Said]:
    page = heard.page
    who = [("everything", "everything", "is")]
    if heard.pronouns:
        who.append(("them", "they", "are"))
        if len(page.things) == 1:
            who += [(name.t, name.s, name.be) for name in _names(heard, 0, owner=False)]
    if any(heard.says(them=them, they=they, they_be=be) for them, they, be in who):
        for place in PLACES:
            said = any(
                heard.says(in_place=in_place, to_place=to_place, a_place=a_place)
                for in_place, to_place, a_place in say.places_of(place)
            )
            if said and place != page.place:
                yield replace(page, place=place)


def _time(heard: _Heard) -> Iterator[Said]:
    for time in TIMES:
        said = any(heard.says(time=word, at_time=at) for word, at in TIME_WORDS[time])
        if said and time != heard.page.time:
            yield replace(heard.page, time=time)


def _weather(heard: _Heard) -> Iterator[Said]:
    page = heard.page
    for weather in WEATHERS:
        said = any(
            heard.says(weather_some=say.without_article(words[2]))
            and heard.says(**dict(zip(_WEATHER_FIELDS, words, strict=True)))
            for words in say.weathers_of(weather, page.time)
        )
        clears = heard.phrasing.variant == "clear"
        if (
            said
            and weather != page.weather
            and (not clears or weather == "clear")
            and heard.says(old=OLD_WEATHER[page.weather])
        ):
            yield replace(page, weather=weather)


def _style(heard: _Heard) -> Iterator[Said]:
    page = heard.page
    for style in STYLES:
        if style == page.style:
            continue
        if any(heard.says(style=word, a_style=words) for word, words in STYLE_WORDS[style]):
            after = replace(page, style=style)
            if not (page.coloured and after.coloured):  # what is not shown is not known
                things = tuple(replace(thing, colour=None) for thing in page.things)
                after = replace(after, things=things)
            yield after


def _put_on(heard: _Heard) -> Iterator[Said]:
    swaps = heard.phrasing.variant == "swap"
    for index, thing in heard.things():
        if thing.kind not in WEARER_KINDS or swaps != (thing.wears is not None):
            continue
        old = say.bare_in_words(thing.wears, thing.count) if thing.wears else ()
        for wears in WEARABLES:
            if wears != thing.wears and heard.says(w=say.worn_in_words(wears, thing.count), old=old):
                yield _set(heard.page, index, replace(thing, wears=wears))


def _take_off(heard: _Heard) -> Iterator[Said]:
    worn = [thing.wears for thing in heard.page.things]
    for index, thing in heard.things():
        if thing.wears is None or (heard.phrasing.variant == "bare" and worn.count(thing.wears) > 1):
            continue
        if heard.says(w=say.bare_in_words(thing.wears, thing.count)):
            yield _set(heard.page, index, replace(thing, wears=None))


def _resize(step: int) -> Callable[[_Heard], Iterator[Said]]:
    def meaning(heard: _Heard) -> Iterator[Said]:
        for index, thing in heard.things():
            at = SIZES.index(thing.size) + step
            if 0 <= at < len(SIZES):
                yield _set(heard.page, index, replace(thing, size=SIZES[at]))

    return meaning


def _count(heard: _Heard) -> Iterator[Said]:
    variant = heard.phrasing.variant
    for index, thing in heard.things():
        for count in range(1, MAX_COUNT + 1):
            by = count - thing.count
            if by == 0 or (variant == "more" and by < 0) or (variant == "fewer" and by > 0):
                continue
            nouns = say.nouns_of(thing.kind)
            if heard.says(
                n=_numbers(count),
                some=_numbered(count, nouns),
                some_be="are" if count > 1 else "is",
                old=_numbered(thing.count, nouns),
                kinds=[say.plural(noun) for noun in nouns],
                d=_numbers(abs(by)),
                kinds_d=[say.plural(noun) if abs(by) > 1 else noun for noun in nouns],
            ):
                yield _set(heard.page, index, replace(thing, count=count))


def _numbers(count: int) -> tuple[str, str]:
    return say.NUMBERS[count], str(count)


def _numbered(count: int, nouns: Iterable[str]) -> list[str]:
    return [f"{n} {say.plural(noun) if count > 1 else noun}" for n in _numbers(count) for noun in nouns]


# To move a thing is not here: Prompt-to-Prompt keeps things where they are.
_MEANINGS: dict[str, Callable[[_Heard], Iterator[Said]]] = {
    "recolour": _recolour,
    "replace": _replace,
    "add": _add,
    "remove": _remove,
    "place": _place,
    "time": _time,
    "weather": _weather,
    "style": _style,
    "put_on": _put_on,
    "take_off": _take_off,
    "bigger": _resize(1),
    "smaller": _resize(-1),
    "count": _count,
}


# --- judging ----------------------------------------------------------------------------------------


class InWords(Protocol):
    """A caption, an instruction and an edited caption: `triples.ExactTriple`, or what a model wrote."""

    @property
    def caption(self) -> str: ...
    @property
    def instruction(self) -> str: ...
    @property
    def edited_caption(self) -> str: ...


# Why an edit in words is right or wrong.
VERDICTS = {
    "right": "the edited caption is the caption after what the instruction asks for",
    "caption": "the caption is none of the storybook's",
    "edited_caption": "the edited caption is none of the storybook's",
    "unchanged": "both captions say the same",
    "instruction": "the instruction is none of the storybook's, or cannot be followed on this page",
    "other_change": "the edited caption is another one than the instruction asks for",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an edit in words is right, and why: a key of VERDICTS."""

    right: bool
    why: str = field(default="right")


def judge(caption: str, instruction: str, edited_caption: str) -> Verdict:
    """Whether the edited caption is the caption after exactly the edit that the instruction asks for."""
    before, after = read(caption), read(edited_caption)
    if before is None:
        return Verdict(right=False, why="caption")
    if after is None:
        return Verdict(right=False, why="edited_caption")
    if replace(before, things=tuple(sorted(before.things, key=lambda t: t.kind))) == replace(
        after, things=tuple(sorted(after.things, key=lambda t: t.kind))
    ):
        return Verdict(right=False, why="unchanged")
    understood = False
    for page in interpret(instruction, before):
        understood = True
        if _agrees(page, after, sided=before.sided if before.things else after.sided):
            return Verdict(right=True)
    return Verdict(right=False, why="other_change" if understood else "instruction")


def judge_triple(triple: InWords) -> Verdict:
    """`judge` of a triple's three texts."""
    return judge(triple.caption, triple.instruction, triple.edited_caption)


def _agrees(asked: Said, seen: Said, *, sided: bool) -> bool:
    """Whether a caption says all that was asked for, and sides just where the one before it did."""
    if replace(asked, things=()) != replace(seen, things=()):
        return False
    found = {thing.kind: thing for thing in seen.things}
    if found.keys() != {thing.kind for thing in asked.things}:
        return False
    for thing in asked.things:
        other = found[thing.kind]
        colour = other.colour if thing.colour is None or not seen.coloured else thing.colour
        slot = other.slot if thing.slot is None or not sided else thing.slot
        if replace(thing, colour=colour, slot=slot) != other or (other.slot is not None) != sided:
            return False
    return True
