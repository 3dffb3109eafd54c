"""What each kind of edit makes of a page and of a thing on it: the rules that `edits` lists."""

from __future__ import annotations

from dataclasses import replace

from ip2p_storybook.scene import WEARER_KINDS, Scene, Thing, stable_hash

_WEARERS = frozenset(WEARER_KINDS)


def added_uid(scene: Scene, slot: str, *, sky: bool) -> int:
    """The `uid` of a thing added to a slot of the page: the page's seed and the slot settle it."""
    return stable_hash("added", scene.seed, slot, sky) & 0xFFFFFFFF


def with_kind(thing: Thing, kind: str, colour: str) -> Thing:
    """The thing replaced by one of another kind, which wears the same if it can wear."""
    return replace(thing, kind=kind, colour=colour, wears=thing.wears if kind in _WEARERS else None)


def put_thing(scene: Scene, index: int, thing: Thing) -> Scene:
    """The scene with another thing at this index."""
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))
