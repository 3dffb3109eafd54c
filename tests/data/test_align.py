"""Detection of shifts and crops between two pictures, on drawn pairs with exact edits."""

from functools import lru_cache

import numpy as np
import pytest
from PIL import Image

from ip2p.data.align import find_move
from ip2p_storybook.draw import draw
from ip2p_storybook.edits import sample_edit
from ip2p_storybook.scene import rng_for

SIZE = 128


@lru_cache
def drawn(kind, number):
    edit = sample_edit(rng_for("align", kind, number), kind)
    return tuple(Image.fromarray(draw(scene, SIZE)) for scene in (edit.before, edit.after))


def shifted(image, across, down):
    """A shifted copy; edge pixels are repeated and nothing wraps around."""
    padded = np.pad(np.asarray(image), ((16, 16), (16, 16), (0, 0)), mode="edge")
    return Image.fromarray(padded[16 - down : 16 - down + SIZE, 16 - across : 16 - across + SIZE])


def cropped(image, share, across=0.5, down=0.5):
    """A crop to 1 - share of each side, at a relative position, enlarged to the original size."""
    side = SIZE * (1 - share)
    left, top = across * (SIZE - side), down * (SIZE - side)
    box = (left, top, left + side, top + side)
    return image.resize(image.size, Image.Resampling.LANCZOS, box=box)


LOCAL = [(kind, number) for kind in ("recolour", "add", "remove", "put_on") for number in range(2)]


def test_aligned_pairs_are_not_reported():
    kinds = ("move", "bigger", "smaller", "count", "place", "style", "weather", "two", "replace", "time")
    assert [k for k in [(kind, n) for kind in kinds for n in range(6)] if find_move(*drawn(*k))] == []


@pytest.mark.parametrize(("across", "down"), [(8, 0), (0, -8), (-8, 8)])
def test_a_shift_of_8_pixels_is_found(across, down):
    moves = [find_move(before, shifted(after, across, down)) for before, after in (drawn(*k) for k in LOCAL)]
    found = [move for move in moves if move]
    assert len(found) >= 7
    for move in found:
        assert move.scale == pytest.approx(1, abs=0.03)
    exact = [m for m in found if np.allclose(m.shift, (across, down), atol=2) and "shifted by" in str(m)]
    assert len(exact) >= 6


@pytest.mark.parametrize("place", [(0.5, 0.5), (0, 1)])
def test_a_crop_of_10_percent_is_found(place):
    moves = [find_move(before, cropped(after, 0.1, *place)) for before, after in (drawn(*k) for k in LOCAL)]
    found = [move for move in moves if move]
    assert len(found) >= 7
    for move in found:
        assert move.scale == pytest.approx(1 / 0.9, abs=0.04)
    assert "cropped by 10% and enlarged" in {str(move) for move in found}


def test_a_picture_without_structure_gives_no_result():
    flat = Image.new("RGB", (SIZE, SIZE), "grey")
    assert find_move(flat, flat) is None
    before, _ = drawn("add", 0)
    assert find_move(before, flat) is None


def test_an_edge_alone_does_not_show_a_shift_along_it():
    stripe = Image.new("RGB", (SIZE, SIZE), "white")
    stripe.paste("black", (0, 40, SIZE, 80))
    assert find_move(stripe, shifted(stripe, 8, 0)) is None


def test_non_square_pictures_are_compared_too():
    before, after = (page.resize((SIZE * 2, SIZE)) for page in drawn("recolour", 0))
    assert find_move(before, after) is None
    moved = after.transform(after.size, Image.Transform.AFFINE, (1, 0, -12, 0, 1, 0))
    move = find_move(before, moved)
    assert move is not None and np.allclose(move.shift, (12, 0), atol=2)
