"""Every operator under what PyTorch does to functions: torch.func, forward mode, export, autocast, meta tensors.

Each gives what its definition gives, or refuses and says what to do; never anything else without a word.
"""

import warnings

import pytest
import torch
from attention_operands import absent
from torch.autograd import forward_ad

from difffast import ops
from difffast.ops import _local


def _random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


#: name -> (operands, call, dtype of the results); as large as needs be for the kernels to be the default.
def _convolve(x, weight, bias):
    return ops.convolution(x, ops.convolution_weights(weight, 4), bias)


CALLS = {
    "attention_entropy": ((_random(2, 64, 20).softmax(-1),), lambda maps: ops.attention_entropy(maps, [2, 5], 8)),
    "cross_attention": (
        (_random(2, 2, 32, 16), _random(1, 2, 77, 16), _random(1, 2, 77, 16)),
        lambda *o: ops.cross_attention(*o, map_tokens=[1, 5]),
    ),
    "edited_attention": (
        (
            _random(2, 2, 32, 16),
            _random(1, 2, 77, 16),
            _random(1, 2, 70, 16),
            _random(77, 70) / 9,
            _random(2, 2, 32, 16) + 1,
            _random(1, 2, 70, 16) + 1,
            _random(70),
        ),
        ops.edited_attention,
    ),
    "convolution": ((_random(2, 5, 9, 6), _random(3, 5, 3, 3), _random(3)), _convolve),
    "geglu": ((_random(3, 5, 32),), ops.geglu),
    "group_norm_silu": (
        (_random(2, 64, 24, 24), _random(64), _random(64), _random(1, 64)),
        lambda x, weight, bias, addend: ops.group_norm_silu(x, 4, weight, bias, addend=addend),
    ),
    "joint_attention": (
        (_random(2, 2, 32, 16), *(_random(1, 2, 7, 16) for _ in "kv"), *(_random(2, 2, 70, 16) for _ in "kv")),
        lambda *o: ops.joint_attention(*o, map_tokens=[1, 5]),
    ),
    "linear": ((_random(4, 128, 320), _random(320, 320), _random(320)), ops.linear),
    "repeat_batch": ((_random(2, 3, 4, 5).to(memory_format=torch.channels_last),), lambda x: ops.repeat_batch(x, 3)),
    "self_attention": ((_random(2, 2, 32, 16), _random(2, 2, 70, 16), _random(2, 2, 70, 16)), ops.self_attention),
    "skip_norm_silu": (
        (_random(2, 64, 24, 24), _random(1, 64, 24, 24), _random(128), _random(128)),
        lambda *o: ops.skip_norm_silu(o[0], o[1], 4, *o[2:]),
    ),
}
KERNELS = [
    pytest.param(operator, b, marks=pytest.mark.skipif(absent(b) is not None, reason=str(absent(b))))
    for operator, backends in ops.OPERATORS.items()
    for b in backends
    if b in ("cpp", "triton")
]
every = pytest.mark.parametrize("operator", CALLS)


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def by_reference(operator, function=None):
    """The call, or a function of it, by the definition in plain PyTorch."""

    def call(*operands):
        with ops.use_backend("reference", operator):
            return (function or (lambda call: call))(CALLS[operator][1])(*operands)

    return call


def assert_equal(found, expected):
    found, expected = as_tuple(found), as_tuple(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))


@pytest.fixture(autouse=True)
def _nothing_is_struck_out():
    """A transform that a kernel cannot do is no failure of the kernel."""
    yield
    assert _local.list_struck() == []


@every
def test_vmap(operator):
    operands, call = CALLS[operator]
    several = tuple(torch.stack([x, 0.5 * x, x + 0.1]) for x in operands)
    one_by_one = [as_tuple(by_reference(operator)(*(x[i] for x in several))) for i in range(3)]
    assert_equal(torch.vmap(call)(*several), tuple(map(torch.stack, zip(*one_by_one, strict=True))))
    first = torch.vmap(call, (0, *(None for _ in operands[1:])))(several[0], *operands[1:])
    one_by_one = [as_tuple(by_reference(operator)(x, *operands[1:])) for x in several[0]]
    assert_equal(first, tuple(map(torch.stack, zip(*one_by_one, strict=True))))


def loss_of(call):
    return lambda *operands: sum(out.sin().sum() for out in as_tuple(call(*operands)))


@every
def test_gradients_of_torch_func(operator):
    operands, call = CALLS[operator]
    which = tuple(range(len(operands)))
    wanted = [x.clone().requires_grad_() for x in operands]
    expected = torch.autograd.grad(loss_of(by_reference(operator))(*wanted), wanted)
    assert_equal(torch.func.grad(loss_of(call), which)(*operands), expected)
    several = tuple(torch.stack([x, x]) for x in operands)
    assert_equal(
        torch.vmap(torch.func.grad(loss_of(call), which))(*several), tuple(torch.stack([x, x]) for x in expected)
    )


def tangents_of(operands):
    return tuple(0.3 * x + 0.1 * x.roll(1) for x in operands)


def by_differences(call, operands, tangents, step=1e-6):
    """Derivatives along tangents, in float64 and independent of any formula."""
    ahead, behind = (
        as_tuple(call(*(x.double() + sign * step * t.double() for x, t in zip(operands, tangents, strict=True))))
        for sign in (1, -1)
    )
    return tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))


@every
def test_forward_mode(operator):
    operands, call = CALLS[operator]
    tangents = tangents_of(operands)
    expected = tuple(x.float() for x in by_differences(by_reference(operator), operands, tangents))
    assert any(x.any() for x in expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # PyTorch's own formulas are scripts
        found = torch.func.jvp(call, operands, tangents)[1]
    assert_equal(found, expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(operands, tangents, strict=True)]
        assert_equal(tuple(forward_ad.unpack_dual(x).tangent for x in as_tuple(call(*duals))), expected)


@pytest.mark.parametrize(("operator", "backend"), KERNELS)
def test_kernels_that_are_forced_refuse_transforms(operator, backend):
    operands, call = CALLS[operator]
    message = "torch.func and forward-mode differentiation take the reference alone"
    with ops.use_backend(backend, operator):
        with pytest.raises(RuntimeError, match=message):
            torch.func.jvp(call, operands, tangents_of(operands))
        with pytest.raises(RuntimeError, match=message):
            torch.vmap(call)(*(x[None] for x in operands))


@every
def test_inference_mode(operator):
    operands, call = CALLS[operator]
    expected = by_reference(operator)(*operands)
    with torch.inference_mode():
        made = [x.clone() for x in operands]
        assert_equal(call(*made), expected)
    assert_equal(call(*made), expected)


@every
@pytest.mark.parametrize("backend", [None, "reference", "cpp"])
@pytest.mark.parametrize("gradient", [False, True])
def test_autocast_makes_no_difference(operator, backend, gradient):
    """Except to linear, whose dtype autocast chooses, as it does that of PyTorch's own."""
    if backend not in (None, *ops.OPERATORS[operator]) or (backend and ops.missing(backend)):
        pytest.skip(f"{operator} has no backend {backend} here")
    if gradient and backend == "cpp" and operator in ("geglu", "self_attention"):
        pytest.skip("it has no backward pass")
    operands, call = CALLS[operator]
    leaves = [x.clone().requires_grad_(gradient) for x in operands]
    expected = as_tuple(by_reference(operator)(*leaves))
    if operator == "linear":
        expected = (torch.nn.functional.linear(*(x.bfloat16() for x in leaves)),)
    with torch.autocast("cpu", torch.bfloat16):
        if backend is None:
            found = as_tuple(call(*leaves))
        else:
            with ops.use_backend(backend, operator):
                found = as_tuple(call(*leaves))
        assert_equal(found, expected)
    if gradient:
        weights = [x.detach().cos() for x in expected]
        wanted = torch.autograd.grad(expected, leaves, weights)
        for a, b in zip(torch.autograd.grad(found, leaves, weights), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3 * float(b.abs().max()))


@every
def test_meta_tensors(operator):
    operands, call = CALLS[operator]
    found, expected = as_tuple(call(*(x.to("meta") for x in operands))), as_tuple(by_reference(operator)(*operands))
    assert [(x.shape, x.dtype, x.device.type) for x in found] == [(x.shape, x.dtype, "meta") for x in expected]
    if operator != "self_attention":  # which takes PyTorch's attention
        assert [x.stride() for x in found] == [x.stride() for x in expected]
    for backend in set(ops.OPERATORS[operator]) & {"cpp", "triton"}:
        if ops.missing(backend) is None:
            with ops.use_backend(backend, operator), pytest.raises(RuntimeError, match="the tensor is on 'meta'"):
                call(*(x.to("meta") for x in operands))


class Module(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *operands):
        return self.call(*operands)


@every
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(operator, strict):
    operands, call = CALLS[operator]
    batch = torch.export.Dim("batch", min=2, max=64)
    first = {"attention_entropy": 0, "geglu": 0, "repeat_batch": 0, "linear": 0, "self_attention": None}.get(operator)
    shapes = None if first is None else {"operands": ({0: batch}, *({} for _ in operands[1:]))}
    program = torch.export.export(Module(call), operands, strict=strict, dynamic_shapes=shapes)
    assert_equal(program.module()(*operands), by_reference(operator)(*operands))
    if first is not None:
        more = (torch.cat([operands[0]] * 2), *operands[1:])
        assert_equal(program.module()(*more), by_reference(operator)(*more))


@pytest.mark.parametrize(
    ("operator", "which"), [(name, i) for name, (operands, _) in CALLS.items() for i in range(len(operands)) if i]
)
def test_mixed_dtypes_are_refused(operator, which):
    operands, call = CALLS[operator]
    for dtype in (torch.bfloat16, torch.float64, torch.int64):
        with pytest.raises(ValueError, match=rf"{dtype}"):
            call(*(x.to(dtype) if i == which else x for i, x in enumerate(operands)))


@every
def test_integers_and_complex_numbers_are_refused(operator):
    operands, call = CALLS[operator]
    for dtype in (torch.int64, torch.complex64):
        made = [x.to(dtype) for x in operands]
        if operator == "repeat_batch":  # there is no arithmetic
            assert_equal(call(*made), (made[0].repeat_interleave(3, 0),))
            continue
        with pytest.raises(ValueError, match=f"float.*{dtype}"):
            call(*made)
