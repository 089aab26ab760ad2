"""The things in pictures in the style of :mod:`drawn.rendering`.

No network is involved, and generated pictures are seen as well as drawn ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .fitting import Fit, fit_shape, part_share
from .layers import Layers, components, grown, pattern_of, split
from .likeness import pixels_of
from .rendering import THING_WAVES
from .shapes import SIDE
from .vocabulary import SHIPPED, Vocabulary

_MIN_AREA = 0.006  # of the picture; the smallest thing drawn covers 0.017
_RADII = 0.08, 0.34  # of what can have a shape; those drawn are 0.12 to 0.26
_MIN_TEXTURE = 0.1  # amplitude of the shade; 0.28 as drawn
_MIN_PART = 0.4  # share of a part's place that is black


@dataclass(frozen=True)
class Found:
    """One thing found in a picture; lengths are fractions of the side, as in :class:`~.shapes.Thing`.

    Attributes:
        shape: one of the vocabulary's; None where nothing fits: a blob, a smear or something far too large or small.
        colour, texture: of the vocabulary's.
        part: one of the vocabulary's or None.
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


def detect(image: Image.Image | np.ndarray, *, vocabulary: Vocabulary = SHIPPED) -> tuple[Found, ...]:
    """The things in a picture, the largest first.

    Args:
        image: square, of any size (it is looked at in ``SIDE`` pixels): PIL, or uint8 [H, W, 3] RGB.
        vocabulary: what may be in it.

    Raises:
        ValueError: an array of another shape or type, or a picture that is not square.
    """
    layers = split(pixels_of(image), vocabulary)
    glasses = "glasses" in vocabulary.parts
    # Of what glasses hide, the rest may be small.
    masks = components(np.where(layers.colour > 0.5, layers.hue, -1), _MIN_AREA / 2 if glasses else _MIN_AREA)
    waiting, things = [(mask, fit_shape(layers, mask, vocabulary)) for mask in masks], []
    bridges = _bridges(layers.black) if glasses else []
    while waiting:
        mask, fit = waiting.pop(0)
        for i, (other, other_fit) in enumerate(things):
            # A generated thing may be in two colours with a seam of a third, or torn: what fits as well as one is one.
            needed = max(fit.lead, other_fit.lead) - 0.02
            bridged = any((mask & each).any() and (other & each).any() for each in bridges)
            if bridged and _hue(layers, mask) == _hue(layers, other):
                needed = min(needed, 0.0)  # glasses leave a tip and a rest, each a shape of its own
            elif not (grown(grown(mask)) & grown(other)).any():
                continue
            joined = fit_shape(layers, mask | other, vocabulary)
            if joined.lead > needed:
                del things[i]
                waiting.insert(0, (mask | other, joined))
                break
        else:
            things.append((mask, fit))
    things = [thing for thing in things if thing[0].sum() >= _MIN_AREA * SIDE**2]
    things.sort(key=lambda thing: -thing[0].sum())
    return tuple(_found(layers, mask, fit, vocabulary) for mask, fit in things)


def background_of(image: Image.Image | np.ndarray, *, vocabulary: Vocabulary = SHIPPED) -> str | None:
    """The background of a picture, one of the vocabulary's; None where things hide too much of it to tell.

    Raises:
        ValueError: see :func:`detect`.
    """
    return split(pixels_of(image), vocabulary).background


def _bridges(black: np.ndarray) -> list[np.ndarray]:
    """Where black lies, and next to it: glasses may leave only what is above and what is below of a thing."""
    return [grown(grown(mask)) for mask in components(np.where(black > 0.5, 0, -1), _MIN_AREA / 2)]


def _found(layers: Layers, mask: np.ndarray, fit: Fit, vocabulary: Vocabulary) -> Found:
    x, y, radius = (float(length) / SIDE for length in (fit.x, fit.y, fit.radius))
    bare = mask & ~grown(layers.black > 0.5)  # a part's soft edge looks like shade
    known = fit.lead >= 0 and _RADII[0] <= radius <= _RADII[1]
    return Found(
        shape=fit.shape if known else None,
        colour=vocabulary.colours[_hue(layers, mask)],
        texture=_texture(layers.shade, bare, vocabulary),
        part=_part(layers.black, fit, vocabulary),
        x=x,
        y=y,
        radius=radius,
        score=float(fit.score),
    )


def _hue(layers: Layers, mask: np.ndarray) -> int:
    """Index of the colour that most of the mask has."""
    return int(np.bincount(layers.hue[mask], layers.colour[mask]).argmax())


def _texture(shade: np.ndarray, mask: np.ndarray, vocabulary: Vocabulary) -> str:
    """By the shade's waves down and across at the textures' period, whatever their phase."""
    y, x = 2 * math.pi * THING_WAVES / SIDE * np.array(np.nonzero(mask))
    waves = [np.ones(len(y)), np.cos(y), np.sin(y), np.cos(x), np.sin(x)]
    if "checkered" in vocabulary.textures:
        waves += [down * across for down in waves[1:3] for across in waves[3:5]]
    amounts = np.linalg.lstsq(np.stack(waves, 1), shade[mask], rcond=None)[0]
    down, across = np.hypot(*amounts[1:3]), np.hypot(*amounts[3:5])
    return pattern_of(down, across, float(np.linalg.norm(amounts[5:])), _MIN_TEXTURE) or "plain"


def _part(black: np.ndarray, fit: Fit, vocabulary: Vocabulary) -> str | None:
    """The part whose place is black, if one's is."""
    shares = {part: part_share(black, fit, part) for part in vocabulary.parts}
    part = max(vocabulary.parts, key=lambda part: shares[part])
    return part if shares[part] >= _MIN_PART else None
