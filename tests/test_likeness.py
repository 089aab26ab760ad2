import math
from dataclasses import replace

import numpy as np
import pytest
from drawn.judge import degrade
from drawn.likeness import distance, features, frechet
from drawn.rendering import render
from drawn.shapes import Scene, Thing
from drawn.vocabulary import LARGE, RGB, SMALL

RED = Thing("circle", "red", x=0.25, y=0.5)
BLUE = Thing("square", "blue", x=0.75, y=0.5)
GREEN = Thing("star", "green", x=0.5, y=0.2, radius=0.13)


def _scene(*things):
    return Scene(things, "white", "")


def test_features_say_what_is_where():
    cells = features(np.full((64, 64, 3), 128, np.uint8), SMALL).reshape(4, 4, 10)
    assert np.allclose(cells[..., :8], 0)
    assert np.allclose(cells[..., 8], 128 / 255)
    assert np.allclose(cells[..., 9], 0)
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[16:32, 48:] = RGB["cyan"]
    cells = features(picture, SMALL).reshape(4, 4, 10)
    cyan = SMALL.colours.index("cyan")
    assert cells[1, 3, cyan] > 0.99
    assert np.delete(cells[..., :8].ravel(), (1 * 4 + 3) * 8 + cyan).max() < 0.01
    picture[16:32, 48:] = RGB["lime"]
    cells = features(picture, LARGE).reshape(4, 4, 12)
    assert cells[1, 3, LARGE.colours.index("lime")] > 0.98
    assert distance(picture, picture, LARGE) == 0


def test_distance_orders_pictures():
    rng = np.random.default_rng(2)
    picture, moved = render(_scene(RED)), render(_scene(replace(RED, x=0.75)))
    recoloured = render(_scene(replace(RED, colour="orange")))
    assert distance(picture, picture) == 0
    assert distance(picture, moved) == distance(moved, picture)
    noisy = distance(picture, degrade(picture, rng))
    assert 0 < noisy < distance(picture, recoloured) / 3
    assert noisy < distance(picture, moved) / 3
    black, white = (np.full((64, 64, 3), grey, np.uint8) for grey in (0, 255))
    for vocabulary, numbers in ((SMALL, 10), (LARGE, 12)):  # of which one is the lightness
        assert distance(black, white, vocabulary) == pytest.approx(math.sqrt(1 / numbers))


def test_frechet_of_equal_sets_is_zero_even_when_singular():
    rng = np.random.default_rng(0)
    for n, d in ((500, 6), (5, 40), (2, 160)):
        values = rng.standard_normal((n, d))
        assert frechet(values, values) == pytest.approx(0, abs=1e-6)
    assert frechet(np.zeros((3, 4)), np.zeros((2, 4))) == 0
    pictures = np.stack([features(render(scene)) for scene in (_scene(RED), _scene(BLUE), _scene(GREEN))])
    assert frechet(pictures, pictures) == pytest.approx(0, abs=1e-6)


def test_frechet_of_shifted_and_scaled_gaussians():
    rng = np.random.default_rng(1)
    values = rng.standard_normal((50, 5)) @ rng.standard_normal((5, 5))
    shift = np.arange(5.0)
    assert frechet(values, values + shift) == pytest.approx(shift @ shift)
    # sqrt(A 9A) = 3A, so tr(A + 9A - 6A) = 4 tr A, besides the means.
    mean = values.mean(0)
    expected = 4 * np.trace(np.cov(values, rowvar=False)) + 4 * mean @ mean
    assert frechet(values, 3 * values) == pytest.approx(expected)
    # In one dimension: (mean difference)^2 + (deviation difference)^2.
    a, b = rng.normal(0, 1, (30, 1)), rng.normal(2, 3, (40, 1))
    assert frechet(a, b) == pytest.approx((a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2)


def test_frechet_when_covariances_do_not_commute():
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((200, 3)) @ rng.standard_normal((3, 3)) for _ in range(2))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real)  # of the product, which is not symmetric
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * roots.sum()
    assert frechet(a, b) == pytest.approx(expected)
    assert frechet(a, b) == pytest.approx(frechet(b, a))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 4)), np.zeros((5, 4)), r"features_a must be .* at least 2 samples, got \[1, 4\]"),
        (np.zeros((5, 4)), np.zeros(4), r"features_b must be .* at least 2 samples, got \[4\]"),
        (np.zeros((5, 4)), np.zeros((5, 3)), "must be equally long, got 4 and 3"),
        (np.zeros((5, 4)), np.full((5, 4), np.nan), "features_b must be finite"),
    ],
)
def test_frechet_errors(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet(a, b)
