"""Judge of pictures in the style of :mod:`difffast.models.shapes`: what is in them, and is it what the prompt said?

No network is involved.  A thing's colour is known exactly, so each pixel is split into the shares of grey background,
of colour and of shadow it is made of; the colour's share is then compared with the six shapes, drawn by the same code
as the pictures.  Soft edges, textures and noise change the shares little, so generated pictures are judged as well as
drawn ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image, ImageFilter

from ..demo import psnr
from .shapes import COLOURS, SHAPES, SIDE, Scene, Thing, draw_scene, holds, render

__all__ = [
    "Accuracy", "Found", "Verdict", "accuracy", "degrade", "detect", "distance", "features", "frechet", "judge",
    "psnr", "summary",
]  # fmt: skip

#: The least IoU with a template at which a thing is said to have that shape.
MIN_SCORE = 0.75
_MIN_AREA = 0.006  # of the picture; the smallest thing drawn covers 0.017
_RADII = 0.08, 0.34  # of anything that can be a shape; those drawn are 0.12 to 0.26
_MIN_TEXTURE = 0.1  # amplitude of the shade; a texture as drawn has 0.25
_MIN_PART = 0.4  # share of a part's place that is black
_CELLS, _REACH = 32, 1.6  # cells of a template's side, and its half length in radii: room for a hat

_RGB = np.array(list(COLOURS.values())) / 255
_LIGHTNESS = _RGB.mean(1)
_CHROMA = _RGB - _LIGHTNESS[:, None]
_HUES = _CHROMA / np.linalg.norm(_CHROMA, axis=1, keepdims=True)


@dataclass(frozen=True)
class Found:
    """One thing found in a picture; lengths are fractions of the side, as in :class:`~.shapes.Thing`.

    Attributes:
        shape: one of ``SHAPES``; None where nothing fits: a blob, smear or something too large.
        colour, texture: names of ``COLOURS`` and ``TEXTURES``.
        part: "hat", "boots" or None.
        x, y, radius: where the best shape fits, be it good enough or not.
        score: IoU of the thing and that shape, 0 to 1; ``shape`` is None below ``MIN_SCORE``.
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
class _Layers:
    """What the pixels are made of, [SIDE, SIDE] each: shares of colour and of black, the colour's shade, its index."""

    colour: np.ndarray
    black: np.ndarray
    shade: np.ndarray
    hue: np.ndarray


def detect(image: Image.Image | np.ndarray) -> tuple[Found, ...]:
    """The things in a picture, the largest first.

    Args:
        image: square, of any size (looked at in ``SIDE`` pixels): PIL, or uint8 [H, W, 3] RGB.

    Raises:
        ValueError: an array of another shape or type, or a picture that is not square.
    """
    layers = _layers(_pixels(image))
    things = [(mask, _fit(layers, mask)) for mask in _components(np.where(layers.colour > 0.5, layers.hue, -1))]
    things = _merged(layers, things)
    return tuple(_found(layers, mask, fit) for mask, fit in sorted(things, key=lambda thing: -thing[0].sum()))


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """[SIDE, SIDE, 3], float64 in 0..1."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"image must be uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
        image = Image.fromarray(array)
    if image.width != image.height:
        raise ValueError(f"image must be square, got {image.width}x{image.height}")
    image = image.convert("RGB")
    if image.width != SIDE:
        smaller = image.width > SIDE
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX if smaller else Image.Resampling.BILINEAR)
    return np.asarray(image) / 255


def _layers(pixels: np.ndarray) -> _Layers:
    """A pixel of coverage a, shade s and colour c on a grey g is (1 - a) g + a s c: linear in a and in a s."""
    lightness = pixels.mean(2)
    chroma = pixels - lightness[..., None]
    # The neighbours have their say in the hue, or noise would push the background's pixels towards some colour.
    hue = (_smooth(chroma) @ _HUES.T).argmax(2)
    lit = (chroma * _CHROMA[hue]).sum(2) / (_CHROMA**2).sum(1)[hue]
    covered = 1 - (lightness - lit * _LIGHTNESS[hue]) / _background(lightness, chroma)
    shade = lit / np.maximum(covered, 0.1)
    colour = np.clip((shade - 0.15) / 0.25, 0, 1) * np.clip(covered, 0, 1)
    return _Layers(colour, np.clip(covered - colour, 0, 1), shade, hue)


def _smooth(planes: np.ndarray) -> np.ndarray:
    """Mean over 3x3 pixels."""
    padded = np.pad(planes, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def _background(lightness: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """Grey of each row, [SIDE, 1]: a line through the background's pixels."""
    y, x = np.nonzero((np.abs(chroma).max(2) < 0.12) & (lightness > 0.45))
    if len(y) < 2 * SIDE or np.ptp(y) < SIDE / 2:
        return np.full((SIDE, 1), 0.98)  # no telling; white is drawn most
    slope, start = np.polyfit(y, lightness[y, x], 1)
    return np.maximum(start + slope * np.arange(SIDE), 0.3)[:, None]


def _components(classes: np.ndarray) -> list[np.ndarray]:
    """Masks of the connected pixels of one class, -1 being none, of at least the least area."""
    index = np.arange(classes.size).reshape(classes.shape)
    labels, before = index.copy(), None
    right, down = classes[:, 1:] == classes[:, :-1], classes[1:] == classes[:-1]
    while before is None or (labels != before).any():
        before = labels.copy()
        for same, a, b in ((right, labels[:, 1:], labels[:, :-1]), (down, labels[1:], labels[:-1])):
            least = np.minimum(a, b)
            a[same], b[same] = least[same], least[same]
        labels = labels.ravel()[labels.ravel()[labels]]  # a label is a pixel: take over that one's label
    names, counts = np.unique(labels[classes >= 0], return_counts=True)
    return [labels == name for name in names[counts >= _MIN_AREA * classes.size]]


@dataclass(frozen=True)
class _Fit:
    shape: str
    x: float  # in pixels, as is the radius
    y: float
    radius: float
    score: float


def _fit(layers: _Layers, mask: np.ndarray) -> _Fit:
    """The shape, place and radius of the greatest IoU."""
    soft, seen = _own(layers, mask), 1 - layers.black
    mass = soft.sum()
    centre = np.arange(SIDE) + 0.5
    x, y = (soft.sum(0) @ centre) / mass, (soft.sum(1) @ centre) / mass
    fits = []
    for shape in SHAPES:
        area, below = _moments(shape)
        radius = math.sqrt(mass / area)
        fits.append(_search(soft, seen, _Fit(shape, x, y - below * radius, radius, 0.0), 0.12))
    best = sorted(fits, key=lambda fit: -fit.score)[:2]
    for step in (0.06, 0.03):
        best = [_search(soft, seen, fit, step) for fit in best]
    return max(best, key=lambda fit: fit.score)


def _own(layers: _Layers, mask: np.ndarray) -> np.ndarray:
    """The colour's share with the thing's soft edge, which the mask leaves out."""
    return layers.colour * (_smooth(mask[..., None].astype(np.float64))[..., 0] > 0)


def _search(soft: np.ndarray, seen: np.ndarray, start: _Fit, step: float) -> _Fit:
    """The best of 27 places and radii around a start.  What is behind black is not seen: it may be anything."""
    moves = np.array((-step, 0, step))
    template = _template(start.shape, None)[0]
    best = start
    for radius in start.radius * (1 + moves):
        columns = [_sampler(start.x + move * radius, radius) for move in moves]
        rows = np.stack([_sampler(start.y + move * radius, radius) for move in moves])
        there = rows[:, None] @ soft @ np.stack(columns).transpose(0, 2, 1)[None]
        weight = rows[:, None] @ seen @ np.stack(columns).transpose(0, 2, 1)[None]
        both = (weight * np.minimum(there, template)).sum((2, 3))
        either = (weight * np.maximum(there, template)).sum((2, 3))
        scores = both / np.maximum(either, 1e-9)
        i, j = np.unravel_index(scores.argmax(), scores.shape)
        if scores[i, j] > best.score:
            place = start.x + moves[j] * radius, start.y + moves[i] * radius
            best = _Fit(start.shape, *place, radius, float(scores[i, j]))
    return best


def _sampler(centre: float, radius: float) -> np.ndarray:
    """[_CELLS, SIDE]: the share of each pixel in each cell, along one axis; nothing is outside the picture."""
    edges = centre + np.linspace(-_REACH, _REACH, _CELLS + 1)[:, None] * radius
    reached = np.clip(edges - np.arange(SIDE), 0, 1)
    return np.diff(reached, axis=0) * (_CELLS / (2 * _REACH * radius))


@lru_cache(maxsize=32)
def _template(shape: str, part: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Shares of colour and of black in the cells around a shape."""
    thing = Thing(shape, "red", part=part, radius=0.5 / _REACH)
    layers = _layers(np.asarray(render(Scene((thing,), "white", ""), _CELLS)) / 255)
    return layers.colour, layers.black
