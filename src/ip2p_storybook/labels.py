"""Class labels of a page or an edit, for training networks to recognize them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ip2p_storybook.edits import EDIT_KINDS, Edit
from ip2p_storybook.scene import (
    ALL_KINDS,
    COLOURS,
    MAX_COUNT,
    PLACES,
    SIZES,
    SLOTS,
    STYLES,
    TIMES,
    WEARABLES,
    WEATHERS,
    Scene,
    Thing,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

IGNORED = -100  # ignored by torch's cross-entropy
# The visible positions of things: a row in the sky and a row on the ground.
SPOTS = tuple((sky, slot) for sky in (True, False) for slot in SLOTS)
THING_CLASSES: dict[str, tuple[object, ...]] = {
    "kind": (None, *ALL_KINDS),  # None: empty
    "colour": tuple(COLOURS),
    "size": SIZES,
    "count": tuple(range(1, MAX_COUNT + 1)),
    "wears": (None, *WEARABLES),
}
PAGE_CLASSES: dict[str, tuple[object, ...]] = {
    "place": PLACES,
    "time": TIMES,
    "weather": WEATHERS,
    "style": STYLES,
}
THING_SIZES = tuple(len(classes) for classes in THING_CLASSES.values())
PAGE_SIZES = tuple(len(classes) for classes in PAGE_CLASSES.values())
EDIT_SIZES = (len(EDIT_KINDS), *2 * (*THING_SIZES, len(SLOTS)), *PAGE_SIZES)


def scene_labels(scene: Scene) -> NDArray[np.int64]:
    """[spots · thing classes + page classes]: the thing at each of `SPOTS`, and the fields of the page."""
    at = {(thing.in_sky, thing.slot): thing for thing in scene.things}
    spots = [_thing(at.get(spot), nothing=0) for spot in SPOTS]
    return np.array([*(label for spot in spots for label in spot), *_page(scene)], dtype=np.int64)


def edit_labels(edit: Edit) -> NDArray[np.int64]:
    """[EDIT_SIZES]: the kind of edit, its thing before and after, and the new fields of the page.

    Of the page, only the changed fields are labeled, because the instruction mentions no others.
    """
    before = after = None
    if edit.target is not None:
        before = edit.before.things[edit.target] if edit.kind != "add" else None
        after = edit.after.things[edit.target] if edit.kind != "remove" else None
    page = [
        label if getattr(edit.before, field) != getattr(edit.after, field) else IGNORED
        for field, label in zip(PAGE_CLASSES, _page(edit.after), strict=True)
    ]
    things = [label for thing in (before, after) for label in (*_thing(thing, IGNORED), _slot(thing))]
    return np.array([EDIT_KINDS.index(edit.kind), *things, *page], dtype=np.int64)


def _thing(thing: Thing | None, nothing: int) -> list[int]:
    if thing is None:
        return [nothing, *(IGNORED,) * (len(THING_CLASSES) - 1)]
    return [classes.index(getattr(thing, field)) for field, classes in THING_CLASSES.items()]


def _slot(thing: Thing | None) -> int:
    return IGNORED if thing is None else SLOTS.index(thing.slot)


def _page(scene: Scene) -> list[int]:
    return [classes.index(getattr(scene, field)) for field, classes in PAGE_CLASSES.items()]
