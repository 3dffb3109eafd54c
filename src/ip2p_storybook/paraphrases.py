"""Hand-written instructions in free English, with words that no phrasing uses: the split `paraphrases`.

`paraphrases.jsonl` has one instruction per line: `id`, `kind`, `instruction` and `changes` (one, or two for
"two"). A change has the `kind` of an edit, its `thing` and the `new` values. A thing is selected by `kind`,
`group`, `pronoun` or `slot`; `colour`, `slot`, `wears` and `count` are further conditions, and a list means
any of its values. `page` has conditions on the page. The file is frozen, because scores depend on it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ip2p_storybook.changes import added_uid, put_thing, with_kind
from ip2p_storybook.language import COLOURLESS_STYLES, FEMALE_KINDS, MALE_KINDS
from ip2p_storybook.scene import (
    GROUND_KINDS,
    GROUP_OF,
    KINDS,
    SIZES,
    SKY_KINDS,
    WEARER_KINDS,
    Scene,
    Thing,
    sample_scene,
    sample_thing,
)

PARAPHRASES_FILE = Path(__file__).with_name("paraphrases.jsonl")
_PRONOUN_KINDS = {"him": MALE_KINDS, "her": FEMALE_KINDS}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One edit without a page: its kind, the conditions on its thing, and the new values."""

    kind: str
    thing: Mapping[str, Any] = field(default_factory=dict)
    new: Mapping[str, Any] = field(default_factory=dict)

    def find_thing(self, scene: Scene) -> int | None:
        """The index of the thing that matches; None if none or more than one matches."""
        found = [i for i, thing in enumerate(scene.things) if self._names(thing)]
        if len(found) != 1:
            return None
        thing = scene.things[found[0]]
        met = all(getattr(thing, key) in _options(value) for key, value in self._conditions().items())
        return found[0] if met else None

    def apply(self, scene: Scene) -> tuple[Scene, int | None] | None:
        """The page after the change and the index of the changed thing; None if it does not apply."""
        after, index = scene, None
        if self.kind in ("place", "time", "weather", "style"):
            after = replace(scene, **self.new)
        elif self.kind == "add":
            added = self._add(scene)
            if added is not None:
                after, index = added, len(scene.things)
        else:
            index = self.find_thing(scene)
            if index is not None:
                after = self._change_thing(scene, index)
        return None if after == scene else (after, index)

    def kinds(self) -> tuple[str, ...]:
        """The kinds of thing to which the change applies."""
        if "kind" in self.thing:
            return (self.thing["kind"],)
        if "pronoun" in self.thing:
            return _PRONOUN_KINDS[self.thing["pronoun"]]
        kinds = KINDS[self.thing["group"]] if "group" in self.thing else GROUND_KINDS
        # What changes its kind is of another one before.
        kinds = tuple(kind for kind in kinds if kind != self.new.get("kind"))
        return tuple(k for k in kinds if k in WEARER_KINDS) if "wears" in self.thing else kinds

    def prepare_thing(self, thing: Thing, rng: random.Random) -> Thing:
        """The thing, modified so that the change applies to it."""
        kind = rng.choice(self.kinds())
        drawn = {key: rng.choice(_options(value)) for key, value in self._conditions().items()}
        return replace(with_kind(thing, kind, thing.colour), **drawn)

    def _names(self, thing: Thing) -> bool:
        """Whether the name alone matches the thing."""
        if "kind" in self.thing:
            return thing.kind == self.thing["kind"]
        if "group" in self.thing:
            return GROUP_OF[thing.kind] == self.thing["group"]
        if "pronoun" in self.thing:
            return thing.kind in KINDS["person"]
        return thing.slot == self.thing["slot"]

    def _conditions(self) -> dict[str, Any]:
        fields = {key: value for key, value in self.thing.items() if key not in ("group", "pronoun")}
        if "pronoun" in self.thing:
            fields["kind"] = _PRONOUN_KINDS[self.thing["pronoun"]]
        return {"count": 1, **fields}

    def _add(self, scene: Scene) -> Scene | None:
        sky = self.new["kind"] in SKY_KINDS
        free = scene.free_slots(sky=sky)
        slot = self.new.get("slot") or (free[0] if len(free) == 1 else "")
        present = any(thing.kind == self.new["kind"] for thing in scene.things)
        if slot not in free or present or scene.style in COLOURLESS_STYLES:
            return None
        thing = Thing(**{**self.new, "slot": slot}, uid=added_uid(scene, slot, sky=sky))
        return replace(scene, things=(*scene.things, thing))

    def _change_thing(self, scene: Scene, index: int) -> Scene:
        """The page after the change; the same page if it is not possible."""
        thing = scene.things[index]
        if self.kind == "remove":
            return replace(scene, things=scene.things[:index] + scene.things[index + 1 :])
        if "colour" in {**self.thing, **self.new} and scene.style in COLOURLESS_STYLES:
            return scene
        if self.kind in ("bigger", "smaller"):
            size = SIZES.index(thing.size) + (1 if self.kind == "bigger" else -1)
            return put_thing(scene, index, replace(thing, size=SIZES[size])) if 0 <= size < 3 else scene
        if self.kind == "replace":
            if any(other.kind == self.new["kind"] for other in scene.things):
                return scene
            new = with_kind(thing, self.new["kind"], self.new.get("colour", thing.colour))
            return put_thing(scene, index, new)
        if self.kind == "move" and self.new["slot"] not in scene.free_slots(sky=thing.in_sky):
            return scene
        if self.kind == "take_off":
            return put_thing(scene, index, replace(thing, wears=None))
        return put_thing(scene, index, replace(thing, **self.new))


@dataclass(frozen=True, kw_only=True)
class Paraphrase:
    """An instruction as typed, and the changes it requests."""

    id: str
    kind: str
    instruction: str
    changes: tuple[Change, ...]
    page: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, scene: Scene) -> bool:
        """Whether the page meets the page conditions."""
        return all(getattr(scene, key) in value for key, value in self.page.items())

    def draw_page(self, rng: random.Random) -> Scene | None:
        """Sample a page to which the instruction applies; None if the sample does not fit."""
        scene = sample_scene(rng, held_out=None)
        scene = replace(scene, **{key: rng.choice(value) for key, value in self.page.items()})
        things, about = list(scene.things), set[int]()
        for change in self.changes:
            if not change.thing or any(things[i].kind in change.kinds() for i in about):
                continue  # of no thing, or of the same as the change before
            sky = change.kinds()[0] in SKY_KINDS
            index = next((i for i, t in enumerate(things) if t.in_sky == sky and i not in about), len(things))
            if index == len(things):
                free = scene.free_slots(sky=sky)
                if not free:
                    return None
                things.append(sample_thing(rng, rng.choice(free), sky=sky, uid=rng.getrandbits(32)))
            things[index] = change.prepare_thing(things[index], rng)
            about.add(index)
        if len({t.kind for t in things}) != len(things) or len({(t.in_sky, t.slot) for t in things}) != len(
            things
        ):
            return None
        return replace(scene, things=tuple(things))


def _options(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


@cache
def read_paraphrases() -> tuple[Paraphrase, ...]:
    """All paraphrases, in the order of the file."""
    rows = map(json.loads, PARAPHRASES_FILE.read_text(encoding="utf-8").splitlines())
    return tuple(Paraphrase(**{**row, "changes": tuple(Change(**c) for c in row["changes"])}) for row in rows)


def is_paraphrase(phrasing_id: str) -> bool:
    """Whether an edit's `phrasing` is the id of a paraphrase ("add/p3") or of one of its two changes."""
    return phrasing_id.split("/", 1)[1].startswith("p")


@cache
def paraphrases_of(kind: str) -> tuple[Paraphrase, ...]:
    """The paraphrases of one kind of edit."""
    return tuple(paraphrase for paraphrase in read_paraphrases() if paraphrase.kind == kind)
