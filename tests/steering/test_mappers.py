"""Word mappers against a brute-force oracle on random pairs of prompts."""

import itertools
import random

import pytest
import torch

from difffast.steering.editing.mappers import align, map_refined, map_replaced
from difffast.words import Words

ROWS = 14
#: word -> how many pieces it has.
VOCABULARY = {"a": 1, "cat": 1, "on": 1, "zebra": 2, "armadillo": 3, "red": 1, "sofas": 2}


def make(words):
    """The words of a prompt, as a tokenizer would cut them."""
    pieces, places = ["<start>"], []
    for word in words:
        count = VOCABULARY[word]
        places.append((word, tuple(range(len(pieces), len(pieces) + count))))
        pieces += [f"{word}/{i}" for i in range(count)]
    return Words(" ".join(words), (*pieces, "<end>"), tuple(places), str.split)


def draw(generator, most):
    return [generator.choice(list(VOCABULARY)) for _ in range(generator.randint(0, most))]


def replaced_by_hand(source, target, shift):
    """Where each row's attention goes, row by row, from words side by side."""
    expected = torch.zeros(ROWS, ROWS, dtype=torch.float64)
    blocks = [([0], [0], "same")]
    changed = [k for k, (a, b) in enumerate(zip(source.words, target.words, strict=True)) if a[0] != b[0]]
    for k, ((_, before), (_, after)) in enumerate(zip(source.words, target.words, strict=True)):
        blocks.append((list(before), list(after), "tail" if not changed or k > changed[-1] else "word"))
    ends = [each.words[-1][1][-1] + 1 if each.words else 1 for each in (source, target)]
    if not shift:
        blocks = [block for block in blocks if block[2] != "tail" and changed]
        first = target.words[changed[-1]][1][-1] + 1 if changed else 0
        for row in range(first, ROWS):
            expected[row, row] = 1
    for before, after, _ in blocks:
        if len(before) == len(after):
            for a, b in zip(before, after, strict=True):
                expected[a, b] = 1
        else:
            for a, b in itertools.product(before, after):
                expected[a, b] = 1 / len(after)
    if shift:
        before, after = (list(range(end, ROWS)) for end in ends)
        for a, b in zip(before, after, strict=False):
            expected[a, b] = 1
        for a in before[len(after) :]:  # they fell off the end
            expected[a, ROWS - 1] = 1
        if len(after) > len(before):  # some are missing: the last row is shared
            expected[ROWS - 1] = 0
            late = after[len(before) - 1 :]
            expected[ROWS - 1, late] = 1 / len(late)
    return expected


@pytest.mark.parametrize("shift", [True, False], ids=["moved", "released"])
def test_replacing_is_what_it_is_row_by_row(shift):
    generator = random.Random(0)
    moved = 0
    for _ in range(250):
        words = draw(generator, 3)
        others = [generator.choice(list(VOCABULARY)) if generator.random() < 0.5 else word for word in words]
        source, target = make(words), make(others)
        found = map_replaced(source, target, ROWS, shift=shift)
        assert torch.equal(found.mix, replaced_by_hand(source, target, shift)), (words, others)
        assert torch.equal(found.keep, torch.ones(ROWS, dtype=torch.float64))
        moved += not torch.equal(found.mix, torch.eye(ROWS, dtype=torch.float64))
        if shift:  # nothing of a pixel's attention is lost
            assert torch.allclose(found.mix.sum(1), torch.ones(ROWS, dtype=torch.float64))
    assert moved > 60


def longest_by_trying(before, after):
    """The length of a longest common subsequence, by trying all, the longest first."""
    for length in range(min(len(before), len(after)), 0, -1):
        some = {tuple(c) for c in itertools.combinations(before, length)}
        if any(tuple(c) in some for c in itertools.combinations(after, length)):
            return length
    return 0


@pytest.mark.parametrize("shift", [True, False], ids=["moved", "released"])
def test_refining_aligns_a_longest_common_subsequence(shift):
    generator = random.Random(1)
    for _ in range(250):
        words = draw(generator, 4)
        others = [word for word in words if generator.random() < 0.7] + draw(generator, 2)
        source, target = make(words), make(others)
        found = map_refined(source, target, ROWS + 2, shift=shift)
        n, m = len(source.pieces) - 2, len(target.pieces) - 2
        pairs = [tuple(pair) for pair in found.mix.nonzero().tolist()]
        inner = [(i, j) for i, j in pairs if 1 <= j <= m]
        assert all(source.pieces[i] == target.pieces[j] for i, j in inner)
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(inner))
        assert len(inner) == longest_by_trying(source.pieces[1:-1], target.pieces[1:-1])
        outer = [(min(n + 1 + k, ROWS + 1), m + 1 + k) for k in range(ROWS + 1 - m)]
        if not shift:  # mapper[len(y_seq):] = len(y_seq) + arange, y_seq with its start and end tokens
            outer = [outer[0], *((j, j) for j in range(len(target.pieces), ROWS + 2))]
        assert sorted(pairs) == sorted([(0, 0), *inner, *outer])
        assert torch.equal(found.keep, found.mix.sum(0))
        assert set(found.mix.unique().tolist()) <= {0.0, 1.0}


def test_of_several_alignments_it_is_the_earliest():
    assert align("ab", "aab") == [(0, 0), (1, 2)]
    assert align("xay", "a") == [(1, 0)]
    assert align("", "a") == []


def test_unequal_numbers_of_words_are_refused_by_name():
    with pytest.raises(ValueError, match="as many words in both prompts, got 2 in 'a cat' and 3 in 'a red cat'"):
        map_replaced(make(["a", "cat"]), make(["a", "red", "cat"]), ROWS)
