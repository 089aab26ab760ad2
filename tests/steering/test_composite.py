"""Merging and substitution against sums written out."""

import pytest
import torch
from sampling import largest

from difffast import ops
from difffast.steering.composite import Columns, correct_by_similarities, locate_subjects, merge, substitute_end
from difffast.steering.losses import Target, entropy
from difffast.steering.prompts import Subject

GROUPS = (Subject((2,), (3, 4), "a cat wearing sunglasses"), Subject((8, 9), (7,), "a black teddy bear"))
LENGTH = 9


@pytest.fixture
def text():
    return torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_paper(text):
    merged, columns = merge(text, GROUPS, LENGTH, "paper")
    rows = [text[0], text[1], text[2] + text[3] + text[4], text[5], text[6], text[8] + text[9] + text[7], *text[10:]]
    assert largest(merged, torch.stack(rows + [text[15]] * 4)) <= 1e-12
    assert columns == Columns((2, 5), ((), ()), 5)


def test_reference(text):
    merged, columns = merge(text, GROUPS, LENGTH, "reference")
    expected = text.clone()
    expected[2] = 1.1 * text[2] + 1.2 * (text[3] + text[4])
    expected[8] = 1.1 * (text[8] + text[9]) + 1.2 * text[7]
    expected[[3, 4, 7, 9]] = 0
    assert largest(merged, expected) <= 1e-12
    assert columns == Columns((2, 8), ((), ()), 9)


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_weights_replace_the_modes(text, mode):
    merged, columns = merge(text, GROUPS, LENGTH, mode, (0.5, 0.1))
    first, second = columns.anchors
    assert largest(merged[first], 0.5 * text[2] + 0.1 * (text[3] + text[4])) <= 1e-12
    assert largest(merged[second], 0.5 * (text[8] + text[9]) + 0.1 * text[7]) <= 1e-12


def test_a_thing_without_modifiers_stays_itself(text):
    merged, columns = merge(text, (Subject((3,), (), "a cat"),), LENGTH, "paper")
    assert torch.equal(merged, text)
    assert columns.anchors == (3,)


def test_unmerged():
    assert locate_subjects(GROUPS, LENGTH) == Columns((2, 8), ((3, 4), (7,)), 9)


@pytest.mark.parametrize("simplified_length", [5, 9, 12])
def test_end_tokens(text, simplified_length):
    other = torch.randn_like(text)
    reference = substitute_end(text, LENGTH, other, simplified_length, "reference")
    assert torch.equal(reference, torch.cat([text[:10], other[10:]]))
    paper = substitute_end(text, LENGTH, other, simplified_length, "paper")
    own = [other[min(simplified_length + 1 + i, 15)] for i in range(6)]
    assert torch.equal(paper, torch.cat([text[:10], torch.stack(own)]))


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_gradients_from_embedding_to_entropy(text, mode):
    """Merge, project, attend with maps, entropy: the chain that is optimised."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 2, 12, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, 8, dtype=torch.float64, generator=generator)

    def chain(text, query):
        merged, columns = merge(text, GROUPS, LENGTH, mode)
        keys = (merged @ weight).unflatten(-1, (2, 4)).transpose(0, 1)[None]
        out, maps = ops.cross_attention(query, keys, keys.flip(-1), map_tokens=range(16))
        return entropy(maps, Target(columns, (3, 4))), out

    assert torch.autograd.gradcheck(chain, (text.requires_grad_(), query.requires_grad_()))


def test_correction_by_similarities(text):
    ours = correct_by_similarities(text, [3], quantile=0.4, window=2, amount=0.3)
    total = torch.zeros(5, dtype=torch.float64)
    for j in (1, 2, 4, 5):
        s = text[3] * text[j]
        s = torch.where(s <= torch.quantile(s, 0.4), 0.0, s)
        total += s / s.max() * text[j]
    expected = text.clone()
    expected[3] = 0.7 * text[3] + 0.3 * total
    assert largest(ours, expected) <= 1e-12
    assert torch.equal(correct_by_similarities(text, [3], amount=0.0), text)


@pytest.mark.parametrize("options", [{"quantile": 1.1}, {"amount": -0.1}, {"window": 0}])
def test_bad_corrections_are_refused(text, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        correct_by_similarities(text, [3], **options)
