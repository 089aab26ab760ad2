"""The Triton kernels of cross attention against float64: on a GPU where there is one, else in Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined, so the variable is set before any test file is imported.
"""

import math

import pytest
import torch
from triton_launches import Recorder

pytest.importorskip("triton")

from difffast.triton_kernels import attention_tiles as tiles
from difffast.triton_kernels import cross_attention as kernels

DEVICE = "cpu" if tiles.INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not tiles.INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EMPTY = ()


@pytest.fixture(autouse=True)
def _nan_filled(monkeypatch):
    """New tensors hold NaN, so that an element which a kernel does not write is seen."""

    def filled(make):
        def wrapper(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return wrapper

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


def eager(q, k, v, scale, sink, tokens):
    """The definition, in the dtype of its inputs: the sink is keys and values of zeros."""
    repeats = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(repeats, 0) for x in (k, v))
    zeros = k.new_zeros([*k.shape[:2], sink, k.shape[3]])
    logits = q @ torch.cat([k, zeros], 2).transpose(-1, -2) * scale
    probabilities = logits.softmax(-1)
    out = probabilities @ torch.cat([v, zeros], 2)
    return out, probabilities[..., list(tokens)].mean(1)


def inputs(batch, heads, queries, n_keys, d, dtype, repeats=1, seed=0):
    """q, k, v, and gradients of out; q stored as a projection of [B, N, H * d] leaves it."""
    generator = torch.Generator().manual_seed(seed)

    def rows(b, n):
        x = torch.randn([b, n, heads * d], generator=generator, dtype=torch.float64)
        return x.to(DEVICE, dtype).view(b, n, heads, d).transpose(1, 2)

    return rows(batch, queries), rows(batch // repeats, n_keys), rows(batch // repeats, n_keys), rows(batch, queries)


def assert_as_exact(actual, expected, composed, what):
    """The error is at most 1.2 times the composition's in the root mean square, 3 times in the largest element.

    Of two equally good float32 sums the worst element of one is often twice that of the other.  Below two roundings
    of float32 neither counts.
    """
    assert actual.shape == expected.shape, what
    if not actual.numel():
        return
    for factor, size in ((1.2, lambda x: x.square().mean().sqrt().item()), (3.0, lambda x: x.abs().max().item())):
        error, allowed = size(actual.double() - expected), size(composed.double() - expected)
        floor = 2 * torch.finfo(torch.float32).eps * size(expected)
        assert error <= max(factor * allowed, floor), f"{what}: error {error:.2e}, the composition's {allowed:.2e}"


def check(q, k, v, grad_out, grad_maps, scale, sink, tokens):
    """Forward and backward, with either gradient left out too, against float64 and against the composition."""
    dtype = q.dtype
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    reason = tiles.obstacle(q, k, v)
    if reason is not None and not tiles.INTERPRETED:
        pytest.skip(reason)
    results = {}
    for name, kind in (("expected", torch.float64), ("composed", dtype)):
        leaves = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        out, maps = eager(*leaves, scale, sink, tokens)
        loss = (out * grad_out.to(kind)).sum()
        if tokens:
            loss = loss + (maps * grad_maps.to(kind)).sum()
        results[name] = (out, maps, *torch.autograd.grad(loss, leaves))
    out, maps = kernels.forward(q, k, v, scale, sink, tokens)
    gradients = kernels.backward(grad_out, grad_maps if tokens else None, q, k, v, scale, sink, tokens)
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    assert maps.dtype == precise
    assert maps.is_contiguous()
    assert maps.shape == (q.shape[0], q.shape[2], len(tokens))
    assert [x.dtype for x in gradients] == [dtype] * 3
    assert gradients[0].transpose(1, 2).is_contiguous()
    for name, actual, expected, composed in zip(
        ("out", "maps", "dq", "dk", "dv"),
        (out, maps, *gradients),
        results["expected"],
        results["composed"],
        strict=True,
    ):
        expected, composed = expected.detach(), composed.detach()
        if dtype == torch.float64:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert_as_exact(actual, expected, composed, name)


# batch, repeats, heads, queries, keys, d, sink, tokens
CASES = {
    "sd1-40": (2, 1, 2, 130, 77, 40, 0, (1, 5, 63, 64, 76)),
    "sd1-80": (2, 2, 1, 65, 77, 80, 5, (2,)),
    "sd1-160": (1, 1, 2, 15, 77, 160, 0, EMPTY),
    "sdxl-64": (4, 2, 1, 65, 77, 64, 5, tuple(range(77))),
    "widest": (1, 1, 1, 15, 128, 256, 0, (0, 63, 64, 127)),
    "one-key": (1, 1, 3, 1, 1, 8, 0, (0,)),
    "two-keys": (3, 1, 1, 15, 2, 8, 5, EMPTY),
    "sixteen-and-one": (1, 1, 2, 65, 17, 64, 0, (16,)),
    "all-but-one": (2, 2, 1, 1, 76, 40, 5, (75,)),
}


@pytest.mark.parametrize(
    "dtype",
    # The interpreter computes float16 as it does bfloat16.
    [pytest.param(each, marks=pytest.mark.slow if each == torch.float16 else ()) for each in DTYPES],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case, dtype):
    batch, repeats, heads, queries, n_keys, d, sink, tokens = CASES[case]
    q, k, v, grad_out = inputs(batch, heads, queries, n_keys, d, dtype, repeats)
    grad_maps = (
        torch.randn([batch, queries, len(tokens)], dtype=torch.float64)
        .to(DEVICE)
        .to(torch.float64 if dtype == torch.float64 else torch.float32)
    )
    check(q, k, v, grad_out, grad_maps, d**-0.5, sink, tokens)


@pytest.mark.parametrize("d", [8, 24, 96, 136])
@pytest.mark.parametrize("n_keys", [33, 81, 100, 128])
def test_every_split_of_keys_and_columns(n_keys, d):
    q, k, v, grad_out = inputs(1, 1, 15, n_keys, d, torch.float64)
    grad_maps = torch.randn([1, 15, 2], dtype=torch.float64, device=DEVICE)
    check(q, k, v, grad_out, grad_maps, -0.3, 0, (n_keys // 2, n_keys - 1))


def _expanded(x):
    return x[:1, :1].expand_as(x)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "head-innermost": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "expanded": _expanded,
    "sliced": lambda x: torch.cat([x, x, x], -1)[..., 3 : 3 + x.shape[-1]],
    "reversed-batch": lambda x: torch.stack([x, x])[1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    arrange = LAYOUTS[layout]
    q, k, v, grad_out = (arrange(x) for x in inputs(2, 2, 15, 17, 40, torch.float64))
    grad_maps = torch.randn([3, 2, 15], dtype=torch.float64, device=DEVICE).permute(1, 2, 0)
    check(q, k, v, grad_out, grad_maps, 0.2, 1, (0, 3, 16))


def test_gradients_that_are_left_out_count_as_zeros():
    q, k, v, grad_out = inputs(2, 2, 15, 17, 40, torch.float64)
    tokens, scale, sink = (3, 9), 0.2, 2
    grad_maps = torch.randn([2, 15, 1], dtype=torch.float64, device=DEVICE).expand(2, 15, 2)
    arguments = (q, k, v, scale, sink, tokens)
    both = kernels.backward(grad_out, grad_maps, *arguments)
    only_out = kernels.backward(grad_out, None, *arguments)
    only_maps = kernels.backward(None, grad_maps, *arguments)
    neither = kernels.backward(None, None, *arguments)
    for total, *parts in zip(both, only_out, only_maps, strict=True):
        torch.testing.assert_close(total, sum(parts), rtol=0, atol=1e-12)
    assert not only_maps[2].any()
    assert not any(x.any() for x in neither)
    only_q = kernels.backward(grad_out, grad_maps, *arguments, need_kv=False)
    assert torch.equal(only_q[0], both[0])
    assert [x.numel() for x in only_q[1:]] == [0, 0]
    only_kv = kernels.backward(grad_out, grad_maps, *arguments, need_q=False)
    assert only_kv[0].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(only_kv[1:], both[1:], strict=True))


def test_without_maps_nothing_else_changes():
    q, k, v, _ = inputs(1, 1, 15, 17, 8, torch.float32)
    out, maps = kernels.forward(q, k, v, 0.3, 0, ())
    assert maps.shape == (1, 15, 0)
    assert torch.equal(out, kernels.forward(q, k, v, 0.3, 0, (4,))[0])


@pytest.mark.parametrize("heads", [1, 3])
def test_sums_over_head_groups_and_splits(monkeypatch, heads):
    """Groups of heads and splits of queries, which small problems do not have."""
    q, k, v, grad_out = inputs(2, heads, 130, 17, 8, torch.float64, repeats=2)
    grad_maps = torch.randn([2, 130, 2], dtype=torch.float64, device=DEVICE)
    monkeypatch.setattr(kernels, "head_groups", lambda *_: 2)
    monkeypatch.setattr(kernels, "_split_rows", lambda *_: 50)
    check(q, k, v, grad_out, grad_maps, 0.3, 3, (0, 16))


def test_groups_and_splits_depend_on_the_problem_alone():
    assert kernels._split_rows(1, 64) == 64
    assert kernels._split_rows(2 * 8 * 3, 4096) == 384
    assert kernels._split_rows(10**6, 4096) == 4096
    assert tiles.head_groups(1, 8, 64) == 1
    assert tiles.head_groups(2, 8, 4096) == 4
    assert tiles.head_groups(64, 10, 4096) == 10


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "d"),
    [(2, 8, 4096, 40), (2, 8, 1024, 80), (2, 8, 256, 160), (2, 10, 4096, 64), (2, 20, 1024, 64)],
)
def test_maps_leave_no_processor_of_a_large_gpu_idle(monkeypatch, batch, heads, queries, d):
    """What SD1.x and SDXL start with maps, on the 132 multiprocessors of an H100."""
    grids = []
    monkeypatch.setattr(kernels, "forward_kernel", Recorder(grids))
    q, k = (torch.empty(batch, heads, n, d, device="meta", dtype=torch.bfloat16) for n in (queries, 77))
    kernels.forward(q, k, k, 1.0, 0, tuple(range(12)))
    assert math.prod(grids[0]) >= 132


@pytest.mark.parametrize(("value", "sink"), [(-60.0, 0), (-60.0, 3), (60.0, 3), (500.0, 1), (-500.0, 0), (-500.0, 2)])
def test_extreme_logits(value, sink):
    """Neither overflow nor 0 / 0 where all logits are far from the sink's."""
    q = torch.full([1, 1, 3, 8], value / 8, device=DEVICE)
    k = torch.ones(1, 1, 5, 8, device=DEVICE)
    v = torch.randn(1, 1, 5, 8, device=DEVICE)
    out, maps = kernels.forward(q, k, v, 1.0, sink, (4,))
    for actual, expected in zip((out, maps), eager(q.double(), k.double(), v.double(), 1.0, sink, (4,)), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-6)


def test_float64_gradcheck():
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, maps = kernels.forward(q, k, v, 0.4, 2, (1, 4))
            ctx.save_for_backward(q, k, v)
            return out, maps

        @staticmethod
        def backward(ctx, grad_out, grad_maps):
            q, k, v = ctx.saved_tensors
            return kernels.backward(grad_out, grad_maps, q, k, v, 0.4, 2, (1, 4))

    if not tiles.INTERPRETED:
        pytest.skip("float64 runs in the interpreter only")
    leaves = [x.requires_grad_() for x in inputs(2, 1, 3, 5, 4, torch.float64, repeats=2)[:3]]
    assert torch.autograd.gradcheck(Attention.apply, leaves, fast_mode=True)


def test_no_queries():
    q, k, v, _ = inputs(2, 1, 3, 5, 4, torch.float32)
    out, maps = kernels.forward(q[:, :, :0], k, v, 1.0, 0, (1,))
    assert (out.shape, maps.shape) == ((2, 1, 0, 4), (2, 0, 1))
    dq, dk, dv = kernels.backward(out, maps, q[:, :, :0], k, v, 1.0, 0, (1,))
    assert dq.shape == out.shape
    assert not dk.any()
    assert not dv.any()


def test_obstacles():
    x = torch.zeros(1, 1, 2, 8, device=DEVICE)
    assert tiles.obstacle(x, x, x) is None
    assert "got torch.int64" in tiles.obstacle(x.long(), x, x)
    assert "one dtype" in tiles.obstacle(x, x.half(), x)
    many = torch.zeros(1, 1, 129, 8, device=DEVICE)
    assert "got 129 keys" in tiles.obstacle(x, many, many)
    wide = torch.zeros(1, 1, 2, 257, device=DEVICE)
    assert "d = 257" in tiles.obstacle(wide, wide, wide)


@pytest.mark.parametrize(
    ("size", "widest", "expected"),
    [
        (1, 64, (16, 1, 0)),
        (17, 128, (32, 1, 0)),
        (40, 64, (32, 1, 16)),
        (64, 64, (64, 1, 0)),
        (77, 128, (64, 1, 16)),
        (80, 64, (64, 1, 16)),
        (100, 128, (128, 1, 0)),
        (128, 128, (128, 1, 0)),
        (120, 64, (64, 2, 0)),
        (40, 16, (16, 3, 0)),
        (160, 64, (64, 2, 32)),
        (256, 64, (64, 4, 0)),
    ],
)
def test_parts(size, widest, expected):
    assert tiles.partition(size, widest) == expected
