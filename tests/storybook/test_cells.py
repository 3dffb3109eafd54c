"""Maps of the thing at each pixel and cell, against pages drawn with and without it."""

from dataclasses import replace

import numpy as np
import pytest

from ip2p_storybook.cells import MAX_THINGS, cell_map, scene_classes, thing_map
from ip2p_storybook.draw import draw, thing_mask
from ip2p_storybook.labels import PAGE_CLASSES, THING_CLASSES
from ip2p_storybook.scene import Scene, Thing, rng_for, sample_scene

SCENES = [replace(sample_scene(rng_for("cells", i)), style="plain", weather="clear") for i in range(12)]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: str(scene.seed))
def test_a_thing_covers_pixels_of_its_mask_that_change_when_it_is_removed(scene):
    pixels = thing_map(scene, 128)
    for index in range(len(scene.things)):
        covered = pixels == index + 1
        assert not (covered & ~thing_mask(scene, index, 128)).any()
        without = replace(scene, things=scene.things[:index] + scene.things[index + 1 :])
        changes = (draw(scene, 128) != draw(without, 128)).any(axis=-1)
        # A pixel of the thing may by chance have the color of what is behind it.
        assert (changes & covered).sum() >= 0.9 * covered.sum()


def test_an_overlap_of_two_things_is_assigned_to_the_one_that_is_drawn_on_top():
    near = Thing(kind="house", colour="red", size="large", slot="middle", uid=2)
    far = Thing(kind="tree", colour="green", size="large", slot="left", uid=1)
    for seed in range(20):
        both = Scene(place="meadow", things=(far, near), seed=seed)
        alone = [thing_map(replace(both, things=(thing,)), 128) > 0 for thing in both.things]
        overlap = alone[0] & alone[1]
        if overlap.any():
            (on_top,) = set(thing_map(both, 128)[overlap].tolist())
            pages = [draw(replace(both, things=(thing,)), 128)[overlap] for thing in both.things]
            equal = [(draw(both, 128)[overlap] == page).all(axis=-1).mean() for page in pages]
            assert equal[on_top - 1] > 0.9 > equal[2 - on_top]
            return
    raise AssertionError("no two things overlap")


def test_a_cell_belongs_to_the_thing_that_covers_most_of_it():
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8, :8] = 1  # a full cell
    pixels[:8, 8:10] = 2  # exactly the minimum share
    pixels[8:, :1] = 2  # below it
    pixels[8:, 8:11], pixels[8:, 11:15] = 1, 2
    assert cell_map(pixels, 2).tolist() == [[1, 2], [0, 2]]


@pytest.mark.parametrize("scene", SCENES[:4], ids=lambda scene: str(scene.seed))
def test_the_cell_map_matches_counting_pixels_per_block(scene):
    pixels = thing_map(scene, 64)
    cells = cell_map(pixels, 8)
    for row in range(8):
        for column in range(8):
            block = pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            counts = [int((block == k).sum()) for k in range(1, MAX_THINGS + 1)]
            expected = 1 + int(np.argmax(counts)) if max(counts) >= 16 else 0
            assert cells[row, column] == expected


def test_scene_classes_decode_back_to_the_page():
    scene = SCENES[0]
    things, page = scene_classes(scene)
    assert things.shape == (MAX_THINGS, len(THING_CLASSES))
    for row, thing in zip(things, scene.things, strict=False):
        assert [c[k] for c, k in zip(THING_CLASSES.values(), row, strict=True)] == [
            getattr(thing, field) for field in THING_CLASSES
        ]
    assert (things[len(scene.things) :] == -1).all()
    assert [c[k] for c, k in zip(PAGE_CLASSES.values(), page, strict=True)] == [
        getattr(scene, field) for field in PAGE_CLASSES
    ]
