"""Which shape a thing of a picture has, and where: its colour's share is held against the shapes as they are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .layers import Layers, grown, split
from .rendering import render
from .shapes import Scene, Thing
from .vocabulary import SMALL, Vocabulary

#: The least IoU at which a thing has a shape: more for those that blobs are like, less for those that blurs wear down.
MIN_SCORE = {
    "circle": 0.83,
    "square": 0.83,
    "triangle": 0.77,
    "star": 0.72,
    "cross": 0.74,
    "ring": 0.72,
    "heart": 0.78,
    "diamond": 0.78,
    "crescent": 0.72,
    "arrow": 0.74,
    "hourglass": 0.72,
    "drop": 0.78,
}
_LOPSIDED = ("crescent", "arrow")  # their mass is left or right of the centre
_CELL = 0.1  # a template's resolution, in radii
_CELLS, _PART_CELLS = 24, 32  # a template's side: of a shape's, and with room for a hat


@dataclass(frozen=True)
class Fit:
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


def fit_shape(layers: Layers, mask: np.ndarray, vocabulary: Vocabulary) -> Fit:
    """The shape, place and radius that fit best, searched from where the mass and its centre are right."""
    near = grown(mask)  # the mask leaves out the soft edge
    y, x = np.nonzero(near)
    top, left = y.min(), x.min()
    window = slice(top, y.max() + 1), slice(left, x.max() + 1)
    colour = (layers.colour * near)[window]
    planes = np.stack((colour, layers.black[window]))
    if "glasses" in vocabulary.parts:
        colour = colour + layers.black[window] * _between(mask[window])
    y, x = (colour.sum(1 - axis) @ (np.arange(colour.shape[axis]) + 0.5) / colour.sum() for axis in (0, 1))
    fits = []
    for shape in vocabulary.shapes:
        cells = _template(shape)
        radius = math.sqrt(colour.sum() / cells.sum()) / _CELL
        below, beside = (_centre(cells.sum(axis)) * radius for axis in (1, 0))
        beside = beside if shape in _LOPSIDED else 0
        fits.append(_search(planes, Fit(shape, x - beside, y - below, radius), 0.12, stretches=(1.0,)))
    fits = sorted(fits, key=lambda fit: -fit.lead)[:3]
    for step in (0.06, 0.03):
        fits = [_search(planes, fit, step, stretches=(1 - step, 1.0, 1 + step)) for fit in fits]
    best = max(fits, key=lambda fit: fit.lead)
    return replace(best, x=best.x + left, y=best.y + top)


def _centre(profile: np.ndarray) -> float:
    """Where the mass of a template's rows or columns has its centre, in radii."""
    return profile @ _edges(_CELLS)[:-1] / profile.sum() + _CELL / 2


def _between(mask: np.ndarray) -> np.ndarray:
    """What has some of the mask above it and below it: where glasses hide a thing."""
    above, below = (np.logical_or.accumulate(part) for part in (mask, mask[::-1]))
    return above & below[::-1]


def _search(planes: np.ndarray, start: Fit, step: float, stretches: Sequence[float]) -> Fit:
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
            best = Fit(start.shape, xs[j], ys[i], radius, scores[i, j])
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


@lru_cache(maxsize=64)
def _template(shape: str, part: str | None = None) -> np.ndarray:
    """[cells, cells]: a shape's share in the cells around it, or its part's."""
    cells = _PART_CELLS if part else _CELLS
    thing = Thing(shape, "red", part=part, radius=1 / (_CELL * cells))
    layers = split(np.asarray(render(Scene((thing,), "white", ""), cells)) / 255, SMALL)
    return layers.black if part else _sharp(layers.colour)


def part_share(black: np.ndarray, fit: Fit, part: str) -> float:
    """How much of a part's place is black, if the fit's thing wears it."""
    rows, columns = (_sampler(np.array([at]), fit.radius, len(black), _PART_CELLS) for at in (fit.y, fit.x))
    template = _template(fit.shape, part)
    return float((rows @ black @ columns.T * template).sum() / template.sum())


def _sharp(shares: np.ndarray) -> np.ndarray:
    """With steeper edges: a blur hardly moves where the share is a half, and is not to count against a shape."""
    return (3 * shares - 1).clip(0, 1)
