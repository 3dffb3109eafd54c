"""The drawing pen: shapes from short texts, light, and the color rendering of each picture style.

Coordinates grow to the right and down. A page is the unit square; a kind is drawn in its own box,
about 100 units high, standing on y = 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import skia

from ip2p_storybook.scene import Scene

RGB = tuple[float, float, float]

# Styles with a line around every part, not only around the silhouette.
LINE_STYLES = ("pencil", "blueprint", "comic")
# The outward width of a silhouette's contour, as a fraction of the page height.
CONTOUR = {
    "plain": 0.0045,
    "pencil": 0.006,
    "watercolour": 0.004,
    "pixel art": 0.007,
    "blueprint": 0.005,
    "comic": 0.0085,
}

INK: RGB = (38, 34, 44)
WHITE: RGB = (255, 255, 255)


def mix(a: RGB, b: RGB, t: float) -> RGB:
    """a for t = 0, b for t = 1."""
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


def shade(c: RGB, t: float) -> RGB:
    """Lighter for t in 0..1 (1 is white), darker for t in -1..0 (-1 is black)."""
    return mix(c, WHITE, t) if t >= 0 else (c[0] * (1 + t), c[1] * (1 + t), c[2] * (1 + t))


def luma(c: RGB) -> float:
    return 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2]


@lru_cache(maxsize=4096)
def rgb(text: str) -> RGB:
    """'#rrggbb' as three numbers in 0..255."""
    return (float(int(text[1:3], 16)), float(int(text[3:5], 16)), float(int(text[5:7], 16)))


# --- shapes -------------------------------------------------------------------------------------


def curve(text: str) -> skia.Path:
    """A path from SVG's absolute commands M, L, Q, C and Z."""
    path = skia.Path()
    tokens = text.replace(",", " ").replace("Z", " Z ").split()
    i = 0
    command = "M"
    while i < len(tokens):
        token = tokens[i]
        if token[0].isalpha():
            command, rest = token[0], token[1:]
            if command == "Z":
                path.close()
                i += 1
                continue
            if rest:
                tokens[i] = rest
            else:
                i += 1
        n = {"M": 2, "L": 2, "Q": 4, "C": 6}[command]
        numbers = [float(v) for v in tokens[i : i + n]]
        i += n
        if command == "M":
            path.moveTo(*numbers)
            command = "L"
        elif command == "L":
            path.lineTo(*numbers)
        elif command == "Q":
            path.quadTo(*numbers)
        else:
            path.cubicTo(*numbers)
    return path


def oval(cx: float, cy: float, rx: float, ry: float | None = None) -> skia.Path:
    ry = rx if ry is None else ry
    return skia.Path.Oval(skia.Rect.MakeLTRB(cx - rx, cy - ry, cx + rx, cy + ry))


def box(x0: float, y0: float, x1: float, y1: float, r: float = 0.0) -> skia.Path:
    rect = skia.Rect.MakeLTRB(x0, y0, x1, y1)
    return skia.Path.RRect(skia.RRect.MakeRectXY(rect, r, r)) if r else skia.Path.Rect(rect)


def poly(*xy: float) -> skia.Path:
    points = [skia.Point(xy[i], xy[i + 1]) for i in range(0, len(xy), 2)]
    return skia.Path.Polygon(points, True)


def tilted(path: skia.Path, degrees: float, cx: float, cy: float) -> skia.Path:
    out = skia.Path(path)
    matrix = skia.Matrix()
    matrix.setRotate(degrees, cx, cy)
    out.transform(matrix)
    return out


def stroke(text: str, width: float) -> skia.Path:
    """The outline of a thick line with round ends."""
    paint = skia.Paint(
        Style=skia.Paint.kStroke_Style,
        StrokeWidth=width,
        StrokeCap=skia.Paint.kRound_Cap,
        StrokeJoin=skia.Paint.kRound_Join,
    )
    out = skia.Path()
    paint.getFillPath(curve(text), out)
    return out


def both(*paths: skia.Path) -> skia.Path:
    """The union of several shapes."""
    out = skia.Path()
    for path in paths:
        out.addPath(path)
    return out


@dataclass(frozen=True)
class Part:
    """One shape of a drawing: its path, its color role and its shading.

    `role` is 'body', 'light', 'dark', 'deep', 'pale' (all from the thing's color), 'patch' (contrasts with
    it), 'glass' (lit at night), or a fixed '#rrggbb'.
    `form` is 'flat', 'tall' (lighter above) or 'round' (lit from the upper left).
    """

    path: skia.Path
    role: str
    form: str = "flat"
    solid: bool = True  # part of the silhouette; not needed for parts inside it
    bounds: tuple[float, float, float, float] = field(init=False)
    small: bool = field(init=False)  # too small for visible shading

    def __post_init__(self) -> None:
        b = self.path.getBounds()
        object.__setattr__(self, "bounds", (b.left(), b.top(), b.right(), b.bottom()))
        object.__setattr__(self, "small", b.width() * b.height() < 300)


def union(parts: Sequence[Part]) -> skia.Path:
    """The silhouette of the solid parts."""
    whole = skia.Path()
    for part in parts:
        if part.solid:
            whole = skia.Op(whole, part.path, skia.PathOp.kUnion_PathOp)
    return whole


# --- light --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Light:
    """The light of a time and weather: factors and offsets of colors."""

    back: tuple[RGB, RGB]
    things: tuple[RGB, RGB]
    lamps: bool  # windows are lit
    shadow_lean: float  # sideways extent of a shadow, in heights
    shadow_depth: float  # and toward the viewer
    shadow_alpha: int


_BACK: dict[str, RGB] = {
    "morning": (1.0, 0.92, 0.88),
    "noon": (1.0, 1.0, 1.0),
    "sunset": (0.96, 0.68, 0.56),
    "night": (0.30, 0.36, 0.58),
}
_THINGS: dict[str, RGB] = {
    "morning": (1.0, 0.96, 0.92),
    "noon": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.87, 0.76),
    "night": (0.66, 0.69, 0.84),
}
_DIM = {"clear": 1.0, "cloudy": 0.92, "rain": 0.82, "snow": 0.95, "fog": 0.92}
_LEAN = {"morning": 0.7, "noon": 0.14, "sunset": -0.85, "night": 0.4}
_ALPHA = {"morning": 70, "noon": 80, "sunset": 76, "night": 90}
_HAZE: dict[str, RGB] = {
    "morning": (232, 226, 226),
    "noon": (226, 232, 236),
    "sunset": (226, 184, 164),
    "night": (76, 86, 122),
}


def haze(time: str) -> RGB:
    """The color of fog and of the far distance."""
    return _HAZE[time]


@lru_cache(maxsize=256)
def light_for(time: str, weather: str, side: int) -> Light:
    dim = _DIM[weather]
    b, t = _BACK[time], _THINGS[time]
    dim_things = 1 - (1 - dim) * 0.5
    fog = 0.42 if weather == "fog" else 0.0
    h = _HAZE[time]
    return Light(
        back=(
            (b[0] * dim * (1 - fog), b[1] * dim * (1 - fog), b[2] * dim * (1 - fog)),
            mix((0, 0, 0), h, fog),
        ),
        things=((t[0] * dim_things, t[1] * dim_things, t[2] * dim_things), (0.0, 0.0, 0.0)),
        lamps=time == "night",
        shadow_lean=_LEAN[time] * side * (1.0 if weather == "clear" else 0.55),
        shadow_depth=0.13 if time != "noon" else 0.10,
        shadow_alpha=int(_ALPHA[time] * (1.0 if weather == "clear" else 0.6)),
    )


# --- the pen ------------------------------------------------------------------------------------


class Pen:
    """Draws shapes on a canvas in the light and style of a scene."""

    def __init__(self, canvas: skia.Canvas, scene: Scene, light: Light) -> None:
        self.canvas = canvas
        self.style = scene.style
        self.light = light
        self.mul, self.add = light.back
        self.lines = scene.style in LINE_STYLES
        self.blueprint = scene.style == "blueprint"
        self.flip = False
        self._fill = skia.Paint(AntiAlias=True)
        self._band = skia.Paint(AntiAlias=False)
        self._line = skia.Paint(
            AntiAlias=True,
            Style=skia.Paint.kStroke_Style,
            StrokeCap=skia.Paint.kRound_Cap,
            StrokeJoin=skia.Paint.kRound_Join,
        )

    def use(self, light: tuple[RGB, RGB]) -> None:
        self.mul, self.add = light

    def ink(self, c: RGB, alpha: int = 255, *, lit: bool = True) -> int:
        """Colour c (0..255 each) in this light and style as ARGB; `lit` is False for light sources."""
        r, g, b = c
        if lit:
            m, a = self.mul, self.add
            r, g, b = r * m[0] + a[0], g * m[1] + a[1], b * m[2] + a[2]
        if self.blueprint:
            y = (0.299 * r + 0.587 * g + 0.114 * b) / 255
            r, g, b = 14 + 44 * y, 44 + 72 * y, 112 + 84 * y
        r = 0 if r < 0 else 255 if r > 255 else r
        g = 0 if g < 0 else 255 if g > 255 else g
        b = 0 if b < 0 else 255 if b > 255 else b
        return alpha << 24 | int(r + 0.5) << 16 | int(g + 0.5) << 8 | int(b + 0.5)

    def contour_colour(self, body: RGB) -> int:
        if self.style == "blueprint":
            return 0xFFF2F6FF
        if self.style in ("comic", "pencil"):
            return 0xFF18161C
        y = luma(body)
        if y < 70:
            return self.ink((176, 178, 192))
        return self.ink(shade(body, -0.5 if y < 215 else -0.45))

    # -- filling
    # Skia's gradient shaders take 20 ns per pixel on a CPU; a clip filled with flat bands takes a tenth.

    def _bands(
        self,
        path: skia.Path,
        bounds: tuple[float, float, float, float],
        stops: Sequence[tuple[float, int]],
        fine: int,
    ) -> None:
        """Fill a path with horizontal bands that fade from stop to stop, `fine` levels per band."""
        canvas, paint = self.canvas, self._band
        x0, x1 = bounds[0] - 1, bounds[2] + 1
        canvas.save()
        canvas.clipPath(path, True)
        for (ya, ca), (yb, cb) in pairwise(stops):
            ra, ga, ba = ca >> 16 & 255, ca >> 8 & 255, ca & 255
            dr, dg, db = (cb >> 16 & 255) - ra, (cb >> 8 & 255) - ga, (cb & 255) - ba
            n = max(abs(dr), abs(dg), abs(db)) // fine + 1
            top = ya if ya > stops[0][0] else min(ya, bounds[1]) - 1
            for i in range(n):
                t = (i + 0.5) / n
                low = ya + (yb - ya) * (i + 1) / n
                if i == n - 1 and yb >= stops[-1][0]:
                    low = max(low, bounds[3]) + 1
                paint.setColor(
                    0xFF000000
                    | int(ra + dr * t + 0.5) << 16
                    | int(ga + dg * t + 0.5) << 8
                    | int(ba + db * t + 0.5)
                )
                canvas.drawRect(skia.Rect.MakeLTRB(x0, top, x1, low), paint)
                top = low
        canvas.restore()

    def _rings(
        self, path: skia.Path, x: float, y: float, radius: float, colours: tuple[int, int, int]
    ) -> None:
        """Fill a path with rings around (x, y) that fade from the first color to the last one."""
        canvas, paint = self.canvas, self._band
        light, middle, dark = colours
        canvas.save()
        canvas.clipPath(path, True)
        canvas.drawColor(dark)
        for inner, outer, k0, k1, n in ((middle, dark, 0.5, 1.0, 5), (light, middle, 0.0, 0.5, 7)):
            for i in range(n):
                t = (i + 0.5) / n
                r = (outer >> 16 & 255) * (1 - t) + (inner >> 16 & 255) * t
                g = (outer >> 8 & 255) * (1 - t) + (inner >> 8 & 255) * t
                b = (outer & 255) * (1 - t) + (inner & 255) * t
                paint.setColor(0xFF000000 | int(r + 0.5) << 16 | int(g + 0.5) << 8 | int(b + 0.5))
                canvas.drawCircle(x, y, radius * (k1 - (k1 - k0) * i / n), paint)
        canvas.restore()

    def fill(
        self,
        path: skia.Path,
        c: RGB,
        below: RGB | None = None,
        *,
        lit: bool = True,
        line: bool = True,
        span: tuple[float, float] | None = None,
    ) -> None:
        """Fill a backdrop shape, fading from c above to `below` at the bottom of the span or shape."""
        if below is None or self.blueprint:
            paint = self._fill
            paint.setColor(self.ink(c, lit=lit))
            self.canvas.drawPath(path, paint)
        else:
            b = path.getBounds()
            bounds = (b.left(), b.top(), b.right(), b.bottom())
            y0, y1 = span or (bounds[1], bounds[3])
            self._bands(path, bounds, ((y0, self.ink(c, lit=lit)), (y1, self.ink(below, lit=lit))), 5)
        if line and self.lines:
            self.outline(path, 0.004 if self.style == "comic" else 0.003)

    def outline(self, path: skia.Path, width: float) -> None:
        paint = self._line
        paint.setStrokeWidth(width)
        paint.setColor({"blueprint": 0x90DCE8FF, "pencil": 0xB0303038}.get(self.style, 0xFF201C26))
        self.canvas.drawPath(path, paint)

    def dots(
        self,
        xy: Sequence[float],
        diameter: float,
        c: RGB,
        alpha: int = 255,
        *,
        lit: bool = True,
        square: bool = False,
    ) -> None:
        """Round or square dots at x0, y0, x1, y1, ..."""
        paint = self._line
        paint.setStrokeWidth(diameter)
        paint.setColor(self.ink(c, alpha, lit=lit))
        if square:
            paint.setStrokeCap(skia.Paint.kSquare_Cap)
        self.canvas.drawPoints(skia.Canvas.kPoints_PointMode, _points(xy), paint)
        if square:
            paint.setStrokeCap(skia.Paint.kRound_Cap)

    def dashes(
        self, xy: Sequence[float], width: float, c: RGB, alpha: int = 255, *, lit: bool = True
    ) -> None:
        """Line segments between successive pairs of points."""
        paint = self._line
        paint.setStrokeWidth(width)
        paint.setColor(self.ink(c, alpha, lit=lit))
        self.canvas.drawPoints(skia.Canvas.kLines_PointMode, _points(xy), paint)

    def glow(self, x: float, y: float, radius: float, c: RGB, alpha: int) -> None:
        """A soft round light that fades out, drawn as overlapping rings."""
        paint = self._fill
        n = 10
        keep = (1 - alpha / 255) ** (1 / n)
        paint.setColor(self.ink(c, round(255 * (1 - keep)), lit=False))
        for i in range(n):
            self.canvas.drawCircle(x, y, radius * (1 - i / n * 0.9), paint)

    def veil(self, y0: float, y1: float, c: RGB, alpha0: int, alpha1: int) -> None:
        """A translucent veil over the whole width, from y0 to y1."""
        paint = self._band
        n = abs(alpha1 - alpha0) // 6 + 1
        for i in range(n):
            paint.setColor(self.ink(c, round(alpha0 + (alpha1 - alpha0) * (i + 0.5) / n), lit=False))
            self.canvas.drawRect(
                skia.Rect.MakeLTRB(-0.01, y0 + (y1 - y0) * i / n, 1.01, y0 + (y1 - y0) * (i + 1) / n), paint
            )

    # -- things

    def role(self, role: str, body: RGB) -> tuple[RGB, bool]:
        """The color of a role for this body, and whether the scene's light affects it."""
        if role[0] == "#":
            return rgb(role), True
        if role == "body":
            return body, True
        if role == "glass":
            return ((255, 214, 96), False) if self.light.lamps else ((178, 222, 244), True)
        dark = luma(body) < 70
        if role == "light":
            return shade(body, 0.2 if not dark else 0.09), True
        if role == "pale":
            return shade(body, 0.55 if not dark else 0.24), True
        if role == "dark":
            return (shade(body, -0.16) if not dark else shade(body, 0.1)), True
        if role == "deep":
            return (shade(body, -0.34) if not dark else shade(body, 0.2)), True
        if role == "patch":
            return ((74, 62, 62) if luma(body) > 165 else (250, 246, 238)), True
        raise ValueError(f"unknown role {role!r}")

    def part(self, part: Part, body: RGB, width: float) -> None:
        """Draw one part of a thing; `width` is its line width in the units of the thing."""
        c, lit = self.role(part.role, body)
        if part.form == "flat" or self.blueprint or part.small:
            paint = self._fill
            paint.setColor(self.ink(c, lit=lit))
            self.canvas.drawPath(part.path, paint)
        else:
            x0, y0, x1, y1 = bounds = part.bounds
            dark = luma(c) < 70
            middle = self.ink(c, lit=lit)
            if part.form == "tall":
                light = self.ink(shade(c, 0.24 if not dark else 0.12), lit=lit)
                low = self.ink(shade(c, -0.13), lit=lit)
                self._bands(part.path, bounds, ((y0, light), (y0 + 0.45 * (y1 - y0), middle), (y1, low)), 8)
            else:
                light = self.ink(shade(c, 0.42 if not dark else 0.2), lit=lit)
                low = self.ink(shade(c, -0.16), lit=lit)
                w, h = x1 - x0, y1 - y0
                cx = x0 + w * (0.66 if self.flip else 0.34)
                self._rings(part.path, cx, y0 + h * 0.28, 0.75 * max(w, h), (light, middle, low))
        if self.lines and part.form != "flat":
            line = self._line
            line.setStrokeWidth(width)
            line.setColor({"blueprint": 0xFFE4ECFF, "pencil": 0xFF28282E}.get(self.style, 0xFF1C1A20))
            self.canvas.drawPath(part.path, line)
        elif self.blueprint and part.form == "flat":
            line = self._line
            line.setStrokeWidth(width * 0.6)
            line.setColor(0xC0DCE6FF)
            self.canvas.drawPath(part.path, line)

    def contour(self, silhouette: skia.Path, body: RGB, width: float) -> None:
        paint = self._line
        paint.setStrokeWidth(2 * width)
        paint.setColor(self.contour_colour(body))
        self.canvas.drawPath(silhouette, paint)

    def shadow(self, silhouette: skia.Path) -> None:
        paint = self._fill
        paint.setColor(self.light.shadow_alpha << 24 | 0x0A0C28)
        self.canvas.drawPath(silhouette, paint)


def _points(xy: Sequence[float]) -> list[skia.Point]:
    return [skia.Point(xy[i], xy[i + 1]) for i in range(0, len(xy), 2)]
