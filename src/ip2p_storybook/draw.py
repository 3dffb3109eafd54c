"""Pictures and masks of scenes.

`draw` paints back to front: backdrop, ground shadows, things, the weather in front of them. Then the style
filters the pixels, each from a bounded neighborhood. The randomness of a thing depends only on the scene's
seed and the thing's `uid`, so that an edit affects only the pixels in `thing_mask` of its things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import skia
from PIL import Image, ImageChops, ImageFilter

from ip2p_storybook.art_pen import CONTOUR, RGB, Part, Pen, light_for, shade
from ip2p_storybook.art_places import backdrop, sun_side, weather_before
from ip2p_storybook.art_things import Art, art, wear
from ip2p_storybook.scene import COLOURS, Scene, Thing, rng_for

MIN_SIZE, MAX_SIZE = 32, 1024

_HEIGHT = {"small": 0.24, "medium": 0.34, "large": 0.46}
_SLOT_X = {"left": 0.2, "middle": 0.5, "right": 0.8}
# The positions of the copies in a group, back row first: (across, up), and their relative size.
_GROUPS: dict[int, tuple[float, tuple[tuple[float, float], ...]]] = {
    1: (1.0, ((0.0, 0.0),)),
    2: (0.62, ((-0.29, 0.03), (0.29, 0.0))),
    3: (0.52, ((0.0, 0.34), (-0.28, 0.0), (0.28, 0.0))),
    4: (0.5, ((-0.22, 0.36), (0.30, 0.38), (-0.30, 0.0), (0.22, 0.0))),
}
# Cells of a page in pixel art, across and down.
_CELLS = 64


# --- where things stand -------------------------------------------------------------------------


class _Figure:
    """A thing prepared for drawing: its art, its shade, and the position of each copy."""

    def __init__(self, scene: Scene, thing: Thing) -> None:
        rng = rng_for(scene.seed, "thing", thing.uid)
        jitter_x, jitter_y = rng.uniform(-0.025, 0.025), rng.random()
        self.flip = rng.random() < 0.5
        wide, high = rng.uniform(0.94, 1.06), rng.uniform(0.95, 1.05)
        tone = rng.uniform(-0.05, 0.05)
        self.thing = thing
        self.art: Art = art(thing.kind)
        self.colour: RGB = shade(COLOURS[thing.colour], tone)
        size = _HEIGHT[thing.size] * (0.86 if thing.in_sky else 1.0)
        scale = size / max(100.0, 0.88 * self.art.width)
        share, spots = _GROUPS[thing.count]
        self.sx, self.sy = scale * share * wide, scale * share * high
        half = self.sx * self.art.width / 2 + (max(abs(x) for x, _ in spots) * size)
        x = _SLOT_X[thing.slot] + jitter_x
        if half < 0.49:
            x = min(max(x, half + 0.01), 0.99 - half)
        rise = max(up for _, up in spots) * size
        if thing.in_sky:
            top = 0.03 + 0.09 * jitter_y
            self.ground = top + rise + 100 * self.sy
        else:
            self.ground = 0.83 + 0.11 * jitter_y
        self.depth = self.ground - (1.0 if thing.in_sky else 0.0)
        self.spots = tuple((x + dx * size, self.ground - up * size) for dx, up in spots)

    def matrices(self) -> Iterator[tuple[float, float, skia.Matrix]]:
        """For each copy, back to front, its ground point and the matrix from the kind's box to the page."""
        for x, y in self.spots:
            sx = -self.sx if self.flip else self.sx
            matrix = skia.Matrix()
            matrix.setAll(sx, 0, x - sx * self.art.width / 2, 0, self.sy, y - 100 * self.sy, 0, 0, 1)
            yield x, y, matrix


def _figures(scene: Scene) -> list[_Figure]:
    return sorted((_Figure(scene, t) for t in scene.things), key=lambda f: (f.depth, f.thing.uid))


# --- painting -----------------------------------------------------------------------------------


def _paint_shadow(pen: Pen, figure: _Figure) -> None:
    if figure.thing.in_sky:
        return
    light = pen.light
    canvas = pen.canvas
    for _, y, matrix in figure.matrices():
        cast = skia.Matrix()
        # The shadow of a point at height h is at lean * h sideways and depth * h toward the viewer.
        cast.setAll(
            1,
            -light.shadow_lean,
            light.shadow_lean * y,
            0,
            -light.shadow_depth,
            y + light.shadow_depth * y,
            0,
            0,
            1,
        )
        canvas.save()
        canvas.concat(cast)
        canvas.concat(matrix)
        pen.shadow(figure.art.silhouette)
        canvas.restore()


def _paint_parts(pen: Pen, parts: tuple[Part, ...], body: RGB, width: float) -> None:
    for part in parts:
        pen.part(part, body, width)


def _paint_thing(pen: Pen, figure: _Figure) -> None:
    canvas, a, body = pen.canvas, figure.art, figure.colour
    pen.flip = figure.flip
    per_unit = 1 / figure.sy
    reach = CONTOUR[pen.style] * per_unit
    line = 0.0042 * per_unit * (1.3 if pen.style == "comic" else 1.0)
    worn = wear(figure.thing.kind, figure.thing.wears) if figure.thing.wears else None
    for _, _, matrix in figure.matrices():
        canvas.save()
        canvas.concat(matrix)
        if worn and worn.behind:
            pen.contour(worn.outline_behind, (120.0, 40.0, 50.0), reach)
            _paint_parts(pen, worn.behind, body, line)
        pen.contour(a.silhouette, body, reach)
        _paint_parts(pen, a.parts, body, line)
        if worn:
            pen.contour(worn.outline_before, (70.0, 60.0, 70.0), reach * 0.8)
            _paint_parts(pen, worn.before, body, line)
        canvas.restore()


def _paint_things(pen: Pen, figures: list[_Figure]) -> None:
    for figure in figures:
        _paint_shadow(pen, figure)
    pen.use(pen.light.things)
    for figure in figures:
        _paint_thing(pen, figure)


def _surface(size: int) -> tuple[np.ndarray, skia.Surface]:
    pixels = np.zeros((size, size, 4), np.uint8)
    surface = skia.Surface(pixels, colorType=skia.kRGBA_8888_ColorType, alphaType=skia.kPremul_AlphaType)
    surface.getCanvas().scale(size, size)
    return pixels, surface


def _paint(scene: Scene, size: int) -> np.ndarray:
    pixels, surface = _surface(size)
    pen = Pen(surface.getCanvas(), scene, light_for(scene.time, scene.weather, sun_side(scene)))
    backdrop(pen, scene)
    _paint_things(pen, _figures(scene))
    weather_before(pen, scene)
    return pixels


# --- styles -------------------------------------------------------------------------------------
# Each filter uses a bounded neighborhood; _reach is the distance over which it spreads a change.
# Pillow's 8-bit operations are exact, and several times as fast here as numpy's.


def _table(f: Callable[[int], float]) -> list[int]:
    """A function of brightness, for Image.point."""
    return [min(255, max(0, round(f(y)))) for y in range(256)]


def _three(grey: Image.Image) -> Image.Image:
    return Image.merge("RGB", (grey, grey, grey))


@lru_cache(maxsize=64)
def _hatching(size: int, phase: int) -> Image.Image:
    """Slanted hatching lines as darkness 0..255."""
    v, u = np.mgrid[0:size, 0:size].astype(np.float64) / size
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * (30 * (0.8 * u + 0.6 * v) + phase / 8))
    return Image.fromarray(np.round(255 * wave**1.5).astype(np.uint8))


_PENCIL_TONE = _table(
    lambda y: 40 + 4 * max(0, y - 8) if y < 40 else min(253.0, 168 + 85 * ((y - 40) / 196) ** 0.9)
)
_PENCIL_HATCH = _table(lambda y: 46 * max(0.0, min(1.0, (210 - y) / 130)) if y > 40 else 24)


def _pencil(page: Image.Image, scene: Scene) -> Image.Image:
    grey = page.convert("L")
    hatching = ImageChops.multiply(grey.point(_PENCIL_HATCH), _hatching(page.width, scene.seed % 8))
    return _three(ImageChops.subtract(grey.point(_PENCIL_TONE), hatching))


@lru_cache(maxsize=16)
def _halftone(size: int) -> Image.Image:
    """A slanted grid of soft-edged dots as darkness 0..255."""
    v, u = np.mgrid[0:size, 0:size].astype(np.float64) / size
    a, b = (u + v) * 24, (u - v) * 24
    wave = 0.5 + 0.25 * (np.cos(2 * np.pi * a) + np.cos(2 * np.pi * b))
    return Image.fromarray(np.round(255 * np.clip((wave - 0.62) * 5, 0, 1)).astype(np.uint8))


def _steps(y: int) -> float:
    """Five flat levels with short slopes between them, so that 1/255 in gives at most 5/255 out."""
    level, part = divmod(y / 255 * 4, 1)
    return 255 / 4 * (level + min(1.0, max(0.0, (part - 0.4) * 5)))


_COMIC_LIGHTER = _table(lambda y: 0.6 * (_steps(y) - y) + 6)
_COMIC_DARKER = _table(lambda y: 0.6 * (y - _steps(y)) - 6)
_COMIC_DOTS = _table(lambda y: 52 * max(0.0, min(1.0, (190 - y) / 40)) * max(0.0, min(1.0, (y - 30) / 30)))


def _comic(page: Image.Image) -> Image.Image:
    grey = page.convert("L")
    # Flat tones that keep the hue: every channel is shifted by the change of the brightness.
    dots = ImageChops.multiply(grey.point(_COMIC_DOTS), _halftone(page.width))
    darker = ImageChops.add(grey.point(_COMIC_DARKER), dots)
    return ImageChops.subtract(ImageChops.add(page, _three(grey.point(_COMIC_LIGHTER))), _three(darker))


def _wash(scene: Scene, size: int) -> Image.Image:
    """The amount of pigment on the uneven paper, 0..255, the same at every picture size."""
    noise = np.random.default_rng(scene.seed)
    coarse = Image.fromarray(noise.integers(172, 249, (12, 12), np.uint8))
    fine = Image.fromarray(noise.integers(172, 249, (48, 48), np.uint8))
    return Image.blend(
        coarse.resize((size, size), Image.Resampling.BICUBIC),
        fine.resize((size, size), Image.Resampling.BILINEAR),
        0.5,
    )


def _blur_radius(size: int) -> int:
    return max(1, round(size / 220))


def _watercolour(page: Image.Image, scene: Scene) -> Image.Image:
    size = page.width
    r = _blur_radius(size)
    soft = page.filter(ImageFilter.BoxBlur(r))
    wide = soft.filter(ImageFilter.BoxBlur(2 * r))
    washed = Image.composite(soft, Image.new("RGB", (size, size), (252, 252, 252)), _wash(scene, size))
    # Pigment gathers where colors meet; between edges the paper shows through.
    return ImageChops.subtract(washed, ImageChops.difference(soft, wide))


_PIXEL_LEVELS = np.array(_table(lambda y: round(y / 255 * 7) / 7 * 255), np.uint8)


@lru_cache(maxsize=64)
def _cell_of(size: int, cells: int) -> np.ndarray:
    return (np.arange(size) * cells) // size


def _pixel_art(scene: Scene, size: int) -> np.ndarray:
    cells = min(_CELLS, size)
    fine = _paint(scene, 2 * cells)[..., :3].astype(np.uint16)
    mean = (fine[0::2, 0::2] + fine[1::2, 0::2] + fine[0::2, 1::2] + fine[1::2, 1::2] + 2) >> 2
    flat = _PIXEL_LEVELS[mean]
    cell = _cell_of(size, cells)
    return flat.take(cell, axis=0).take(cell, axis=1)


def _blueprint(out: np.ndarray, scene: Scene) -> np.ndarray:
    size = len(out)
    width = max(1, size // 256)
    shift = (scene.seed % 97) / 97 / 16
    for k in range(16):
        at = int((k / 16 + shift) * size)
        for lines in (out[at : at + width], out[:, at : at + width]):
            lines += (255 - lines) // 8
    return out


def _opaque(rgba: np.ndarray) -> np.ndarray:
    """Drop the last channel; three strided copies are four times as fast as one copy of a slice."""
    out = np.empty((*rgba.shape[:2], 3), np.uint8)
    for k in range(3):
        out[..., k] = rgba[..., k]
    return out


def _reach(style: str, size: int) -> int:
    """The distance in pixels over which a change of the paint may affect the picture."""
    return 3 * _blur_radius(size) + 2 if style == "watercolour" else 2


def _check_size(size: int) -> None:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"picture size {size} is outside {MIN_SIZE} to {MAX_SIZE}")


def draw(scene: Scene, size: int = 256) -> np.ndarray:
    """The picture of a scene: uint8 [size, size, 3], for any size from 32 to 1024.

    Raises ValueError for a size outside that range.
    """
    _check_size(size)
    style = scene.style
    if style == "pixel art":
        return _pixel_art(scene, size)
    pixels = _opaque(_paint(scene, size))
    if style == "plain":
        return pixels
    if style == "blueprint":
        return _blueprint(pixels, scene)
    page = Image.fromarray(pixels)
    if style == "pencil":
        page = _pencil(page, scene)
    elif style == "comic":
        page = _comic(page)
    else:
        page = _watercolour(page, scene)
    return np.array(page)


def thing_mask(scene: Scene, index: int, size: int = 256) -> np.ndarray:
    """Where thing `index` (with its wearable and shadow) may affect the picture: bool [size, size].

    Outside it, the picture without the thing has identical pixels. Raises ValueError for a size outside 32
    to 1024 and IndexError if there is no such thing.
    """
    _check_size(size)
    figure = _Figure(scene, scene.things[index])
    cells = min(_CELLS, size) if scene.style == "pixel art" else 0
    pixels, surface = _surface(2 * cells if cells else size)
    pen = Pen(surface.getCanvas(), scene, light_for(scene.time, scene.weather, sun_side(scene)))
    _paint_things(pen, [figure])
    touched = pixels[..., 3] > 0
    if cells:
        grown = _grow(touched, 1)
        blocks = grown[0::2, 0::2] | grown[1::2, 0::2] | grown[0::2, 1::2] | grown[1::2, 1::2]
        cell = _cell_of(size, cells)
        return blocks.take(cell, axis=0).take(cell, axis=1)
    return _grow(touched, _reach(scene.style, size))


def _grow(mask: np.ndarray, by: int) -> np.ndarray:
    image = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * by + 1))
    return np.asarray(image) > 0
