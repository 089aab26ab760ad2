"""What the pixels of a picture in the style of :mod:`drawn.rendering` are made of.

The colours are known exactly, so each pixel is split into the shares of grey background, of colour and of black that
it is made of.  Soft edges, textures and noise change the shares little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .likeness import palette
from .rendering import BACKGROUND_WAVES
from .vocabulary import Vocabulary

#: Of backgrounds: how much darker a gradient's end is, at least (0.32 as drawn); how light white is, at least (as drawn
#: 0.98, and grey 0.66); amplitude of a pattern's waves, at least (as drawn 0.08 to 0.12).
_GRADIENT, _LIGHT, _MIN_PATTERN = 0.16, 0.8, 0.03


@dataclass(frozen=True)
class Layers:
    """What pixels are made of, [side, side] each: shares of colour and of black, the colour's shade and its index.

    ``background`` is the name of what lies behind them, or None where too little of it is seen to tell.
    """

    colour: np.ndarray
    black: np.ndarray
    shade: np.ndarray
    hue: np.ndarray
    background: str | None


def split(pixels: np.ndarray, vocabulary: Vocabulary) -> Layers:
    """What the pixels of a picture, [side, side, 3] in 0 .. 1, are made of, its hues being the vocabulary's colours.

    A pixel covered to a share a by colour c of shade s on grey g is (1 - a) g + a s c: linear in a and in a s.
    """
    colours = palette(vocabulary)
    lightness = pixels.mean(2)
    chroma = pixels - lightness[..., None]
    # The neighbours have their say in the hue, or noise would push the background's pixels towards some colour.
    hue = (_smooth(chroma) @ colours.hues.T).argmax(2)
    lit = (chroma * colours.hues[hue]).sum(2) / colours.strength[hue]
    grey, background = _background(lightness, chroma, patterned="striped" in vocabulary.backgrounds)
    covered = 1 - (lightness - lit * colours.lightness[hue]) / grey
    shade = lit / np.maximum(covered, 0.1)
    colour = np.clip((shade - 0.15) / 0.25, 0, 1) * np.clip(covered, 0, 1)
    return Layers(colour, np.clip(covered - colour, 0, 1), shade, hue, background)


def _background(lightness: np.ndarray, chroma: np.ndarray, *, patterned: bool) -> tuple[np.ndarray, str | None]:
    """Grey of each row, [side, 1], or of each pixel if the background may be patterned, and the background's name.

    It is a line through the background's pixels, and waves about it.
    """
    side = len(lightness)
    y, x = np.nonzero((np.abs(chroma).max(2) < 0.12) & (lightness > 0.45))
    if len(y) < 2 * side or np.ptp(y) < side / 2:
        return np.full((side, 1), 0.98), None  # no telling; white is drawn most
    slope, start = np.polyfit(y, lightness[y, x], 1)
    grey = np.maximum(start + slope * np.arange(side), 0.3)[:, None]
    name = "gradient" if grey[0] - grey[-1] > _GRADIENT else "white" if grey.mean() > _LIGHT else "grey"
    if not patterned:
        return grey, name
    waves, pattern = _waves(lightness - grey, y, x)
    return grey + waves, pattern or name


def _waves(rest: np.ndarray, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, str | None]:
    """What the background's pixels at y, x differ from a line by, as waves at the patterns' period; its pattern."""
    phase = 2 * np.pi * BACKGROUND_WAVES / len(rest) * np.arange(len(rest))
    down = np.stack((np.ones(len(rest)), np.cos(phase), np.sin(phase)))
    waves = down[:, None, :, None] * down[None, :, None, :]  # every wave down times every wave across
    waves = waves.reshape(9, *rest.shape)[1:]
    there = waves[:, y, x]
    amounts = np.linalg.solve(there @ there.T + np.eye(8), there @ rest[y, x])
    across, down = np.hypot(*amounts[:2]), np.hypot(amounts[2], amounts[5])
    pattern = pattern_of(down, across, float(np.linalg.norm(amounts[[3, 4, 6, 7]])), _MIN_PATTERN)
    return np.tensordot(amounts, waves, 1), pattern


def pattern_of(down: float, across: float, both: float, least: float) -> str | None:
    """The pattern that has waves of these amplitudes: down, across, and products of the two; None below the least."""
    if max(down + across, both) < least:
        return None
    if both > down + across:
        return "checkered"
    return "striped" if across < 0.4 * down else "dotted"


def _smooth(planes: np.ndarray) -> np.ndarray:
    """Mean over 3x3 pixels of [H, W, n]."""
    padded = np.pad(planes, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its neighbours."""
    return _smooth(mask[..., None].astype(np.float64))[..., 0] > 0


def components(classes: np.ndarray, least: float) -> list[np.ndarray]:
    """Masks of the connected pixels of one class, -1 being none, of this share of all at least, the largest first."""
    labels, before = np.arange(classes.size).reshape(classes.shape), None
    across, along = classes[:, 1:] == classes[:, :-1], classes[1:] == classes[:-1]
    while before is None or (labels != before).any():
        before, labels = labels, labels.copy()
        right, left, lower, upper = labels[:, 1:], labels[:, :-1], labels[1:], labels[:-1]
        for same, a, b in ((across, right, left), (across, left, right), (along, lower, upper), (along, upper, lower)):
            a[same] = np.minimum(a, b)[same]
        labels = labels.ravel()[labels]  # a label is a pixel: take over that pixel's label
    names, counts = np.unique(labels[classes >= 0], return_counts=True)
    return [labels == names[i] for i in np.argsort(-counts, kind="stable") if counts[i] >= least * classes.size]
