"""attention_entropy: value and gradient against float64, ties, maps that are uniform, NaN."""

import math

import pytest
import torch
from entropy_operands import EVERY, KERNELS, LAYOUTS, SHAPES, _contiguous, needs_cpp, run, run_backend, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from difffast import ops
from difffast.ops.attention_entropy import reference, reference_backward


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.usefixtures("_nan_memory")
def test_float64_is_the_definition(backend, shape):
    torch.manual_seed(0)
    batch, pixels, columns, words, anchors = shape
    maps, grad_loss = _contiguous(batch, pixels, columns), weights(batch)
    # Triton's interpreter takes seconds for the large ones.
    for detach_min in (False, True) if backend == "cpp" or pixels < 200 else (False,):
        arguments = (anchors, words, 0.3, 2e-4, 1.5, detach_min)
        loss, grad = run_backend(backend, maps, grad_loss, *arguments)
        exact_loss, exact_grad = run(reference, maps, grad_loss, *arguments)
        torch.testing.assert_close(loss, exact_loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, exact_grad, rtol=1e-11, atol=1e-11 * float(exact_grad.abs().max()))
        outside = torch.ones(columns, dtype=torch.bool)
        outside[1 : words + 1] = False
        assert not grad[..., outside].any()
        assert grad.is_contiguous()


@pytest.mark.parametrize("detach_min", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_closed_form_is_autograd(shape, detach_min):
    torch.manual_seed(0)
    batch, pixels, columns, words, anchors = shape
    maps, grad_loss = _contiguous(batch, pixels, columns), weights(batch)
    arguments = (anchors, words, 0.5, 1e-5, 2.0, detach_min)
    _, grad = run(reference, maps, grad_loss, *arguments)
    ours = reference_backward(grad_loss, maps, *arguments)
    torch.testing.assert_close(ours, grad, rtol=1e-12, atol=1e-12 * (1 + float(grad.abs().max())))


def errors(result, exact):
    """Of each batch entry: the loss's relative error, and the gradient's (of norms)."""
    (loss, grad), (exact_loss, exact_grad) = result, exact
    size = exact_grad.norm(dim=(1, 2))
    return torch.cat([(loss - exact_loss).abs() / exact_loss.abs(), (grad - exact_grad).norm(dim=(1, 2)) / size])


#: Many maps of each shape, or at the speed of Triton's interpreter a few maps of several shapes together.
ERROR_CASES = [("cpp", [s], 24) for s in SHAPES if s[1] > 1 and s[3] > 1]


ERROR_CASES += [("triton", [SHAPES[1], SHAPES[3], SHAPES[5]], 8)]


@pytest.mark.parametrize(("backend", "shapes", "batch"), ERROR_CASES, ids=str)
@pytest.mark.usefixtures("_nan_memory")
def test_float32_error_is_no_worse_than_eager(backend, shapes, batch):
    """On the geometric mean of many errors: the rounding of one lowest pixel decides on most of a map's."""
    if ops.missing(backend):
        pytest.skip(str(ops.missing(backend)))
    torch.manual_seed(0)
    ours, theirs = [], []
    for _, pixels, columns, words, anchors in shapes:
        maps, grad_loss = _contiguous(batch, pixels, columns, torch.float32), torch.ones(batch)
        for detach_min in (False, True):
            arguments = (grad_loss, anchors, words, 0.5, 1e-5, 2.0, detach_min)
            exact = run(reference, maps.double(), *arguments)
            result = run_backend(backend, maps, *arguments)
            assert result[0].dtype == result[1].dtype == torch.float32
            ours.append(errors(result, exact))
            theirs.append(errors(run(reference, maps, *arguments), exact))
    floor = 2 * torch.finfo(torch.float32).eps
    # Without fused multiply-add an exponential is rounded twice.
    factor = 1.8 if backend == "cpp" and ops.INSTRUCTION_SET == "baseline" else 1.2
    ours, theirs = (float((torch.cat(x) + floor).log().mean().exp()) for x in (ours, theirs))
    assert ours <= factor * theirs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.usefixtures("_nan_memory")
def test_layout_does_not_matter(backend, dtype, layout):
    torch.manual_seed(0)
    maps, grad_loss = LAYOUTS[layout](2, 70, 21, dtype), weights(2)
    same = maps.clone(memory_format=torch.contiguous_format)
    ours, theirs = (run_backend(backend, x, grad_loss, [5, 2], 18) for x in (maps, same))
    # PyTorch's own sums take another order then.
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if backend == "reference" else {"rtol": 0, "atol": 0}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("backend", EVERY)
def test_gradcheck(backend):
    torch.manual_seed(0)
    maps = _contiguous(1, 5, 5).requires_grad_()
    with ops.use_backend(backend, "attention_entropy"):
        assert torch.autograd.gradcheck(lambda x: ops.attention_entropy(x, [3, 1], 3, 0.2, 1e-3, -1.5), maps)


@pytest.mark.parametrize("backend", EVERY)
def test_detach_min_is_the_gradient_for_a_constant_minimum(backend):
    torch.manual_seed(0)
    maps, grad_loss = _contiguous(2, 9, 8), weights(2)

    def columns(maps):
        return (maps[..., 1:7] / 0.5).softmax(-1)[..., [0, 3]]

    least = columns(maps).amin(1, keepdim=True)

    def constant(maps):
        rise = columns(maps) - least
        p = rise / rise.sum(1, keepdim=True)
        return -2.0 * (p * (p + 1e-5).log()).sum((1, 2))

    assert torch.autograd.gradcheck(constant, maps.clone().requires_grad_())
    ours = run_backend(backend, maps, grad_loss, [1, 4], 6, detach_min=True)
    for a, b in zip(ours, run(constant, maps, grad_loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_detach_min_removes_the_peak():
    """What the option is for: nearly all of the gradient's square lies on the lowest pixel."""
    torch.manual_seed(0)
    maps = _contiguous(1, 1024, 77)
    (_, full), (_, rest) = (run(ops.attention_entropy, maps, weights(1), [3], 12, detach_min=d) for d in (False, True))
    lowest = int((maps[0, :, 1:13] / 0.5).softmax(-1)[:, 2].argmin())
    share = full.square().sum(-1)[0] / full.square().sum()
    assert share[lowest] > 0.9
    others = torch.arange(1024) != lowest
    torch.testing.assert_close(full[:, others], rest[:, others], rtol=1e-9, atol=1e-12)
    assert rest.square().sum() < full.square().sum() / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.usefixtures("_nan_memory")
def test_uniform_columns_count_for_nothing(backend, dtype):
    torch.manual_seed(0)
    for pixels in (1, 2, 37, 300):
        # All pixels alike: both columns uniform.
        maps = _contiguous(2, 1, 9, dtype).expand(2, pixels, 9)
        loss, grad = run_backend(backend, maps, weights(2), [1, 4], 7)
        assert not loss.any()
        assert not grad.any()
    # After an entry that is not uniform, whose numbers may not stay behind.
    maps = _contiguous(2, 100, 9, dtype)
    maps[1] = maps[1, 0]
    loss, grad = run_backend(backend, maps, torch.ones(2), [1, 4], 7)
    assert loss.bool().tolist() == [True, False]
    assert grad.any((1, 2)).tolist() == [True, False]
    # One word: its softmax is 1 everywhere.
    loss, grad = run_backend(backend, _contiguous(2, 20, 9, dtype), weights(2), [1], 1)
    assert not loss.any()
    assert not grad.any()
    # Words 1 and 2 share a pixel's half: word 3 is uniform, but not word 1.
    maps = torch.full((1, 40, 4), 0.25, dtype=dtype)
    maps[..., 3] = 20.0
    maps[0, 7, 1:3] = torch.tensor([0.5, 0.25], dtype=dtype)
    both = run_backend(backend, maps, weights(1), [1, 2], 2)
    alone = run_backend(backend, maps, weights(1), [1], 2)
    assert both[0].isfinite().all()
    assert both[1].isfinite().all()
    assert alone[0].any()


@pytest.mark.parametrize("backend", KERNELS)
def test_one_uniform_subject_beside_another(backend):
    """Two pixels that swap the other words: the subject's own share stays the same."""
    maps = torch.tensor([[[0.0, 0.5, 0.1, 0.3], [0.0, 0.5, 0.3, 0.1]]], dtype=torch.float64)
    for anchors in ([1], [1, 2], [1, 2, 3]):
        ours = run_backend(backend, maps, torch.ones(1), anchors, 3)
        theirs = run(reference, maps, torch.ones(1), anchors, 3)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    stats = run_stats(backend, maps, [1, 2], 3)
    assert not stats[0, 0].any()
    assert stats[0, 1].all()


def run_stats(backend, maps, anchors, words):
    return getattr(torch.ops.difffast.attention_entropy, backend)(maps, anchors, words, 0.5, 1e-5, 2.0, False)[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("everywhere", [False, True])
def test_nan_is_not_hidden(backend, dtype, everywhere):
    torch.manual_seed(0)
    maps = _contiguous(3, 70, 21, dtype)
    maps[1, slice(None) if everywhere else 66, 4] = math.nan
    loss, grad = run_backend(backend, maps, weights(3), [5, 2], 12)
    expected, expected_grad = run(reference, maps, weights(3), [5, 2], 12)
    assert loss.isnan().tolist() == [False, True, False]
    assert torch.equal(loss.isnan(), expected.isnan())
    assert torch.equal(grad.isnan(), expected_grad.isnan())
    # One pixel has no neighbours to hide among, and its column would else be uniform.
    assert run_backend(backend, maps[:, 66:67], weights(3), [5, 2], 12)[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("pixels", [(13, 70), (70, 13, 71), (0, 99), (98, 99)])
@pytest.mark.parametrize("backend", EVERY)
def test_ties_go_to_the_first_pixel(backend, pixels):
    torch.manual_seed(0)
    maps = _contiguous(2, 100, 9)
    maps[:, list(pixels), 1:6] = torch.tensor([0.0, 0.9, 0.5, 0.6, 0.7], dtype=torch.float64)
    _, grad = run_backend(backend, maps, weights(2), [1], 5)
    _, expected = run(reference, maps, weights(2), [1], 5)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    assert set(grad[0].square().sum(-1).argsort()[-1:].tolist()) == {min(pixels)}


@pytest.mark.parametrize("backend", KERNELS)
def test_the_saved_minimum(backend):
    """The first of equal minima; none where it carries no gradient."""
    torch.manual_seed(0)
    maps = _contiguous(2, 100, 9)
    maps[0] = maps[0, 0]
    operator = getattr(torch.ops.difffast.attention_entropy, backend)
    b = (maps[..., 1:6] / 0.5).softmax(-1)[..., [0, 3]]
    argmin = operator(maps, [1, 4], 5, 0.5, 1e-5, 2.0, False)[3]
    assert argmin.tolist() == [[-1, -1], b[1].argmin(0).tolist()]
    assert (operator(maps, [1, 4], 5, 0.5, 1e-5, 2.0, True)[3] == -1).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_large_and_small_logits(backend):
    torch.manual_seed(0)
    maps = _contiguous(2, 70, 9)
    for factor, shift in ((1e3, 0.0), (1.0, 1e3), (1.0, -1e3), (1e-3, 0.0)):
        ours = run_backend(backend, maps * factor + shift, weights(2), [1, 4], 7)
        theirs = run(reference, maps * factor + shift, weights(2), [1, 4], 7)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * float(b.abs().max()))


@needs_cpp
def test_bits_depend_on_neither_threads_nor_batch():
    torch.manual_seed(0)
    maps, grad_loss = _contiguous(6, 3000, 40, torch.float32), torch.ones(6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = run_backend("cpp", maps, grad_loss, [3, 30, 8], 35)
        torch.set_num_threads(1)
        one = run_backend("cpp", maps, grad_loss, [3, 30, 8], 35)
    finally:
        torch.set_num_threads(threads)
    alone = [run_backend("cpp", maps[i : i + 1], grad_loss[:1], [3, 30, 8], 35) for i in range(6)]
    for results in (one, [torch.cat(parts) for parts in zip(*alone, strict=True)]):
        for a, b in zip(two, results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", EVERY)
def test_order_of_anchors_does_not_matter(backend):
    torch.manual_seed(0)
    maps = _contiguous(2, 30, 12)
    one, other = (run_backend(backend, maps, weights(2), anchors, 9) for anchors in ([7, 1, 4], (1, 4, 7)))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("backend", EVERY)
def test_empty_batch(backend):
    loss, grad = run_backend(backend, torch.ones(0, 5, 9), torch.ones(0), [1, 3], 7)
    assert loss.shape == (0,)
    assert grad.shape == (0, 5, 9)


@pytest.mark.parametrize("backend", KERNELS)
def test_no_second_derivative_but_from_the_reference(backend):
    maps = _contiguous(1, 9, 8).requires_grad_()

    def second():
        grad = torch.autograd.grad(ops.attention_entropy(maps, [2], 6).sum(), maps, create_graph=True)[0]
        return torch.autograd.grad(grad.square().sum(), maps)[0]

    with ops.use_backend(backend), pytest.raises(RuntimeError, match="cannot be differentiated again"):
        second()
    with ops.use_backend("reference"):
        assert second().any()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    pixels=st.integers(3, 70),
    words=st.integers(4, 20),
    shift=st.floats(-10, 10),
    subjects=st.integers(1, 3),
)
def test_invariance_and_order(seed, pixels, words, shift, subjects):
    """A constant added to all words of a pixel changes nothing; a focused map costs less than a spread one.

    Two pixels always give p = (1, 0), whose gradient is rounding; without a word that is no subject there is nothing
    to focus away from.
    """
    generator = torch.Generator().manual_seed(seed)
    anchors = (torch.randperm(words, generator=generator)[:subjects] + 1).tolist()
    spread = torch.rand(1, pixels, words + 3, generator=generator, dtype=torch.float64) / 10
    shifts = shift * torch.rand(1, pixels, 1, generator=generator, dtype=torch.float64)
    focused = spread * 1e-6
    focused[0, int(torch.randint(pixels, (), generator=generator)), anchors] += 1.0
    for backend in (b.values[0] for b in EVERY):
        if ops.missing(backend):
            continue
        loss, grad = run_backend(backend, spread, torch.ones(1), anchors, words)
        moved_loss, moved_grad = run_backend(backend, spread + shifts, torch.ones(1), anchors, words)
        torch.testing.assert_close(moved_loss, loss, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moved_grad, grad, rtol=1e-6, atol=1e-8 * float(grad.abs().max()))
        # The softmax is invariant, so that its gradient has no part along the shift.
        assert float(grad.sum(-1).abs().max()) <= 1e-10 * float(grad.abs().max())
        assert run_backend(backend, focused, torch.ones(1), anchors, words)[0] < loss
