"""What can be in a scene, and the words for it: what the shipped model knows, and a smaller set."""

from __future__ import annotations

from dataclasses import dataclass

#: RGB.  Told apart by hue, which the darker shade of a texture shares.
RGB = {
    "red": (222, 30, 38),
    "orange": (245, 138, 20),
    "yellow": (242, 222, 40),
    "green": (40, 164, 62),
    "cyan": (40, 200, 216),
    "blue": (38, 74, 222),
    "purple": (128, 48, 192),
    "pink": (246, 120, 196),
    "lime": (136, 224, 30),
    "magenta": (206, 30, 216),
}
#: Ranges of the radius, in sides of the picture.  "medium" is never said.
RADII = {"small": (0.12, 0.14), "medium": (0.165, 0.19), "large": (0.22, 0.26)}
#: How a thing is said to wear each part.
WORN = {"hat": "wearing a hat", "boots": "wearing boots", "glasses": "wearing glasses"}
#: Each with the one that says the same of the two things in the other order.
CONVERSE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}


@dataclass(frozen=True)
class Vocabulary:
    """What scenes are made of, and how often.

    Attributes:
        shapes, parts: names of what :mod:`drawn.outlines` has.
        colours: names of ``RGB``.
        textures: of things; the first, "plain", is never said.
        sizes: names of ``RADII``.
        backgrounds: "gradient" goes from white at the top to grey; textured ones are light grey on white.
        relations: names of ``CONVERSE``.
        counts: shares of the scenes that have 1, 2, ... things.
        plain: share of the things that are plain; the other textures are equally frequent.
        dressed: share of the things that wear a part.
        white: share of the scenes on the first background; the others are equally frequent.
        most_dressed: no thing wears a part in scenes of more things.
        most_large: no thing is large in scenes of more things.
    """

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    textures: tuple[str, ...]
    sizes: tuple[str, ...]
    parts: tuple[str, ...]
    backgrounds: tuple[str, ...]
    relations: tuple[str, ...]
    counts: tuple[float, ...]
    plain: float
    dressed: float
    white: float
    most_dressed: int
    most_large: int

    @property
    def most(self) -> int:
        """The greatest number of things in a scene."""
        return len(self.counts)


SMALL = Vocabulary(
    shapes=("circle", "square", "triangle", "star", "cross", "ring"),
    colours=("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
    textures=("plain", "striped", "dotted"),
    sizes=("small", "medium", "large"),
    parts=("hat", "boots"),
    backgrounds=("white", "grey", "gradient"),
    relations=("to the left of", "to the right of", "above", "below"),
    counts=(0.4, 0.42, 0.18),
    plain=0.6,
    dressed=0.25,
    white=0.5,
    most_dressed=2,
    most_large=1,
)
LARGE = Vocabulary(
    shapes=(*SMALL.shapes, "heart", "diamond", "crescent", "arrow", "hourglass", "drop"),
    colours=(*SMALL.colours, "lime", "magenta"),
    textures=(*SMALL.textures, "checkered"),
    sizes=SMALL.sizes,
    parts=(*SMALL.parts, "glasses"),
    backgrounds=(*SMALL.backgrounds, "striped", "dotted", "checkered"),
    relations=SMALL.relations,
    counts=(0.3, 0.4, 0.18, 0.12),
    plain=0.46,
    dressed=0.3,
    white=0.4,
    most_dressed=4,
    most_large=2,
)
#: What the embedded model that ships was trained on.
SHIPPED = LARGE
