"""Outlines of the shapes and of the parts that they wear, in radii around the centre; x to the right, y downwards."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]
#: (left, top, right, bottom)
Box = tuple[float, float, float, float]


def _star() -> list[Point]:
    corners = []
    for i in range(10):
        angle, radius = math.pi * i / 5 - math.pi / 2, 1.0 if i % 2 == 0 else 0.45
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    return corners


def _cross() -> list[Point]:
    corners, quarter = [], [(-0.32, -0.95), (0.32, -0.95), (0.32, -0.32)]
    for _ in range(4):
        corners += quarter
        quarter = [(-v, u) for u, v in quarter]
    return corners


def _arc(centre: Point, radius: float, start: float, end: float) -> list[Point]:
    """Points from one angle to another, in degrees, clockwise from the right."""
    angles = [math.radians(start + (end - start) * i / 48) for i in range(49)]
    return [(centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)) for angle in angles]


def _heart() -> list[Point]:
    """Two half discs above a tip."""
    return [*_arc((-0.49, -0.4), 0.5, 150, 360), *_arc((0.49, -0.4), 0.5, 180, 390), (0.0, 0.95)]


def _crescent() -> list[Point]:
    """A disc less a smaller one at its right."""
    x, radius = 0.5, 0.78
    tip = (1 - radius**2 + x**2) / (2 * x)
    outer = math.degrees(math.acos(tip))
    inner = math.degrees(math.acos((tip - x) / radius))
    return [*_arc((0, 0), 1, outer, 360 - outer), *_arc((x, 0), radius, 360 - inner, inner)]


def _drop() -> list[Point]:
    """A disc with a tip above."""
    return [(0.0, -1.0), *_arc((0, 0.3), 0.7, -30, 210)]


CORNERS: dict[str, Sequence[Point]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)],
    "star": _star(),
    "cross": _cross(),
    "heart": _heart(),
    "diamond": [(0.0, -1.0), (0.8, 0.0), (0.0, 1.0), (-0.8, 0.0)],
    "crescent": _crescent(),
    "arrow": [(-1.0, -0.35), (0.0, -0.35), (0.0, -0.9), (1.0, 0.0), (0.0, 0.9), (0.0, 0.35), (-1.0, 0.35)],
    "hourglass": [(-0.9, -0.95), (0.9, -0.95), (0.2, 0.0), (0.9, 0.95), (-0.9, 0.95), (-0.2, 0.0)],
    "drop": _drop(),
}
#: Highest and lowest y of a shape.
EXTENT = {
    "circle": (-1.0, 1.0),
    "ring": (-1.0, 1.0),
    **{shape: (min(v for _, v in corners), max(v for _, v in corners)) for shape, corners in CORNERS.items()},
}
#: Where glasses sit, if not at the centre.
_EYES: dict[str, Point] = {
    "triangle": (0.0, 0.25),
    "heart": (0.0, -0.3),
    "crescent": (-0.3, 0.0),
    "arrow": (0.2, 0.0),
    "hourglass": (0.0, -0.6),
    "drop": (0.0, 0.3),
}


def rise(part: str | None) -> tuple[float, float]:
    """How far a part reaches above the shape and below it."""
    return 0.55 if part == "hat" else 0.0, 0.4 if part == "boots" else 0.0


def part_boxes(shape: str, part: str) -> list[Box]:
    """The black boxes that a part is made of."""
    top, bottom = EXTENT[shape]
    if part == "hat":
        return [(-0.6, top - 0.08, 0.6, top + 0.12), (-0.35, top - 0.55, 0.35, top)]
    if part == "boots":
        feet = [sorted((side * 0.15, side * 0.65)) for side in (-1, 1)]
        return [(left, bottom - 0.1, right, bottom + 0.4) for left, right in feet]
    x, y = _EYES.get(shape, (0.0, 0.0))
    lenses = [(x + side - 0.24, y - 0.18, x + side + 0.24, y + 0.22) for side in (-0.34, 0.34)]
    return [*lenses, (x - 0.64, y - 0.18, x + 0.64, y - 0.05)]
