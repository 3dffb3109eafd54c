"""Which thing covers which part of a page: maps of pixels and of latent cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import skia

from ip2p_storybook.art_things import wear
from ip2p_storybook.draw import _figures, _surface
from ip2p_storybook.labels import PAGE_CLASSES, THING_CLASSES
from ip2p_storybook.scene import Scene

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A cell belongs to a thing that covers at least this share of its pixels.
MIN_COVER = 0.25


def thing_map(scene: Scene, size: int = 128) -> NDArray[np.uint8]:
    """The thing in front at each pixel: uint8 [size, size], 0 for none.

    Thing k of `scene.things` has number k + 1. This includes its wearable, but not its shadow and contour.
    """
    pixels, surface = _surface(size)
    canvas = surface.getCanvas()
    for figure in _figures(scene):
        number = scene.things.index(figure.thing) + 1
        paint = skia.Paint(Color=skia.Color(number, 0, 0), AntiAlias=False)
        worn = wear(figure.thing.kind, figure.thing.wears) if figure.thing.wears else None
        paths = [figure.art.silhouette]
        if worn:
            paths = [worn.outline_behind, figure.art.silhouette, worn.outline_before]
        for _, _, matrix in figure.matrices():
            canvas.save()
            canvas.concat(matrix)
            for path in paths:
                canvas.drawPath(path, paint)
            canvas.restore()
    return pixels[..., 0].copy()


def cell_map(pixels: NDArray[np.uint8], cells: int) -> NDArray[np.uint8]:
    """The thing in each cell of a `thing_map`: uint8 [cells, cells], with the same numbers.

    A cell belongs to the thing that covers most of it, if that is at least `MIN_COVER`.
    """
    side = len(pixels) // cells
    blocks = pixels.reshape(cells, side, cells, side).transpose(0, 2, 1, 3).reshape(cells, cells, -1)
    numbers = range(int(pixels.max()) + 1)
    cover = np.stack([(blocks == number).mean(-1) for number in numbers], axis=-1)
    cover[..., 0] = MIN_COVER - 1e-9
    return cover.argmax(-1).astype(np.uint8)


MAX_THINGS = 6  # a page of four after two additions


def scene_classes(scene: Scene) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """The classes of the things [MAX_THINGS, thing fields], -1 for none, and of the page [page fields].

    The fields and classes are in `labels.THING_CLASSES` and `labels.PAGE_CLASSES`. Raises ValueError for a
    page with more things.
    """
    things = np.full((MAX_THINGS, len(THING_CLASSES)), -1, np.int8)
    if len(scene.things) > MAX_THINGS:
        raise ValueError(f"a page of {len(scene.things)} things; at most {MAX_THINGS} have classes")
    for row, thing in zip(things, scene.things, strict=False):
        row[:] = [classes.index(getattr(thing, field)) for field, classes in THING_CLASSES.items()]
    page = [classes.index(getattr(scene, field)) for field, classes in PAGE_CLASSES.items()]
    return things, np.array(page, np.int8)
