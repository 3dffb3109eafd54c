"""The 32 kinds and the five things to wear, as lists of parts in a box 100 units high.

Side views face right. The color of a thing fills most of it; everything else is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import skia

from ip2p_storybook.art_pen import Part, both, box, curve, oval, poly, stroke, tilted, union

INK = "#26222c"
CREAM = "#f8f0e0"
PINK = "#f2a0ac"
SKIN = "#f4c8a0"
GOLD = "#f6c636"
WOOD = "#7a5230"
GREY = "#8c8c98"


@dataclass(frozen=True)
class Art:
    """The parts of a kind, the width of its box, and the anchors of wearables."""

    width: float
    parts: tuple[Part, ...]
    silhouette: skia.Path
    head: tuple[float, float, float] = (0, 0, 0)  # x, top, width of the head
    eyes: tuple[float, float, float] = (0, 0, 0)  # x, y, width over both eyes
    neck: tuple[float, float, float] = (0, 0, 0)  # x, y, width
    back: tuple[float, float] | None = None  # a side view's rump (x, y), where a cape ends


Parts = list[Part]


def outer(path: skia.Path, role: str, form: str = "flat") -> Part:
    """A part that the silhouette needs."""
    return Part(path, role, form)


def inner(path: skia.Path, role: str, form: str = "flat") -> Part:
    """A part inside the silhouette."""
    return Part(path, role, form, solid=False)


def _eye(x: float, y: float, r: float, look: float = 0.25) -> Parts:
    return [
        inner(oval(x, y, r, r * 1.1), "#ffffff"),
        inner(oval(x + r * look, y + r * 0.1, r * 0.62, r * 0.72), INK),
    ]


# --- animals ------------------------------------------------------------------------------------


def _cat() -> Art:
    parts = [
        outer(stroke("M56 92 C82 94 84 70 72 60", 9), "body", "tall"),
        outer(curve("M19 96 C12 72 24 50 39 50 C54 50 66 72 59 96 Q39 103 19 96Z"), "body", "tall"),
        inner(oval(39, 76, 10, 14), "pale"),
        outer(oval(29, 95, 9, 5), "light", "tall"),
        outer(oval(49, 95, 9, 5), "light", "tall"),
        outer(poly(14, 38, 13, 4, 37, 18), "body", "tall"),
        outer(poly(64, 38, 65, 4, 41, 18), "body", "tall"),
        inner(poly(19, 24, 18, 11, 28, 18), PINK),
        inner(poly(59, 24, 60, 11, 50, 18), PINK),
        outer(oval(39, 35, 27, 22), "body", "round"),
        inner(
            both(poly(36, 14, 42, 14, 39, 23), poly(28, 16, 33, 15, 32, 22), poly(50, 16, 45, 15, 46, 22)),
            "deep",
        ),
        inner(oval(28.5, 34, 6.5, 7.5), "#d8f08c"),
        inner(oval(49.5, 34, 6.5, 7.5), "#d8f08c"),
        inner(oval(28.5, 34.5, 2.8, 6), INK),
        inner(oval(49.5, 34.5, 2.8, 6), INK),
        inner(poly(35.5, 42, 42.5, 42, 39, 46.5), PINK),
        inner(stroke("M33 49 Q36.5 52 39 47 Q41.5 52 45 49", 1.6), INK),
        inner(
            both(
                stroke("M24 45 L8 42", 1.5),
                stroke("M24 48 L9 50", 1.5),
                stroke("M54 45 L70 42", 1.5),
                stroke("M54 48 L69 50", 1.5),
            ),
            "patch",
        ),
    ]
    return _art(78, parts, head=(39, 15, 42), eyes=(39, 34, 38), neck=(39, 57, 34))


def _dog() -> Art:
    parts = [
        outer(stroke("M16 52 C4 46 2 34 8 24", 8), "body", "tall"),
        outer(box(16, 62, 28, 100, 5), "dark", "tall"),
        outer(box(60, 62, 72, 100, 5), "dark", "tall"),
        outer(box(10, 42, 80, 78, 17), "body", "tall"),
        outer(box(24, 64, 36, 100, 5), "body", "tall"),
        outer(box(68, 60, 80, 100, 5), "body", "tall"),
        inner(oval(34, 52, 13, 8), "deep"),
        outer(curve("M58 52 C58 20 72 8 86 10 C100 12 104 24 102 36 L80 62Z"), "body", "round"),
        outer(box(80, 30, 116, 49, 9), "light", "tall"),
        inner(curve("M94 48 C94 62 106 62 106 48Z"), "#ee6a7c"),
        outer(oval(113, 33, 6, 5), INK),
        outer(curve("M70 12 C54 10 50 40 60 50 C72 50 78 30 76 16Z"), "deep", "tall"),
        *_eye(89, 25, 5.2),
        inner(stroke("M88 46 Q100 51 110 46", 1.6), INK),
    ]
    return _art(120, parts, head=(84, 12, 38), eyes=(89, 25, 32), neck=(71, 53, 34), back=(14, 46))


def _rabbit() -> Art:
    ear = curve("M18 40 C4 18 6 2 14 1 C24 0 30 18 30 38Z")
    ear2 = curve("M46 40 C60 18 58 2 50 1 C40 0 34 18 34 38Z")
    parts = [
        outer(oval(57, 86, 9), "#ffffff", "round"),
        outer(ear, "body", "tall"),
        outer(ear2, "body", "tall"),
        inner(curve("M19 34 C10 18 11 7 15 6 C21 6 25 20 25 34Z"), PINK),
        inner(curve("M45 34 C54 18 53 7 49 6 C43 6 39 20 39 34Z"), PINK),
        outer(oval(32, 78, 24, 21), "body", "tall"),
        inner(oval(32, 80, 12, 14), "pale"),
        outer(oval(17, 96, 13, 5.5), "light", "tall"),
        outer(oval(47, 96, 13, 5.5), "light", "tall"),
        outer(oval(32, 46, 22, 18), "body", "round"),
        *_eye(23.5, 43, 5),
        *_eye(40.5, 43, 5, -0.25),
        inner(both(oval(27, 54, 6.5, 5), oval(37, 54, 6.5, 5)), "pale"),
        inner(box(28.5, 56, 35.5, 63, 1), "#ffffff"),
        inner(poly(28.5, 49, 35.5, 49, 32, 53), "#e8748a"),
    ]
    return _art(66, parts, head=(32, 30, 36), eyes=(32, 43, 34), neck=(32, 64, 32))


def _duck() -> Art:
    parts = [
        outer(both(stroke("M44 88 L44 97 L52 97", 4.5), stroke("M58 88 L58 97 L66 97", 4.5)), "#f08c1e"),
        outer(
            curve(
                "M2 50 C14 58 24 52 40 54 C56 54 60 46 60 36 L86 36 C86 56 92 64 84 78 C76 92 54 94 40 92 "
                "C18 90 4 72 2 50Z"
            ),
            "body",
            "tall",
        ),
        outer(curve("M80 24 L106 28 C108 34 100 38 80 37Z"), "#f59a23", "tall"),
        outer(oval(72, 26, 19, 20), "body", "round"),
        outer(curve("M18 64 C32 56 52 58 60 66 C56 82 34 84 24 76Z"), "dark", "tall"),
        inner(stroke("M30 74 Q42 78 54 70", 2), "deep"),
        *_eye(78, 21, 5.2),
        inner(stroke("M88 32 L104 31", 1.6), "#b8641a"),
    ]
    return _art(108, parts, head=(71, 7, 36), eyes=(77, 21, 32), neck=(72, 47, 30), back=(14, 58))


def _cow() -> Art:
    parts = [
        outer(stroke("M12 38 C2 46 4 58 6 66", 4), "body"),
        outer(oval(6, 70, 4.5, 6), "deep"),
        outer(both(box(20, 62, 31, 97), box(72, 62, 83, 97)), "dark", "tall"),
        outer(oval(56, 74, 10, 8), PINK),
        outer(box(10, 32, 92, 76, 15), "body", "tall"),
        outer(both(box(12, 60, 24, 97), box(78, 60, 90, 97)), "body", "tall"),
        outer(
            both(
                box(12, 93, 24, 100, 1),
                box(78, 93, 90, 100, 1),
                box(20, 93, 31, 100, 1),
                box(72, 93, 83, 100, 1),
            ),
            INK,
        ),
        inner(both(oval(34, 44, 13, 9), oval(62, 62, 12, 8)), "patch"),
        outer(
            both(
                curve("M90 20 C82 16 82 6 86 2 C88 10 92 12 98 14Z"),
                curve("M112 20 C120 16 120 6 116 2 C114 10 110 12 104 14Z"),
            ),
            CREAM,
        ),
        outer(both(oval(80, 24, 9, 5), oval(122, 24, 9, 5)), "dark", "flat"),
        outer(curve("M84 18 C88 10 114 10 118 18 L114 52 C112 60 90 60 88 52Z"), "body", "round"),
        inner(curve("M97 13 L107 13 L103 34 L100 34Z"), "patch"),
        outer(oval(101, 52, 17, 11), "#f6b4b0", "tall"),
        inner(both(oval(95, 51, 2.4, 3.2), oval(107, 51, 2.4, 3.2)), "#8c4a4e"),
        *_eye(93, 28, 5),
        *_eye(109, 28, 5, -0.25),
    ]
    return _art(132, parts, head=(101, 13, 34), eyes=(101, 28, 34), neck=(96, 65, 34), back=(14, 36))


def _pig() -> Art:
    parts = [
        outer(stroke("M12 52 C2 50 2 38 9 40 C14 44 4 48 2 42", 3.4), "dark"),
        outer(both(box(22, 78, 35, 100, 3), box(66, 78, 79, 100, 3)), "dark", "tall"),
        outer(oval(50, 60, 43, 31), "body", "tall"),
        outer(both(box(30, 80, 43, 100, 3), box(74, 76, 87, 100, 3)), "body", "tall"),
        outer(both(poly(66, 30, 62, 8, 82, 22), poly(92, 22, 110, 9, 104, 32)), "dark", "tall"),
        outer(oval(86, 46, 25, 25), "body", "round"),
        outer(oval(96, 53, 13, 10.5), "deep", "flat"),
        inner(oval(96, 52, 11, 8.5), "light"),
        inner(both(oval(92, 52, 2.4, 4), oval(100, 52, 2.4, 4)), INK),
        *_eye(79, 39, 5),
        *_eye(97, 37, 5),
        inner(stroke("M84 64 Q92 69 101 65", 1.8), INK),
    ]
    return _art(114, parts, head=(87, 22, 38), eyes=(88, 38, 36), neck=(76, 70, 34), back=(10, 48))


def _elephant() -> Art:
    parts = [
        outer(stroke("M10 40 C2 48 4 58 3 66", 4), "dark"),
        outer(both(box(30, 66, 46, 100, 3), box(66, 66, 82, 100, 3)), "dark", "tall"),
        outer(
            curve("M6 56 C4 24 30 14 52 14 C82 14 94 30 92 56 C92 76 80 84 50 84 C20 84 8 76 6 56Z"),
            "body",
            "tall",
        ),
        outer(both(box(12, 62, 30, 100, 3), box(56, 66, 73, 100, 3)), "body", "tall"),
        inner(
            both(
                oval(16, 98, 2.6, 2.4), oval(22, 98, 2.6, 2.4), oval(61, 98, 2.6, 2.4), oval(67, 98, 2.6, 2.4)
            ),
            CREAM,
        ),
        outer(stroke("M104 42 C116 54 114 70 112 80 C110 92 122 94 126 84", 12), "body", "tall"),
        outer(oval(94, 34, 24, 25), "body", "round"),
        outer(curve("M102 58 C104 72 114 72 120 62 C112 64 110 58 110 52Z"), CREAM),
        outer(curve("M84 18 C62 4 48 20 54 40 C58 58 74 64 82 52 C90 44 90 28 84 18Z"), "dark", "tall"),
        inner(curve("M79 24 C66 16 58 26 62 40 C66 52 74 54 78 46 C84 38 84 30 79 24Z"), PINK),
        *_eye(100, 28, 5.2),
    ]
    return _art(132, parts, head=(95, 9, 36), eyes=(100, 28, 30), neck=(84, 62, 36), back=(10, 34))


def _fox() -> Art:
    parts = [
        outer(curve("M26 72 C4 78 -2 50 8 22 C12 10 22 4 28 2 C34 24 42 44 34 60Z"), "body", "tall"),
        inner(curve("M10 18 C14 9 22 4 28 2 C31 12 34 20 35 28 C28 20 20 26 10 18Z"), "#fffaf0"),
        outer(both(box(32, 70, 41, 99, 3), box(76, 70, 85, 99, 3)), "dark", "tall"),
        outer(curve("M24 66 C26 50 46 52 60 50 C80 46 94 52 92 68 C90 82 40 86 26 78Z"), "body", "tall"),
        outer(both(box(24, 66, 34, 99, 3), box(84, 64, 94, 99, 3)), "body", "tall"),
        inner(
            both(
                box(24, 86, 34, 99, 3), box(84, 86, 94, 99, 3), box(32, 88, 41, 99, 3), box(76, 88, 85, 99, 3)
            ),
            INK,
        ),
        outer(both(poly(70, 34, 66, 4, 88, 20), poly(92, 20, 110, 3, 110, 32)), "body", "tall"),
        inner(both(poly(72, 24, 70, 11, 80, 19), poly(100, 19, 107, 10, 107, 22)), INK),
        outer(
            curve(
                "M64 32 C70 16 108 14 114 30 C116 42 106 48 124 52 C126 58 112 64 96 62 C78 62 62 50 64 32Z"
            ),
            "body",
            "round",
        ),
        inner(curve("M76 56 C88 44 106 52 122 52 C126 58 112 63 96 62 C88 62 80 60 76 56Z"), "#fffaf0"),
        outer(oval(123, 53, 5, 4.4), INK),
        *_eye(83, 36, 5),
        *_eye(103, 35, 5),
    ]
    return _art(130, parts, head=(90, 19, 36), eyes=(93, 36, 36), neck=(82, 65, 34), back=(30, 56))


# --- people -------------------------------------------------------------------------------------


def _face(x: float, y: float, r: float) -> Parts:
    return [
        outer(oval(x, y, r, r * 1.02), SKIN, "tall"),
        inner(
            both(
                oval(x - r * 0.58, y + r * 0.38, r * 0.2, r * 0.14),
                oval(x + r * 0.58, y + r * 0.38, r * 0.2, r * 0.14),
            ),
            PINK,
        ),
        inner(both(oval(x - r * 0.38, y, r * 0.15, r * 0.2), oval(x + r * 0.38, y, r * 0.15, r * 0.2)), INK),
        inner(
            stroke(f"M{x - r * 0.32} {y + r * 0.44} Q{x} {y + r * 0.72} {x + r * 0.32} {y + r * 0.44}", 1.8),
            "#b0403c",
        ),
    ]


def _girl() -> Art:
    hair = "#8a4a22"
    parts = [
        outer(
            both(
                curve("M16 18 C0 18 2 36 5 42 C12 40 16 32 18 26Z"),
                curve("M52 18 C68 18 66 36 63 42 C56 40 52 32 50 26Z"),
            ),
            hair,
            "tall",
        ),
        outer(both(box(24, 82, 32, 97, 3), box(36, 82, 44, 97, 3)), "light"),
        outer(both(oval(26, 97, 7, 3.6), oval(42, 97, 7, 3.6)), "deep"),
        outer(both(oval(7, 66, 4.5), oval(61, 66, 4.5)), SKIN),
        outer(both(stroke("M24 48 L9 63", 10), stroke("M44 48 L59 63", 10)), "light", "tall"),
        outer(curve("M24 42 L44 42 C50 56 60 72 64 86 C50 92 18 92 4 86 C8 72 18 56 24 42Z"), "body", "tall"),
        inner(curve("M7 79 C24 85 44 85 61 79 L64 86 C50 92 18 92 4 86Z"), "light"),
        outer(curve("M16 30 C12 8 24 3 34 3 C44 3 56 8 52 30 C50 40 18 40 16 30Z"), hair, "tall"),
        *_face(34, 26, 15),
        inner(curve("M18 25 C18 8 30 7 34 8 C42 6 50 10 50 25 C44 22 40 16 38 13 C34 19 24 22 18 25Z"), hair),
        outer(both(oval(14, 19, 4.2), oval(54, 19, 4.2)), "body"),
    ]
    return _art(68, parts, head=(34, 8, 36), eyes=(34, 26, 29), neck=(34, 45, 27))


def _boy() -> Art:
    hair = "#3c2a20"
    parts = [
        outer(both(oval(23, 97, 9, 4), oval(41, 97, 9, 4)), "deep"),
        outer(both(box(17, 64, 30, 96, 3), box(34, 64, 47, 96, 3)), "dark", "tall"),
        outer(both(oval(5, 68, 5), oval(59, 68, 5)), SKIN),
        outer(both(stroke("M17 49 L7 64", 11), stroke("M47 49 L57 64", 11)), "body", "tall"),
        outer(box(14, 42, 50, 74, 8), "body", "tall"),
        inner(both(box(16, 52, 48, 58, 1)), "pale"),
        outer(both(oval(15, 28, 4), oval(49, 28, 4)), SKIN),
        outer(curve("M15 28 C10 6 24 4 32 4 C42 3 54 8 49 28Z"), hair, "tall"),
        *_face(32, 27, 15.5),
        inner(curve("M16 24 C15 8 26 5 34 5 C46 5 50 14 48 24 C44 20 42 16 42 15 C34 20 24 14 16 24Z"), hair),
        outer(poly(30, 6, 34, 0, 38, 7), hair),
    ]
    return _art(64, parts, head=(32, 7, 35), eyes=(32, 27, 30), neck=(32, 46, 28))


def _queen() -> Art:
    hair = "#d8a03c"
    parts = [
        outer(stroke("M66 40 L72 92", 3.2), GOLD),
        outer(oval(65.5, 36, 5), "#e84878", "round"),
        outer(
            curve("M26 40 L46 40 C50 54 66 78 70 97 C54 101 18 101 2 97 C6 78 22 54 26 40Z"), "body", "tall"
        ),
        inner(curve("M33 46 L39 46 L46 97 L26 97Z"), "light"),
        inner(curve("M3 91 C22 97 50 97 69 91 L70 97 C54 101 18 101 2 97Z"), "#fffaf0"),
        outer(both(stroke("M25 47 L10 63", 10), stroke("M47 47 L62 58", 10)), "body", "tall"),
        outer(both(oval(8, 66, 4.4), oval(66, 61, 4.4)), SKIN),
        outer(both(oval(36, 42, 16, 5)), "#fffaf0"),
        outer(
            curve("M20 30 C16 8 30 8 36 8 C42 8 56 8 52 30 C54 36 50 40 46 40 L26 40 C22 40 18 36 20 30Z"),
            hair,
            "tall",
        ),
        *_face(36, 27, 13),
        inner(
            curve("M23 25 C23 12 32 11 36 13 C40 11 49 12 49 25 C45 22 42 20 36 16 C30 20 27 22 23 25Z"), hair
        ),
        outer(poly(25, 12, 24, 1, 30, 6, 36, 0, 42, 6, 48, 1, 47, 12), "#e4e8f2", "tall"),
        inner(oval(36, 7.5, 2), "#e84878"),
    ]
    return _art(74, parts, head=(36, 12, 34), eyes=(36, 27, 26), neck=(36, 44, 28))


def _wizard() -> Art:
    parts = [
        outer(stroke("M66 30 L70 98", 3.6), WOOD),
        outer(oval(65.5, 25, 6.5), "#6ce4f4", "round"),
        outer(
            curve("M24 46 L48 46 C52 60 62 84 64 98 C50 101 20 101 8 98 C10 84 20 60 24 46Z"), "body", "tall"
        ),
        outer(
            both(
                curve("M24 48 C12 54 4 66 2 74 L14 78 C20 70 26 64 30 60Z"),
                curve("M48 48 C58 52 66 58 72 64 L64 74 C56 68 48 64 42 60Z"),
            ),
            "dark",
            "tall",
        ),
        outer(both(oval(7, 77, 4.6), oval(68, 69, 4.6)), SKIN),
        *_face(36, 40, 12),
        outer(curve("M24 41 C26 47 46 47 48 41 C52 58 42 74 36 80 C30 74 20 58 24 41Z"), "#f4f4f8", "tall"),
        inner(stroke("M31 47.5 Q36 51 41 47.5", 1.8), "#b0403c"),
        outer(curve("M12 34 C22 26 24 10 42 0 C44 8 46 22 60 34 C50 39 22 39 12 34Z"), "body", "tall"),
        inner(curve("M12 34 C22 30 50 30 60 34 C50 39 22 39 12 34Z"), "deep"),
        inner(_star(36, 19, 5.2), GOLD),
        inner(both(_star(22, 88, 4.5), _star(50, 88, 4.5)), GOLD),
    ]
    return _art(76, parts, head=(36, 30, 34), eyes=(36, 40, 25), neck=(36, 54, 28))


# --- vehicles -----------------------------------------------------------------------------------


def _wheels(y: float, r: float, *xs: float) -> Parts:
    return [
        outer(both(*(oval(x, y, r) for x in xs)), "#34343e"),
        inner(both(*(oval(x, y, r * 0.5) for x in xs)), "#c8ccd4"),
    ]


def _car() -> Art:
    parts = [
        outer(curve("M34 56 C42 30 48 26 60 26 L88 26 C100 26 106 36 116 56Z"), "body", "tall"),
        inner(curve("M46 54 C50 38 54 34 62 34 L73 34 L73 54Z"), "glass"),
        inner(curve("M79 54 L79 34 L88 34 C95 34 100 42 105 54Z"), "glass"),
        outer(
            curve("M4 84 C0 64 6 56 30 54 L118 53 C140 55 148 64 146 84 Q144 88 138 88 L12 88 Q6 88 4 84Z"),
            "body",
            "tall",
        ),
        inner(box(68, 62, 80, 65, 1.5), "deep"),
        inner(box(4, 78, 146, 82, 2), "dark"),
        inner(oval(140, 68, 6, 5), "#fff0a0"),
        inner(oval(8, 68, 4, 5), "#e04038"),
        *_wheels(86, 14, 36, 114),
    ]
    return _art(150, parts)


def _bus() -> Art:
    parts = [
        outer(box(3, 20, 149, 86, 9), "body", "tall"),
        inner(
            both(
                box(13, 31, 33, 51, 3),
                box(40, 31, 60, 51, 3),
                box(67, 31, 87, 51, 3),
                box(94, 31, 114, 51, 3),
            ),
            "glass",
        ),
        inner(box(121, 30, 143, 80, 3), "deep"),
        inner(box(123, 32, 141, 54, 2), "glass"),
        inner(box(3, 60, 119, 66), "pale"),
        inner(oval(146, 76, 4, 5), "#fff0a0"),
        *_wheels(87, 13, 34, 98),
    ]
    return _art(152, parts)


def _truck() -> Art:
    parts = [
        outer(box(4, 78, 150, 88, 2), "#50505c"),
        outer(box(2, 18, 98, 80, 4), "body", "tall"),
        inner(both(box(24, 24, 28, 76), box(48, 24, 52, 76), box(72, 24, 76, 76)), "dark"),
        outer(curve("M104 36 L128 36 C134 36 138 44 142 56 L152 60 L152 84 L104 84Z"), "body", "tall"),
        inner(curve("M111 42 L126 42 C130 44 133 50 135 57 L111 57Z"), "glass"),
        inner(box(110, 64, 118, 67, 1), "deep"),
        inner(oval(149, 70, 4, 5), "#fff0a0"),
        *_wheels(88, 12, 22, 48, 128),
    ]
    return _art(154, parts)


def _train() -> Art:
    parts = [
        outer(both(oval(106, 8, 11, 7), oval(90, 5, 8, 5), oval(119, 13, 7, 5)), "#f0f0f4", "tall"),
        outer(curve("M102 48 L105 30 L101 22 L119 22 L115 30 L118 48Z"), "dark", "tall"),
        outer(box(52, 42, 136, 78, 14), "body", "tall"),
        outer(both(curve("M72 44 C72 32 88 32 88 44Z")), GOLD),
        outer(box(8, 26, 56, 80, 2), "body", "tall"),
        outer(box(2, 18, 62, 28, 4), "dark", "tall"),
        inner(box(17, 36, 46, 56, 3), "glass"),
        inner(both(box(74, 42, 78, 78), box(96, 42, 100, 78)), "deep"),
        outer(oval(137, 58, 6, 8), "#fff0a0"),
        outer(poly(124, 80, 138, 80, 152, 98, 124, 98), "dark", "tall"),
        outer(box(4, 76, 136, 84, 2), "dark"),
        outer(both(oval(30, 84, 15.5), oval(66, 86, 13), oval(97, 86, 13)), "#34343e"),
        inner(both(oval(30, 84, 8), oval(66, 86, 6.5), oval(97, 86, 6.5)), "#c8ccd4"),
        inner(stroke("M30 84 L97 86", 4), "#8c8c98"),
    ]
    return _art(152, parts)


# --- buildings ----------------------------------------------------------------------------------


def _house() -> Art:
    parts = [
        outer(box(70, 8, 82, 36), "deep", "tall"),
        outer(box(10, 46, 92, 100), "body", "tall"),
        outer(poly(0, 50, 51, 6, 102, 50), "dark", "tall"),
        inner(
            both(stroke("M20 42 L82 42", 1.6), stroke("M32 31 L70 31", 1.6), stroke("M43 21 L59 21", 1.6)),
            "deep",
        ),
        inner(box(43, 66, 60, 100, 1), WOOD, "tall"),
        inner(oval(56, 84, 1.8), GOLD),
        inner(both(box(17, 60, 36, 79), box(67, 60, 86, 79)), "#fffaf0"),
        inner(
            both(
                box(19, 62, 26, 69),
                box(27.5, 62, 34, 69),
                box(19, 70.5, 26, 77),
                box(27.5, 70.5, 34, 77),
                box(69, 62, 76, 69),
                box(77.5, 62, 84, 69),
                box(69, 70.5, 76, 77),
                box(77.5, 70.5, 84, 77),
            ),
            "glass",
        ),
    ]
    return _art(102, parts)


def _battlement(x0: float, x1: float, y: float, n: int, height: float = 7) -> skia.Path:
    """A row of n merlons from x0 to x1, standing on y."""
    step = (x1 - x0) / (2 * n - 1)
    return both(*(box(x0 + 2 * i * step, y - height, x0 + (2 * i + 1) * step, y + 1) for i in range(n)))


def _castle() -> Art:
    parts = [
        outer(stroke("M55 20 L55 2", 1.8), WOOD),
        outer(poly(55, 2, 72, 6.5, 55, 11), "deep"),
        outer(both(box(40, 26, 70, 60), _battlement(38, 72, 27, 4, 6)), "dark", "tall"),
        outer(both(box(22, 56, 88, 100), _battlement(28, 82, 57, 5, 6)), "body", "tall"),
        outer(both(box(4, 40, 30, 100), _battlement(1, 33, 41, 3, 8), box(1, 40, 33, 47)), "body", "tall"),
        outer(
            both(box(80, 40, 106, 100), _battlement(77, 109, 41, 3, 8), box(77, 40, 109, 47)), "body", "tall"
        ),
        inner(curve("M43 100 L43 80 C43 68 67 68 67 80 L67 100Z"), "#4a3424"),
        inner(both(stroke("M51 73 L51 99", 1.4), stroke("M59 73 L59 99", 1.4)), "#8a6844"),
        inner(both(box(13, 54, 21, 68, 4), box(89, 54, 97, 68, 4), box(51, 35, 59, 48, 4)), "glass"),
    ]
    return _art(110, parts)


def _tent() -> Art:
    parts = [
        outer(stroke("M60 26 L60 12", 2.4), WOOD),
        outer(poly(60, 10, 78, 15, 60, 21), "dark"),
        outer(curve("M60 20 Q44 70 2 100 L118 100 Q76 70 60 20Z"), "body", "tall"),
        inner(curve("M60 20 Q56 70 38 100 L20 100 Q50 70 60 20Z"), "light"),
        inner(curve("M60 20 Q64 70 82 100 L100 100 Q70 70 60 20Z"), "light"),
        inner(curve("M60 58 Q58 80 48 100 L72 100 Q62 80 60 58Z"), "#4a3c3a"),
        inner(curve("M60 58 Q66 80 72 100 L79 100 Q70 78 60 58Z"), "dark"),
    ]
    return _art(120, parts)


def _lighthouse() -> Art:
    parts = [
        outer(curve("M2 100 C4 90 14 88 28 89 C44 88 54 92 56 100Z"), "#84848e", "tall"),
        outer(poly(17, 32, 41, 32, 47, 95, 11, 95), "body", "tall"),
        inner(poly(15.2, 51, 42.8, 51, 43.8, 60, 14.2, 60), "pale"),
        inner(poly(13.1, 73, 44.9, 73, 45.7, 82, 12.3, 82), "pale"),
        inner(curve("M24 95 L24 88 C24 84 34 84 34 88 L34 95Z"), WOOD),
        outer(box(18, 15, 40, 32), "glass"),
        inner(both(box(24.5, 15, 26, 32), box(32, 15, 33.5, 32)), "deep"),
        outer(box(11, 29, 47, 35, 1.5), "dark", "tall"),
        outer(curve("M14 16 C18 4 26 3 29 0 C32 3 40 4 44 16Z"), "body", "tall"),
    ]
    return _art(58, parts)


# --- plants -------------------------------------------------------------------------------------


def _tree() -> Art:
    parts = [
        outer(curve("M38 100 C42 90 41 76 40 62 L52 62 C51 76 50 90 56 100Z"), WOOD, "tall"),
        outer(both(stroke("M46 72 L30 58", 4.5)), WOOD),
        outer(both(oval(24, 50, 23, 19), oval(68, 50, 23, 19)), "dark", "tall"),
        outer(
            both(oval(46, 24, 28, 23), oval(28, 36, 20, 17), oval(64, 36, 20, 17), oval(46, 50, 28, 19)),
            "body",
            "tall",
        ),
        inner(both(oval(38, 18, 10, 7), oval(24, 38, 7, 5), oval(60, 36, 8, 5)), "light"),
    ]
    return _art(92, parts)


def _flower() -> Art:
    petals = both(*(tilted(oval(38, 15, 11.5, 16), i * 60, 38, 34) for i in range(6)))
    petals2 = both(*(tilted(oval(38, 16, 11.5, 15), i * 60 + 30, 38, 34) for i in range(6)))
    parts = [
        outer(stroke("M38 44 C36 66 40 84 38 98", 4.5), "#3c8c40"),
        outer(curve("M38 94 C26 94 16 84 14 74 C28 74 38 82 38 94Z"), "#4ca04c", "tall"),
        outer(curve("M39 88 C50 88 60 78 62 68 C48 70 39 76 39 88Z"), "#4ca04c", "tall"),
        outer(petals2, "dark", "tall"),
        outer(petals, "body", "tall"),
        inner(oval(38, 34, 8.5), "#6a4020"),
        inner(oval(38, 34, 5.5), GOLD),
    ]
    return _art(76, parts)


def _mushroom() -> Art:
    parts = [
        outer(curve("M37 56 C38 74 33 88 33 96 C38 101 58 101 63 96 C63 88 58 74 59 56Z"), CREAM, "tall"),
        outer(curve("M34 52 C40 66 56 66 62 52Z"), "#d8ccb8"),
        outer(
            curve("M2 56 C0 22 26 4 48 4 C70 4 96 22 94 56 C94 64 70 62 48 62 C26 62 2 64 2 56Z"),
            "body",
            "tall",
        ),
        inner(
            both(oval(46, 18, 7.5, 5.5), oval(23, 36, 6, 5), oval(72, 34, 6.5, 5.5), oval(48, 46, 5.5, 4.2)),
            "patch",
        ),
    ]
    return _art(96, parts)


def _cactus() -> Art:
    parts = [
        outer(stroke("M34 72 L18 72 C10 72 10 66 10 60 L10 44", 15), "body", "tall"),
        outer(stroke("M44 60 L60 60 C68 60 68 54 68 48 L68 32", 15), "body", "tall"),
        outer(box(25, 8, 53, 100, 13), "body", "tall"),
        inner(
            both(
                box(32, 16, 34.4, 96, 1),
                box(43.6, 16, 46, 96, 1),
                box(9, 44, 11, 64, 1),
                box(67, 32, 69, 54, 1),
            ),
            "deep",
        ),
        inner(
            both(
                *(
                    stroke(f"M{x} {y} L{x + 3} {y - 3}", 1.6)
                    for x, y in (
                        (37, 26),
                        (27, 36),
                        (48, 42),
                        (37, 58),
                        (48, 72),
                        (27, 82),
                        (37, 88),
                        (6, 54),
                        (72, 44),
                    )
                )
            ),
            "patch",
        ),
        outer(both(oval(34, 7, 5, 4.5), oval(44, 7, 5, 4.5), oval(39, 4, 5, 4.5)), "#f25c9a"),
    ]
    return _art(78, parts)


# --- things of the sky --------------------------------------------------------------------------


def _balloon() -> Art:
    parts = [
        outer(
            both(stroke("M24 62 L34 86", 1.8), stroke("M58 62 L48 86", 1.8), stroke("M41 70 L41 86", 1.4)),
            "#6a5440",
        ),
        outer(box(31, 84, 51, 100, 3), "#a06c38", "tall"),
        outer(
            curve("M41 0 C68 0 82 18 82 36 C82 54 62 64 56 76 L26 76 C20 64 0 54 0 36 C0 18 14 0 41 0Z"),
            "body",
            "round",
        ),
        inner(
            curve("M41 0 C52 4 58 20 58 36 C58 54 50 64 48 76 L34 76 C32 64 24 54 24 36 C24 20 30 4 41 0Z"),
            "light",
            "tall",
        ),
        inner(
            curve("M41 0 C60 2 72 20 72 38 C70 54 58 64 54 76 L56 76 C62 64 82 54 82 36 C82 18 68 0 41 0Z"),
            "dark",
        ),
        inner(box(26, 72, 56, 77), "deep"),
    ]
    return _art(82, parts)


def _kite() -> Art:
    parts = [
        outer(stroke("M46 66 C40 78 58 84 50 97", 1.8), "#6a5440"),
        outer(
            both(
                poly(42, 80, 32, 74, 33, 85),
                poly(42, 80, 52, 75, 51, 86),
                poly(53, 91, 44, 86, 44, 97),
                poly(53, 91, 63, 87, 62, 98),
            ),
            "dark",
        ),
        outer(poly(46, 0, 88, 28, 46, 70, 4, 28), "body", "tall"),
        inner(poly(46, 0, 88, 28, 46, 28), "light"),
        inner(poly(46, 28, 46, 70, 4, 28), "dark"),
        inner(both(stroke("M46 2 L46 68", 2), stroke("M6 28 L86 28", 2)), "deep"),
        inner(both(oval(34, 20, 2.6), oval(58, 20, 2.6)), INK),
        inner(stroke("M34 36 Q46 48 58 36", 2.4), INK),
    ]
    return _art(92, parts)


def _plane() -> Art:
    parts = [
        outer(curve("M14 50 L2 20 L20 20 L42 46Z"), "dark", "tall"),
        outer(
            curve("M6 52 C10 44 60 40 100 40 C126 40 146 48 150 58 C146 70 124 74 96 74 C56 74 20 66 6 52Z"),
            "body",
            "tall",
        ),
        inner(both(*(oval(x, 53, 4, 4.6) for x in (46, 60, 74, 88, 102))), "glass"),
        inner(curve("M118 44 C130 46 138 50 141 55 L120 56Z"), "glass"),
        outer(curve("M62 62 L98 62 L66 98 L48 98Z"), "dark", "tall"),
        outer(curve("M10 52 L32 54 L14 70 L4 70Z"), "dark", "tall"),
        outer(curve("M72 42 L92 42 L70 22 L60 22Z"), "light", "tall"),
    ]
    return _art(150, parts)


def _bird() -> Art:
    parts = [
        outer(curve("M30 62 L0 52 L6 66 L0 76 L34 74Z"), "dark", "tall"),
        outer(curve("M52 60 C40 40 22 22 6 16 C30 10 66 20 78 54Z"), "dark", "tall"),
        outer(curve("M22 66 C36 48 70 44 92 48 C110 50 112 64 98 74 C80 90 40 86 22 66Z"), "body", "tall"),
        inner(curve("M44 78 C60 86 82 82 96 72 C88 70 64 70 44 78Z"), "pale"),
        outer(curve("M108 44 L128 52 L108 57Z"), "#f59a23", "tall"),
        outer(oval(97, 48, 16, 15), "body", "round"),
        outer(curve("M46 62 C44 34 54 12 72 2 C88 22 88 46 76 66 C66 72 52 70 46 62Z"), "body", "tall"),
        inner(both(stroke("M60 58 C58 40 62 26 70 16", 2), stroke("M68 60 C70 44 72 36 76 26", 2)), "deep"),
        *_eye(102, 45, 4.6),
    ]
    return _art(128, parts)


# --- toys ---------------------------------------------------------------------------------------


def _star(cx: float, cy: float, r: float) -> skia.Path:
    xy: list[float] = []
    for i in range(10):
        a = math.pi * (i / 5 - 0.5)
        q = r if i % 2 == 0 else r * 0.45
        xy += [cx + q * math.cos(a), cy + q * math.sin(a)]
    return poly(*xy)


def _ball() -> Art:
    parts = [
        outer(oval(46, 54, 46), "body", "round"),
        inner(
            curve("M4 36 C26 52 64 52 88 36 C91 42 92.5 50 92 56 C64 72 28 72 0 56 C0 48 1 42 4 36Z"), "light"
        ),
        inner(stroke("M4 36 C26 52 64 52 88 36", 2.4), "deep"),
        inner(stroke("M0 56 C28 72 64 72 92 56", 2.4), "deep"),
        inner(_star(46, 55, 13), "patch"),
        inner(oval(28, 24, 9, 5.5), "pale"),
    ]
    return _art(92, parts)


def _robot() -> Art:
    parts = [
        outer(stroke("M38 14 L38 4", 2.6), GREY),
        outer(oval(38, 4, 4), "#f0503c", "round"),
        outer(both(box(22, 78, 33, 94), box(43, 78, 54, 94)), GREY, "tall"),
        outer(both(box(17, 91, 35, 100, 3), box(41, 91, 59, 100, 3)), "dark", "tall"),
        outer(both(stroke("M14 54 L7 70", 8), stroke("M62 54 L69 70", 8)), "dark", "tall"),
        outer(both(box(0, 68, 14, 80, 4), box(62, 68, 76, 80, 4)), "dark", "tall"),
        outer(box(33, 40, 43, 50), GREY),
        outer(box(13, 46, 63, 82, 5), "body", "tall"),
        inner(box(22, 54, 54, 74, 3), "pale"),
        inner(both(oval(30, 61, 3.6)), "#f0503c"),
        inner(oval(38, 61, 3.6), GOLD),
        inner(oval(46, 61, 3.6), "#3cc05a"),
        inner(box(26, 67.5, 50, 70.5, 1), INK),
        outer(both(box(7, 22, 14, 34, 2), box(62, 22, 69, 34, 2)), "deep"),
        outer(box(12, 12, 64, 43, 7), "body", "tall"),
        inner(both(oval(26, 25, 7), oval(50, 25, 7)), "#34343e"),
        inner(both(oval(26, 25, 4.6), oval(50, 25, 4.6)), "#78f0fa"),
        inner(box(26, 35, 50, 39, 1), "#34343e"),
    ]
    return _art(76, parts, head=(38, 13, 46), eyes=(38, 25, 44), neck=(38, 45, 36))


def _teddy() -> Art:
    parts = [
        outer(both(oval(17, 12, 12), oval(63, 12, 12)), "body", "round"),
        inner(both(oval(17, 13, 6.5), oval(63, 13, 6.5)), "pale"),
        outer(both(oval(9, 63, 9, 14), oval(71, 63, 9, 14)), "dark", "tall"),
        outer(oval(40, 72, 27, 26), "body", "tall"),
        inner(oval(40, 72, 15, 16), "pale"),
        outer(both(oval(15, 90, 14, 10), oval(65, 90, 14, 10)), "body", "tall"),
        inner(both(oval(14, 90, 7.5, 6), oval(66, 90, 7.5, 6)), "pale"),
        outer(oval(40, 30, 31, 26), "body", "round"),
        inner(oval(40, 39, 14, 11), "pale"),
        inner(oval(40, 34, 5.5, 4), INK),
        inner(stroke("M40 38 L40 42 M33 43 Q36.5 47 40 42 Q43.5 47 47 43", 1.8), INK),
        inner(both(oval(27, 25, 4.6, 5), oval(53, 25, 4.6, 5)), INK),
        inner(both(oval(28.5, 23.4, 1.6), oval(54.5, 23.4, 1.6)), "#ffffff"),
        inner(stroke("M40 58 L40 88", 1.4), "deep"),
    ]
    return _art(80, parts, head=(40, 7, 46), eyes=(40, 25, 40), neck=(40, 55, 36))


def _rocket() -> Art:
    parts = [
        outer(curve("M22 92 C24 98 28 100 31 100 C34 100 38 98 40 92Z"), "#c86a28"),
        outer(curve("M16 54 C2 64 0 80 0 96 L18 86Z"), "deep", "tall"),
        outer(curve("M46 54 C60 64 62 80 62 96 L44 86Z"), "deep", "tall"),
        outer(curve("M31 0 C52 20 52 62 44 90 L18 90 C10 62 10 20 31 0Z"), "body", "round"),
        inner(curve("M31 0 C40 9 44 18 46 28 L16 28 C18 18 22 9 31 0Z"), "dark"),
        inner(oval(31, 44, 11), "#e6e8f0"),
        inner(oval(31, 44, 7.6), "glass"),
        inner(box(15.6, 74, 46.4, 79), "pale"),
        outer(curve("M31 62 C27 70 27 86 31 96 C35 86 35 70 31 62Z"), "deep"),
        outer(box(20, 88, 42, 94, 2), GREY),
    ]
    return _art(62, parts)


def _art(
    width: float,
    parts: Parts,
    head: tuple[float, float, float] = (0, 0, 0),
    eyes: tuple[float, float, float] = (0, 0, 0),
    neck: tuple[float, float, float] = (0, 0, 0),
    back: tuple[float, float] | None = None,
) -> Art:
    return Art(width, tuple(parts), union(parts), head, eyes, neck, back)


_MAKERS: dict[str, Callable[[], Art]] = {
    "cat": _cat, "dog": _dog, "rabbit": _rabbit, "duck": _duck, "cow": _cow, "pig": _pig,
    "elephant": _elephant, "fox": _fox, "girl": _girl, "boy": _boy, "queen": _queen, "wizard": _wizard,
    "car": _car, "bus": _bus, "truck": _truck, "train": _train, "house": _house, "castle": _castle,
    "tent": _tent, "lighthouse": _lighthouse, "tree": _tree, "flower": _flower, "mushroom": _mushroom,
    "cactus": _cactus, "balloon": _balloon, "kite": _kite, "plane": _plane, "bird": _bird, "ball": _ball,
    "robot": _robot, "teddy bear": _teddy, "rocket": _rocket,
}  # fmt: skip


@lru_cache(maxsize=64)
def art(kind: str) -> Art:
    """The drawing of a kind."""
    return _MAKERS[kind]()


# --- things to wear -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Wear:
    """A wearable: parts behind the body, parts in front of it, and their silhouettes."""

    behind: tuple[Part, ...]
    before: tuple[Part, ...]
    outline_behind: skia.Path
    outline_before: skia.Path


def _placed(parts: Parts, x: float, y: float, s: float) -> Parts:
    matrix = skia.Matrix()
    matrix.setScaleTranslate(s, s, x, y)
    out = []
    for part in parts:
        path = skia.Path(part.path)
        path.transform(matrix)
        out.append(Part(path, part.role, part.form, part.solid))
    return out


def _hat() -> Parts:  # brim's middle at (0, 0), brim 100 wide
    return [
        outer(curve("M-32 0 L-37 -58 C-20 -66 20 -66 37 -58 L32 0Z"), "#1e7a4c", "tall"),
        inner(curve("M-32.5 -4 L-34 -22 L34 -22 L32.5 -4Z"), "#ffd23c"),
        outer(curve("M-54 0 C-40 -10 40 -10 54 0 C40 12 -40 12 -54 0Z"), "#176340", "tall"),
    ]


def _crown() -> Parts:
    return [
        outer(poly(-42, 4, -50, -50, -24, -24, 0, -62, 24, -24, 50, -50, 42, 4), "#ffcb2e", "tall"),
        outer(both(oval(-50, -52, 6), oval(0, -64, 6), oval(50, -52, 6)), "#e83a4e"),
        inner(box(-42, -8, 42, 4, 2), "#e0a018"),
        inner(both(oval(-24, -12, 6), oval(24, -12, 6)), "#3a7ae0"),
        inner(oval(0, -16, 8), "#e83a4e"),
    ]


def _sunglasses() -> Parts:
    return [
        outer(
            both(
                curve("M-54 -15 L-5 -15 L-7 6 C-10 22 -44 24 -50 6Z"),
                curve("M54 -15 L5 -15 L7 6 C10 22 44 24 50 6Z"),
                box(-8, -15, 8, -7),
            ),
            "#16161c",
        ),
        inner(both(poly(-42, -9, -32, -9, -40, 6), poly(16, -9, 26, -9, 18, 6)), "#a8c8e8"),
    ]


def _scarf() -> Parts:
    return [
        outer(curve("M14 4 L40 2 L46 74 L20 78Z"), "#12a5b5", "tall"),
        inner(
            both(poly(16.5, 28, 42, 26, 43, 40, 18, 42), poly(19, 56, 44.8, 53, 45.6, 67, 20, 70)), "#ffffff"
        ),
        outer(
            curve(
                "M-52 -14 C-30 -4 30 -4 52 -14 C60 0 54 16 46 18 C20 28 -20 28 -46 18 C-54 16 -60 0 -52 -14Z"
            ),
            "#12a5b5",
            "tall",
        ),
        inner(
            both(poly(-30, -8, -16, -6, -16, 24, -30, 21), poly(2, -6.4, 16, -6.8, 16, 24, 2, 25)), "#ffffff"
        ),
    ]


@lru_cache(maxsize=128)
def wear(kind: str, what: str) -> Wear:
    """A wearable, fitted to a kind."""
    a = art(kind)
    behind: Parts = []
    before: Parts = []
    if what == "hat":
        x, y, w = a.head
        before = _placed(_hat(), x, y + 0.06 * w, w / 76)
    elif what == "crown":
        x, y, w = a.head
        before = _placed(_crown(), x, y + 0.06 * w, w / 80)
    elif what == "sunglasses":
        x, y, w = a.eyes
        before = _placed(_sunglasses(), x, y, w / 84)
    elif what == "scarf":
        x, y, w = a.neck
        before = _placed(_scarf(), x, y, w / 88)
    else:
        x, y, w = a.neck
        if a.back is None:
            half, low = max(a.width * 0.54, w), 96
            behind = [
                outer(
                    curve(
                        f"M{x - w * 0.5} {y - 4} C{x - half} {y + 14} {x - half - 8} {low - 18} "
                        f"{x - half - 10} {low} Q{x} {low + 6} {x + half + 10} {low} "
                        f"C{x + half + 8} {low - 18} {x + half} {y + 14} {x + w * 0.5} {y - 4}Z"
                    ),
                    "#d41f3a",
                    "tall",
                ),
            ]
            before = [
                outer(
                    curve(
                        f"M{x - w * 0.6} {y - 5} Q{x} {y + 6} {x + w * 0.6} {y - 5} L{x + w * 0.62} {y + 5} "
                        f"Q{x} {y + 18} {x - w * 0.62} {y + 5}Z"
                    ),
                    "#d41f3a",
                    "tall",
                ),
                inner(oval(x, y + 6, 4.5), GOLD),
            ]
        else:
            rx, ry = a.back
            before = [
                outer(
                    curve(
                        f"M{x - w * 0.3} {y - 13} C{x - 22} {ry - 8} {rx + 14} {ry - 8} {rx - 12} {ry + 4} "
                        f"C{rx - 14} {ry + 14} {rx - 10} {ry + 20} {rx - 12} {ry + 30} "
                        f"C{rx + 12} {ry + 34} {x - 24} {y + 12} {x + w * 0.1} {y + 10}Z"
                    ),
                    "#d41f3a",
                    "tall",
                ),
                outer(
                    curve(
                        f"M{x - w * 0.42} {y - 14} Q{x - w * 0.1} {y + 4} {x + w * 0.42} {y} "
                        f"L{x + w * 0.36} {y + 10} Q{x - w * 0.2} {y + 14} {x - w * 0.56} {y - 6}Z"
                    ),
                    "#a8142c",
                    "tall",
                ),
                inner(oval(x + w * 0.2, y + 4, 4.2), GOLD),
            ]
    return Wear(tuple(behind), tuple(before), union(behind), union(before))
