"""Judge of pictures in the style of :mod:`drawn.shapes`: what is in them, and is it what the prompt said?

No network is involved.  The colours are known exactly, so each pixel is split into the shares of grey background, of
colour and of black that it is made of; the colour's share is then compared with the six shapes, drawn by the same code
as the pictures.  Soft edges, textures and noise change the shares little, so generated pictures are judged as well as
drawn ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from .likeness import HUES, LIGHTNESS, STRENGTH, pixels_of
from .rendering import render
from .shapes import SIDE, Scene, Thing, draw_scene, holds
from .vocabulary import SHIPPED

#: The least IoU at which a thing has a shape: more for those that blobs are like, less for those that blurs wear down.
MIN_SCORE = {"circle": 0.83, "square": 0.83, "triangle": 0.77, "star": 0.72, "cross": 0.74, "ring": 0.72}
_MIN_AREA = 0.006  # of the picture; the smallest thing drawn covers 0.017
_RADII = 0.08, 0.34  # of what can have a shape; those drawn are 0.12 to 0.26
_MIN_TEXTURE = 0.1  # amplitude of the shade; 0.28 as drawn
_MIN_PART = 0.4  # share of a part's place that is black
_CELL = 0.1  # a template's resolution, in radii
_CELLS, _PART_CELLS = 24, 32  # a template's side: of a shape's, and with room for a hat


@dataclass(frozen=True)
class Found:
    """One thing found in a picture; lengths are fractions of the side, as in :class:`~.shapes.Thing`.

    Attributes:
        shape: one of ``SHAPES``; None where nothing fits: a blob, a smear or something far too large or small.
        colour, texture: names of ``COLOURS`` and ``TEXTURES``.
        part: one of ``PARTS`` or None.
        x, y, radius: where the best shape fits, be it good enough or not.
        score: IoU of the thing and that shape, 0 to 1; below ``MIN_SCORE``, ``shape`` is None.
    """

    shape: str | None
    colour: str
    texture: str
    part: str | None
    x: float
    y: float
    radius: float
    score: float


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
            thing of the prompt ("plain" and no part are not said); None if none is present.
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


def detect(image: Image.Image | np.ndarray) -> tuple[Found, ...]:
    """The things in a picture, the largest first.

    Args:
        image: square, of any size (it is looked at in ``SIDE`` pixels): PIL, or uint8 [H, W, 3] RGB.

    Raises:
        ValueError: an array of another shape or type, or a picture that is not square.
    """
    layers = _layers(pixels_of(image))
    masks = _components(np.where(layers.colour > 0.5, layers.hue, -1))
    waiting, things = [(mask, _fit(layers, mask)) for mask in masks], []
    while waiting:
        mask, fit = waiting.pop(0)
        for i, (other, other_fit) in enumerate(things):
            # A generated thing may be in two colours with a seam of a third, or torn: what fits as well as one is one.
            if (_grown(_grown(mask)) & _grown(other)).any():
                joined = _fit(layers, mask | other)
                if joined.lead > max(fit.lead, other_fit.lead) - 0.02:
                    del things[i]
                    waiting.insert(0, (mask | other, joined))
                    break
        else:
            things.append((mask, fit))
    things.sort(key=lambda thing: -thing[0].sum())
    return tuple(_found(layers, mask, fit) for mask, fit in things)


@dataclass(frozen=True)
class _Layers:
    """What pixels are made of, [side, side] each: shares of colour and of black, the colour's shade and its index."""

    colour: np.ndarray
    black: np.ndarray
    shade: np.ndarray
    hue: np.ndarray


def _layers(pixels: np.ndarray) -> _Layers:
    """A pixel covered to a share a by colour c of shade s on grey g is (1 - a) g + a s c: linear in a and in a s."""
    lightness = pixels.mean(2)
    chroma = pixels - lightness[..., None]
    # The neighbours have their say in the hue, or noise would push the background's pixels towards some colour.
    hue = (_smooth(chroma) @ HUES.T).argmax(2)
    lit = (chroma * HUES[hue]).sum(2) / STRENGTH[hue]
    covered = 1 - (lightness - lit * LIGHTNESS[hue]) / _background(lightness, chroma)
    shade = lit / np.maximum(covered, 0.1)
    colour = np.clip((shade - 0.15) / 0.25, 0, 1) * np.clip(covered, 0, 1)
    return _Layers(colour, np.clip(covered - colour, 0, 1), shade, hue)


def _background(lightness: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """Grey of each row, [side, 1]: a line through the background's pixels."""
    side = len(lightness)
    y, x = np.nonzero((np.abs(chroma).max(2) < 0.12) & (lightness > 0.45))
    if len(y) < 2 * side or np.ptp(y) < side / 2:
        return np.full((side, 1), 0.98)  # no telling; white is drawn most
    slope, start = np.polyfit(y, lightness[y, x], 1)
    return np.maximum(start + slope * np.arange(side), 0.3)[:, None]


def _smooth(planes: np.ndarray) -> np.ndarray:
    """Mean over 3x3 pixels of [H, W, n]."""
    padded = np.pad(planes, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its neighbours."""
    return _smooth(mask[..., None].astype(np.float64))[..., 0] > 0


def _components(classes: np.ndarray) -> list[np.ndarray]:
    """Masks of the connected pixels of one class, -1 being none, that are large enough, the largest first."""
    labels, before = np.arange(classes.size).reshape(classes.shape), None
    across, along = classes[:, 1:] == classes[:, :-1], classes[1:] == classes[:-1]
    while before is None or (labels != before).any():
        before, labels = labels, labels.copy()
        right, left, lower, upper = labels[:, 1:], labels[:, :-1], labels[1:], labels[:-1]
        for same, a, b in ((across, right, left), (across, left, right), (along, lower, upper), (along, upper, lower)):
            a[same] = np.minimum(a, b)[same]
        labels = labels.ravel()[labels]  # a label is a pixel: take over that pixel's label
    names, counts = np.unique(labels[classes >= 0], return_counts=True)
    return [labels == names[i] for i in np.argsort(-counts, kind="stable") if counts[i] >= _MIN_AREA * classes.size]


@dataclass(frozen=True)
class _Fit:
    """A shape at a place, in pixels, and its IoU."""

    shape: str
    x: float
    y: float
    radius: float
    score: float = 0.0

    @property
    def lead(self) -> float:
        """Over the shape's least score; compared instead of scores, or a blurred star would be a poor circle."""
        return self.score - MIN_SCORE[self.shape]


def _fit(layers: _Layers, mask: np.ndarray) -> _Fit:
    """The shape, place and radius that fit best, searched from where the mass and its centre are right."""
    near = _grown(mask)  # the mask leaves out the soft edge
    y, x = np.nonzero(near)
    top, left = y.min(), x.min()
    window = slice(top, y.max() + 1), slice(left, x.max() + 1)
    colour = (layers.colour * near)[window]
    planes = np.stack((colour, layers.black[window]))
    y, x = (colour.sum(1 - axis) @ (np.arange(colour.shape[axis]) + 0.5) / colour.sum() for axis in (0, 1))
    fits = []
    for shape in SHIPPED.shapes:
        cells = _template(shape)
        radius = math.sqrt(colour.sum() / cells.sum()) / _CELL
        below = (cells.sum(1) @ _edges(_CELLS)[:-1] / cells.sum() + _CELL / 2) * radius
        fits.append(_search(planes, _Fit(shape, x, y - below, radius), 0.12, stretches=(1.0,)))
    fits = sorted(fits, key=lambda fit: -fit.lead)[:3]
    for step in (0.06, 0.03):
        fits = [_search(planes, fit, step, stretches=(1 - step, 1.0, 1 + step)) for fit in fits]
    best = max(fits, key=lambda fit: fit.lead)
    return replace(best, x=best.x + left, y=best.y + top)


def _search(planes: np.ndarray, start: _Fit, step: float, stretches: Sequence[float]) -> _Fit:
    """The best of 3x3 places at some radii; ``planes`` are colour and black, [2, H, W].

    What black hides does not count.
    """
    template = _template(start.shape)
    moves = np.array((-step, 0, step))
    best = start
    for radius in (start.radius * stretch for stretch in stretches):
        ys, xs = start.y + moves * radius, start.x + moves * radius
        # Every place down at once with every place to the right: [2, 3 * _CELLS, 3 * _CELLS].
        sampled = _sampler(ys, radius, planes.shape[1]) @ planes @ _sampler(xs, radius, planes.shape[2]).T
        colour, black = sampled.reshape(2, 3, _CELLS, 3, _CELLS).swapaxes(2, 3)
        colour, seen = _sharp(colour), 1 - black
        both = (seen * np.minimum(colour, template)).sum((2, 3))
        scores = both / np.maximum((seen * (colour + template)).sum((2, 3)) - both, 1e-9)
        i, j = np.unravel_index(scores.argmax(), scores.shape)
        if scores[i, j] > best.score:
            best = _Fit(start.shape, xs[j], ys[i], radius, scores[i, j])
    return best


@lru_cache(maxsize=2)
def _edges(cells: int) -> np.ndarray:
    """Of the cells around a centre, in radii."""
    return (np.arange(cells + 1) - cells / 2) * _CELL


def _sampler(centres: np.ndarray, radius: float, length: int, cells: int = _CELLS) -> np.ndarray:
    """[centres * cells, length]: each pixel's share in each cell along one axis; outside the window is nothing."""
    edges = centres[:, None] + _edges(cells) * radius
    covered = (edges[..., None] - np.arange(length)).clip(0, 1)
    return (covered[:, 1:] - covered[:, :-1]).reshape(-1, length) / (_CELL * radius)


@lru_cache(maxsize=32)
def _template(shape: str, part: str | None = None) -> np.ndarray:
    """[cells, cells]: a shape's share in the cells around it, or its part's."""
    cells = _PART_CELLS if part else _CELLS
    thing = Thing(shape, "red", part=part, radius=1 / (_CELL * cells))
    layers = _layers(np.asarray(render(Scene((thing,), "white", ""), cells)) / 255)
    return layers.black if part else _sharp(layers.colour)


def _sharp(shares: np.ndarray) -> np.ndarray:
    """With steeper edges: a blur hardly moves where the share is a half, and is not to count against a shape."""
    return (3 * shares - 1).clip(0, 1)


def _found(layers: _Layers, mask: np.ndarray, fit: _Fit) -> Found:
    votes = np.bincount(layers.hue[mask], layers.colour[mask], len(SHIPPED.colours))
    x, y, radius = (float(length) / SIDE for length in (fit.x, fit.y, fit.radius))
    known = fit.lead >= 0 and _RADII[0] <= radius <= _RADII[1]
    return Found(
        shape=fit.shape if known else None,
        colour=SHIPPED.colours[votes.argmax()],
        texture=_texture(layers.shade, mask & ~_grown(layers.black > 0.5)),  # a part's soft edge looks like shade
        part=_part(layers.black, fit),
        x=x,
        y=y,
        radius=radius,
        score=float(fit.score),
    )


def _texture(shade: np.ndarray, mask: np.ndarray) -> str:
    """By the shade's waves down and across at the textures' period, whatever their phase."""
    y, x = 2 * math.pi * 10 / SIDE * np.array(np.nonzero(mask))
    waves = np.stack((np.ones(len(y)), np.cos(y), np.sin(y), np.cos(x), np.sin(x)), 1)
    amounts = np.linalg.lstsq(waves, shade[mask], rcond=None)[0]
    down, across = np.hypot(*amounts[1:3]), np.hypot(*amounts[3:])
    if down + across < _MIN_TEXTURE:
        return "plain"
    return "striped" if across < 0.4 * down else "dotted"


def _part(black: np.ndarray, fit: _Fit) -> str | None:
    """The part whose place is black, if one's is."""
    rows, columns = (_sampler(np.array([at]), fit.radius, SIDE, _PART_CELLS) for at in (fit.y, fit.x))
    there = rows @ black @ columns.T
    shares = {
        part: (there * _template(fit.shape, part)).sum() / _template(fit.shape, part).sum() for part in SHIPPED.parts
    }
    part = max(SHIPPED.parts, key=lambda part: shares[part])
    return part if shares[part] >= _MIN_PART else None


def judge(image: Image.Image | np.ndarray, scene: Scene) -> Verdict:
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
    found = detect(image)
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
        leakage=sum(_leaks(own, seen, things) for own, seen in pairs) / len(pairs) if pairs else None,
        relation=relation,
    )


def _looks(thing: Thing | Found) -> tuple[str, str, str | None]:
    return thing.colour, thing.texture, thing.part


def _match(thing: Thing, found: Sequence[Found]) -> Found | None:
    """The one found of the thing's shape; of several, the one most like it, colour first."""
    same = [f for f in found if f.shape == thing.shape]
    own = _looks(thing)
    return max(same, key=lambda f: ([a == b for a, b in zip(_looks(f), own, strict=True)], f.score), default=None)


def _leaks(own: tuple[str | None, ...], seen: tuple[str | None, ...], things: Sequence[Thing]) -> bool:
    """Whether something seen is not the thing's own, but said of another."""
    said = [{look for look in looks if look not in ("plain", None)} for looks in zip(*map(_looks, things), strict=True)]
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


def accuracy(scenes: int = 2000, seed: int = 0, *, degraded: bool = False) -> dict[str, float]:
    """How much of drawn scenes the detector gets right, drawn clean or put through :func:`degrade`.

    Returns:
        ``things``: how many were drawn.  ``found``: the share of them found with their shape and colour, and the
        centre within a quarter of the radius.  ``texture``, ``part``: right, as shares of those found.  ``extra``: how
        many were found besides, per scene.

    Raises:
        ValueError: no scenes.
    """
    if scenes < 1:
        raise ValueError(f"scenes must be at least 1, got {scenes}")
    rng = np.random.default_rng(seed)
    things = found = texture = part = extra = 0
    for _ in range(scenes):
        scene = draw_scene(rng)
        image = render(scene)
        seen = detect(degrade(image, rng) if degraded else image)
        pairs = [(thing, _match(thing, seen)) for thing in scene.things]
        near = ((a, b) for a, b in pairs if b and math.dist((a.x, a.y), (b.x, b.y)) < a.radius / 4)
        right = [(a, b) for a, b in near if a.colour == b.colour]
        things += len(pairs)
        found += len(right)
        texture += sum(a.texture == b.texture for a, b in right)
        part += sum(a.part == b.part for a, b in right)
        extra += len(seen) - len(right)
    of_found = {"texture": texture / max(found, 1), "part": part / max(found, 1)}
    return {"things": things, "found": found / things, **of_found, "extra": extra / scenes}
