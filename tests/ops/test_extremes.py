"""Numbers at the edges of their range: overflow is never hidden, what has no weight has none, zero rows are no error.

Expected values are written out by hand. Each check has found a fault; tests/ops/test_fuzzed.py draws more.
"""

import math

import pytest
import torch
from attention_operands import absent

from difffast import ops

ATTENTION = ("cross_attention", "joint_attention", "self_attention")
#: Numbers of keys that fill the vectors of every instruction set, and that do not.
KEYS = (64, 77)
KERNELS = [
    pytest.param(b, marks=pytest.mark.skipif(absent(b) is not None, reason=str(absent(b))))
    for b in ("reference", "cpp", "triton")
]
# Triton's interpreter computes with NumPy, which warns of what becomes infinite or NaN.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")


def attend(operator, q, k, v, *, scale=1.0, **options):
    if operator != "joint_attention":
        return getattr(ops, operator)(q, k, v, scale=scale, **options)
    half = k.shape[2] // 2
    return ops.joint_attention(
        q, k[:, :, :half], v[:, :, :half], k[:, :, half:], v[:, :, half:], scale=scale, **options
    )


def operands(logits, value=0.0, rows=3):
    """Queries of 1 and keys whose logits are those; all values are one."""
    keys = len(logits)
    k = torch.tensor(logits, dtype=torch.float32).reshape(1, 1, keys, 1)
    return torch.ones(1, 1, rows, 1), k, torch.full((1, 1, keys, 1), value)


def check_weightless_keys(operator, keys):
    """A key whose probability is zero in float32 counts for nothing, however large its value."""
    q, k, v = operands([0.0] + [-1000.0] * (keys - 1), 1e38)
    v[:, :, 0] = 2.0
    assert torch.equal(attend(operator, q, k, v), torch.full((1, 1, 3, 1), 2.0))


def check_overflow(operator, keys):
    """Logits that overflow to minus infinity in all keys make a row NaN, and no other row."""
    q, k, v = operands([-1e35] * keys, 5.0)
    q[:, :, 0] = 1e5
    out = attend(operator, q, k, v)
    assert out[0, 0, 0].isnan().all()
    torch.testing.assert_close(out[0, 0, 1:], torch.full((2, 1), 5.0))


def check_billions(operator, keys):
    """Among logits of billions, whose float32 neighbours are hundreds apart, the largest takes everything."""
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.linspace(4e4, 5e4, 9).to(dtype).reshape(1, 1, 9, 1)
        k = torch.linspace(-5e4, 5e4, keys).to(dtype).reshape(1, 1, keys, 1)
        v = torch.arange(1.0, keys + 1).to(dtype).reshape(1, 1, keys, 1)
        for scale in (0.7, 1.0, 3.0, -7.3):
            out = attend(operator, q, k, v, scale=scale)
            assert torch.equal(out, torch.full_like(out, keys if scale > 0 else 1)), (dtype, scale, out.flatten())


def check_infinite_queries_and_sinks(keys):
    """Where all stored keys have logit minus infinity, the sinks, with logit 0, take everything."""
    q, k, v = operands([-1.0] * keys, 5.0)
    q[:, :, 0] = math.inf
    out, maps = ops.cross_attention(q, k, v, scale=1.0, sink=2, map_tokens=[0, keys - 1])
    assert torch.equal(out[0, 0, 0], torch.zeros(1))
    assert torch.equal(maps[0, 0], torch.zeros(2))
    p = math.exp(-1) / (keys * math.exp(-1) + 2)
    torch.testing.assert_close(out[0, 0, 1:], torch.full((2, 1), 5 * keys * p))


def check_silu(layout):
    """SiLU of large negative numbers is zero, and of minus infinity NaN, as PyTorch's is."""
    x = torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2).expand(1, 40, 1, 2).contiguous(memory_format=layout)
    weight = torch.full((40,), 1e37)
    weight[7] = math.inf
    out = ops.group_norm_silu(x, 40, weight, torch.zeros(40))
    assert torch.equal(out[0, :7, 0, 0], torch.zeros(7))
    assert out[0, 7, 0, 0].isnan()
    assert not out[0, 7, 0, 1].isfinite()
    assert (out[0, :7, 0, 1] > 9e36).all()
    assert out[0, 8:].isfinite().all()


def check_two_numbers_a_group():
    """A group of two numbers is normalised to -1 and 1, wherever they lie, and in every layout of one pixel."""
    x = torch.tensor([[1e4, 1e4 + 1, -3e3, -3e3 - 2]]).reshape(1, 4, 1, 1)
    wanted = torch.tensor([-1.0, 1.0, 1.0, -1.0])
    one, none = torch.ones(4), torch.zeros(4)
    for each in (x, x.as_strided(x.shape, (4, 1, 4, 4)), x.flatten(2)):
        out = ops.group_norm_silu(each, 2, one, none, silu=False)
        torch.testing.assert_close(out.flatten(), wanted, rtol=0, atol=2e-3)
        for rows in (each[:, :2], each[:, :3]):
            both = ops.skip_norm_silu(rows, each[:, rows.shape[1] :], 2, one, none, silu=False)
            both = torch.cat([part.flatten() for part in both])
            torch.testing.assert_close(both, wanted, rtol=0, atol=2e-3)


def check_empty_batches():
    """Nothing in, nothing out."""
    none = torch.zeros(0, 2, 3, 4)
    for operator in ATTENTION:
        out = attend(operator, none, torch.zeros(0, 2, 7, 4), torch.zeros(0, 2, 7, 4))
        assert out.shape == (0, 2, 3, 4)
    for out, channels in zip(
        ops.skip_norm_silu(none, torch.zeros(0, 4, 3, 4), 2, torch.ones(6), torch.ones(6)), (3, 3), strict=True
    ):
        assert out.shape == (0, channels, 3, 4)


def check_all(backend):
    for operator in ops.OPERATORS:
        if operator not in ATTENTION or backend not in ops.OPERATORS[operator]:
            continue
        with ops.use_backend(backend, operator):
            for keys in KEYS:
                for check in (check_weightless_keys, check_overflow, check_billions):
                    check(operator, keys)
    with ops.use_backend(backend):
        for keys in KEYS:
            check_infinite_queries_and_sinks(keys)
        for layout in (torch.contiguous_format, torch.channels_last):
            check_silu(layout)
        check_two_numbers_a_group()
        check_empty_batches()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("check", [check_weightless_keys, check_overflow, check_billions])
@pytest.mark.parametrize("operator", ATTENTION)
def test_attention(operator, check, keys, backend):
    if backend not in ops.OPERATORS[operator]:
        pytest.skip(f"{operator} has no backend {backend}")
    with ops.use_backend(backend, operator):
        check(operator, keys)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("keys", KEYS)
def test_infinite_queries_and_sinks(keys, backend):
    with ops.use_backend(backend):
        check_infinite_queries_and_sinks(keys)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_silu(layout, backend):
    with ops.use_backend(backend):
        check_silu(layout)


@pytest.mark.parametrize("backend", KERNELS)
def test_two_numbers_a_group(backend):
    with ops.use_backend(backend):
        check_two_numbers_a_group()


@pytest.mark.parametrize("backend", KERNELS)
def test_empty_batches(backend):
    with ops.use_backend(backend):
        check_empty_batches()
