"""Captioned scenes, drawn by program: what the embedded model is trained on and what its judge knows the truth about.

A scene is one to three things on a background.  Lengths are fractions of the picture's side, so that one scene can be
drawn at any size; x grows to the right, y downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

#: Side of the pictures that the embedded model makes, in pixels.
SIDE = 64
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
#: Told apart by hue, which the darker shade of a texture shares.
COLOURS = {
    "red": (222, 30, 38),
    "orange": (245, 138, 20),
    "yellow": (242, 222, 40),
    "green": (40, 164, 62),
    "cyan": (40, 200, 216),
    "blue": (38, 74, 222),
    "purple": (128, 48, 192),
    "pink": (246, 120, 196),
}
TEXTURES = ("plain", "striped", "dotted")
#: Ranges of the radius.  "medium" is never said.
SIZES = {"small": (0.12, 0.14), "medium": (0.165, 0.19), "large": (0.22, 0.26)}
PARTS = ("hat", "boots")
BACKGROUNDS = ("white", "grey", "gradient")
RELATIONS = ("to the left of", "to the right of", "above", "below")

_SHADE = 0.55  # of a texture's dark places
_BLACK = (20, 20, 20)
_WHITE, _GREY = 250, 168
_MARGIN = 0.03  # between things, and to the border
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One thing of a scene.

    Attributes:
        shape: one of ``SHAPES``.
        colour: a name of ``COLOURS``.
        texture: one of ``TEXTURES``.
        size: a name of ``SIZES``.
        part: one of ``PARTS`` that it wears, or None.
        x, y: centre.
        radius: of the circle around the shape, without the part.
    """

    shape: str
    colour: str
    texture: str = "plain"
    size: str = "medium"
    part: str | None = None
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.18

    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of everything that is drawn."""
        top, bottom = _EXTENT[self.shape]
        top -= 0.55 if self.part == "hat" else 0
        bottom += 0.4 if self.part == "boots" else 0
        r = self.radius
        return self.x - r, self.y + top * r, self.x + r, self.y + bottom * r

    def phrase(self, *, size: bool = True) -> str:
        """For example "a small striped red circle wearing a hat"."""
        words = [
            self.size if size and self.size != "medium" else "",
            self.texture if self.texture != "plain" else "",
            self.colour,
            self.shape,
            {"hat": "wearing a hat", "boots": "wearing boots", None: ""}[self.part],
        ]
        text = " ".join(filter(None, words))
        return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


@dataclass(frozen=True)
class Scene:
    """A picture's content and what is said about it.

    Attributes:
        things: one to three, of different shapes.
        background: one of ``BACKGROUNDS``; "gradient" goes from white at the top to grey.
        caption: the prompt.
        relation: what the caption says of where the first thing is to the second, one of ``RELATIONS``, or None.
    """

    things: tuple[Thing, ...]
    background: str
    caption: str
    relation: str | None = None


def draw_scene(rng: np.random.Generator, *, things: int | None = None, relation: bool | None = None) -> Scene:
    """A random scene; the same generator state gives the same scene.

    Args:
        rng: source of randomness.
        things: how many, 1 to 3; None: at random.
        relation: whether the caption of two things says where they are; None: at random.

    Raises:
        ValueError: ``things`` out of range, or a relation asked of one or three things.
    """
    count = int(rng.choice((1, 2, 3), p=(0.4, 0.42, 0.18))) if things is None else things
    if not 1 <= count <= 3:
        raise ValueError(f"things must be 1, 2 or 3, got {things}")
    if relation and count != 2:
        raise ValueError(f"only two things can be in a relation, got things={count}")
    if relation is None:
        relation = count == 2 and bool(rng.random() < 0.5)
    how = str(rng.choice(RELATIONS)) if relation else None
    while True:
        drawn = _things(rng, count)
        placed = _placed(rng, drawn, how)
        if placed is not None:
            break
    background = str(rng.choice(BACKGROUNDS, p=(0.5, 0.25, 0.25)))
    return Scene(placed, background, _caption(rng, placed, how, background), how)


def _things(rng: np.random.Generator, count: int) -> list[Thing]:
    sizes = {1: ("small", "medium", "large"), 2: ("small", "medium"), 3: ("small", "medium")}[count]
    things = []
    for shape in rng.choice(SHAPES, count, replace=False):
        size = str(rng.choice(sizes))
        part = str(rng.choice(PARTS)) if count < 3 and rng.random() < 0.25 else None
        things.append(
            Thing(
                shape=str(shape),
                colour=str(rng.choice(list(COLOURS))),
                texture=str(rng.choice(TEXTURES, p=(0.6, 0.2, 0.2))),
                size=size,
                part=part,
                radius=float(rng.uniform(*SIZES[size])),
            )
        )
    return things


def _placed(rng: np.random.Generator, things: list[Thing], relation: str | None) -> tuple[Thing, ...] | None:
    """The things at places where they neither touch nor break the relation; None: no luck."""
    for _ in range(30):
        placed: list[Thing] = []
        for thing in things:
            left, top, right, bottom = (edge - 0.5 for edge in thing.box())
            x = float(rng.uniform(_MARGIN - left, 1 - _MARGIN - right))
            y = float(rng.uniform(_MARGIN - top, 1 - _MARGIN - bottom))
            placed.append(Thing(**{**vars(thing), "x": x, "y": y}))
        apart = all(not _touch(a, b) for i, a in enumerate(placed) for b in placed[:i])
        if apart and (relation is None or holds(relation, *placed)):
            return tuple(placed)
    return None


def _touch(a: Thing, b: Thing) -> bool:
    (l1, t1, r1, b1), (l2, t2, r2, b2) = a.box(), b.box()
    return l1 < r2 + _MARGIN and l2 < r1 + _MARGIN and t1 < b2 + _MARGIN and t2 < b1 + _MARGIN


def holds(relation: str, a: Thing, b: Thing) -> bool:
    """Whether ``a`` stands in the relation to ``b``: apart in its direction, and more so than across it.

    Raises:
        ValueError: unknown relation.
    """
    if relation not in RELATIONS:
        raise ValueError(f"relation must be one of {', '.join(RELATIONS)}, got {relation!r}")
    right, down = b.x - a.x, b.y - a.y
    along = {"to the left of": right, "to the right of": -right, "above": down, "below": -down}[relation]
    across = down if relation.startswith("to") else right
    return along > abs(across)


def _caption(rng: np.random.Generator, things: tuple[Thing, ...], relation: str | None, background: str) -> str:
    phrases = [thing.phrase(size=bool(rng.random() < 0.5)) for thing in things]
    if relation:
        text = f"{phrases[0]} {relation} {phrases[1]}"
    elif len(phrases) == 3:
        text = f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    else:
        text = " and ".join(phrases)
    return f"{text} on a {background} background" if rng.random() < 0.5 else text


def render(scene: Scene, side: int = SIDE) -> Image.Image:
    """The picture of a scene, ``side`` x ``side`` pixels, RGB, antialiased."""
    n = side * _SUPERSAMPLING
    picture = _background(scene.background, n).copy()
    for thing in scene.things:
        _draw(picture, thing, n)
    return picture.reduce(_SUPERSAMPLING)


@lru_cache(maxsize=16)
def _background(name: str, n: int) -> Image.Image:
    ends = {"white": (_WHITE, _WHITE), "grey": (_GREY, _GREY), "gradient": (_WHITE, _GREY)}[name]
    column = np.linspace(*ends, n).round().astype(np.uint8)
    return Image.fromarray(np.broadcast_to(column[:, None, None], (n, n, 3)).copy())


def _draw(picture: Image.Image, thing: Thing, n: int) -> None:
    mask = Image.new("L", (n, n))
    draw = ImageDraw.Draw(mask)
    x, y, r = thing.x * n, thing.y * n, thing.radius * n
    if thing.shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if thing.shape == "ring":
            draw.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=0)
    else:
        draw.polygon([(x + u * r, y + v * r) for u, v in _CORNERS[thing.shape]], fill=255)
    colour = COLOURS[thing.colour]
    picture.paste(colour, mask=mask)
    if thing.texture != "plain":
        dark = Image.fromarray(np.minimum(np.asarray(mask), _texture(thing.texture, n)))
        picture.paste(tuple(round(_SHADE * c) for c in colour), mask=dark)
    top, bottom = (y + v * r for v in _EXTENT[thing.shape])
    pen = ImageDraw.Draw(picture)
    if thing.part == "hat":
        pen.rectangle((x - 0.6 * r, top - 0.08 * r, x + 0.6 * r, top + 0.12 * r), fill=_BLACK)
        pen.rectangle((x - 0.35 * r, top - 0.55 * r, x + 0.35 * r, top), fill=_BLACK)
    elif thing.part == "boots":
        for side in (-1, 1):
            inner, outer = sorted((x + side * 0.15 * r, x + side * 0.65 * r))
            pen.rectangle((inner, bottom - 0.1 * r, outer, bottom + 0.4 * r), fill=_BLACK)


@lru_cache(maxsize=16)
def _texture(name: str, n: int) -> np.ndarray:
    """Mask of a texture's dark places; its period is 1/10 of the side."""
    phase = 2 * math.pi * 10 * (np.arange(n) + 0.5) / n
    rows = np.cos(phase)[:, None]
    wave = np.broadcast_to(rows, (n, n)) if name == "striped" else (rows + np.cos(phase)[None]) / 2
    return np.where(wave > (0 if name == "striped" else 0.3), 255, 0).astype(np.uint8)


def _star() -> list[tuple[float, float]]:
    corners = []
    for i in range(10):
        angle, radius = math.pi * i / 5 - math.pi / 2, 1.0 if i % 2 == 0 else 0.45
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    return corners


def _cross() -> list[tuple[float, float]]:
    corners, quarter = [], [(-0.32, -0.95), (0.32, -0.95), (0.32, -0.32)]
    for _ in range(4):
        corners += quarter
        quarter = [(-v, u) for u, v in quarter]
    return corners


_CORNERS = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)],
    "star": _star(),
    "cross": _cross(),
}
#: Highest and lowest y of a shape, in radii.
_EXTENT = {
    "circle": (-1.0, 1.0),
    "ring": (-1.0, 1.0),
    **{shape: (min(v for _, v in corners), max(v for _, v in corners)) for shape, corners in _CORNERS.items()},
}
