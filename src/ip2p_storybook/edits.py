"""Edits of storybook pages with a known exact answer.

An edit changes the one aspect of a `Scene` that its instruction names; the rest of the record, and of the
picture, is unchanged. Each kind of edit is deterministic given the page and the instruction:

- recolour: changes the color; shape and shades keep their seed (`uid`).
- replace: changes the kind; keeps size, slot, count and `uid`, the color unless another is named, and the
  wearable if the new kind can wear it.
- add: the instruction names kind, color and slot; size is medium and count 1 unless named; the `uid` depends
  on the page's seed and the slot, and so does the color if the style shows none.
- remove, put on, take off: the named thing. bigger, smaller: one step of `SIZES`.
- move: to the named side, or one slot in the named direction. count: the named number, in the same slot.
- place, time, weather, style: changes that field of the page.
- two: two of these on different aspects, one after the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from ip2p_storybook import language as say
from ip2p_storybook.changes import added_uid, put_thing, with_kind
from ip2p_storybook.paraphrases import Paraphrase, is_paraphrase, paraphrases_of
from ip2p_storybook.scene import (
    COLOURS,
    GROUND_KINDS,
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
    is_held_out_combination,
    rng_for,
    sample_scene,
)
from ip2p_storybook.words import ADDED_SIZES, IN_SKY, OLD_WEATHER, STYLE_WORDS, TIME_WORDS

if TYPE_CHECKING:
    import numpy as np

EDIT_KINDS = (
    "recolour", "replace", "add", "remove", "place", "time", "weather", "style",
    "put_on", "take_off", "bigger", "smaller", "move", "count", "two",
)  # fmt: skip
GLOBAL_KINDS = ("place", "time", "weather", "style")
_WEIGHTS = {
    "recolour": 0.09, "replace": 0.09, "add": 0.09, "remove": 0.07,
    "place": 0.07, "time": 0.06, "weather": 0.07, "style": 0.07,
    "put_on": 0.08, "take_off": 0.06, "bigger": 0.06, "smaller": 0.06,
    "move": 0.06, "count": 0.06, "two": 0.08,
}  # fmt: skip
SPLITS = ("train", "test", "unseen_phrasings", "unseen_combinations", "paraphrases")
_COLOURS = tuple(COLOURS)
_WEARERS = frozenset(WEARER_KINDS)
_SKY = frozenset(SKY_KINDS)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An instruction with the page before and the exact answer after it.

    phrasing: id of the sentence frame; for "two" the joint and both parts, "two/3+time/1+add/2".
    target: index of the thing in `before.things` (for "add" in `after.things`); None for
        the whole page and for "two".
    steps: for "two" both edits, the second starting from the page after the first.
    """

    kind: str
    before: Scene
    after: Scene
    instruction: str
    phrasing: str
    target: int | None = None
    steps: tuple[Edit, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The kinds of both edits of a "two"; empty for every other kind."""
        return tuple(step.kind for step in self.steps)


# --- drawing edits ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draw:
    """The inputs of a proposal: random generator, phrasings of the split, and allowed combinations."""

    rng: random.Random
    held_out_phrasing: bool
    combinations: str  # "seen": none held out; "unseen": that of the named thing is held out; "any"
    earlier: Edit | None = None  # the first of two edits, when this is the second
    pronouns: bool = True

    def phrasing(self, kind: str, *variants: str) -> say.Phrasing | None:
        return say.pick_phrasing(kind, self.rng, held_out=self.held_out_phrasing, variants=variants or ("",))

    def allows(
        self, place: str, *things: Thing, before: Sequence[Thing] = (), was: str | None = None
    ) -> bool:
        """Whether things at `place` after the edit, and `before` at `was`, fit the split."""
        if self.combinations == "any":
            return True
        held = any(_is_held(t.kind, t.colour, place) for t in things)
        if self.combinations == "seen":
            return not held
        return held or any(_is_held(t.kind, t.colour, was or place) for t in before)

    def order(self, n: int) -> list[int]:
        order = list(range(n))
        if n > 1:
            self.rng.shuffle(order)
        return order

    def choice(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.random() * len(options))]

    def name(self, scene: Scene, index: int, *, owner: bool = False, side: bool = True) -> say.Name:
        """Name a thing; for the second of two edits, so that the name also fits the page before both."""
        if self.earlier is None:
            return say.name_thing(scene, index, self.rng, owner=owner, side=side, pronouns=self.pronouns)
        thing = scene.things[index]
        if thing not in self.earlier.before.things:  # the first edit was about this very thing
            if self.rng.random() < 0.5:
                return say.pronoun(thing)
            return say.name_thing(replace(scene, things=(thing,)), 0, _NeverClose, side=False, pronouns=False)
        return say.name_thing(
            scene, index, self.rng, owner=owner, side=side, pronouns=False, also_in=self.earlier.before
        )


class _Plain(random.Random):
    """A random generator that always chooses the plainest name, "the cat"."""

    def random(self) -> float:
        return 0.99


_NeverClose = _Plain()


@cache
def _is_held(kind: str, colour: str, place: str) -> bool:
    return is_held_out_combination(kind, colour, place)


def _has_held(scene: Scene) -> bool:
    return any(_is_held(t.kind, t.colour, scene.place) for t in scene.things)


def propose(scene: Scene, rng: random.Random, kind: str | None = None, split: str = "train") -> Edit | None:
    """Sample an edit of the page. Returns None if no edit of that kind is possible in the split.

    split: "train" and "test": training phrasings, no held-out combination before or after;
    "unseen_phrasings": only held-out phrasings, no held-out combination; "unseen_combinations":
    training phrasings, and the thing named (for place, time, weather and style: any thing) is a
    held-out combination before or after; "paraphrases": instructions in free English, no held-out
    combination.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of: {', '.join(SPLITS)}")
    unseen = split == "unseen_combinations"
    if not unseen and _has_held(scene):
        return None
    draw = _Draw(rng, split == "unseen_phrasings", "unseen" if unseen else "seen")
    left = dict(_WEIGHTS) if kind is None else {_check_kind(kind): 1.0}
    while left:
        chosen = rng.choices(tuple(left), tuple(left.values()))[0]
        if split == "paraphrases":
            edit = _propose_paraphrase(scene, rng, chosen)
        else:
            edit = _propose(scene, draw, chosen)
        if edit is not None:
            break
        del left[chosen]
    else:
        return None
    if split == "paraphrases":
        return edit
    return replace(edit, instruction=say.finish(edit.instruction, rng, typos=split == "train"))


def _check_kind(kind: str) -> str:
    if kind not in _WEIGHTS:
        raise ValueError(f"unknown kind of edit {kind!r}; choose one of: {', '.join(EDIT_KINDS)}")
    return kind


def sample_edit(
    rng: random.Random, kind: str | None = None, split: str = "train", page_split: str | None = None
) -> Edit:
    """Sample a page and an edit of it.

    Training pages have even seeds and all others odd ones, so test pages are never in the training set.
    page_split: the split of the pages ("train" or "test"), if it differs from `split`.
    """
    if kind is None:
        kind = rng.choices(tuple(_WEIGHTS), tuple(_WEIGHTS.values()))[0]
    odd = (page_split or split) != "train"
    while split == "paraphrases":
        paraphrase = rng.choice(paraphrases_of(kind))
        page = paraphrase.draw_page(rng)
        edit = _say_paraphrase(paraphrase, replace(page, seed=page.seed & ~1 | odd)) if page else None
        if edit is not None:
            return edit
    while True:
        held_out = False
        if split == "unseen_combinations":
            held_out = kind not in ("recolour", "replace", "add", "place") or rng.random() < 0.3
        scene = sample_scene(rng, held_out=held_out)
        scene = replace(scene, seed=scene.seed & ~1 | odd)
        edit = propose(scene, rng, kind, split)
        if edit is not None:
            return edit


def _propose_paraphrase(scene: Scene, rng: random.Random, kind: str) -> Edit | None:
    edits = [edit for p in paraphrases_of(kind) if (edit := _say_paraphrase(p, scene)) is not None]
    return rng.choice(edits) if edits else None


def _say_paraphrase(paraphrase: Paraphrase, scene: Scene) -> Edit | None:
    """The page edited by the paraphrase; None unless there is exactly one answer."""
    page, steps = scene, list[Edit]()
    for number, change in enumerate(paraphrase.changes, start=1):
        done = change.apply(page)
        if done is None:
            return None
        after, target = done
        step = Edit(
            kind=change.kind,
            before=page,
            after=after,
            instruction=paraphrase.instruction,
            phrasing=f"{paraphrase.id}.{number}" if paraphrase.kind == "two" else paraphrase.id,
            target=target,
        )
        steps.append(step)
        page = after
    edit = steps[0]
    if paraphrase.kind == "two":
        edit = Edit(
            kind="two",
            before=scene,
            after=page,
            instruction=paraphrase.instruction,
            phrasing="+".join((paraphrase.id, *(step.phrasing for step in steps))),
            steps=tuple(steps),
        )
    fits = paraphrase.fits(scene) and not _has_held(scene) and not _has_held(page) and is_unique(edit)
    return edit if fits and (not edit.steps or _go_together(*steps)) else None


def _propose(scene: Scene, draw: _Draw, kind: str) -> Edit | None:
    return _PROPOSERS[kind](scene, draw)


def _edit(
    phrasing: say.Phrasing,
    before: Scene,
    after: Scene,
    target: int | None,
    name: say.Name | None,
    **fields: str,
) -> Edit:
    if name is not None:
        fields.update(t=name.t, s=name.s, p=name.p)
        fields.setdefault("be", name.be)
    return Edit(
        kind=phrasing.kind,
        before=before,
        after=after,
        instruction=say.fill_phrasing(phrasing, fields),
        phrasing=phrasing.id,
        target=target,
    )


def _owner(phrasing: say.Phrasing) -> bool:
    return "{p}" in phrasing.text


def _recolour(scene: Scene, draw: _Draw) -> Edit | None:
    if scene.style in say.COLOURLESS_STYLES:
        return None
    vague = draw.rng.random() < 0.03
    phrasing = (vague and draw.phrasing("recolour", "vague")) or draw.phrasing("recolour")
    assert phrasing is not None
    for i in draw.order(len(scene.things)):
        thing = scene.things[i]
        for c in draw.order(len(_COLOURS)):
            colour = _COLOURS[c]
            if colour == thing.colour:
                continue
            new = replace(thing, colour=colour)
            if draw.allows(scene.place, new, before=(thing,)):
                after = put_thing(scene, i, new)
                person = thing.kind in KINDS["person"]
                name = draw.name(scene, i, owner=person or _owner(phrasing))
                name = say.clothes(name) if person else name
                word = say.vary_colour(colour, draw.rng)
                return _edit(phrasing, scene, after, i, name, c=word, a_c=say.a(word))
    return None


def _replace(scene: Scene, draw: _Draw) -> Edit | None:
    phrasing = draw.phrasing("replace")
    assert phrasing is not None
    present = {t.kind for t in scene.things}
    for i in draw.order(len(scene.things)):
        thing = scene.things[i]
        row = SKY_KINDS if thing.in_sky else GROUND_KINDS
        for _ in range(12):
            kind = draw.choice(row)
            if kind in present:
                continue
            named = draw.rng.random() < 0.3 and scene.style not in say.COLOURLESS_STYLES
            colour = draw.choice(_COLOURS) if named else thing.colour
            new = with_kind(thing, kind, colour)
            if not draw.allows(scene.place, new, before=(thing,)):
                continue
            noun, many = say.vary_noun(kind, draw.rng), thing.count > 1
            colour_word = say.vary_colour(colour if named else "", draw.rng)
            words = say.described(noun, colour=colour_word, count=thing.count)
            new_words = words if many else say.a(words)
            name = draw.name(scene, i, owner=_owner(phrasing))
            return _edit(phrasing, scene, put_thing(scene, i, new), i, name, new=new_words)
    return None


def _add(scene: Scene, draw: _Draw) -> Edit | None:
    present = {t.kind for t in scene.things}
    for _ in range(12):
        sky = draw.rng.random() < 0.25
        free = scene.free_slots(sky=sky)
        if not free:
            continue
        kind = draw.choice(SKY_KINDS if sky else GROUND_KINDS)
        if kind in present:
            continue
        slot = draw.choice(free)
        uid = added_uid(scene, slot, sky=sky)
        colourless = scene.style in say.COLOURLESS_STYLES
        colour = _COLOURS[uid % len(_COLOURS)] if colourless else draw.choice(_COLOURS)
        lot = draw.rng.random()
        size = "small" if lot < 0.1 else "large" if lot < 0.2 else "medium"
        count = draw.choice((2, 3)) if draw.rng.random() < 0.1 else 1
        new = Thing(kind=kind, colour=colour, size=size, slot=slot, count=count, uid=uid)
        if not draw.allows(scene.place, new):
            continue
        lot = draw.rng.random()
        variant = "vague" if lot < 0.05 else "anywhere" if lot < (0.3 if len(free) == 1 else 0.09) else ""
        phrasing = draw.phrasing("add", variant) or draw.phrasing("add")
        assert phrasing is not None
        words = say.counted(
            count,
            say.vary_noun(kind, draw.rng),
            size=say.choose_words(ADDED_SIZES[size], draw.rng, 0.5),
            colour=say.vary_colour("" if phrasing.vague or colourless else colour, draw.rng),
        )
        where = say.side_words(slot, draw.rng)[0]
        if sky and draw.rng.random() < 0.6:
            where = f"{say.choose_words(IN_SKY, draw.rng)} {where}"
        after = replace(scene, things=(*scene.things, new))
        be = "are" if count > 1 else "is"
        return _edit(phrasing, scene, after, len(scene.things), None, new=words, where=where, be=be)
    return None


def _unchanged_targets(scene: Scene, draw: _Draw) -> list[int]:
    """The things, in random order, that an edit may name without changing a combination."""
    return [i for i in draw.order(len(scene.things)) if draw.allows(scene.place, scene.things[i])]


def _remove(scene: Scene, draw: _Draw) -> Edit | None:
    for i in _unchanged_targets(scene, draw):
        thing = scene.things[i]
        phrasing = draw.phrasing("remove", "", "kind")
        assert phrasing is not None
        name = draw.name(scene, i, owner=_owner(phrasing))
        noun = say.vary_noun(thing.kind, draw.rng)
        after = replace(scene, things=scene.things[:i] + scene.things[i + 1 :])
        kind = say.plural(noun) if thing.count > 1 else noun
        return _edit(phrasing, scene, after, i, name, kind=kind)
    return None


def _place(scene: Scene, draw: _Draw) -> Edit | None:
    phrasing = draw.phrasing("place")
    assert phrasing is not None
    for p in draw.order(len(PLACES)):
        place = PLACES[p]
        if place == scene.place:
            continue
        if not draw.allows(place, *scene.things, before=scene.things, was=scene.place):
            continue
        in_place, to_place, a_place = say.choose_words(say.places_of(place), draw.rng, 0.3)
        lot = draw.rng.random()
        them, they, be = "everything", "everything", "is"
        if len(scene.things) == 1 and draw.earlier is None and draw.pronouns:
            name = say.name_thing(scene, 0, draw.rng, side=False)
            them, they, be = name.t, name.s, name.be
        elif lot < 0.8 and draw.earlier is None and draw.pronouns:
            them, they, be = "them", "they", "are"
        return _edit(
            phrasing, scene, replace(scene, place=place), None, None,
            in_place=in_place, to_place=to_place, a_place=a_place, them=them, they=they, they_be=be,
        )  # fmt: skip
    return None


def _time(scene: Scene, draw: _Draw) -> Edit | None:
    if not draw.allows(scene.place, *scene.things):
        return None
    phrasing = draw.phrasing("time")
    assert phrasing is not None
    time = draw.choice([t for t in TIMES if t != scene.time])
    word, at = say.choose_words(TIME_WORDS[time], draw.rng, 0.35)
    return _edit(phrasing, scene, replace(scene, time=time), None, None, time=word, at_time=at)


def _weather(scene: Scene, draw: _Draw) -> Edit | None:
    if not draw.allows(scene.place, *scene.things):
        return None
    weather = draw.choice([w for w in WEATHERS if w != scene.weather])
    variants = ("", "clear") if weather == "clear" else ("",)
    phrasing = draw.phrasing("weather", *variants)
    assert phrasing is not None
    words = say.choose_words(say.weathers_of(weather, scene.time), draw.rng, 0.6)
    do, do_be, noun, adj, ing = words
    return _edit(
        phrasing, scene, replace(scene, weather=weather), None, None,
        do=do, do_be=do_be, weather=noun, weather_some=say.without_article(noun), adj=adj, ing=ing,
        old=say.choose_words(OLD_WEATHER[scene.weather], draw.rng),
    )  # fmt: skip


def _style(scene: Scene, draw: _Draw) -> Edit | None:
    if not draw.allows(scene.place, *scene.things):
        return None
    phrasing = draw.phrasing("style")
    assert phrasing is not None
    style = draw.choice([s for s in STYLES if s != scene.style])
    word, a_style = say.choose_words(STYLE_WORDS[style], draw.rng, 0.6)
    return _edit(phrasing, scene, replace(scene, style=style), None, None, style=word, a_style=a_style)


def _put_on(scene: Scene, draw: _Draw) -> Edit | None:
    for i in _unchanged_targets(scene, draw):
        thing = scene.things[i]
        if thing.kind not in _WEARERS:
            continue
        phrasing = draw.phrasing("put_on", "swap" if thing.wears else "")
        if phrasing is None:
            continue
        wears = draw.choice([w for w in WEARABLES if w != thing.wears])
        after = put_thing(scene, i, replace(thing, wears=wears))
        name = draw.name(scene, i, owner=_owner(phrasing), side="on {t}" not in phrasing.text)
        old = say.choose_words(say.bare_in_words(thing.wears, thing.count), draw.rng) if thing.wears else ""
        new = say.choose_words(say.worn_in_words(wears, thing.count), draw.rng)
        return _edit(phrasing, scene, after, i, name, w=new, old=old)
    return None


def _take_off(scene: Scene, draw: _Draw) -> Edit | None:
    for i in _unchanged_targets(scene, draw):
        thing = scene.things[i]
        if thing.wears is None:
            continue
        alone = sum(t.wears == thing.wears for t in scene.things) == 1
        phrasing = draw.phrasing("take_off", *(("", "bare") if alone else ("",)))
        assert phrasing is not None
        after = put_thing(scene, i, replace(thing, wears=None))
        name = draw.name(scene, i, owner=_owner(phrasing))
        wears = say.choose_words(say.bare_in_words(thing.wears, thing.count), draw.rng)
        return _edit(phrasing, scene, after, i, name, w=wears)
    return None


def _resize(kind: str, step: int) -> Callable[[Scene, _Draw], Edit | None]:
    def proposer(scene: Scene, draw: _Draw) -> Edit | None:
        for i in _unchanged_targets(scene, draw):
            thing = scene.things[i]
            at = SIZES.index(thing.size) + step
            if not 0 <= at < len(SIZES):
                continue
            phrasing = draw.phrasing(kind)
            assert phrasing is not None
            after = put_thing(scene, i, replace(thing, size=SIZES[at]))
            return _edit(phrasing, scene, after, i, draw.name(scene, i, owner=_owner(phrasing)))
        return None

    return proposer


def _move(scene: Scene, draw: _Draw) -> Edit | None:
    for i in _unchanged_targets(scene, draw):
        thing = scene.things[i]
        free = scene.free_slots(sky=thing.in_sky)
        if not free:
            continue
        slot = draw.choice(free)
        here, there = SLOTS.index(thing.slot), SLOTS.index(slot)
        step = abs(here - there) == 1
        phrasing = draw.phrasing("move", *(("", "step") if step else ("",)))
        assert phrasing is not None
        on_side, to_side = say.side_words(slot, draw.rng)
        way = "left" if there < here else "right"
        if thing.slot == "middle" and draw.rng.random() < 0.5:
            to_side = f"to the {way}"
        after = put_thing(scene, i, replace(thing, slot=slot))
        name = draw.name(scene, i, owner=_owner(phrasing), side=False)
        return _edit(phrasing, scene, after, i, name, on_side=on_side, to_side=to_side, way=way)
    return None


def _count(scene: Scene, draw: _Draw) -> Edit | None:
    for i in _unchanged_targets(scene, draw):
        thing = scene.things[i]
        count = draw.choice([n for n in range(1, MAX_COUNT + 1) if n != thing.count])
        variant = "more" if count > thing.count else "fewer"
        phrasing = draw.phrasing("count", "", *((variant,) if draw.rng.random() < 0.5 else ()))
        assert phrasing is not None
        noun = say.vary_noun(thing.kind, draw.rng)
        many = say.plural(noun)
        digits = draw.rng.random() < 0.15

        def number(n: int, digits: bool = digits) -> str:
            return str(n) if digits else say.NUMBERS[n]

        by = abs(count - thing.count)
        after = put_thing(scene, i, replace(thing, count=count))
        name = draw.name(scene, i, owner=_owner(phrasing))
        return _edit(
            phrasing, scene, after, i, name,
            n=number(count), some=f"{number(count)} {many if count > 1 else noun}",
            some_be="are" if count > 1 else "is",
            old=f"{number(thing.count)} {many if thing.count > 1 else noun}",
            kinds=many, d=number(by), kinds_d=many if by > 1 else noun,
        )  # fmt: skip
    return None


_ASPECTS = {
    "recolour": "colour", "replace": "kind", "put_on": "wears", "take_off": "wears",
    "bigger": "size", "smaller": "size", "move": "slot", "count": "count",
}  # fmt: skip
_SINGLE = {k: w for k, w in _WEIGHTS.items() if k != "two"}
# Two edits may concern one thing only if it stays recognizable after the first.
_SAME_THING = frozenset(("recolour", "put_on", "take_off", "bigger", "smaller", "move"))


def _two(scene: Scene, draw: _Draw) -> Edit | None:
    joint = draw.phrasing("two")
    assert joint is not None
    kinds, weights = tuple(_SINGLE), tuple(_SINGLE.values())
    for _ in range(8):
        first_kind, second_kind = draw.rng.choices(kinds, weights, k=2)
        if first_kind == second_kind and first_kind in GLOBAL_KINDS:
            continue
        first = _propose(scene, replace(draw, pronouns=False), first_kind)
        if first is None or say.phrasing_of(first.phrasing).vague:
            continue
        later = replace(draw, pronouns=False, earlier=first)
        if draw.combinations == "unseen":
            later = replace(later, combinations="any")
        second = _propose(first.after, later, second_kind)
        if second is None or say.phrasing_of(second.phrasing).vague or not _go_together(first, second):
            continue
        if draw.combinations == "unseen" and not _shows_unseen(scene, second.after):
            continue
        text = say.fill_phrasing(joint, {"a": first.instruction, "b": second.instruction})
        return Edit(
            kind="two",
            before=scene,
            after=second.after,
            instruction=text,
            phrasing="+".join((joint.id, first.phrasing, second.phrasing)),
            steps=(first, second),
        )
    return None


def _go_together(first: Edit, second: Edit) -> bool:
    """Whether both edits are visible in the result, and neither changes the meaning of the other."""
    if first.kind == "recolour" and second.after.style in say.COLOURLESS_STYLES:
        return False
    if second.after.time == "night" and say.names_sun(first.instruction):
        return False
    if second.target is None or first.target is None:
        return True
    if second.kind == "add":
        # "Remove the cat and add a dog where it was" is a replacement.
        return first.kind not in ("remove", "move", "add")
    one = second.before.things[second.target].uid
    if first.kind == "add":
        return one != first.after.things[first.target].uid and second.kind != "move"
    if one != first.before.things[first.target].uid:
        # A slot that the first edit frees is occupied in the picture, and a removed kind must not return.
        return not (first.kind in ("remove", "move") and second.kind == "move") and not (
            first.kind in ("remove", "replace") and second.kind == "replace"
        )
    return (
        {first.kind, second.kind} <= _SAME_THING and _ASPECTS[first.kind] != _ASPECTS[second.kind]
    )  # fmt: skip


def _shows_unseen(before: Scene, after: Scene) -> bool:
    """Whether a changed thing is a held-out combination before or after the edit."""
    if before.place != after.place:
        return _has_held(before) or _has_held(after)
    gone, come = _differing(before, after)
    return any(_is_held(t.kind, t.colour, before.place) for t in (*gone, *come)) or (
        _whole_page(before, after) and _has_held(before)
    )


_PROPOSERS: dict[str, Callable[[Scene, _Draw], Edit | None]] = {
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
    "bigger": _resize("bigger", 1),
    "smaller": _resize("smaller", -1),
    "move": _move,
    "count": _count,
    "two": _two,
}


# --- what an edit leaves open, and where it shows -------------------------------------------------


def is_unique(edit: Edit) -> bool:
    """Whether page and instruction have exactly one right answer (see the rules of the module).

    A picture in a style without colors does not determine the colors in another style.
    """
    colourless = say.COLOURLESS_STYLES
    if edit.before.style in colourless and edit.after.style not in colourless:
        return False
    if edit.steps:
        return all(is_unique(step) for step in edit.steps)
    if is_paraphrase(edit.phrasing):
        return True  # used only on pages where it has one answer
    phrasing = say.phrasing_of(edit.phrasing)
    if phrasing.kind == "add" and phrasing.variant == "anywhere":
        assert edit.target is not None
        return len(edit.before.free_slots(sky=edit.after.things[edit.target].in_sky)) == 1
    return not phrasing.vague


def change_mask(edit: Edit, size: int = 256) -> np.ndarray:
    """The pixels that the edit may change: bool [size, size].

    These are the different things before and after, with their shadows, or the whole page for place, time,
    weather and style.
    """
    import numpy as np

    from ip2p_storybook.draw import thing_mask

    if _whole_page(edit.before, edit.after):
        return np.ones((size, size), dtype=bool)
    mask = np.zeros((size, size), dtype=bool)
    for scene, other in ((edit.before, edit.after), (edit.after, edit.before)):
        for i, thing in enumerate(scene.things):
            if thing not in other.things:
                mask |= thing_mask(scene, i, size)
    return mask


def _whole_page(before: Scene, after: Scene) -> bool:
    return any(getattr(before, field) != getattr(after, field) for field in GLOBAL_KINDS)


def _differing(before: Scene, after: Scene) -> tuple[list[Thing], list[Thing]]:
    gone = [t for t in before.things if t not in after.things]
    return gone, [t for t in after.things if t not in before.things]


# --- other answers ------------------------------------------------------------------------------

MIN_ALTERNATIVES = 15
_USUAL_ALTERNATIVES = 24  # a few extra, because two records can look alike


def alternatives(edit: Edit, n: int | None = None) -> list[Scene]:
    """Wrong answers: exact results of similar edits on the same page, the most similar first.

    The first ones differ from the right answer in one respect: another color, kind, slot, size, wearable,
    number, place … of the same thing, or the same change of another thing. If these are fewer than `n` (at
    least 15; 24 if None), others follow:

    - recolour, replace: the right color on another kind, the right kind in another color;
    - put_on, take_off, bigger, smaller, move, count: the right change and then a wrong one, together with
      another color;
    - remove: the thing is replaced, shrunk or reduced in number instead of removed;
    - place, time, weather, style: the right value with another time or weather, then wrong values with those;
    - two: only one of both edits done, then one done right and the other replaced by its alternatives;
    - last, for any edit of a thing, other kinds in its place, of all sizes and numbers.

    In styles without colors, no two answers differ in colors only. All answers are different, and none
    equals `edit.after` or `edit.before`.
    """
    count = _USUAL_ALTERNATIVES if n is None else max(n, MIN_ALTERNATIVES)
    seen = {_looks(edit.before), _looks(edit.after)}
    found: list[Scene] = []
    for scene in _others(edit):
        looks = _looks(scene)
        if looks not in seen:
            seen.add(looks)
            found.append(scene)
            if len(found) == count:
                break
    return found


def _looks(scene: Scene) -> Scene:
    """The scene without the fields that its style does not show."""
    if scene.style not in say.COLOURLESS_STYLES:
        return scene
    return replace(scene, things=tuple(replace(t, colour="white") for t in scene.things))


def _others(edit: Edit) -> Iterator[Scene]:
    rng = rng_for("alternatives", edit.before.seed, edit.phrasing)
    if edit.kind == "two":
        return _others_two(edit)
    if edit.kind in GLOBAL_KINDS:
        return _others_global(edit, rng)
    if edit.kind == "add":
        return _others_add(edit, rng)
    return _others_thing(edit, rng)


def _take_turns(rng: random.Random, *lists: Iterable[Scene]) -> Iterator[Scene]:
    """Interleave the shuffled lists, so that no single kind of mistake fills all places."""
    shuffled = [rng.sample(scenes, len(scenes)) for scenes in map(list, lists)]
    for row in zip_longest(*shuffled):
        yield from (scene for scene in row if scene is not None)


def _others_global(edit: Edit, rng: random.Random) -> Iterator[Scene]:
    values = {"place": PLACES, "time": TIMES, "weather": WEATHERS, "style": STYLES}[edit.kind]
    wrong = [replace(edit.before, **{edit.kind: v}) for v in values]  # type: ignore[arg-type]
    yield from _take_turns(rng, wrong)
    second = [f for f in ("time", "weather") if f != edit.kind]
    light = {"time": TIMES, "weather": WEATHERS}
    yield from _take_turns(rng, *([replace(edit.after, **{f: v}) for v in light[f]] for f in second))  # type: ignore[arg-type]
    for f in second:
        yield from _take_turns(rng, [replace(s, **{f: v}) for s in wrong for v in light[f]])  # type: ignore[arg-type]


_SIZES_AND_COUNTS = tuple((s, c) for s in SIZES for c in range(1, MAX_COUNT + 1))


def _others_add(edit: Edit, rng: random.Random) -> Iterator[Scene]:
    assert edit.target is not None
    page, new = edit.before, edit.after.things[edit.target]

    def added(**changes: Any) -> Scene:
        thing = replace(new, **changes)
        uid = added_uid(page, thing.slot, sky=thing.in_sky)
        return replace(page, things=(*page.things, replace(thing, uid=uid)))

    row = SKY_KINDS if new.in_sky else GROUND_KINDS
    slots = page.free_slots(sky=new.in_sky)
    yield from _take_turns(
        rng,
        [added(kind=k) for k in row],
        [added(colour=c) for c in _COLOURS],
        [added(slot=s) for s in slots],
        [added(size=s) for s in SIZES],
        [added(count=c) for c in range(1, MAX_COUNT + 1)],
    )
    if new.in_sky or edit.before.style in say.COLOURLESS_STYLES:
        yield from _take_turns(
            rng, [added(kind=k, size=s, slot=a) for k in row for s in SIZES for a in slots]
        )
    yield from _take_turns(rng, [added(kind=k, colour=c) for k in row for c in _COLOURS])
    yield from (added(kind=k, size=s, count=c) for k in row for s, c in _SIZES_AND_COUNTS)


def _others_thing(edit: Edit, rng: random.Random) -> Iterator[Scene]:
    page, target = edit.before, edit.target
    assert target is not None
    was = page.things[target]
    others = [i for i in range(len(page.things)) if i != target]
    row = SKY_KINDS if was.in_sky else GROUND_KINDS

    def made(things: Iterable[Thing]) -> list[Scene]:
        return [put_thing(page, target, thing) for thing in things]

    if edit.kind == "remove":
        wrong = [with_kind(was, k, was.colour) for k in row if k != was.kind]
        yield from (replace(page, things=page.things[:i] + page.things[i + 1 :]) for i in others)
        fewer = [replace(was, count=c) for c in range(1, was.count)]
        shrunk = [replace(was, size=s) for s in SIZES[: SIZES.index(was.size)]]
        yield from _take_turns(rng, made(fewer), made(shrunk), made(wrong))
        yield from _take_turns(rng, made(with_kind(was, k, c) for k in row for c in _COLOURS))
        yield from made(replace(t, size=s, count=c) for t in wrong for s, c in _SIZES_AND_COUNTS)
        return
    now = edit.after.things[target]
    wrong = [t for t in _changes(edit.kind, page, target) if t != now]
    same_change = ((i, _same_change(edit, page.things[i])) for i in others)
    yield from (put_thing(page, i, thing) for i, thing in same_change if thing is not None)
    elsewhere = [[put_thing(page, i, thing) for thing in _changes(edit.kind, page, i)] for i in others]
    yield from _take_turns(rng, made(wrong), *elsewhere)
    further = [replace(t, colour=c) for t in wrong for c in _COLOURS]
    if edit.kind in ("recolour", "replace"):
        further = [with_kind(was, k, now.colour) for k in row]
    yield from _take_turns(rng, made(replace(now, colour=c) for c in _COLOURS), made(further))
    kinds = [with_kind(now, k, now.colour) for k in row]
    yield from _take_turns(rng, made(kinds))
    yield from made(replace(t, size=s, count=c) for t in kinds for s, c in _SIZES_AND_COUNTS)


def _changes(kind: str, page: Scene, i: int) -> list[Thing]:
    """All results of an edit of this kind on thing `i`."""
    thing = page.things[i]
    if kind == "recolour":
        return [replace(thing, colour=c) for c in _COLOURS]
    if kind == "replace":
        present = {t.kind for t in page.things}
        row = SKY_KINDS if thing.in_sky else GROUND_KINDS
        return [with_kind(thing, k, thing.colour) for k in row if k not in present]
    if kind in ("put_on", "take_off"):
        # "Take off the hat" gone wrong may leave another thing to wear.
        return [replace(thing, wears=w) for w in WEARABLES] if thing.kind in _WEARERS else []
    if kind in ("bigger", "smaller"):
        return [replace(thing, size=s) for s in SIZES]
    if kind == "move":
        return [replace(thing, slot=s) for s in page.free_slots(sky=thing.in_sky)]
    return [replace(thing, count=c) for c in range(1, MAX_COUNT + 1)]


def _same_change(edit: Edit, thing: Thing) -> Thing | None:
    """The change of the edit applied to another thing of the page; None if it does not apply."""
    assert edit.target is not None
    now = edit.after.things[edit.target]
    if edit.kind == "recolour":
        return replace(thing, colour=now.colour)
    if edit.kind == "replace":
        return with_kind(thing, now.kind, thing.colour) if (now.kind in _SKY) == thing.in_sky else None
    if edit.kind == "put_on":
        return replace(thing, wears=now.wears) if thing.kind in _WEARERS else None
    if edit.kind == "take_off":
        return replace(thing, wears=None)
    if edit.kind in ("bigger", "smaller"):
        at = SIZES.index(thing.size) + (1 if edit.kind == "bigger" else -1)
        return replace(thing, size=SIZES[at]) if 0 <= at < len(SIZES) else None
    if edit.kind == "move":
        free = edit.before.free_slots(sky=thing.in_sky)
        return replace(thing, slot=now.slot) if now.slot in free else None
    return replace(thing, count=now.count)


def _others_two(edit: Edit) -> Iterator[Scene]:
    first, second = edit.steps
    yield first.after
    only_second = _carry_over(second, edit.before)
    if only_second is not None:
        yield only_second
    first_wrong = (_carry_over(second, scene) for scene in alternatives(first))
    for pair in zip_longest(alternatives(second), first_wrong):
        yield from (scene for scene in pair if scene is not None)


def _carry_over(edit: Edit, page: Scene) -> Scene | None:
    """Apply the change of the edit to another page; None if it does not apply."""
    globals_ = {f: getattr(edit.after, f) for f in GLOBAL_KINDS}
    changed = {f: v for f, v in globals_.items() if v != getattr(edit.before, f)}
    old = {t.uid: t for t in edit.before.things}
    new = {t.uid: t for t in edit.after.things}
    things = []
    for thing in page.things:
        if thing.uid in old and thing.uid not in new:
            continue
        if thing.uid in old and old[thing.uid] != new[thing.uid]:
            a, b = old[thing.uid], new[thing.uid]
            moved = {f: getattr(b, f) for f in _THING_FIELDS if getattr(a, f) != getattr(b, f)}
            if moved.get("wears", thing.wears) and moved.get("kind", thing.kind) not in _WEARERS:
                moved["wears"] = None
            thing = replace(thing, **moved)
        things.append(thing)
    things += [t for uid, t in new.items() if uid not in old]
    if len({(t.in_sky, t.slot) for t in things}) != len(things):
        return None
    return replace(page, things=tuple(things), **changed)


_THING_FIELDS = ("kind", "colour", "size", "slot", "count", "wears")
