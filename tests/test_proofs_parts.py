"""A CPU's proofs of large shapes: pieces against float64, all of it against PyTorch, and nothing wrong gets through."""

import planted
import pytest
import torch
from test_proofs_cuda import KEYS

from difffast import ops
from difffast.ops._keys import Key
from difffast.proofs import checks, parts
from difffast.proofs.candidates import Candidate, find_candidates
from difffast.proofs.parts import shorten, split
from difffast.proofs.problems import KINDS, make_problem, repeat, vary

CPU = torch.device("cpu")
#: Of 8 million products and more, so that four blocks of queries of two samples are computed in float64.
LARGE = Key.parse("cross_attention float32 5x2x65536x8,5x2x64x8,5x2x64x8 any sink=0,maps=0,gradient=0")


def prove(function, key=LARGE):
    """Check a way of attending on a key."""
    problem = make_problem(key, "normal", CPU)
    plain = next(each for each in find_candidates(key, CPU) if each.name == "sdpa")
    candidate = Candidate("ours", True, plain.around, function)
    return checks.check(candidate, problem, checks.expect(problem, plain))


def spoil(sample, query):
    def attend(key, q, k, v):
        out = planted.attend(q, k, v).clone()
        out[sample, 1, query, 3] += 1e-3
        return (out,)

    return attend


def test_a_large_shape_is_proved_by_pieces():
    problem = make_problem(LARGE, "normal", CPU)
    pieces, whole = split(LARGE, [x.shape for x in problem.tensors], CPU)
    assert not whole
    computed = sum(problem.tensors[0][part.operands[0]].shape[:3].numel() for part in pieces) * 64
    assert computed <= 1 << 23, "what float64 costs is bounded"
    assert len(pieces) == 8
    assert prove(planted.right) <= 1


@pytest.mark.parametrize(("sample", "query"), [(0, 0), (0, 65535), (4, 22000), (4, 43690)])
def test_a_wrong_element_in_a_piece_is_found_by_the_definition(sample, query):
    with pytest.raises(checks.RefutedError, match=r"error \S+ in the"):
        prove(spoil(sample, query))


@pytest.mark.parametrize(("sample", "query"), [(1, 0), (3, 65535), (0, 12000), (4, 40000)])
def test_a_wrong_element_elsewhere_is_found_by_comparison_with_pytorch(sample, query):
    with pytest.raises(checks.RefutedError, match="from PyTorch's own way in the"):
        prove(spoil(sample, query))


def test_what_is_not_written_elsewhere_is_found():
    def unwritten(key, q, k, v):
        out = torch.empty(q.shape)
        right = planted.attend(q, k, v)
        out[0], out[2:], out[1, :, :-1] = right[0], right[2:], right[1, :, :-1]
        return (out,)

    with pytest.raises(checks.RefutedError, match="16 of 5242880 elements are not finite, or were not written"):
        prove(unwritten)


def test_nan_in_one_piece_is_not_hidden_by_the_next():
    def nan(key, q, k, v):
        out = planted.attend(q, k, v).clone()
        out[0, 0, 0, 0] = float("nan")
        return (out,)

    with pytest.raises(checks.RefutedError, match="1 of 5242880 elements"):
        prove(nan)


@pytest.mark.parametrize("text", KEYS)
@pytest.mark.parametrize("most", [1 << 23, 1 << 6], ids=["whole", "pieces"])
def test_pieces_of_operands_define_pieces_of_results(monkeypatch, text, most):
    """Each piece computed alone is what the definition has there when it computes everything at once."""
    monkeypatch.setattr(parts, "_MOST", most)
    key = Key.parse(text)._replace(dtype=torch.float64)
    problem = make_problem(key, "normal", CPU)
    define = KINDS[key.operator].define
    everything = _define_all(key, problem.tensors)
    pieces, whole = split(key, [x.shape for x in problem.tensors], CPU)
    assert whole == (most == 1 << 23)
    seen = [torch.zeros(out.shape, dtype=torch.bool) for out in everything]
    for part in pieces:
        operands = [x[index] for x, index in zip(problem.tensors, part.operands, strict=True)]
        found = define(key, *operands)
        for out, mask, index, piece in zip(everything, seen, part.outputs, found, strict=True):
            torch.testing.assert_close(piece, out[index], rtol=1e-12, atol=1e-12)
            mask[index] = True
    assert all(bool(mask.all()) for mask in seen) == whole


def _define_all(key, tensors):
    with ops.use_backend("reference"):
        return KINDS[key.operator].call(key, *tensors)


def test_times_of_large_attentions_are_taken_of_their_first_samples():
    key = Key.parse("cross_attention float32 8x8x4096x40,2x8x77x40,2x8x77x40 any sink=0,maps=0,gradient=0")
    assert shorten(key, 1 << 25) == key
    half = shorten(key, 1 << 24)
    assert [shape[0] for shape in half.shapes] == [4, 1, 1], "steps of one text stay together"
    assert [shape[0] for shape in shorten(key, 1).shapes] == [4, 1, 1]
    norm = Key.parse(
        "group_norm_silu float32 8x320x64x64 contiguous groups=32,addends=0,whole=0,modulated=0,gradient=0"
    )
    assert shorten(norm, 1) == norm


@pytest.mark.parametrize("text", KEYS)
def test_spikes_are_looked_at_in_several_samples(text):
    small = vary(Key.parse(text), 0)
    key = repeat(small)
    assert key.shapes[0][0] == 16 * small.shapes[0][0]
    problem = make_problem(key, "spike", CPU)
    assert all(int((x == 300).sum()) == len(x) for x in problem.tensors if x.ndim > 1)
