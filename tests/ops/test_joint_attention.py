"""joint_attention: every backend against float64, its gradients, and what it must not do."""

import importlib
import math

import pytest
import torch
from attention_operands import LAYOUTS, absent, assert_as_good, with_dtypes

from difffast import ops
from difffast.ops.joint_attention import reference, reference_backward

#: The module; the package's attribute of this name is the function.
joint_module = importlib.import_module("difffast.ops.joint_attention")

needs_triton = pytest.mark.skipif(absent("triton") is not None, reason=str(absent("triton")))
TRITON = pytest.param("triton", marks=needs_triton)
CPP = pytest.param("cpp", marks=pytest.mark.skipif(absent("cpp") is not None, reason=str(absent("cpp"))))
KERNELS = [TRITON, CPP]
BACKENDS = ["reference", "sdpa", *KERNELS]
WITH_MAPS = ["reference", *KERNELS]

#: (batch, text batch, heads, queries, text keys, pixel keys, head_dim): odd sizes, sizes that are no multiple of a
#: tile, one key, no pixels.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 2, 17, 77, 70, 40),
    (1, 1, 1, 130, 77, 65, 64),
    (4, 2, 1, 7, 2, 128, 64),
    (16, 16, 1, 5, 77, 9, 8),
    (1, 1, 1, 18, 128, 130, 128),
    (3, 3, 2, 17, 17, 33, 33),
    (4, 1, 1, 15, 100, 20, 96),
    (1, 1, 2, 9, 81, 0, 16),
]


def operands(shape, dtype, layout="by row"):
    """q, text_k, text_v, k, v"""
    torch.manual_seed(0)
    batch, text_batch, heads, queries, text, pixels, dim = shape
    rows = ((batch, queries), (text_batch, text), (text_batch, text), (batch, pixels), (batch, pixels))
    return [LAYOUTS[layout](b, heads, n, dim, dtype) for b, n in rows]


def tokens_of(text):
    return sorted({0, text // 2, text - 1, min(63, text - 1), min(64, text - 1)})


def eager(q, text_k, text_v, k, v, scale, tokens):
    """What one writes without us, in the operands' own dtype."""
    repeats = q.shape[0] // text_k.shape[0]
    k, v = (torch.cat([text.repeat_interleave(repeats, 0), pixels], 2) for text, pixels in ((text_k, k), (text_v, v)))
    p = (q @ k.transpose(-1, -2) * scale).softmax(-1)
    return p @ v, p[..., tokens].mean(1)


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(BACKENDS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("_nan_memory")
def test_error_is_no_worse_than_eager(backend, shape, dtype):
    made = operands(shape, dtype)
    scale, tokens = 0.9 * shape[-1] ** -0.5, tokens_of(shape[4])
    exact = eager(*(x.double() for x in made), scale, tokens)
    theirs = eager(*made, scale, tokens)
    with ops.use_backend(backend):
        out = ops.joint_attention(*made, scale=scale)
        assert_as_good(out, theirs[0], exact[0])
        assert out.dtype == dtype
        assert out.transpose(1, 2).is_contiguous()
        if backend == "sdpa":
            return
        with_maps, maps = ops.joint_attention(*made, scale=scale, map_tokens=tokens)
    assert torch.equal(with_maps, out), "maps change nothing"
    assert maps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert maps.is_contiguous()
    assert_as_good(maps, theirs[1], exact[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_does_not_matter(backend, layout):
    made = operands((2, 2, 3, 20, 18, 21, 40), torch.float64, layout)
    same = [x.clone(memory_format=torch.contiguous_format) for x in made]
    options = {} if backend == "sdpa" else {"map_tokens": [3, 7]}
    with ops.use_backend(backend):
        ours, theirs = (ops.joint_attention(*each, **options) for each in (made, same))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_of_text_keys(backend):
    """Splits of the keys into tiles, 1 .. 128."""
    for text in (1, 15, 16, 17, 32, 33, 63, 64, 65, 77, 80, 81, 96, 97, 127, 128):
        made = operands((1, 1, 1, 3, text, 5, 8), torch.float64)
        tokens = tokens_of(text)
        with ops.use_backend(backend):
            ours = ops.joint_attention(*made, **({} if backend == "sdpa" else {"map_tokens": tokens}))
        exact = eager(*made, 8**-0.5, tokens)
        torch.testing.assert_close(ours, exact[0] if backend == "sdpa" else exact, rtol=1e-12, atol=1e-12)


def test_text_and_pixels_share_one_softmax():
    """Against attention over the text alone: what the pixels take is missing in every word's share."""
    made = operands((2, 2, 2, 9, 77, 20, 8), torch.float64)
    _, maps = ops.joint_attention(*made, map_tokens=range(77))
    taken = 1 - maps.sum(-1)
    assert float(taken.min()) > 0.01
    ones = torch.ones_like(made[4])
    shares = ops.joint_attention(*made[:2], torch.zeros_like(made[2]), made[3], ones)
    torch.testing.assert_close(shares.mean((1, 3)), taken, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", TRITON])
def test_text_alone_is_cross_attention(backend):
    q, text_k, text_v, *_ = operands((4, 2, 2, 9, 12, 0, 8), torch.float32)
    with ops.use_backend(backend):
        ours = ops.joint_attention(q, text_k, text_v, None, None, scale=0.3, map_tokens=[4, 0])
        theirs = ops.cross_attention(q, text_k, text_v, scale=0.3, map_tokens=[4, 0])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_map_tokens_keep_their_order():
    made = operands((1, 1, 2, 9, 77, 20, 8), torch.float32)
    _, maps = ops.joint_attention(*made, map_tokens=range(77))
    _, some = ops.joint_attention(*made, map_tokens=[70, 3, 3])
    assert torch.equal(some, maps[..., [70, 3, 3]])


@needs_triton
def test_maps_are_summed_over_groups_of_heads(monkeypatch):
    """As for a large GPU: several programs share the heads, and the sum has a fixed order."""
    from difffast.triton_kernels import joint_attention as kernels

    made = operands((1, 1, 5, 9, 20, 6, 8), torch.float64)
    monkeypatch.setattr(kernels, "head_groups", lambda *_: 2)
    with ops.use_backend("triton"):
        torch.testing.assert_close(
            ops.joint_attention(*made, map_tokens=[1, 17]), eager(*made, 8**-0.5, [1, 17]), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("backend", KERNELS)
def test_rows_do_not_depend_on_their_batch(backend):
    """A batch of decoders must equal one at a time to the last bit."""
    q, text_k, text_v, k, v = operands((4, 2, 2, 20, 18, 9, 8), torch.float32)
    with ops.use_backend(backend):
        out, maps = ops.joint_attention(q, text_k, text_v, k, v, map_tokens=[1, 2])
        for row in range(4):
            rows, text = slice(row, row + 1), slice(row // 2, row // 2 + 1)
            one, one_map = ops.joint_attention(q[rows], text_k[text], text_v[text], k[rows], v[rows], map_tokens=[1, 2])
            assert torch.equal(one[0], out[row])
            assert torch.equal(one_map[0], maps[row])


@pytest.mark.parametrize("backend", WITH_MAPS)
@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_large_logits(backend, factor):
    made = operands((1, 1, 2, 20, 17, 70, 40), torch.float32)
    with ops.use_backend(backend):
        ours = ops.joint_attention(*made, scale=factor, map_tokens=[1])
    for a, b in zip(ours, reference(*(x.double() for x in made), factor, [1]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", range(5))
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # numpy, in Triton's interpreter
def test_nan_is_not_hidden(backend, where):
    made = operands((1, 1, 2, 7, 17, 70, 40), torch.float32)
    made[where][0, 1, 3, 5] = math.nan
    with ops.use_backend(backend):
        out = ops.joint_attention(*made)
    assert torch.equal(out.isnan(), eager(*made, 40**-0.5, [0])[0].isnan())


def test_empty_queries():
    made = operands((2, 2, 2, 0, 77, 5, 8), torch.float32)
    out, maps = ops.joint_attention(*made, map_tokens=[1, 2])
    assert out.shape == (2, 2, 0, 8)
    assert maps.shape == (2, 0, 2)


# Gradients


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_closed_form_is_autograd(shape):
    leaves = [x.requires_grad_() for x in operands(shape, torch.float64)]
    tokens, scale = tokens_of(shape[4]), 0.3
    out, maps = reference(*leaves, scale, tokens)
    d_out, d_maps = torch.randn_like(out), torch.randn_like(maps)
    for pair, outputs in (((d_out, d_maps), (out, maps)), ((d_out, None), (out,)), ((None, d_maps), (maps,))):
        given = tuple(x for x in pair if x is not None)
        expected = torch.autograd.grad(outputs, leaves, given, retain_graph=True, materialize_grads=True)
        for a, b in zip(reference_backward(*pair, *leaves, scale, tokens), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(KERNELS, (torch.float32, torch.bfloat16, torch.float16)))
@pytest.mark.usefixtures("_nan_memory")
def test_gradients_are_no_worse_than_eager(backend, dtype):
    made, tokens, scale = operands((4, 2, 2, 17, 18, 19, 40), dtype), [0, 16], 40**-0.5
    d_out, d_maps = torch.randn_like(made[0].double()), torch.randn(4, 17, 2).double()

    def gradients(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in made]
        out, maps = function(*leaves)
        return torch.autograd.grad((out, maps), leaves, (d_out.to(out.dtype), d_maps.to(maps.dtype)))

    exact = gradients(lambda *x: eager(*x, scale, tokens), torch.float64)
    theirs = gradients(lambda *x: eager(*x, scale, tokens), dtype)
    with ops.use_backend(backend):
        ours = gradients(lambda *x: ops.joint_attention(*x, scale=scale, map_tokens=tokens), dtype)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        assert_as_good(a, b, c)


@pytest.mark.parametrize("wanted", ["out", "maps", "both"])
@pytest.mark.parametrize("backend", WITH_MAPS)
def test_gradcheck(backend, wanted):
    leaves = [x.requires_grad_() for x in operands((2, 1, 2, 3, 7, 5, 4), torch.float64)]

    def function(*leaves):
        out, maps = ops.joint_attention(*leaves, map_tokens=[4, 0, 6])
        return {"out": out, "maps": maps, "both": (out, maps)}[wanted]

    with ops.use_backend(backend):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_pytorchs_attention_is_differentiated_where_it_is_the_faster_one(monkeypatch):
    """The C++ kernel is a default on CPUs, but its backward pass is plain PyTorch."""
    made, calls = operands((2, 1, 2, 3, 7, 5, 4), torch.float32), []
    original = joint_module._attend
    monkeypatch.setattr(joint_module, "_attend", lambda *a: calls.append(1) or original(*a))
    ops.joint_attention(*made)
    assert bool(calls) == (ops.missing("cpp") is not None)
    calls.clear()
    leaves = [x.requires_grad_() for x in made]
    ops.joint_attention(*leaves).sum().backward()
    assert calls
    calls.clear()
    with torch.no_grad():
        ops.joint_attention(*leaves)
    assert bool(calls) == (ops.missing("cpp") is not None)


def test_gradcheck_of_pytorch_attention():
    leaves = [x.requires_grad_() for x in operands((2, 1, 2, 3, 7, 5, 4), torch.float64)]
    with ops.use_backend("sdpa"):
        assert torch.autograd.gradcheck(lambda *leaves: ops.joint_attention(*leaves), leaves, fast_mode=True)


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivatives(backend):
    leaves = [x.requires_grad_() for x in operands((2, 1, 2, 3, 4, 5, 2), torch.float64)]
    results = []
    for each in ("reference", backend):
        with ops.use_backend(each):
            out, maps = ops.joint_attention(*leaves, map_tokens=[1])
        first = torch.autograd.grad(out.sin().sum() + maps.sin().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


# Registration


@pytest.mark.parametrize(("layout", "tokens"), [("by row", []), ("sliced", [0, 2])])
@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend, layout, tokens):
    made = [x.requires_grad_() for x in operands((2, 1, 1, 3, 4, 5, 6), torch.float32, layout)]
    torch.library.opcheck(getattr(torch.ops.difffast.joint_attention, backend), (*made, 0.3, tokens))


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        ("reference", False),
        ("sdpa", True),
        pytest.param("triton", True, marks=needs_triton),
        pytest.param("cpp", True, marks=CPP.marks),
    ],
)
def test_compiles_without_graph_breaks(backend, dynamic):
    torch._dynamo.reset()
    tokens = None if backend == "sdpa" else [5, 1]

    def loss(*operands):
        result = ops.joint_attention(*operands, map_tokens=tokens)
        return sum(x.sin().sum() for x in ([result] if tokens is None else result))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with ops.use_backend(backend):
        for shape in ((2, 1, 1, 5, 7, 9, 8), (4, 2, 1, 6, 9, 12, 8)):
            leaves = [x.requires_grad_() for x in operands(shape, torch.float64)]
            expected, value = loss(*leaves), compiled(*leaves)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
            for a, b in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# Errors

Q, T, P = torch.randn(2, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(2, 2, 6, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ((Q[0], T, T, P, P), {}, r"q, text_k and text_v must be \[batch, heads, rows, head_dim\], got \(2, 5, 8\)"),
        ((Q, T, T[:, :, :6], P, P), {}, "text_k and text_v must have the same shape"),
        ((Q, T[:, :1], T[:, :1], P, P), {}, "q and text_k must have the same heads and head_dim"),
        (
            (Q, torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8), P, P),
            {},
            "text_k's batch must divide q's, got 3 and 2",
        ),
        ((Q, torch.ones(2, 2, 129, 8), torch.ones(2, 2, 129, 8), P, P), {}, "text_k must have 1 to 128 keys, got 129"),
        ((Q, T, T, P[:1], P[:1]), {}, r"k must be \[2, 2, pixels, 8\] like q, got \(1, 2, 6, 8\)"),
        ((Q, T, T, P[0], P[0]), {}, r"k must be \[2, 2, pixels, 8\] like q, got \(2, 6, 8\)"),
        ((Q, T, T, P, P[:, :, 1:]), {}, r"k and v must have the same shape, got \(2, 2, 6, 8\) and \(2, 2, 5, 8\)"),
        ((Q, T, T, P, P.double()), {}, "v must be torch.float32 on cpu like q, got torch.float64 on cpu"),
        ((Q, T, T, P.to("meta"), P), {}, "k must be torch.float32 on cpu like q, got torch.float32 on meta"),
        ((Q, T, T, P, None), {}, "k and v must both be tensors or both be None, got Tensor, NoneType"),
        ((Q, T, T, P, P), {"scale": math.nan}, "scale must be finite, got nan"),
        ((Q, T, T, P, P), {"map_tokens": [7]}, r"map_tokens must be ints in 0 .. 6, got 7"),
        ((Q, T, T, P, P), {"map_tokens": []}, "at least one token"),
    ],
)
def test_bad_input(backend, made, options, message):
    with ops.use_backend(backend), pytest.raises(ValueError, match=message):
        ops.joint_attention(*made, **options)


def test_forced_backends_that_cannot_run():
    wide, long = torch.ones(1, 1, 2, 129), torch.ones(1, 1, 2, 8)
    cases = [("sdpa", (long,) * 5, "returns no maps")]
    if absent("cpp") is None:
        cases.append(("cpp", (long.half(),) * 5, "it takes float32, float64 and bfloat16, got float16"))
    if absent("triton") is None:
        cases.append(("triton", (wide,) * 5, "heads of at most 128 are supported, got d = 129"))
    for backend, made, message in cases:
        with (
            ops.use_backend(backend),
            pytest.raises(RuntimeError, match=f"joint_attention: backend '{backend}' was forced .*{message}"),
        ):
            ops.joint_attention(*made, map_tokens=[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 2, 8, 1024, 77, 1024, 64)], ids=str)
@pytest.mark.usefixtures("_nan_memory")
def test_gpu_kernels(shape, dtype):
    """What a row of the proof table stands for."""
    if ops.missing("triton"):
        pytest.fail(str(ops.missing("triton")))
    leaves = [x.cuda().requires_grad_() for x in operands(shape, dtype)]
    scale, tokens = 0.9 * shape[-1] ** -0.5, tokens_of(shape[4])
    results = {}
    for name, each in (("exact", [x.detach().double().requires_grad_() for x in leaves]), ("theirs", leaves)):
        out, maps = eager(*each, scale, tokens)
        results[name] = (out, maps, *torch.autograd.grad(out.sum() + maps.sum(), each))
    with ops.use_backend("triton"):
        out, maps = ops.joint_attention(*leaves, scale=scale, map_tokens=tokens)
        ours = (out, maps, *torch.autograd.grad(out.sum() + maps.sum(), leaves))
    for a, b, c in zip(ours, results["theirs"], results["exact"], strict=True):
        assert_as_good(a.detach(), b.detach(), c.detach())
