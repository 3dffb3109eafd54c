"""Pictures and masks of scenes.

`draw` paints back to front: backdrop, ground shadows, things, the weather before them; then the
style works on the pixels, each from a bounded neighbourhood. All that is random about a thing comes
from the scene's seed and the thing's `uid` alone, so that an edit touches only the pixels of
`thing_mask` of the things it names.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import skia
from PIL import Image, ImageFilter

from ip2p.storybook.art_pen import CONTOUR, RGB, Part, Pen, light_for, luma, shade
from ip2p.storybook.art_places import backdrop, sun_side, weather_before
from ip2p.storybook.art_things import Art, art, wear
from ip2p.storybook.scene import COLOURS, Scene, Thing, rng_for

MIN_SIZE, MAX_SIZE = 32, 1024

_HEIGHT = {"small": 0.24, "medium": 0.34, "large": 0.46}
_SLOT_X = {"left": 0.2, "middle": 0.5, "right": 0.8}
# Where a group's copies stand, back row first: (across, up) and the copies' share of the size.
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
    """A thing made ready to be drawn: its art, its own shade, and where each copy stands."""

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
        """For each copy its ground point and the way from the kind's box to the page, back to front."""
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
    for x, y, matrix in figure.matrices():
        cast = skia.Matrix()
        # A point h above the ground falls lean * h aside and depth * h towards the reader.
        cast.setAll(1, -light.shadow_lean, x_shift(x, y, light.shadow_lean), 0, -light.shadow_depth,
                    y + light.shadow_depth * y, 0, 0, 1)  # fmt: skip
        canvas.save()
        canvas.concat(cast)
        canvas.concat(matrix)
        pen.shadow(figure.art.silhouette)
        canvas.restore()


def x_shift(x: float, y: float, lean: float) -> float:
    """The offset that keeps the ground point (x, y) in place under a shear by `lean`."""
    return lean * y


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
# Each works on pixels from a bounded neighbourhood; _reach says how far it carries a change.


def _table(f: object, n: int = 256) -> np.ndarray:
    values = [f(i) for i in range(n)]  # type: ignore[operator]
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def _luma(rgba: np.ndarray) -> np.ndarray:
    y = rgba[..., 0] * np.uint16(77)
    y += rgba[..., 1] * np.uint16(150)
    y += rgba[..., 2] * np.uint16(29)
    y >>= 8
    return y.astype(np.uint8)


@lru_cache(maxsize=64)
def _hatching(size: int, phase: int) -> np.ndarray:
    """Two crossed families of slanted lines as darkness 0..255; the second bites in deep shade only."""
    v, u = np.mgrid[0:size, 0:size].astype(np.float64) / size
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * (30 * (0.8 * u + 0.6 * v) + phase / 8))
    return np.round(255 * wave**1.5).astype(np.uint16)


_PENCIL_TONE = _table(lambda y: 40 + 4 * max(0, y - 8) if y < 40 else min(253.0, 168 + 85 * ((y - 40) / 196) ** 0.9))
_PENCIL_HATCH = _table(lambda y: 58 * max(0.0, min(1.0, (210 - y) / 130)) if y > 40 else 28)


def _pencil(rgba: np.ndarray, scene: Scene) -> np.ndarray:
    y = _luma(rgba)
    dark = _PENCIL_HATCH[y] * _hatching(len(y), scene.seed % 8)
    dark >>= 8
    grey = _PENCIL_TONE[y].astype(np.int16)
    grey -= dark.astype(np.int16)
    out = np.clip(grey, 0, 255, out=grey).astype(np.uint8)
    return np.repeat(out[..., None], 3, axis=2)


@lru_cache(maxsize=16)
def _halftone(size: int) -> np.ndarray:
    """A slanted grid of soft-edged dots as darkness 0..255."""
    v, u = np.mgrid[0:size, 0:size].astype(np.float64) / size
    a, b = (u + v) * 24, (u - v) * 24
    wave = 0.5 + 0.25 * (np.cos(2 * np.pi * a) + np.cos(2 * np.pi * b))
    return np.round(255 * np.clip((wave - 0.62) * 5, 0, 1)).astype(np.uint16)


def _steps(y: int) -> float:
    """Five flat levels with short slopes between them, so that 1/255 in gives at most 5/255 out."""
    level, part = divmod(y / 255 * 4, 1)
    return 255 / 4 * (level + min(1.0, max(0.0, (part - 0.4) * 5)))


_COMIC_CHANGE = np.array([_steps(y) * 0.6 - y * 0.6 + 6 for y in range(256)]).round().astype(np.int16)
_COMIC_DOTS = _table(lambda y: 52 * max(0.0, min(1.0, (190 - y) / 40)) * max(0.0, min(1.0, (y - 30) / 30)))


def _comic(rgba: np.ndarray, scene: Scene) -> np.ndarray:
    y = _luma(rgba)
    dots = _COMIC_DOTS[y] * _halftone(len(y))
    dots >>= 8
    # Flat tones, hue kept: every channel moves by what brings the brightness to its level.
    change = _COMIC_CHANGE[y]
    change -= dots.astype(np.int16)
    out = _opaque(rgba) + change[..., None]
    return np.clip(out, 0, 255, out=out).astype(np.uint8)


def _paper(scene: Scene, size: int) -> np.ndarray:
    """The paper's unevenness, -1..1, the same at every size of picture."""
    noise = np.random.default_rng(scene.seed)
    coarse = Image.fromarray(noise.random((12, 12), np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    fine = Image.fromarray(noise.random((48, 48), np.float32)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(coarse) + np.asarray(fine) - 1.0


def _blur_radius(size: int) -> int:
    return max(1, round(size / 128))


def _watercolour(rgba: np.ndarray, scene: Scene) -> np.ndarray:
    size = len(rgba)
    r = _blur_radius(size)
    page = Image.fromarray(_opaque(rgba))
    soft_image = page.filter(ImageFilter.BoxBlur(r))
    soft = np.asarray(soft_image).astype(np.int16)
    wide = np.asarray(soft_image.filter(ImageFilter.BoxBlur(2 * r))).astype(np.int16)
    # Pigment gathers where colours meet; between edges the wash lets the paper through.
    edge = np.abs(soft - wide)
    wash = (108 + 18 * _paper(scene, size)).astype(np.int16)[..., None]
    out = ((soft - 252) * wash) >> 7
    out += 252
    out -= (edge * 3) >> 2
    return np.clip(out, 0, 255, out=out).astype(np.uint8)


_PIXEL_LEVELS = _table(lambda y: round(y / 255 * 7) / 7 * 255)


@lru_cache(maxsize=64)
def _cell_of(size: int, cells: int) -> np.ndarray:
    return (np.arange(size) * cells) // size


def _pixel_art(scene: Scene, size: int) -> np.ndarray:
    cells = min(_CELLS, size)
    fine = _paint(scene, 2 * cells)[..., :3].astype(np.uint16)
    mean = (fine[0::2, 0::2] + fine[1::2, 0::2] + fine[0::2, 1::2] + fine[1::2, 1::2] + 2) >> 2
    flat = _PIXEL_LEVELS[mean]
    cell = _cell_of(size, cells)
    return flat[cell][:, cell]


def _blueprint(rgba: np.ndarray, scene: Scene) -> np.ndarray:
    out = _opaque(rgba)
    size = len(out)
    width = max(1, size // 256)
    shift = (scene.seed % 97) / 97 / 16
    for k in range(16):
        at = int((k / 16 + shift) * size)
        for lines in (out[at : at + width], out[:, at : at + width]):
            lines += (255 - lines) // 8
    return out


def _opaque(rgba: np.ndarray) -> np.ndarray:
    """Without the last channel; three strided copies are four times as fast as one of a slice."""
    out = np.empty((*rgba.shape[:2], 3), np.uint8)
    for k in range(3):
        out[..., k] = rgba[..., k]
    return out


def _reach(style: str, size: int) -> int:
    """How many pixels from where the paint changed the picture may change."""
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
    rgba = _paint(scene, size)
    if style == "pencil":
        return _pencil(rgba, scene)
    if style == "comic":
        return _comic(rgba, scene)
    if style == "watercolour":
        return _watercolour(rgba, scene)
    if style == "blueprint":
        return _blueprint(rgba, scene)
    return _opaque(rgba)


def thing_mask(scene: Scene, index: int, size: int = 256) -> np.ndarray:
    """Where thing `index` (with what it wears and its shadow) may change the picture: bool [size, size].

    Outside it, the picture without the thing is equal to the pixel. Raises ValueError for a size
    outside 32 to 1024 and IndexError where there is no such thing.
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
        return blocks[cell][:, cell]
    return _grow(touched, _reach(scene.style, size))


def _grow(mask: np.ndarray, by: int) -> np.ndarray:
    image = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * by + 1))
    return np.asarray(image) > 0


__all__ = ["MAX_SIZE", "MIN_SIZE", "draw", "luma", "thing_mask"]
