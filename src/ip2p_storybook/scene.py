"""The contents of a storybook page: an immutable record from which everything else follows.

A `Scene` has the place, the time of day, the weather, the picture style and the things in it; its seed
determines everything else (horizon, proportions, shades, clouds, stars). The picture, captions, masks and
the exact answer to every edit are pure functions of the record.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace

# --- the vocabulary -----------------------------------------------------------------------------

KINDS: dict[str, tuple[str, ...]] = {
    "animal": ("cat", "dog", "rabbit", "duck", "cow", "pig", "elephant", "fox"),
    "person": ("girl", "boy", "queen", "wizard"),
    "vehicle": ("car", "bus", "truck", "train"),
    "building": ("house", "castle", "tent", "lighthouse"),
    "plant": ("tree", "flower", "mushroom", "cactus"),
    "sky": ("balloon", "kite", "plane", "bird"),
    "toy": ("ball", "robot", "teddy bear", "rocket"),
}
GROUP_OF = {kind: group for group, kinds in KINDS.items() for kind in kinds}
ALL_KINDS = tuple(GROUP_OF)
SKY_KINDS = KINDS["sky"]
GROUND_KINDS = tuple(k for k in ALL_KINDS if k not in SKY_KINDS)
WEARER_KINDS = (*KINDS["animal"], *KINDS["person"], "robot", "teddy bear")

# sRGB of each colour's middle shade; a thing's seed moves it a little, never into a neighbour.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (240, 138, 36),
    "yellow": (250, 210, 60),
    "green": (70, 160, 70),
    "blue": (52, 110, 210),
    "purple": (132, 74, 176),
    "pink": (244, 140, 186),
    "brown": (134, 86, 50),
    "black": (44, 44, 52),
    "white": (244, 242, 236),
}
PLACES = (
    "meadow", "beach", "desert", "forest", "city",
    "mountains", "farm", "north pole", "moon", "volcano",
)  # fmt: skip
TIMES = ("morning", "noon", "sunset", "night")
WEATHERS = ("clear", "cloudy", "rain", "snow", "fog")
STYLES = ("plain", "pencil", "watercolour", "pixel art", "blueprint", "comic")
WEARABLES = ("hat", "crown", "scarf", "sunglasses", "cape")
SIZES = ("small", "medium", "large")
SLOTS = ("left", "middle", "right")
MAX_COUNT = 4


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One thing on a page, or a group of `count` of them. `uid` seeds its shade and proportions."""

    kind: str
    colour: str
    size: str = "medium"
    slot: str = "middle"  # where across the page; sky things have their own row
    count: int = 1  # how many, drawn side by side within the slot
    wears: str | None = None
    uid: int = 0

    def __post_init__(self) -> None:
        _check("kind", self.kind, ALL_KINDS)
        _check("colour", self.colour, tuple(COLOURS))
        _check("size", self.size, SIZES)
        _check("slot", self.slot, SLOTS)
        if not 1 <= self.count <= MAX_COUNT:
            raise ValueError(f"count {self.count} is outside 1 to {MAX_COUNT}")
        if self.wears is not None:
            _check("wears", self.wears, WEARABLES)
            if self.kind not in WEARER_KINDS:
                able = ", ".join(WEARER_KINDS)
                raise ValueError(f"a {self.kind} cannot wear a {self.wears}; these can: {able}")

    @property
    def in_sky(self) -> bool:
        return self.kind in SKY_KINDS


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One page. `seed` determines everything that the fields do not."""

    place: str
    time: str = "noon"
    weather: str = "clear"
    style: str = "plain"
    things: tuple[Thing, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _check("place", self.place, PLACES)
        _check("time", self.time, TIMES)
        _check("weather", self.weather, WEATHERS)
        _check("style", self.style, STYLES)
        spots = [(t.in_sky, t.slot) for t in self.things]
        if len(set(spots)) != len(spots):
            raise ValueError("two things stand in the same slot; move one to a free slot")

    def with_thing(self, index: int, **changes: object) -> Scene:
        """The same scene with some fields of thing `index` replaced."""
        things = list(self.things)
        things[index] = replace(things[index], **changes)  # type: ignore[arg-type]
        return replace(self, things=tuple(things))

    def free_slots(self, *, sky: bool) -> tuple[str, ...]:
        taken = {t.slot for t in self.things if t.in_sky == sky}
        return tuple(s for s in SLOTS if s not in taken)


def _check(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {field} {value!r}; choose one of: {', '.join(allowed)}")


# --- randomness that is the same everywhere -----------------------------------------------------


def stable_hash(*parts: object) -> int:
    """A 64-bit hash of the parts' text, equal on every machine and in every process."""
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def rng_for(*parts: object) -> random.Random:
    return random.Random(stable_hash(*parts))


# --- held-out combinations ----------------------------------------------------------------------


def is_held_out_combination(kind: str, colour: str, place: str) -> bool:
    """Whether training excludes a kind-color-place combination. A tenth of them are held out."""
    return stable_hash("combination", kind, colour, place) % 10 == 0


def has_held_out_combination(scene: Scene) -> bool:
    return any(is_held_out_combination(t.kind, t.colour, scene.place) for t in scene.things)


# --- random scenes ------------------------------------------------------------------------------

_COUNT_WEIGHTS = (0.82, 0.09, 0.06, 0.03)


def sample_thing(rng: random.Random, slot: str, *, sky: bool, uid: int) -> Thing:
    kind = rng.choice(SKY_KINDS if sky else GROUND_KINDS)
    wears = rng.choice(WEARABLES) if kind in WEARER_KINDS and rng.random() < 0.35 else None
    return Thing(
        kind=kind,
        colour=rng.choice(tuple(COLOURS)),
        size=rng.choices(SIZES, (0.2, 0.45, 0.35))[0],
        slot=slot,
        count=rng.choices(range(1, MAX_COUNT + 1), _COUNT_WEIGHTS)[0],
        wears=wears,
        uid=uid,
    )


def sample_scene(rng: random.Random, *, held_out: bool | None = False) -> Scene:
    """Sample a scene.

    held_out: False allows only combinations from training, True requires at least one held-out combination,
    None allows both.
    """
    while True:
        ground = rng.choices((1, 2, 3), (0.45, 0.4, 0.15))[0]
        slots = rng.sample(SLOTS, ground)
        things = [sample_thing(rng, slot, sky=False, uid=rng.getrandbits(32)) for slot in slots]
        if rng.random() < 0.35:
            things.append(sample_thing(rng, rng.choice(SLOTS), sky=True, uid=rng.getrandbits(32)))
        # No two things share a kind, so that "the cat" always means one thing.
        if len({t.kind for t in things}) != len(things):
            continue
        scene = Scene(
            place=rng.choice(PLACES),
            time=rng.choices(TIMES, (0.2, 0.4, 0.2, 0.2))[0],
            weather=rng.choices(WEATHERS, (0.5, 0.15, 0.12, 0.13, 0.1))[0],
            style=rng.choices(STYLES, (0.6, 0.08, 0.08, 0.08, 0.08, 0.08))[0],
            things=tuple(things),
            seed=rng.getrandbits(32),
        )
        if held_out is None or has_held_out_combination(scene) == held_out:
            return scene
