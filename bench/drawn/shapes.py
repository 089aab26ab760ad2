"""Captioned scenes, drawn by program: what the embedded model is trained on and what its judge knows the truth about.

A scene is one to a few things on a background.  Lengths are fractions of the picture's side, so that one scene can be
drawn at any size; x grows to the right, y downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .outlines import EXTENT, rise
from .vocabulary import CONVERSE, RADII, SHIPPED, WORN, Vocabulary

#: Side of the pictures that the embedded model makes, in pixels.
SIDE = 64

_MARGIN = 0.03  # between things, and to the border


@dataclass(frozen=True)
class Thing:
    """One thing of a scene; the names are those of a :class:`~.vocabulary.Vocabulary`.

    Attributes:
        shape, colour, texture, size: what it is.
        part: what it wears, or None.
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
        top, bottom = EXTENT[self.shape]
        above, below = rise(self.part)
        top -= above
        bottom += below
        r = self.radius
        return self.x - r, self.y + top * r, self.x + r, self.y + bottom * r

    def phrase(self, *, size: bool = True) -> str:
        """For example "a small striped red circle wearing a hat"."""
        words = [
            self.size if size and self.size != "medium" else "",
            self.texture if self.texture != "plain" else "",
            self.colour,
            self.shape,
            WORN[self.part] if self.part else "",
        ]
        text = " ".join(filter(None, words))
        return f"{article(text)} {text}"


@dataclass(frozen=True)
class Scene:
    """A picture's content and what is said about it.

    Attributes:
        things: of different shapes.
        background: one of a vocabulary's.
        caption: the prompt.
        relation: what the caption says of where the first thing is to the second, or None.
    """

    things: tuple[Thing, ...]
    background: str
    caption: str
    relation: str | None = None

    @property
    def says_background(self) -> bool:
        """Whether the caption says what the background is."""
        return self.caption.endswith(" background")


def draw_scene(
    rng: np.random.Generator,
    *,
    vocabulary: Vocabulary = SHIPPED,
    things: int | None = None,
    relation: bool | None = None,
) -> Scene:
    """A random scene; the same generator state gives the same scene.

    Args:
        rng: source of randomness.
        vocabulary: what there is to draw.
        things: how many, 1 to ``vocabulary.most``; None: at random.
        relation: whether the caption of two things says where they are; None: at random.

    Raises:
        ValueError: ``things`` out of range, or a relation asked of another number of things than two.
    """
    numbers = range(1, vocabulary.most + 1)
    count = int(rng.choice(numbers, p=vocabulary.counts)) if things is None else things
    if count not in numbers:
        known = f"{', '.join(map(str, numbers[:-1]))} or {vocabulary.most}"
        raise ValueError(f"things must be {known}, got {things}")
    if relation and count != 2:
        raise ValueError(f"only two things can be in a relation, got things={count}")
    if relation is None:
        relation = count == 2 and bool(rng.random() < 0.5)
    how = str(rng.choice(vocabulary.relations)) if relation else None
    while True:
        drawn = _things(rng, count, vocabulary)
        placed = place(rng, drawn, how)
        if placed is not None:
            break
    background = _either(rng, vocabulary.backgrounds, vocabulary.white)
    said = [bool(rng.random() < 0.5) for _ in placed]
    text = caption(placed, how, background if rng.random() < 0.5 else None, sizes=said)
    return Scene(placed, background, text, how)


def _either(rng: np.random.Generator, names: tuple[str, ...], first: float) -> str:
    """The first of the names with a probability, or one of the others."""
    others = len(names) - 1
    return str(rng.choice(names, p=(first, *[(1 - first) / others] * others)))


def _things(rng: np.random.Generator, count: int, vocabulary: Vocabulary) -> list[Thing]:
    sizes = [size for size in vocabulary.sizes if size != "large" or count <= vocabulary.most_large]
    things = []
    for shape in rng.choice(vocabulary.shapes, count, replace=False):
        size = str(rng.choice(sizes))
        dressed = count <= vocabulary.most_dressed and rng.random() < vocabulary.dressed
        part = str(rng.choice(vocabulary.parts)) if dressed else None
        things.append(
            Thing(
                shape=str(shape),
                colour=str(rng.choice(vocabulary.colours)),
                texture=_either(rng, vocabulary.textures, vocabulary.plain),
                size=size,
                part=part,
                radius=float(rng.uniform(*RADII[size])),
            )
        )
    return things


def place(rng: np.random.Generator, things: Sequence[Thing], relation: str | None) -> tuple[Thing, ...] | None:
    """The things at places where they neither touch nor break the relation; None: no luck in 30 tries."""
    for _ in range(30):
        placed: list[Thing] = []
        for thing in things:
            left, top, right, bottom = thing.box()
            x = float(rng.uniform(_MARGIN - (left - thing.x), 1 - _MARGIN - (right - thing.x)))
            y = float(rng.uniform(_MARGIN - (top - thing.y), 1 - _MARGIN - (bottom - thing.y)))
            placed.append(replace(thing, x=x, y=y))
        if fits(placed, relation):
            return tuple(placed)
    return None


def fits(things: Sequence[Thing], relation: str | None) -> bool:
    """Whether the things are in the picture, apart from each other and in the relation."""
    boxes = [thing.box() for thing in things]
    inside = all(min(box) > _MARGIN - 1e-9 and max(box) < 1 - _MARGIN + 1e-9 for box in boxes)
    apart = all(not _touch(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    return inside and apart and (relation is None or holds(relation, *things))


def _touch(a: Sequence[float], b: Sequence[float]) -> bool:
    (l1, t1, r1, b1), (l2, t2, r2, b2) = a, b
    return l1 < r2 + _MARGIN and l2 < r1 + _MARGIN and t1 < b2 + _MARGIN and t2 < b1 + _MARGIN


def holds(relation: str, a: Thing, b: Thing) -> bool:
    """Whether ``a`` stands in the relation to ``b``: apart in its direction, and more so than across it.

    Raises:
        ValueError: unknown relation.
    """
    if relation not in CONVERSE:
        raise ValueError(f"relation must be one of {', '.join(CONVERSE)}, got {relation!r}")
    right, down = b.x - a.x, b.y - a.y
    along = {"to the left of": right, "to the right of": -right, "above": down, "below": -down}[relation]
    across = down if relation.startswith("to") else right
    return along > abs(across)


def article(text: str) -> str:
    """The indefinite article of a text."""
    return "an" if text[0] in "aeiou" else "a"


def caption(things: Sequence[Thing], relation: str | None, background: str | None, *, sizes: Sequence[bool]) -> str:
    """What is said of a scene: its things in order, where they are and on what, unless it is None.

    Args:
        things, relation, background: what to say.
        sizes: of each thing, whether its size is said.
    """
    phrases = [thing.phrase(size=size) for thing, size in zip(things, sizes, strict=True)]
    if relation:
        text = f"{phrases[0]} {relation} {phrases[1]}"
    else:
        text = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
    return f"{text} on {article(background)} {background} background" if background else text
