"""self_attention: every backend against float64, and what it must not do."""

import math

import instruction_sets
import pytest
import torch
from attention_operands import LAYOUTS, absent, assert_as_good, with_dtypes

from difffast import ops
from difffast.ops import _installed
from difffast.ops.cross_attention import reference
from difffast.ops.self_attention import choose

needs_cpp = pytest.mark.skipif(absent("cpp") is not None, reason=str(absent("cpp")))
BACKENDS = ["reference", "sdpa", pytest.param("cpp", marks=needs_cpp)]

#: (batch, heads, queries, keys, head_dim): one of each, sizes around tiles of 64 and vectors, other keys than queries.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 65, 65, 8),
    (1, 2, 64, 64, 40),
    (1, 1, 200, 129, 33),
    (3, 2, 16, 16, 64),
    (1, 2, 7, 300, 160),
    (2, 1, 127, 63, 256),
]


def operands(shape, dtype, layout="by row"):
    torch.manual_seed(0)
    batch, heads, queries, keys, dim = shape
    return [LAYOUTS[layout](batch, heads, n, dim, dtype) for n in (queries, keys, keys)]


def eager(q, k, v, scale):
    """What one writes without us, in the operands' own dtype."""
    return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(BACKENDS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("_nan_memory")
def test_error_is_no_worse_than_eager(backend, shape, dtype):
    made, scale = operands(shape, dtype), 0.9 * shape[-1] ** -0.5
    with ops.use_backend(backend):
        out = ops.self_attention(*made, scale=scale)
    assert_as_good(out, eager(*made, scale), eager(*(x.double() for x in made), scale))
    assert out.dtype == dtype
    assert backend == "sdpa" or out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_does_not_matter(backend, dtype, layout):
    made = operands((2, 3, 20, 70, 40), dtype, layout)
    same = [x.clone(memory_format=torch.contiguous_format) for x in made]
    with ops.use_backend(backend):
        ours, theirs = (ops.self_attention(*each) for each in (made, same))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@needs_cpp
def test_rows_do_not_depend_on_their_batch():
    """A batch of decoders must equal one at a time to the last bit."""
    q, k, v = operands((4, 2, 70, 70, 8), torch.float32)
    with ops.use_backend("cpp"):
        out = ops.self_attention(q, k, v)
        for row in range(4):
            rows = slice(row, row + 1)
            assert torch.equal(ops.self_attention(q[rows], k[rows], v[rows])[0], out[row])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1e4, -1e4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)], ids=str)
def test_large_logits(backend, factor, dtype, tolerance):
    """The running maximum rises from tile to tile, by more than an exponential can hold."""
    # Of bfloat16 few numbers differ: with these no two logits of a row are equal.
    made = [x.bfloat16().to(dtype) for x in operands((1, 2, 20, 200, 40), torch.float32)]
    with ops.use_backend(backend):
        ours = ops.self_attention(*made, scale=factor)
    exact = reference(*(x.double() for x in made), factor)[0]
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_is_not_hidden(backend, where, dtype):
    made = operands((1, 2, 70, 151, 39), dtype)
    made[where][0, 1, 65, 5] = math.nan
    with ops.use_backend(backend):
        out = ops.self_attention(*made)
    assert torch.equal(out.isnan(), eager(*made, 39**-0.5).isnan())


@needs_cpp
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_rounded_probabilities_are_no_worse_than_pytorchs(mean):
    """Kernels for bfloat16 may round probabilities to it, as PyTorch's does."""
    made = [(x + mean).bfloat16() for x in operands((2, 4, 256, 1024, 64), torch.float32)]
    exact = reference(*(x.double() for x in made), 64**-0.5)[0]
    errors = []
    for backend in ("cpp", "sdpa"):
        with ops.use_backend(backend):
            errors.append(float((ops.self_attention(*made).double() - exact).square().mean().sqrt()))
    assert errors[0] <= 1.1 * errors[1]


@needs_cpp
def test_few_pixels_in_wide_heads_are_pytorchs_with_amx(monkeypatch):
    monkeypatch.setattr(_installed, "INSTRUCTION_SET", "amx")
    for pixels, dim, expected in ((100, 51, "sdpa"), (100, 50, "cpp"), (16, 51, "cpp"), (1024, 160, "cpp")):
        q = torch.zeros(2, 8, pixels, dim, dtype=torch.bfloat16)
        assert choose(q, q.shape, q.stride()) == expected


def test_empty_queries():
    assert ops.self_attention(*operands((2, 2, 0, 77, 8), torch.float32)).shape == (2, 2, 0, 8)


def test_gradients_are_pytorchs():
    """Where a gradient is wanted PyTorch's attention runs, also where the kernel would."""
    leaves = [x.requires_grad_() for x in operands((2, 2, 40, 33, 8), torch.float64)]
    assert torch.autograd.gradcheck(ops.self_attention, leaves, fast_mode=True)
    with torch.no_grad():
        ops.self_attention(*leaves)


@needs_cpp
def test_opcheck():
    made = operands((2, 2, 9, 70, 6), torch.float32, "sliced")
    torch.library.opcheck(torch.ops.difffast.self_attention.cpp, (*made, 0.3))
    out = torch.ops.difffast.self_attention.cpp(*(x.requires_grad_() for x in made), 0.3)
    with pytest.raises(RuntimeError, match="no backward pass"):
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: ops.self_attention(*x).sin(), fullgraph=True, backend="aot_eager", dynamic=True)
    with ops.use_backend(backend), torch.no_grad():
        for shape in ((2, 1, 5, 7, 8), (4, 2, 66, 65, 8)):
            made = operands(shape, torch.float64)
            torch.testing.assert_close(compiled(*made), ops.self_attention(*made).sin(), rtol=1e-12, atol=1e-12)


@needs_cpp
@pytest.mark.parametrize("instruction_set", instruction_sets.EVERY)
def test_every_instruction_set(instruction_set):
    """The same numbers from every instruction set that this machine has, with a text and without."""
    code = """
        import torch
        from difffast.ops import cross_attention, joint_attention
        from difffast.ops.cross_attention import reference
        from difffast.ops.joint_attention import reference as joint
        torch.manual_seed(0)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 5e-2)):
            for batch, keys, dim in ((2, 77, 40), (1, 128, 256), (3, 1, 1), (2, 200, 8), (2, 5, 33), (1, 300, 160)):
                q, k, v = (torch.randn(batch, 2, n, dim, dtype=dtype) for n in (67, keys, keys))
                text = [torch.randn(1, 2, 20, dim, dtype=dtype) for _ in range(2)]
                q[0, 0, 3, 0] = float("nan")
                with ops.use_backend("cpp"):
                    ours = ops.self_attention(q, k, v), *ops.joint_attention(q, *text, k, v, map_tokens=[0, 19])
                    ours += (cross_attention(q, *text),)
                q, k, v, *text = (x.double() for x in (q, k, v, *text))
                theirs = reference(q, k, v, dim**-0.5)[0], *joint(q, *text, k, v, dim**-0.5, [0, 19])
                theirs += reference(q, *(x.expand(batch, -1, -1, -1) for x in text), dim**-0.5)[:1]
                for a, b in zip(ours, theirs):
                    torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, equal_nan=True)
    """
    instruction_sets.run(code, instruction_set)


Q, K = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ((Q[0], K, K), {}, r"q, k and v must be \[batch, heads, rows, head_dim\], got \(2, 5, 8\)"),
        ((Q, K, K[:, :, :6]), {}, "k and v must have the same shape"),
        ((Q, K[:, :1], K[:, :1]), {}, "q and k must have the same heads and head_dim"),
        ((Q, K[:1], K[:1]), {}, "q and k must have the same batch, got 2 and 1"),
        ((Q, K[:, :, :0], K[:, :, :0]), {}, "k must have at least 1 key, got 0"),
        ((Q, K, K.double()), {}, "must have one dtype"),
        ((Q, K, K.to("meta")), {}, "must be on one device, got cpu, cpu and meta"),
        ((Q, K, K), {"scale": math.inf}, "scale must be finite, got inf"),
    ],
)
def test_bad_input(backend, made, options, message):
    with ops.use_backend(backend), pytest.raises(ValueError, match=message):
        ops.self_attention(*made, **options)


@needs_cpp
def test_forced_backends_that_cannot_run():
    for made, message in (
        ((Q.half(), K.half(), K.half()), "it takes float32, float64 and bfloat16, got float16"),
        ((Q.clone().requires_grad_(), K, K), "it has no backward pass"),
    ):
        with (
            ops.use_backend("cpp"),
            pytest.raises(RuntimeError, match=f"self_attention: backend 'cpp' was forced but cannot run: {message}"),
        ):
            ops.self_attention(*made)
