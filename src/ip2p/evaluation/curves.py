"""Curves of one metric against another, as SVG, PNG and CSV: figures 8 and 10 of the paper."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ip2p.base.files import replacing, write_text

WIDTH, HEIGHT = 720, 480
LEFT, TOP, RIGHT, BOTTOM = 78, 24, WIDTH - 190, HEIGHT - 56
COLORS = ("#1f6fb2", "#c23b22", "#2e8b57", "#8a4fbf", "#d98c00", "#00868b", "#b0448c", "#5a5a5a")
TICKS = 5
# ("line", points, color, width), ("dot", x, y, radius, color) or ("text", x, y, text, color, anchor), in
# pixels of WIDTH x HEIGHT.
Shape = tuple[Any, ...]


def curve_points(
    summary: Sequence[Mapping[str, Any]], x: str, y: str
) -> dict[str, list[tuple[float | None, Mapping[str, float], Mapping[str, float]]]]:
    """For each variant, its (point, estimate of x, estimate of y), in order; empty variants are omitted."""
    found: dict[str, list[Any]] = {}
    for line in summary:
        one, other = line["metrics"].get(x), line["metrics"].get(y)
        if one is not None and other is not None:
            found.setdefault(line["name"], []).append((line["point"], one, other))
    return found


def draw_curves(summary: Sequence[Mapping[str, Any]], x: str, y: str, folder: Path) -> str | None:
    """Write curves-X-Y.svg, .png and .csv into a folder and return the SVG; None without points."""
    series = curve_points(summary, x, y)
    if not series:
        return None
    shapes = _shapes(series, x, y)
    stem, svg = f"curves-{x}-{y}", as_svg(shapes)
    write_text(folder / f"{stem}.svg", svg)
    with replacing(folder / f"{stem}.png") as temporary:
        curve_picture(shapes).save(temporary)
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["name", "point", *(f"{name}{end}" for name in (x, y) for end in ("", "_low", "_high"))])
    for name, points in series.items():
        for point, *both in points:
            cells = (each[end] for each in both for end in ("value", "low", "high"))
            table.writerow([name, "" if point is None else point, *("" if c is None else c for c in cells)])
    write_text(folder / f"{stem}.csv", file.getvalue())
    return svg


def _shapes(series: Mapping[str, Sequence[Any]], x: str, y: str) -> list[Shape]:
    every = [both for points in series.values() for _, *both in points]
    spans = []
    for axis in (0, 1):
        ends = [
            both[axis][end]
            for both in every
            for end in ("value", "low", "high")
            if both[axis][end] is not None
        ]
        low, high = min(ends), max(ends)
        room = (high - low or abs(high) or 1.0) * 0.06
        spans.append((low - room, high + room))

    def at(one: float, other: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = spans
        return LEFT + (RIGHT - LEFT) * (one - x0) / (x1 - x0), BOTTOM - (BOTTOM - TOP) * (other - y0) / (
            y1 - y0
        )

    shapes: list[Shape] = [("line", [(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], "#888888", 1)]
    for axis, (low, high) in enumerate(spans):
        for value in _ticks(low, high):
            a, b = at(value, value)
            if axis == 0:
                shapes.append(("line", [(a, TOP), (a, BOTTOM)], "#eeeeee", 1))
                shapes.append(("text", a, BOTTOM + 16, f"{value:g}", "#444444", "middle"))
            else:
                shapes.append(("line", [(LEFT, b), (RIGHT, b)], "#eeeeee", 1))
                shapes.append(("text", LEFT - 8, b, f"{value:g}", "#444444", "end"))
    shapes.append(("text", (LEFT + RIGHT) / 2, HEIGHT - 16, f"{x}", "#222222", "middle"))
    shapes.append(("text", 8, 12, f"{y}", "#222222", "start"))
    for number, (name, points) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        places = [at(one["value"], other["value"]) for _, one, other in points]
        for (_, one, other), place in zip(points, places, strict=True):
            for which, other_axis in ((one, False), (other, True)):
                if which["low"] is not None:
                    ends = [
                        at(one["value"], which[end]) if other_axis else at(which[end], other["value"])
                        for end in ("low", "high")
                    ]
                    shapes.append(("line", ends, color + "66", 1))
            shapes.append(("dot", *place, 4, color))
        if len(places) > 1:
            shapes.append(("line", places, color, 2))
            for (point, *_), place in ((points[0], places[0]), (points[-1], places[-1])):
                shapes.append(("text", place[0] + 7, place[1] - 8, f"{point:g}", color, "start"))
        row = TOP + 8 + 20 * number
        shapes += [("dot", RIGHT + 16, row, 4, color), ("text", RIGHT + 26, row, name, "#222222", "start")]
    return shapes


def _ticks(low: float, high: float) -> list[float]:
    """About TICKS round numbers in the range of an axis."""
    rough = (high - low) / TICKS
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * each for each in (1, 2, 5, 10) if unit * each >= rough)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def as_svg(shapes: Sequence[Shape]) -> str:
    """The shapes as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for kind, *rest in shapes:
        if kind == "line":
            points, color, width = rest
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>')
        elif kind == "dot":
            a, b, radius, color = rest
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{radius}" fill="{color}"/>')
        else:
            a, b, text, color, anchor = rest
            parts.append(
                f'<text x="{a:.1f}" y="{b:.1f}" fill="{color}" text-anchor="{anchor}" '
                f'dominant-baseline="middle">{html.escape(text)}</text>'
            )
    return "\n".join([*parts, "</svg>\n"])


def curve_picture(shapes: Sequence[Shape], scale: int = 2) -> Image.Image:
    """The shapes as a picture."""
    image = Image.new("RGB", (WIDTH * scale, HEIGHT * scale), "white")
    pen, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(13 * scale)
    for kind, *rest in shapes:
        if kind == "line":
            points, color, width = rest
            pen.line([(a * scale, b * scale) for a, b in points], color, width * scale)
        elif kind == "dot":
            a, b, radius, color = rest
            pen.ellipse([(each + sign * radius) * scale for sign in (-1, 1) for each in (a, b)], color)
        else:
            a, b, text, color, anchor = rest
            pen.text(
                (a * scale, b * scale),
                text,
                color,
                font,
                anchor={"middle": "mm", "end": "rm", "start": "lm"}[anchor],
            )
    return image
