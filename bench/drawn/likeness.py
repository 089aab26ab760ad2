"""How alike two pictures of captioned shapes are, or two sets of them, in features that are computed, not learned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from .shapes import SIDE
from .vocabulary import RGB, SHIPPED, Vocabulary


@dataclass(frozen=True)
class Palette:
    """Of each colour: how light it is, [n], and the direction, [n, 3], and length, [n], of how it differs from grey."""

    lightness: np.ndarray
    hues: np.ndarray
    strength: np.ndarray


@lru_cache(maxsize=4)
def palette(vocabulary: Vocabulary) -> Palette:
    """The colours of a vocabulary, in its order."""
    rgb = np.array([RGB[colour] for colour in vocabulary.colours]) / 255
    lightness = rgb.mean(1)
    chroma = rgb - lightness[:, None]
    strength = np.linalg.norm(chroma, axis=1)
    return Palette(lightness, chroma / strength[:, None], strength)


def pixels_of(image: Image.Image | np.ndarray) -> np.ndarray:
    """[SIDE, SIDE, 3], float64 in 0 .. 1.

    Args:
        image: square, of any size: PIL, or uint8 [H, W, 3] RGB.

    Raises:
        ValueError: an array of another shape or type, or a picture that is not square.
    """
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"image must be uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
        image = Image.fromarray(array)
    if image.width != image.height:
        raise ValueError(f"image must be square, got {image.width}x{image.height}")
    if image.width != SIDE:
        resampling = Image.Resampling.BOX if image.width > SIDE else Image.Resampling.BILINEAR
        image = image.resize((SIDE, SIDE), resampling)
    return np.asarray(image.convert("RGB")) / 255


def features(image: Image.Image | np.ndarray, vocabulary: Vocabulary = SHIPPED) -> np.ndarray:
    """What is where, roughly: float64 [16 * (colours + 2)], each 0 to 1, for :func:`distance` and :func:`frechet`.

    In each of 4x4 cells: the share of each colour, softly assigned, and the lightness' mean and standard deviation.

    Raises:
        ValueError: see :func:`pixels_of`.
    """
    pixels, colours = pixels_of(image), palette(vocabulary)
    lightness = pixels.mean(2, keepdims=True)
    chroma = pixels - lightness
    strength = np.linalg.norm(chroma, axis=2, keepdims=True)
    alike = np.exp(30 * (chroma @ colours.hues.T / np.maximum(strength, 1e-9) - 1))  # 1/10 for orange and yellow
    shares = alike / alike.sum(2, keepdims=True) * np.minimum(strength / colours.strength, 1)
    cells = np.concatenate((shares, lightness), 2).reshape(4, SIDE // 4, 4, SIDE // 4, -1)
    return np.concatenate((cells.mean((1, 3)), cells[..., -1:].std((1, 3))), 2).ravel()


def distance(a: Image.Image | np.ndarray, b: Image.Image | np.ndarray, vocabulary: Vocabulary = SHIPPED) -> float:
    """How unlike two pictures look: the root mean square difference of their features, 0 (identical) to 1.

    Raises:
        ValueError: see :func:`pixels_of`.
    """
    return float(np.sqrt(np.mean((features(a, vocabulary) - features(b, vocabulary)) ** 2)))


def frechet(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features, [n, d] and [m, d] (arXiv:1706.08500).

    Covariances may be singular, as with n <= d.  Few samples bias it upwards: compare only at equal n and m.

    Raises:
        ValueError: fewer than two samples, not 2-D, different d, or values that are not finite.
    """
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    for name, values in (("features_a", a), ("features_b", b)):
        if values.ndim != 2 or len(values) < 2:
            raise ValueError(f"{name} must be [samples, features] with at least 2 samples, got {list(values.shape)}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features_a and features_b must be equally long, got {a.shape[1]} and {b.shape[1]}")
    cov_a, cov_b = (np.atleast_2d(np.cov(values, rowvar=False)) for values in (a, b))
    # tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)), of a symmetric matrix; rounding may make eigenvalues negative.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    mixed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    squared = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * mixed
    return max(0.0, float(squared))
