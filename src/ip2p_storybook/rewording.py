"""Instructions for the edit between two given pages, with varied wording.

`edits.propose` samples an edit and its answer; here the answer is fixed. For two edits of one page, the
reverse edits, and the edit from one result to the other, are edits too if the language can express them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ip2p_storybook import language as say
from ip2p_storybook.changes import added_uid
from ip2p_storybook.edits import (
    _WEIGHTS,
    GLOBAL_KINDS,
    Edit,
    _Draw,
    _go_together,
    _propose,
    is_unique,
)
from ip2p_storybook.scene import COLOURS, PLACES, SIZES, Scene, Thing

KIND_WEIGHTS = _WEIGHTS  # relative frequency of each kind of edit
_TRIES = 120
_FIELDS = ("kind", "colour", "size", "slot", "count", "wears")


def say_change(before: Scene, after: Scene, rng: random.Random) -> Edit | None:
    """A training edit of `before` whose exact and only answer is `after`; None if there is no such edit.

    Its `after` may list the things in another order, which does not affect the picture.
    """
    change = _change_of(before, after)
    return None if change is None else _say(change, before, after, _Directed(rng, target_change=change), rng)


def say_two_changes(before: Scene, between: Scene, after: Scene, rng: random.Random) -> Edit | None:
    """As `say_change` for a "two" edit, whose first part leads to the page `between`."""
    changes = _change_of(before, between), _change_of(between, after)
    if changes[0] is None or changes[1] is None:
        return None
    draw = _Directed(rng, target_change=changes[0], pronouns=False)
    joint = draw.phrasing("two")
    assert joint is not None
    for _ in range(4):
        first = _say(changes[0], before, between, draw, None)
        if first is None:
            return None
        later = replace(draw, earlier=first, target_change=changes[1])
        second = _say(changes[1], first.after, after, later, None)
        if second is None:
            return None
        if _go_together(first, second):
            text = say.fill_phrasing(joint, {"a": first.instruction, "b": second.instruction})
            return Edit(
                kind="two",
                before=before,
                after=second.after,
                instruction=say.finish(text, rng, typos=True),
                phrasing="+".join((joint.id, first.phrasing, second.phrasing)),
                steps=(first, second),
            )
    return None


def same_page(a: Scene, b: Scene) -> bool:
    """Whether two scenes give the same picture: they are equal except for the order of their things."""
    return replace(a, things=()) == replace(b, things=()) and set(a.things) == set(b.things)


def reversible(scene: Scene) -> Scene:
    """The scene with things seeded as if they had been added, so that removing one can be reversed."""
    things = [replace(t, uid=added_uid(scene, t.slot, sky=t.in_sky)) for t in scene.things]
    return replace(scene, things=tuple(things))


# --- the change between two pages ---------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """The kind of an edit, its thing (on the page before), and the new values."""

    kind: str
    target: int | None
    values: tuple[Any, ...]


def _change_of(before: Scene, after: Scene) -> _Change | None:
    """The single change between two pages; None for no or several changes."""
    if before.seed != after.seed:
        return None
    fields = [field for field in GLOBAL_KINDS if getattr(before, field) != getattr(after, field)]
    gone = [t for t in before.things if t not in after.things]
    come = [t for t in after.things if t not in before.things]
    if fields:
        if len(fields) > 1 or gone or come:
            return None
        return _Change(fields[0], None, (getattr(after, fields[0]),))
    if len(gone) > 1 or len(come) > 1 or not (gone or come):
        return None
    if not gone:
        new = come[0]
        sky = new.in_sky
        if new.wears or new.count > 3 or new.uid != added_uid(before, new.slot, sky=sky):
            return None  # no instruction adds such a thing
        return _Change("add", None, (new.kind, new.colour, new.slot, new.count))
    target = before.things.index(gone[0])
    if not come:
        return _Change("remove", target, ())
    kind = _kind_of(gone[0], come[0])
    values = [getattr(come[0], field) for field in _FIELDS if field != "wears" or kind == "put_on"]
    return None if kind is None else _Change(kind, target, tuple(values))


def _kind_of(was: Thing, now: Thing) -> str | None:
    changed = {field for field in _FIELDS if getattr(was, field) != getattr(now, field)}
    if was.uid != now.uid:
        return None
    if "kind" in changed:
        return "replace" if changed <= {"kind", "colour", "wears"} else None
    if len(changed) != 1:
        return None
    if changed == {"wears"}:
        return "put_on" if now.wears else "take_off"
    if changed == {"size"}:
        return "bigger" if SIZES.index(now.size) > SIZES.index(was.size) else "smaller"
    return {"colour": "recolour", "slot": "move", "count": "count"}[changed.pop()]


# --- sampling edits with a given answer ---------------------------------------------------------


@dataclass(frozen=True)
class _Directed(_Draw):
    """A random generator that makes given choices; wordings stay random."""

    held_out_phrasing: bool = False
    combinations: str = "seen"
    target_change: _Change = _Change("", None, ())

    def order(self, n: int) -> list[int]:
        order = super().order(n)
        first: int | None = self.target_change.target
        for names in (tuple(COLOURS), PLACES):  # longer than any list of things
            if n == len(names):
                first = next((names.index(v) for v in self.target_change.values if v in names), first)
        if first is not None and first < n:
            order.remove(first)
            order.insert(0, first)
        return order

    def choice(self, options: Sequence[Any]) -> Any:
        return next(
            (value for value in self.target_change.values if value in options), None
        ) or super().choice(options)


def _say(
    change: _Change, before: Scene, after: Scene, draw: _Directed, finish: random.Random | None
) -> Edit | None:
    """Sample edits of the change until one leads to `after`."""
    for _ in range(_TRIES):
        edit = _propose(before, draw, change.kind)
        if edit is None or not same_page(edit.after, after) or not is_unique(edit):
            continue
        if finish is None:
            return edit
        return replace(edit, instruction=say.finish(edit.instruction, finish, typos=True))
    return None
