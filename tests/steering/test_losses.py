"""Every loss against its formula, written out pixel by pixel, and its gradient."""

import math

import pytest
import torch
from sampling import largest

from difffast.steering.composite import Columns
from difffast.steering.losses import LOSSES, Target, entropy_threshold

SIZE = (4, 6)
TOKENS, LENGTH = 10, 7
CENTRES = {side: [(i + 0.5) / side for i in range(side)] for side in SIZE}
TO_THE_EDGE = {side: [i / (side - 1) for i in range(side)] for side in SIZE}
MERGED = Columns((2, 5), ((), ()), LENGTH)
APART = Columns((2, 5), ((1,), (4, 6)), LENGTH)


def maps(seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, 24, TOKENS, dtype=torch.float64, generator=generator)).softmax(-1)


def column(maps, k):
    """A token's map of the first image, as rows."""
    return [[float(maps[0, y * SIZE[1] + x, k]) for x in range(SIZE[1])] for y in range(SIZE[0])]


def share(maps, k):
    values = [v for row in column(maps, k) for v in row]
    return [v / sum(values) for v in values]


def spatial(maps, k):
    """The entropy loss's p."""
    words = [torch.exp(maps[0, :, j] / 0.5) for j in range(1, LENGTH + 1)]
    b = torch.exp(maps[0, :, k] / 0.5) / sum(words)
    return [float(v - b.min()) / float((b - b.min()).sum()) for v in b]


def entropy(maps):
    return -2 * sum(p * math.log(p + 1e-5) for k in (2, 5) for p in spatial(maps, k))


def layout(maps, *, subjects_weight=0.5, places=((0.25, 0.5), (0.75, 0.5)), across=CENTRES[6], down=CENTRES[4]):
    total = 0.0
    for k, place in zip((2, 5), places, strict=True):
        p = spatial(maps, k)
        for axis in (0, 1):
            at = [(across[i % 6], down[i // 6])[axis] for i in range(24)]
            total += (32 * sum(x * y for x, y in zip(p, at, strict=True)) - 32 * place[axis]) ** 2 / 2
    return 0.2 * subjects_weight * total


def attend_and_excite(maps):
    losses = []
    inner = maps[0, :, 1:-1]
    b = torch.exp(100 * inner - (100 * inner).amax(1, keepdim=True))
    b = b / b.sum(1, keepdim=True)
    weight = {0: 1.0, 1: math.exp(-2.0), 2: math.exp(-4.0)}  # by the squared distance
    norm = sum(weight[dy * dy + dx * dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1))

    def reflected(i, n):
        return -i if i < 0 else 2 * n - 2 - i if i >= n else i

    for k in (2, 5):
        peak = max(
            sum(
                weight[dy * dy + dx * dx] * float(b[reflected(y + dy, 4) * 6 + reflected(x + dx, 6), k - 1])
                for dy in (-1, 0, 1)
                for dx in (-1, 0, 1)
            )
            / norm
            for y in range(4)
            for x in range(6)
        )
        losses.append(max(0.0, 1 - peak))
    return max(losses)


def overlap(a, b):
    return sum(map(min, a, b)) / sum(x + y for x, y in zip(a, b, strict=True))


def flat(maps, k):
    return [v for row in column(maps, k) for v in row]


def segregation(maps):
    return overlap(flat(maps, 2), flat(maps, 5))


def retention(maps, before):
    total = 0.0
    for k in (2, 5):
        values = flat(before, k)
        total += 1 - overlap(flat(maps, k), [float(v > sum(values) / 24) for v in values])
    return total


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def syngen(maps):
    def distance(m, n):
        return (kl(share(maps, m), share(maps, n)) + kl(share(maps, n), share(maps, m))) / 2

    pull = distance(2, 1) + distance(5, 4) + distance(5, 6)
    push = 0.0
    for things in ((2, 1), (5, 4, 6)):
        pairs = [(w, u) for w in things for u in range(1, 8) if u not in things]
        push += sum(distance(*pair) for pair in pairs) / len(pairs)
    return pull - push


def divide_and_bind(maps):
    def variation(k):
        rows = column(maps, k)
        down = sum(abs(rows[y + 1][x] - rows[y][x]) for y in range(3) for x in range(6))
        return down + sum(abs(rows[y][x + 1] - rows[y][x]) for y in range(4) for x in range(5))

    total = -min(variation(2), variation(5))
    for noun, attribute in ((2, 1), (5, 4), (5, 6)):
        a, b = share(maps, noun), share(maps, attribute)
        middle = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
        total += (kl(a, middle) + kl(b, middle)) / 2
    return total


CASES = {
    "entropy": (MERGED, entropy),
    "layout": (MERGED, layout),
    "attend-and-excite": (MERGED, attend_and_excite),
    "segregation": (MERGED, segregation),
    "retention": (MERGED, lambda maps: retention(maps, globals()["maps"](1))),
    "syngen": (APART, syngen),
    "divide-and-bind": (APART, divide_and_bind),
}


def target(columns):
    return Target(columns, SIZE, previous=maps(1))


def test_every_loss_has_a_case():
    assert set(CASES) == set(LOSSES)


@pytest.mark.parametrize("name", CASES)
def test_formula(name):
    columns, by_hand = CASES[name]
    found = LOSSES[name](maps(), target(columns))
    assert found.shape == (2,)
    assert abs(float(found[0]) - by_hand(maps())) <= 1e-10
    second = LOSSES[name](maps()[1:], Target(columns, SIZE, previous=maps(1)[1:]))
    assert largest(found[1:], second) <= 1e-12  # images do not mix


@pytest.mark.parametrize("name", CASES)
def test_gradient(name):
    columns, _ = CASES[name]
    assert torch.autograd.gradcheck(lambda a: LOSSES[name](a, target(columns)), maps(batch=1).requires_grad_())


def test_nothing_is_retained_before_there_is_a_map():
    assert LOSSES["retention"](maps(), Target(MERGED, SIZE)).tolist() == [0.0, 0.0]


def test_layout_as_released():
    """Places (10, 16) and (25, 16) of 32; along a side pixels are at 0, ..., 1; the sum over both."""
    found = LOSSES["layout"](maps(), Target(MERGED, SIZE, reference=True))
    places = {"places": ((10 / 32, 16 / 32), (25 / 32, 16 / 32)), "across": TO_THE_EDGE[6], "down": TO_THE_EDGE[4]}
    assert abs(float(found[0]) - layout(maps(), subjects_weight=1.0, **places)) <= 1e-10


@pytest.mark.parametrize("anchors", [(2,), (2, 4, 6)])
def test_layout_is_for_two_things(anchors):
    columns = Columns(anchors, ((),) * len(anchors), LENGTH)
    assert LOSSES["layout"](maps(), Target(columns, SIZE)).tolist() == [0.0, 0.0]


def test_threshold():
    assert entropy_threshold(26.0, 2, 1024, shifted=False) == 24.0
    assert entropy_threshold(26.0, 2, 1024, shifted=True) == 24.0
    # Uniform maps of 8 x 8 are at 4 ln 64 = 16.6: as far above the threshold as those of 32 x 32 are.
    assert math.isclose(entropy_threshold(26.0, 2, 64, shifted=True), 24.0 - 4 * math.log(16))
    assert entropy_threshold(26.0, 3, 1024, shifted=False) == 37.0
