"""Pictures depend on the record alone, and an edit changes no pixel outside its masks."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import skia

from ip2p_storybook import draw as drawing
from ip2p_storybook.draw import draw, thing_mask
from ip2p_storybook.scene import (
    ALL_KINDS,
    COLOURS,
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
    sample_scene,
)


def _crowd(style: str, seed: int) -> Scene:
    """Large things in every slot, on the ground and in the sky, so that all overlap."""
    rng = random.Random(seed)
    kinds = rng.sample(WEARER_KINDS, 3)
    ground = [
        Thing(
            kind=kind,
            colour=rng.choice(tuple(COLOURS)),
            size="large",
            slot=slot,
            count=rng.randint(1, 4),
            wears=rng.choice(WEARABLES),
            uid=rng.getrandbits(32),
        )
        for kind, slot in zip(kinds, SLOTS, strict=True)
    ]
    sky = [
        Thing(kind=kind, colour="black", size="large", slot=slot, uid=rng.getrandbits(32))
        for kind, slot in zip(("balloon", "kite"), ("left", "middle"), strict=True)
    ]
    return Scene(
        place=rng.choice(PLACES),
        time=rng.choice(TIMES),
        weather=rng.choice(WEATHERS),
        style=style,
        things=(*ground, *sky),
        seed=seed,
    )


def _without(scene: Scene, index: int) -> Scene:
    return replace(scene, things=scene.things[:index] + scene.things[index + 1 :])


def _body_mask(scene: Scene, size: int) -> np.ndarray:
    """The first thing's silhouette, without contour, shadow and wearable."""
    pixels, surface = drawing._surface(size)
    canvas = surface.getCanvas()
    figure = drawing._Figure(scene, scene.things[0])
    for _, _, matrix in figure.matrices():
        canvas.save()
        canvas.concat(matrix)
        canvas.drawPath(figure.art.silhouette, skia.Paint(AntiAlias=False, Color=0xFFFFFFFF))
        canvas.restore()
    return pixels[..., 3] > 0


@pytest.mark.parametrize("size", [32, 63, 128, 257])
@pytest.mark.parametrize("style", STYLES)
def test_all_sizes_draw_the_same_page(style: str, size: int) -> None:
    scene = _crowd(style, 5)
    page = draw(scene, size)
    assert page.shape == (size, size, 3)
    assert page.dtype == np.uint8
    assert page.flags.c_contiguous
    assert np.array_equal(page, draw(scene, size))
    # Sizes differ in sampling only (at size 32, a one-pixel line is wide).
    assert abs(page.mean() - draw(scene, 256).mean()) < (24 if size == 32 else 8)


@pytest.mark.parametrize("size", [0, 31, 1025])
def test_sizes_outside_the_range_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} is outside 32 to 1024"):
        draw(Scene(place="meadow"), size)
    with pytest.raises(ValueError, match="outside 32 to 1024"):
        thing_mask(Scene(place="meadow", things=(Thing(kind="cat", colour="red"),)), 0, size)


def test_two_processes_draw_the_same_picture() -> None:
    code = (
        "import hashlib; from ip2p_storybook.draw import draw; from ip2p_storybook.scene import Scene, Thing;"
        "s = Scene(place='city', time='night', style='watercolour', seed=3,"
        " things=(Thing(kind='fox', colour='orange', wears='hat', uid=8),));"
        "print(hashlib.sha256(draw(s, 96).tobytes()).hexdigest())"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)
    }
    assert len(runs) == 1


def test_different_seeds_draw_different_pages() -> None:
    for place in PLACES:
        empty = {draw(Scene(place=place, seed=seed), 64).tobytes() for seed in range(30)}
        assert len(empty) == 30
    cat = Thing(kind="cat", colour="red", uid=1)
    pages = [Scene(place="moon", things=(replace(cat, uid=uid),), seed=4) for uid in range(30)]
    assert len({draw(page, 128).tobytes() for page in pages}) == 30


@pytest.mark.parametrize("style", STYLES)
def test_removing_a_thing_changes_only_its_mask(style: str) -> None:
    rng = random.Random(STYLES.index(style))
    scenes = [replace(sample_scene(rng, held_out=None), style=style) for _ in range(25)]
    scenes += [_crowd(style, seed) for seed in range(8)]
    for scene in scenes:
        size = rng.choice((64, 100, 128, 256))
        index = rng.randrange(len(scene.things))
        mask = thing_mask(scene, index, size)
        assert mask.shape == (size, size)
        assert mask.dtype == bool
        changed = (draw(scene, size) != draw(_without(scene, index), size)).any(axis=-1)
        assert not (changed & ~mask).any()


@pytest.mark.parametrize(
    "change",
    [
        {"colour": "purple"},
        {"kind": "elephant"},
        {"size": "small"},
        {"slot": "right"},
        {"count": 3},
        {"wears": "cape"},
        {"wears": None},
    ],
    ids=str,
)
def test_changing_a_thing_changes_only_its_masks_before_and_after(change: dict[str, object]) -> None:
    for k, style in enumerate(STYLES):
        before = Scene(
            place=PLACES[k],
            time=TIMES[k % 4],
            style=style,
            things=(
                Thing(kind="dog", colour="red", wears="hat", size="large", slot="middle", uid=7),
                Thing(kind="girl", colour="blue", size="large", slot="left", uid=8),
                Thing(kind="plane", colour="green", slot="right", uid=9),
            ),
            seed=k,
        )
        after = before.with_thing(0, **change)
        allowed = thing_mask(before, 0, 128) | thing_mask(after, 0, 128)
        changed = (draw(before, 128) != draw(after, 128)).any(axis=-1)
        assert changed.any() or style in ("pencil", "blueprint")
        assert not (changed & ~allowed).any()


def test_a_wearable_is_visible_but_does_not_hide_the_body() -> None:
    for kind in WEARER_KINDS:
        bare = Scene(place="farm", things=(Thing(kind=kind, colour="blue", size="large", uid=3),), seed=1)
        for wears in WEARABLES:
            worn = bare.with_thing(0, wears=wears)
            changed = (draw(bare, 128) != draw(worn, 128)).any(axis=-1)
            share = changed.sum() / _body_mask(bare, 128).sum()
            assert 0.03 < share < 0.9, (kind, wears, share)


def test_the_time_of_day_changes_light_and_shadow_but_not_the_body() -> None:
    scene = Scene(place="desert", things=(Thing(kind="castle", colour="white", size="large", uid=2),), seed=6)
    body = _body_mask(scene, 128)
    tones = {}
    for time in TIMES:
        lit = replace(scene, time=time)
        assert np.array_equal(_body_mask(lit, 128), body)
        tones[time] = draw(lit, 128)[~body].mean()
    assert tones["night"] < 0.5 * tones["noon"]
    # Shadows fall to opposite sides in the morning and at sunset.
    mean_columns = [
        np.nonzero(thing_mask(replace(scene, time=t), 0, 128))[1].mean() for t in ("morning", "sunset")
    ]
    assert abs(mean_columns[0] - mean_columns[1]) > 5


def test_replacing_the_kind_keeps_the_ground_line() -> None:
    lines = []
    for kind in ("cat", "house", "tree"):
        scene = Scene(place="meadow", things=(Thing(kind=kind, colour="red", uid=11),), seed=2)
        lines.append(np.nonzero(_body_mask(scene, 256))[0].max())
    assert max(lines) - min(lines) <= 3


def test_sizes_and_slots_are_distinguishable() -> None:
    for kind in ALL_KINDS:
        areas = []
        for size in SIZES:
            scene = Scene(place="meadow", things=(Thing(kind=kind, colour="red", size=size, uid=1),))
            areas.append(_body_mask(scene, 128).sum())
        assert areas[0] * 1.5 < areas[1]
        assert areas[1] * 1.5 < areas[2]
        centers = []
        for slot in SLOTS:
            scene = Scene(place="meadow", things=(Thing(kind=kind, colour="red", slot=slot, uid=1),))
            centers.append(np.nonzero(_body_mask(scene, 128))[1].mean() / 128)
        assert centers[0] + 0.2 < centers[1] < centers[2] - 0.2


@pytest.mark.parametrize("place", PLACES)
def test_every_time_weather_and_style_draws_a_different_page(place: str) -> None:
    pages = set()
    for time in TIMES:
        for weather in WEATHERS:
            page = draw(Scene(place=place, time=time, weather=weather, seed=1), 64)
            assert page.std() > 4
            pages.add(page.tobytes())
    assert len(pages) == len(TIMES) * len(WEATHERS)
    styles = {draw(Scene(place=place, style=style, seed=1), 64).tobytes() for style in STYLES}
    assert len(styles) == len(STYLES)


def test_every_kind_has_a_distinct_silhouette() -> None:
    shapes = {}
    for kind in ALL_KINDS:
        scene = Scene(place="moon", things=(Thing(kind=kind, colour="red", size="large", uid=5),))
        body = _body_mask(scene, 128)
        assert body.sum() > 0.02 * body.size
        shapes[kind] = body
    for a in ALL_KINDS:
        for b in ALL_KINDS:
            if a < b and (a in SKY_KINDS) == (b in SKY_KINDS):
                overlap = (shapes[a] & shapes[b]).sum() / (shapes[a] | shapes[b]).sum()
                assert overlap < 0.93, (a, b, overlap)


def test_the_named_color_fills_the_thing() -> None:
    names = list(COLOURS)
    table = np.array([COLOURS[name] for name in names], dtype=float)
    mean_right, most_right, total = 0, 0, 0
    for kind in ALL_KINDS:
        for k, colour in enumerate(names):
            thing = Thing(kind=kind, colour=colour, size="large", uid=31 * k + len(kind))
            scene = Scene(place="meadow", things=(thing,), seed=k)
            pixels = draw(scene, 128)[_body_mask(scene, 128)].astype(float)
            nearest = np.argmin(((table - pixels[:, None]) ** 2).sum(axis=-1), axis=1)
            most_right += bool(np.bincount(nearest, minlength=len(names)).argmax() == k)
            mean_right += bool(np.argmin(((table - pixels.mean(axis=0)) ** 2).sum(axis=-1)) == k)
            total += 1
    assert most_right >= 0.99 * total
    assert mean_right >= 0.9 * total


def test_colors_are_distinguishable_at_night() -> None:
    for kind in ALL_KINDS:
        means = []
        for colour in COLOURS:
            scene = Scene(
                place="forest", time="night", things=(Thing(kind=kind, colour=colour, size="large", uid=4),)
            )
            means.append(draw(scene, 128)[_body_mask(scene, 128)].astype(float).mean(axis=0))
        gaps = [np.abs(a - b).max() for i, a in enumerate(means) for b in means[:i]]
        assert min(gaps) > 8, kind
