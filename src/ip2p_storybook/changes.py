"""The effect of each kind of edit on a page and its things: the rules listed in `edits`."""

from __future__ import annotations

from dataclasses import replace

from ip2p_storybook.scene import WEARER_KINDS, Scene, Thing, stable_hash

_WEARERS = frozenset(WEARER_KINDS)


def added_uid(scene: Scene, slot: str, *, sky: bool) -> int:
    """The `uid` of a thing added to a slot of the page, from the page's seed and the slot."""
    return stable_hash("added", scene.seed, slot, sky) & 0xFFFFFFFF


def with_kind(thing: Thing, kind: str, colour: str) -> Thing:
    """The thing as another kind, with the same wearable if that kind can wear."""
    return replace(thing, kind=kind, colour=colour, wears=thing.wears if kind in _WEARERS else None)


def put_thing(scene: Scene, index: int, thing: Thing) -> Scene:
    """The scene with another thing at this index."""
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))
