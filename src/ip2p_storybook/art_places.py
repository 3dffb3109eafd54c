"""Sky, hills, middle ground and foreground of the ten places, and the particles of the weather.

Everything here depends on the scene's seed, place, time and weather only, never on its things.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache

import skia

from ip2p_storybook.art_pen import RGB, Pen, both, box, haze, mix, oval, rgb, shade
from ip2p_storybook.scene import Scene, rng_for

_SKY: dict[str, tuple[RGB, RGB]] = {
    "morning": ((142, 196, 240), (255, 220, 196)),
    "noon": ((84, 172, 244), (204, 236, 255)),
    "sunset": ((112, 78, 158), (255, 146, 74)),
    "night": ((12, 18, 54), (46, 60, 122)),
}
_OVERCAST: dict[str, RGB] = {
    "morning": (196, 196, 202),
    "noon": (186, 196, 206),
    "sunset": (178, 138, 138),
    "night": (40, 46, 66),
}
_OVERCAST_SHARE = {"clear": 0.0, "cloudy": 0.55, "rain": 0.78, "snow": 0.6, "fog": 0.65}
_SNOW: RGB = (240, 245, 252)


def horizon_of(scene: Scene) -> float:
    return rng_for(scene.seed, "horizon").uniform(0.52, 0.6)


def sun_side(scene: Scene) -> int:
    """-1 if the morning sun is on the left, +1 if it is on the right."""
    return 1 if rng_for(scene.seed, "sun side").random() < 0.5 else -1


def _ridge(rng: random.Random, y: float, rise: float, n: int, *, sharp: bool = False) -> skia.Path:
    """A range of n hills (or peaks) over the width of the page, filled slightly below its base at y."""
    path = skia.Path()
    step = 1.3 / n
    x = -0.15 - rng.random() * step
    path.moveTo(x, y + 0.14)
    path.lineTo(x, y)
    while x < 1.05:
        h = rise * rng.uniform(0.55, 1.0)
        w = step * rng.uniform(0.8, 1.25)
        if sharp:
            path.lineTo(x + w * rng.uniform(0.42, 0.58), y - h)
            path.lineTo(x + w, y - h * 0.15)
        else:
            path.cubicTo(x + w * 0.3, y - h, x + w * 0.7, y - h, x + w, y - rise * 0.1)
        x += w
    path.lineTo(x, y + 0.14)
    path.close()
    return path


def _ground(p: Pen, h: float, top: RGB, bottom: RGB, rng: random.Random, swell: float = 0.012) -> None:
    path = skia.Path()
    path.moveTo(-0.02, 1.02)
    path.lineTo(-0.02, h)
    a, b = rng.uniform(-swell, swell), rng.uniform(-swell, swell)
    path.cubicTo(0.3, h + a - swell, 0.65, h + b + swell, 1.02, h + a)
    path.lineTo(1.02, 1.02)
    path.close()
    p.fill(path, top, bottom)


@lru_cache(maxsize=1)
def _unit_blob() -> skia.Path:
    parts = (
        oval(-0.28, -0.35, 0.24, 0.36),
        oval(0.02, -0.55, 0.28, 0.46),
        oval(0.3, -0.32, 0.22, 0.34),
        box(-0.42, -0.38, 0.42, 0, 0.19),
    )
    return _one(*parts)


def _one(*parts: skia.Path) -> skia.Path:
    """The outline of several shapes together, without inner lines."""
    whole = skia.Path()
    for part in parts:
        whole = skia.Op(whole, part, skia.PathOp.kUnion_PathOp)
    return whole


def _blob(x: float, y: float, w: float, h: float) -> skia.Path:
    """A low bush or cloud, w wide and h high, standing on y."""
    matrix = skia.Matrix()
    matrix.setAll(w, 0, x, 0, h, y, 0, 0, 1)
    path = skia.Path(_unit_blob())
    path.transform(matrix)
    return path


def _scatter(rng: random.Random, n: int, y0: float, y1: float) -> list[float]:
    out: list[float] = []
    for _ in range(n):
        out += [rng.uniform(0.02, 0.98), rng.uniform(y0, y1)]
    return out


def _snowy(scene: Scene, c: RGB, share: float = 0.72) -> RGB:
    return mix(c, _SNOW, share) if scene.weather == "snow" else c


# --- the sky ------------------------------------------------------------------------------------


def sky_colours(scene: Scene) -> tuple[RGB, RGB]:
    top, low = _SKY[scene.time]
    rng = rng_for(scene.seed, "sky")
    t = rng.uniform(-0.06, 0.06)
    top, low = shade(top, t), shade(low, min(t, 0.02))
    place = scene.place
    night = scene.time == "night"
    if place == "moon":
        top, low = mix(top, (6, 6, 16), 0.82), mix(low, (14, 14, 34), 0.66)
    elif place == "volcano":
        top, low = mix(top, (70, 36, 40), 0.5), mix(low, (200, 84, 50), 0.5 if not night else 0.4)
    elif place == "desert":
        low = mix(low, (255, 222, 150), 0.35 if not night else 0.08)
    elif place == "forest":
        low = mix(low, (206, 236, 190), 0.35 if not night else 0.05)
    elif place == "north pole":
        top, low = (
            mix(top, (150, 205, 230), 0.25 if not night else 0.05),
            mix(low, (232, 246, 250), 0.3 if not night else 0),
        )
    share = _OVERCAST_SHARE[scene.weather] * (0.6 if place == "moon" else 1.0)
    grey = _OVERCAST[scene.time]
    return mix(top, shade(grey, -0.1), share), mix(low, shade(grey, 0.12), share)


def sky(p: Pen, scene: Scene, h: float) -> None:
    top, low = sky_colours(scene)
    p.fill(box(-0.01, -0.01, 1.01, h + 0.08), top, low, lit=False, line=False)
    rng = rng_for(scene.seed, "heavens")
    side = sun_side(scene)
    jx, jy = rng.uniform(-0.05, 0.05), rng.uniform(-0.02, 0.02)
    stars = _scatter(rng, 26, 0.01, h - 0.04)
    weather, time = scene.weather, scene.time
    if (time == "night" or scene.place == "moon") and weather in ("clear", "cloudy", "snow"):
        shown = stars if weather == "clear" else stars[:20]
        bright = 255 if time == "night" else 170
        p.dots(shown[: len(shown) // 4 * 2], 0.009, (255, 250, 226), bright, lit=False)
        p.dots(shown[len(shown) // 4 * 2 :], 0.014, (255, 250, 226), bright, lit=False)
    if weather in ("clear", "cloudy"):
        if time == "night":
            x, y, r = 0.5 + side * 0.33 + jx, 0.15 + jy, 0.06
            p.glow(x, y, r * 2.6, (220, 226, 255), 90)
            p.fill(oval(x, y, r), (250, 246, 222), (226, 222, 200), lit=False)
            craters = both(oval(x - r * 0.3, y - r * 0.2, r * 0.2), oval(x + r * 0.3, y + r * 0.25, r * 0.26))
            p.fill(craters, (214, 208, 186), lit=False, line=False)
        else:
            x, y, r, core, edge = {
                "morning": (0.5 + side * 0.34, 0.30, 0.062, rgb("#fff3c0"), rgb("#ffd27a")),
                "noon": (0.5 + side * 0.26, 0.12, 0.066, rgb("#fff8cc"), rgb("#ffe05a")),
                "sunset": (0.5 - side * 0.32, h - 0.075, 0.085, rgb("#ffdf7a"), rgb("#ff7a3c")),
            }[time]
            x, y = x + jx, y + jy
            p.glow(x, y, r * 2.5, edge, 130)
            p.fill(oval(x, y, r), core, edge, lit=False)
    if scene.place == "moon":
        x, y = 0.5 - side * 0.22 + jy, 0.2 + jx * 0.5
        p.fill(oval(x, y, 0.075), rgb("#5aa8f0"), rgb("#2858b0"), lit=False)
        p.fill(
            both(oval(x - 0.025, y - 0.025, 0.03, 0.02), oval(x + 0.025, y + 0.025, 0.026, 0.018)),
            rgb("#68b868"),
            lit=False,
            line=False,
        )
    if scene.place == "north pole" and time == "night":
        _aurora(p, scene)
    _clouds(p, scene, h)


def _aurora(p: Pen, scene: Scene) -> None:
    rng = rng_for(scene.seed, "aurora")
    for colour, y in ((rgb("#3cd8a0"), 0.2), (rgb("#7a6cf0"), 0.32)):
        a, b = rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05)
        path = skia.Path()
        path.moveTo(-0.02, y + a)
        path.cubicTo(0.3, y - 0.12 + b, 0.6, y + 0.14 + a, 1.02, y - 0.06 + b)
        path.lineTo(1.02, y + 0.03 + b)
        path.cubicTo(0.6, y + 0.26 + a, 0.3, y + 0.0 + b, -0.02, y + 0.1 + a)
        path.close()
        p.fill(
            path,
            mix(colour, sky_colours(scene)[0], 0.35),
            mix(colour, sky_colours(scene)[0], 0.75),
            lit=False,
        )


def _clouds(p: Pen, scene: Scene, h: float) -> None:
    rng = rng_for(scene.seed, "clouds")
    n = {"clear": 2, "cloudy": 6, "rain": 7, "snow": 5, "fog": 2}[scene.weather]
    if scene.place == "moon" and scene.weather == "clear":
        n = 0
    t = scene.time
    white = {
        "morning": (255, 246, 240),
        "noon": (255, 255, 255),
        "sunset": (255, 206, 180),
        "night": (92, 102, 146),
    }[t]
    grey = {
        "morning": (176, 176, 188),
        "noon": (164, 174, 188),
        "sunset": (164, 118, 130),
        "night": (54, 60, 88),
    }[t]
    share = {"clear": 0.0, "cloudy": 0.35, "rain": 1.0, "snow": 0.3, "fog": 0.4}[scene.weather]
    top = mix(white, grey, share)
    if scene.weather == "rain":
        top = shade(top, -0.12)
    low = shade(mix(top, grey, 0.4), -0.04)
    for i in range(n):
        w = rng.uniform(0.2, 0.34) * (1.25 if n > 2 else 1.0)
        x = (i + rng.uniform(0.15, 0.85)) / n
        y = rng.uniform(0.1, max(0.16, h * 0.62)) if n <= 2 else rng.uniform(0.06, h * 0.5)
        p.fill(_blob(x, y, w, w * 0.42), top, low, lit=False)


# --- the ten places -----------------------------------------------------------------------------


def _meadow(p: Pen, s: Scene, h: float, rng: random.Random) -> None:
    g = shade((118, 196, 92), rng.uniform(-0.06, 0.06))
    p.fill(_ridge(rng, h + 0.02, 0.13, 2), _snowy(s, (150, 206, 150)), _snowy(s, (126, 190, 126)))
    p.fill(_ridge(rng, h + 0.05, 0.08, 3), _snowy(s, (136, 206, 112)), _snowy(s, g), span=(h - 0.04, h + 0.1))
    for _ in range(2):
        x = rng.uniform(0, 1)
        p.fill(
            _blob(x, h + 0.07, rng.uniform(0.12, 0.18), 0.07),
            _snowy(s, (84, 160, 84), 0.4),
            _snowy(s, (62, 130, 66), 0.3),
        )
    _ground(p, h + 0.07, _snowy(s, g), _snowy(s, (74, 150, 62)), rng, 0.02)
    spots = _scatter(rng, 18, h + 0.14, 0.98)
    p.dots(spots[:12], 0.02, _snowy(s, (255, 246, 250), 0.3))
    p.dots(spots[12:24], 0.02, _snowy(s, (255, 222, 90), 0.4))
    p.dots(spots[24:], 0.02, _snowy(s, (240, 130, 170), 0.4))
    p.dots(spots[:12], 0.008, (250, 200, 60))


def _beach(p: Pen, s: Scene, h: float, rng: random.Random) -> None:
    sea = shade((40, 140, 196), rng.uniform(-0.08, 0.08))
    p.fill(
        box(-0.02, h - 0.02, 1.02, h + 0.17), shade(sea, -0.12), shade(mix(sea, (110, 220, 214), 0.5), 0.1)
    )
    waves: list[float] = []
    for _ in range(8):
        x, y = rng.uniform(0, 1), rng.uniform(h + 0.01, h + 0.1)
        waves += [x, y, x + rng.uniform(0.05, 0.1), y]
    p.dashes(waves, 0.007, (214, 244, 250))
    x = rng.choice((-0.02, 0.84))
    p.fill(_blob(x + 0.1, h + 0.0, 0.3, 0.09), (96, 160, 110), (70, 130, 96))
    y = h + rng.uniform(0.11, 0.14)
    for colour, low, dy in (
        ((255, 255, 255), (255, 255, 255), -0.014),
        ((250, 226, 168), (230, 190, 120), 0.0),
    ):
        path = skia.Path()
        path.moveTo(-0.02, 1.02)
        path.lineTo(-0.02, y + dy)
        path.cubicTo(0.2, y + dy + 0.03, 0.3, y + dy - 0.03, 0.52, y + dy)
        path.cubicTo(0.7, y + dy + 0.03, 0.85, y + dy - 0.02, 1.02, y + dy + 0.01)
        path.lineTo(1.02, 1.02)
        path.close()
        p.fill(path, _snowy(s, colour, 0.5), _snowy(s, low, 0.6), line=dy == 0.0)
    spots = _scatter(rng, 9, y + 0.08, 0.98)
    p.dots(spots[:6], 0.024, (255, 240, 224))
    p.dots(spots[6:12], 0.022, (240, 150, 120))
    p.dots(spots[12:], 0.016, (204, 164, 104))


def _desert(p: Pen, s: Scene, h: float, rng: random.Random) -> None:
    sand = shade((240, 196, 120), rng.uniform(-0.05, 0.04))
    for _ in range(2):
        x, w, y = rng.uniform(0.05, 0.85), rng.uniform(0.1, 0.2), rng.uniform(0.1, 0.17)
        path = skia.Path.Polygon(
            [
                skia.Point(x - w * 0.15, h + 0.05),
                skia.Point(x + w * 0.1, h - y),
                skia.Point(x + w * 0.85, h - y),
                skia.Point(x + w * 1.2, h + 0.05),
            ],
            True,
        )
        p.fill(path, _snowy(s, (214, 126, 84), 0.4), _snowy(s, (188, 104, 72), 0.25))
        p.dashes([x + w * 0.02, h - y * 0.55, x + w * 0.95, h - y * 0.55], 0.01, (170, 88, 62))
    p.fill(
        _ridge(rng, h + 0.05, 0.09, 2),
        _snowy(s, shade(sand, 0.12)),
        _snowy(s, (226, 168, 96), 0.5),
        span=(h - 0.04, h + 0.12),
    )
    _ground(p, h + 0.1, _snowy(s, sand), _snowy(s, (214, 156, 86)), rng, 0.03)
    for _ in range(3):
        x, y, w = rng.uniform(0.03, 0.97), rng.uniform(h + 0.17, 0.96), rng.uniform(0.03, 0.05)
        p.fill(oval(x, y, w, w * 0.55), _snowy(s, (204, 146, 100), 0.4), (158, 104, 70))
    ripples: list[float] = []
    for _ in range(6):
        x, y = rng.uniform(0, 0.9), rng.uniform(h + 0.16, 0.98)
        ripples += [x, y, x + rng.uniform(0.08, 0.14), y]
    p.dashes(ripples, 0.007, (206, 150, 84))


def _pine(x: float, y: float, w: float, t: float) -> skia.Path:
    path = skia.Path()
    for i in range(3):
        k = 1 - 0.24 * i
        top, low = y - t * (0.5 + 0.25 * i), y - t * (0.1 + 0.25 * i)
        path.moveTo(x - w * 0.5 * k, low)
        path.lineTo(x, top)
        path.lineTo(x + w * 0.5 * k, low)
        path.close()
    return path


def _forest(p: Pen, s: Scene, h: float, rng: random.Random) -> None:
    far = both(
        *(_pine(i / 9 + rng.uniform(-0.03, 0.03), h + 0.05, 0.15, rng.uniform(0.3, 0.4)) for i in range(10))
    )
    p.fill(far, _snowy(s, (108, 168, 132), 0.4), _snowy(s, (84, 140, 104), 0.3))
    p.fill(
        box(-0.02, h, 1.02, h + 0.12),
        _snowy(s, (84, 134, 92), 0.4),
        _snowy(s, (58, 100, 62), 0.3),
        line=False,
    )
    n = 7
    xs = [(i + rng.uniform(0.2, 0.8)) / n for i in range(n)]
    p.dashes([v for x in xs for v in (x, h + 0.1, x, h - 0.02)], 0.02, (92, 66, 48))
    near = both(*(_pine(x, h + 0.08, 0.19, rng.uniform(0.4, 0.56)) for x in xs))
    p.fill(near, _snowy(s, (56, 122, 78), 0.45), _snowy(s, (36, 92, 60), 0.2))
    _ground(p, h + 0.08, _snowy(s, (92, 142, 72)), _snowy(s, (66, 96, 48)), rng)
    for _ in range(3):
        x = rng.uniform(0, 1)
        p.fill(
            _blob(x, rng.uniform(h + 0.12, h + 0.16), rng.uniform(0.1, 0.15), 0.05),
            _snowy(s, (70, 130, 64), 0.4),
            (50, 100, 52),
        )
    spots = _scatter(rng, 12, h + 0.18, 0.98)
    p.dots(spots[:12], 0.022, _snowy(s, (150, 104, 54), 0.3))
    p.dots(spots[12:], 0.018, _snowy(s, (186, 140, 64), 0.3))


def _city(p: Pen, s: Scene, h: float, rng: random.Random) -> None:
    lamps = p.light.lamps
    for layer in range(2):
        colours = (
            ((168, 178, 204), (150, 160, 190))
            if layer == 0
            else ((130, 132, 164), (186, 150, 140), (112, 140, 164))
        )
        x = -0.04
        windows: list[float] = []
        while x < 1.02:
            w = rng.uniform(0.1, 0.17)
            t = rng.uniform(0.2, 0.38) if layer == 0 else rng.uniform(0.1, 0.27)
            c = rng.choice(colours)
            p.fill(box(x, h - t, x + w, h + 0.12), _snowy(s, c, 0.15), shade(c, -0.12))
            if layer == 1:
                for row in range(int(t / 0.062)):
                    for col in range(2):
                        if rng.random() < 0.72:
                            windows += [x + w * (0.3 + 0.4 * col), h - t + 0.045 + row * 0.062]
            x += w + (0.0 if layer == 0 else rng.uniform(0.0, 0.06))
        if windows:
            p.dots(windows, 0.026, (255, 222, 120) if lamps else (206, 228, 244), lit=not lamps, square=True)
    p.fill(box(-0.02, h + 0.06, 1.02, 1.02), _snowy(s, (198, 192, 188), 0.6), _snowy(s, (176, 170, 168), 0.6))
    y = h + rng.uniform(0.11, 0.15)
    p.fill(box(-0.02, y, 1.02, y + 0.13), _snowy(s, (96, 98, 110), 0.45), _snowy(s, (84, 86, 98), 0.45))
    shift = rng.uniform(0, 0.2)
    p.dashes(
        [v for i in range(-1, 5) for v in (i * 0.24 + shift, y + 0.065, i * 0.24 + shift + 0.1, y + 0.065)],
        0.014,
        (250, 240, 200),
    )
    tiles = [
        v
        for i in range(6)
        for v in (i * 0.2 + shift * 0.5, 1.0, 0.5 + (i * 0.2 + shift * 0.5 - 0.5) * 0.8, y + 0.14)
    ]
    p.dashes(tiles, 0.006, _snowy(s, (160, 154, 152), 0.4))


def _mountains(p: Pen, s: Scene, h: float, rng: random.Random) -> None:
    p.fill(
        _ridge(rng, h + 0.03, 0.24, 4, sharp=True), (170, 184, 212), (190, 204, 220), span=(h - 0.24, h + 0.1)
    )
    x = -0.1 + rng.uniform(-0.06, 0.06)
    for _ in range(4):
        w, t = rng.uniform(0.3, 0.42), rng.uniform(0.24, 0.36)
        peak = x + w * rng.uniform(0.4, 0.6)
        foot = h + 0.08
        body = skia.Path.Polygon(
            [skia.Point(x - 0.04, foot), skia.Point(peak, h - t), skia.Point(x + w + 0.04, foot)], True
        )
        p.fill(body, (134, 140, 168), (104, 118, 134))
        k = 0.32
        lx, rx = peak + (x - 0.04 - peak) * k, peak + (x + w + 0.04 - peak) * k
        ty = h - t + (foot - h + t) * k
        cap = skia.Path.Polygon(
            [
                skia.Point(peak, h - t),
                skia.Point(rx, ty),
                skia.Point(peak + (rx - peak) * 0.4, ty - 0.025),
                skia.Point(peak, ty + 0.02),
                skia.Point(peak + (lx - peak) * 0.5, ty - 0.02),
                skia.Point(lx, ty),
            ],
            True,
        )
        p.fill(cap, (252, 253, 255))
        x += w * 0.72
    p.fill(
        _ridge(rng, h + 0.09, 0.05, 4),
        _snowy(s, (104, 156, 112)),
        _snowy(s, (92, 140, 98)),
        span=(h + 0.02, h + 0.16),
    )
    _ground(p, h + 0.11, _snowy(s, (132, 168, 104)), _snowy(s, (96, 128, 80)), rng)
    for _ in range(4):
        x, y, w = rng.uniform(0.02, 0.98), rng.uniform(h + 0.15, 0.97), rng.uniform(0.025, 0.05)
        rock = skia.Path.Polygon(
            [
                skia.Point(x - w, y),
                skia.Point(x - w * 0.6, y - w * 0.7),
                skia.Point(x + w * 0.3, y - w * 0.9),
                skia.Point(x + w, y),
            ],
            True,
        )
        p.fill(rock, _snowy(s, (176, 178, 186), 0.4), (124, 128, 138))


def _farm(p: Pen, s: Scene, h: float, rng: random.Random) -> None:
    p.fill(_ridge(rng, h + 0.02, 0.09, 2), _snowy(s, (176, 204, 126)), _snowy(s, (160, 190, 112)))
    x = rng.choice((rng.uniform(0.02, 0.2), rng.uniform(0.6, 0.78)))
    y = h + 0.05
    p.fill(box(x + 0.19, y - 0.2, x + 0.25, y, 0.02), (200, 204, 212), (160, 164, 176))
    p.fill(box(x, y - 0.1, x + 0.18, y), (196, 66, 56), (164, 48, 44))
    roof = skia.Path.Polygon(
        [
            skia.Point(x - 0.012, y - 0.1),
            skia.Point(x + 0.03, y - 0.16),
            skia.Point(x + 0.09, y - 0.185),
            skia.Point(x + 0.15, y - 0.16),
            skia.Point(x + 0.192, y - 0.1),
        ],
        True,
    )
    p.fill(roof, _snowy(s, (120, 66, 58)), _snowy(s, (100, 54, 50)))
    p.fill(box(x + 0.06, y - 0.075, x + 0.12, y), (250, 240, 226), line=False)
    p.dashes([x + 0.06, y, x + 0.12, y - 0.075, x + 0.06, y - 0.075, x + 0.12, y], 0.008, (196, 66, 56))
    _ground(p, h + 0.05, _snowy(s, (206, 186, 96)), _snowy(s, (158, 124, 62)), rng, 0.006)
    vx = rng.uniform(0.3, 0.7)
    rows: list[float] = []
    for i in range(-4, 6):
        rows += [vx + (i - 0.5) * 0.09, h + 0.07, vx + (i - 0.5) * 0.36, 1.02]
    p.dashes(rows, 0.018, _snowy(s, (132, 160, 66), 0.35))
    fence = h + 0.1
    p.dashes(
        [-0.02, fence - 0.035, 1.02, fence - 0.035, -0.02, fence - 0.01, 1.02, fence - 0.01],
        0.012,
        (248, 240, 226),
    )
    shift = rng.uniform(0, 0.1)
    p.dashes(
        [v for i in range(11) for v in (i * 0.1 + shift, fence - 0.055, i * 0.1 + shift, fence + 0.015)],
        0.016,
        (248, 240, 226),
    )


def _north_pole(p: Pen, s: Scene, h: float, rng: random.Random) -> None:
    p.fill(
        _ridge(rng, h + 0.04, 0.16, 3, sharp=True),
        (206, 228, 244),
        (166, 204, 232),
        span=(h - 0.12, h + 0.06),
    )
    p.fill(box(-0.02, h, 1.02, h + 0.1), (84, 152, 196), (116, 186, 216))
    for _ in range(2):
        x, w = rng.uniform(0, 0.9), rng.uniform(0.1, 0.16)
        berg = skia.Path.Polygon(
            [
                skia.Point(x - w * 0.5, h + 0.06),
                skia.Point(x - w * 0.25, h - 0.02),
                skia.Point(x + w * 0.1, h - 0.05),
                skia.Point(x + w * 0.3, h),
                skia.Point(x + w * 0.5, h + 0.06),
            ],
            True,
        )
        p.fill(berg, (246, 252, 255), (180, 216, 238))
    _ground(p, h + 0.08, (242, 248, 254), (206, 224, 242), rng, 0.02)
    x = rng.choice((0.14, 0.86)) + rng.uniform(-0.04, 0.04)
    y = h + 0.14
    dome = skia.Path()
    dome.moveTo(x - 0.1, y)
    dome.cubicTo(x - 0.1, y - 0.14, x + 0.1, y - 0.14, x + 0.1, y)
    dome.close()
    p.fill(dome, (250, 253, 255), (190, 214, 236))
    p.dashes(
        [x - 0.085, y - 0.045, x + 0.085, y - 0.045, x - 0.06, y - 0.08, x + 0.06, y - 0.08],
        0.006,
        (164, 194, 222),
    )
    p.fill(oval(x, y - 0.012, 0.026, 0.03), (70, 100, 140), line=False)
    for _ in range(3):
        x, y, w = rng.uniform(0.05, 0.95), rng.uniform(h + 0.2, 0.98), rng.uniform(0.06, 0.1)
        p.fill(oval(x, y, w, w * 0.22), (190, 212, 236), (226, 238, 250))


def _moon(p: Pen, s: Scene, h: float, rng: random.Random) -> None:
    grey = shade((188, 188, 196), rng.uniform(-0.05, 0.05))
    p.fill(
        _ridge(rng, h + 0.04, 0.1, 3),
        _snowy(s, (138, 138, 152), 0.5),
        _snowy(s, (158, 158, 170), 0.5),
        span=(h - 0.06, h + 0.1),
    )
    _ground(p, h + 0.04, _snowy(s, grey, 0.55), _snowy(s, (138, 138, 150), 0.5), rng, 0.02)
    for i in range(6):
        y = h + 0.09 + (i + rng.random()) * 0.058
        x, w = rng.uniform(0, 1), 0.03 + (y - h) * 0.17
        p.fill(oval(x, y, w, w * 0.36), _snowy(s, (112, 112, 126), 0.3), _snowy(s, (164, 164, 176), 0.3))
    p.dots(_scatter(rng, 8, h + 0.1, 0.98), 0.018, (126, 126, 138))


def _volcano(p: Pen, s: Scene, h: float, rng: random.Random) -> None:
    x = rng.choice((0.26, 0.5, 0.74)) + rng.uniform(-0.05, 0.05)
    top = h - rng.uniform(0.24, 0.3)
    smoke = _one(
        oval(x + 0.0, top - 0.05, 0.07, 0.05),
        oval(x + 0.06, top - 0.11, 0.09, 0.06),
        oval(x + 0.15, top - 0.16, 0.1, 0.06),
    )
    p.fill(smoke, (110, 98, 104), (150, 110, 104))
    p.glow(x, top, 0.17, (255, 120, 40), 160)
    p.fill(_ridge(rng, h + 0.04, 0.1, 3, sharp=True), (104, 74, 84), (92, 66, 74), span=(h - 0.08, h + 0.1))
    cone = skia.Path()
    cone.moveTo(x - 0.36, h + 0.08)
    cone.quadTo(x - 0.12, h - 0.04, x - 0.075, top)
    cone.lineTo(x + 0.075, top)
    cone.quadTo(x + 0.12, h - 0.04, x + 0.36, h + 0.08)
    cone.close()
    p.fill(cone, _snowy(s, (112, 78, 76), 0.25), (66, 48, 56))
    lava = skia.Path()
    lava.moveTo(x - 0.075, top)
    lava.lineTo(x + 0.075, top)
    lava.lineTo(x + 0.06, top + 0.08)
    lava.lineTo(x + 0.03, top + 0.05)
    lava.lineTo(x + 0.012, top + 0.19)
    lava.lineTo(x - 0.014, top + 0.07)
    lava.lineTo(x - 0.05, top + 0.13)
    lava.close()
    p.fill(lava, (255, 216, 80), (246, 84, 30), lit=False)
    _ground(p, h + 0.06, _snowy(s, (98, 78, 80), 0.5), _snowy(s, (66, 52, 60), 0.4), rng, 0.015)
    cracks: list[float] = []
    for _ in range(5):
        cx, cy = rng.uniform(0, 1), rng.uniform(h + 0.12, 0.97)
        mx, my = cx + rng.uniform(0.04, 0.08), cy + rng.uniform(-0.02, 0.02)
        cracks += [cx, cy, mx, my, mx, my, mx + rng.uniform(0.03, 0.07), my + rng.uniform(-0.025, 0.025)]
    p.dashes(cracks, 0.02, (214, 62, 28), lit=False)
    p.dashes(cracks, 0.009, (255, 190, 70), lit=False)
    for _ in range(3):
        rx, ry, w = rng.uniform(0.02, 0.98), rng.uniform(h + 0.14, 0.96), rng.uniform(0.025, 0.045)
        p.fill(oval(rx, ry, w, w * 0.6), _snowy(s, (120, 104, 108), 0.4), (58, 46, 54))


_PLACES: dict[str, Callable[[Pen, Scene, float, random.Random], None]] = {
    "meadow": _meadow, "beach": _beach, "desert": _desert, "forest": _forest, "city": _city,
    "mountains": _mountains, "farm": _farm, "north pole": _north_pole, "moon": _moon, "volcano": _volcano,
}  # fmt: skip


def backdrop(p: Pen, scene: Scene) -> None:
    """Paint everything behind the things."""
    h = horizon_of(scene)
    sky(p, scene, h)
    _PLACES[scene.place](p, scene, h, rng_for(scene.seed, "place", scene.place))
    if scene.weather == "fog":
        p.veil(h - 0.1, 1.0, haze(scene.time), 150, 30)


def weather_before(p: Pen, scene: Scene) -> None:
    """Paint the weather in front of the things."""
    rng = rng_for(scene.seed, "weather")
    night = scene.time == "night"
    if scene.weather == "rain":
        drops: list[float] = []
        lean = rng.choice((-1, 1)) * rng.uniform(0.012, 0.028)
        for i in range(34):
            x, y = (i * 0.618 + rng.random() * 0.06) % 1.0, rng.uniform(-0.05, 0.97)
            drops += [x, y, x + lean, y + 0.07]
        p.dashes(drops, 0.009, (222, 236, 252) if not night else (150, 172, 220), 165, lit=False)
    elif scene.weather == "snow":
        flakes: list[float] = []
        for i in range(44):
            flakes += [(i * 0.618 + rng.random() * 0.07) % 1.0, rng.uniform(0.0, 1.0)]
        c = (255, 255, 255) if not night else (206, 214, 240)
        p.dots(flakes[:44], 0.017, c, 235, lit=False)
        p.dots(flakes[44:], 0.026, c, 235, lit=False)
    elif scene.weather == "fog":
        p.veil(-0.01, 1.01, haze(scene.time), 64, 64)
