"""Judge of pictures in the style of :mod:`drawn.rendering`: is what is in them what the prompt said?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .detector import Found, background_of, detect
from .rendering import render
from .shapes import Scene, Thing, draw_scene, holds
from .vocabulary import SHIPPED, Vocabulary


@dataclass(frozen=True)
class Verdict:
    """A picture held against the scene whose caption was its prompt; shares are 0 to 1.

    Attributes:
        things: how many the scene has.
        present: how many of them were found: a thing of their shape, in any colour.
        extra: how many things were found besides, whether of a known shape or not.
        count: whether as many were found as the scene has.
        presence: share of the things that are present.
        binding: share of the things that are present in their own colour.
        full_binding: the same with their own texture and part as well.
        leakage: share of the things present of which the colour, the texture or the part is wrong and said of another
            thing of the prompt ("plain" and no part are not said) or of the background; None if none is present.
        relation: whether the relation said holds, for which both must be present; None if none was said.
    """

    things: int
    present: int
    extra: int
    count: bool
    presence: float
    binding: float
    full_binding: float
    leakage: float | None
    relation: bool | None


def judge(image: Image.Image | np.ndarray, scene: Scene, *, vocabulary: Vocabulary = SHIPPED) -> Verdict:
    """What a picture shows of a scene's caption; where things are matters only as far as a relation was said.

    Raises:
        ValueError: see :func:`detect`; or the scene has no thing, two of one shape, which cannot be told apart, or a
            relation without two things.
    """
    things = scene.things
    if not things or len({thing.shape for thing in things}) < len(things):
        raise ValueError(f"things must be of different shapes, and one at least, got {[t.shape for t in things]}")
    if scene.relation is not None and len(things) != 2:
        raise ValueError(f"only two things can be in a relation, got {len(things)}")
    found = detect(image, vocabulary=vocabulary)
    matches = [_match(thing, found) for thing in things]
    pairs = [(_looks(thing), _looks(match)) for thing, match in zip(things, matches, strict=True) if match]
    relation = None
    if scene.relation is not None:
        first, second = matches
        relation = bool(first and second and holds(scene.relation, first, second))
    return Verdict(
        things=len(things),
        present=len(pairs),
        extra=len(found) - len(pairs),
        count=len(found) == len(things),
        presence=len(pairs) / len(things),
        binding=sum(own[0] == seen[0] for own, seen in pairs) / len(things),
        full_binding=sum(own == seen for own, seen in pairs) / len(things),
        leakage=sum(_leaks(own, seen, scene) for own, seen in pairs) / len(pairs) if pairs else None,
        relation=relation,
    )


def _looks(thing: Thing | Found) -> tuple[str, str, str | None]:
    return thing.colour, thing.texture, thing.part


def _match(thing: Thing, found: Sequence[Found]) -> Found | None:
    """The one found of the thing's shape; of several, the one most like it, colour first."""
    same = [f for f in found if f.shape == thing.shape]
    own = _looks(thing)
    return max(same, key=lambda f: ([a == b for a, b in zip(_looks(f), own, strict=True)], f.score), default=None)


def _leaks(own: tuple[str | None, ...], seen: tuple[str | None, ...], scene: Scene) -> bool:
    """Whether something seen is not the thing's own, but said of another, or of the background."""
    looks = zip(*map(_looks, scene.things), strict=True)
    said = [{look for look in each if look not in ("plain", None)} for each in looks]
    if scene.says_background:
        said[1].add(scene.background)
    return any(b != a and b in words for a, b, words in zip(own, seen, said, strict=True))


def summary(verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """Means over pictures: ``count``, ``extra``, and ``relation`` over the ``relations`` pictures that were told one.

    The shares of things weigh every thing alike, ``leakage`` every thing present.  None where there was none to take a
    share of.

    Raises:
        ValueError: no verdicts.
    """
    if not verdicts:
        raise ValueError("there must be at least one verdict, got none")

    def mean(name: str, weight: str | None = None) -> float | None:
        given = [v for v in verdicts if getattr(v, name) is not None]
        weights = [getattr(v, weight) if weight else 1 for v in given]
        return sum(getattr(v, name) * w for v, w in zip(given, weights, strict=True)) / sum(weights) if given else None

    return {
        "pictures": len(verdicts),
        "things": sum(v.things for v in verdicts),
        **{name: mean(name, "things") for name in ("presence", "binding", "full_binding")},
        "leakage": mean("leakage", "present"),
        "relations": sum(v.relation is not None for v in verdicts),
        **{name: mean(name) for name in ("relation", "count", "extra")},
    }


def degrade(image: Image.Image, rng: np.random.Generator, *, blur: float = 0.7, noise: float = 8.0) -> Image.Image:
    """A picture with a Gaussian blur and Gaussian noise, their sigmas in pixels and in steps of 1/255."""
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), np.float64)
    return Image.fromarray(np.clip(np.rint(soft + noise * rng.standard_normal(soft.shape)), 0, 255).astype(np.uint8))


def accuracy(
    scenes: int = 2000, seed: int = 0, *, degraded: bool = False, vocabulary: Vocabulary = SHIPPED
) -> dict[str, float]:
    """How much of drawn scenes the detector gets right, drawn clean or put through :func:`degrade`.

    Returns:
        ``things``: how many were drawn.  ``found``: the share of them found with their shape and colour, and the
        centre within a quarter of the radius.  ``texture``, ``part``: right, as shares of those found.  ``extra``: how
        many were found besides, per scene.  ``background``: right, as a share of the scenes.

    Raises:
        ValueError: no scenes.
    """
    if scenes < 1:
        raise ValueError(f"scenes must be at least 1, got {scenes}")
    rng = np.random.default_rng(seed)
    things = found = texture = part = extra = background = 0
    for _ in range(scenes):
        scene = draw_scene(rng, vocabulary=vocabulary)
        image = render(scene)
        image = degrade(image, rng) if degraded else image
        seen = detect(image, vocabulary=vocabulary)
        background += background_of(image, vocabulary=vocabulary) == scene.background
        pairs = [(thing, _match(thing, seen)) for thing in scene.things]
        near = ((a, b) for a, b in pairs if b and math.dist((a.x, a.y), (b.x, b.y)) < a.radius / 4)
        right = [(a, b) for a, b in near if a.colour == b.colour]
        things += len(pairs)
        found += len(right)
        texture += sum(a.texture == b.texture for a, b in right)
        part += sum(a.part == b.part for a, b in right)
        extra += len(seen) - len(right)
    of_found = {"texture": texture / max(found, 1), "part": part / max(found, 1)}
    of_scenes = {"extra": extra / scenes, "background": background / scenes}
    return {"things": things, "found": found / things, **of_found, **of_scenes}
