"""edited_attention: every backend against explicit maps in float64, its gradients, and what it must not do."""

import math

import pytest
import torch
from attention_operands import LAYOUTS, absent, assert_as_good, with_dtypes

from difffast import ops
from difffast.ops.edited_attention import mix_values

needs_triton = pytest.mark.skipif(absent("triton") is not None, reason=str(absent("triton")))
TRITON = pytest.param("triton", marks=needs_triton)
CPP = pytest.param("cpp", marks=pytest.mark.skipif(absent("cpp") is not None, reason=str(absent("cpp"))))
BACKENDS = ["reference", "sdpa", TRITON, CPP]

#: (batch, key batch, heads, queries, source keys, keys, head_dim): odd sizes, no multiples of a tile, one key.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 2, 17, 77, 77, 40),
    (4, 2, 1, 70, 20, 77, 64),
    (16, 16, 1, 5, 77, 9, 8),
    (1, 1, 1, 18, 128, 81, 128),
    (3, 1, 2, 9, 17, 128, 33),
]
#: Layouts that -m slow sees alone: each is a part of another one.
MANY = ("channels_last", "expanded batch", "contiguous")


def operands(shape, dtype, layout="by row"):
    """source_q, source_k, v, mix, q, k, keep; values are not centred"""
    torch.manual_seed(0)
    batch, rows, heads, queries, texts, keys, dim = shape
    make = LAYOUTS[layout]
    source_q, q = (make(batch, heads, queries, dim, dtype) for _ in "sq")
    source_k, k, v = (make(rows, heads, n, dim, dtype) for n in (texts, keys, keys))
    mix, keep = torch.rand(texts, keys) * 2 / keys, torch.rand(keys)
    return [source_q, source_k, v + 1, mix.to(dtype), q, k, keep.to(dtype)]


def explicit(source_q, source_k, v, mix, q=None, k=None, keep=None, scale=None):
    """The map itself, in the operands' own dtype."""
    factor = source_q.shape[-1] ** -0.5 if scale is None else scale
    repeats = source_q.shape[0] // v.shape[0]
    source_k, v = (x.repeat_interleave(repeats, 0) for x in (source_k, v))
    maps = (source_q @ source_k.transpose(-1, -2) * factor).softmax(-1) @ mix
    if keep is not None:
        maps = maps + (q @ k.repeat_interleave(repeats, 0).transpose(-1, -2) * factor).softmax(-1) * keep
    return maps @ v


def two_attentions(source_q, source_k, v, mix, q=None, k=None, keep=None):
    """The same with S v and diag(o) v in place of the maps' product and sum, eagerly."""
    out = explicit(source_q, source_k, mix @ v, torch.eye(len(mix), dtype=mix.dtype))
    return out if keep is None else out + explicit(q, k, keep[:, None] * v, torch.eye(len(keep), dtype=keep.dtype))


def _cases():
    """Every backend, dtype and shape; Triton's interpreter, which is slow, sees most of them with -m slow alone."""
    for shape in SHAPES:
        for each in with_dtypes(BACKENDS):
            few = shape in SHAPES[:2] and each.values[1] in (torch.float32, torch.float16)
            slow = [pytest.mark.slow] if each.values[0] == "triton" and not few else []
            yield pytest.param(*each.values, shape, marks=[*each.marks, *slow], id=f"{each.id}-{shape}")


@pytest.mark.parametrize(("backend", "dtype", "shape"), list(_cases()))
@pytest.mark.usefixtures("_nan_memory")
def test_error_is_no_worse_than_eager(backend, dtype, shape):
    made = operands(shape, dtype)
    # Of 77 keys and 9 values, explicit maps are rounded less often than any two attentions, and PyTorch's fused ones
    # have up to 1.2 times the error of eager ones: of these the same formula is asked, of our kernels the maps'.
    eager = two_attentions if backend == "sdpa" else explicit
    for given in (made, made[:4]):
        exact, theirs = explicit(*(x.double() for x in given)), eager(*given)
        with ops.use_backend(backend, "edited_attention"):
            out = ops.edited_attention(*given)
        assert out.dtype == dtype
        assert out.transpose(1, 2).is_contiguous()
        assert_as_good(out, theirs, exact)


@pytest.mark.parametrize("layout", [*(pytest.param(x, marks=[pytest.mark.slow] * (x in MANY)) for x in LAYOUTS)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_does_not_matter(backend, layout):
    made = operands((2, 1, 3, 20, 18, 21, 40), torch.float64, layout)
    same = [x.clone(memory_format=torch.contiguous_format) for x in made]
    with ops.use_backend(backend, "edited_attention"):
        ours, theirs = ops.edited_attention(*made, scale=0.4), ops.edited_attention(*same, scale=0.4)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, explicit(*made, scale=0.4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_of_keys(backend):
    for keys in (1, 16, 65, 77, 80, 128):
        made = operands((1, 1, 1, 3, keys, 129 - keys, 8), torch.float64)
        with ops.use_backend(backend, "edited_attention"):
            torch.testing.assert_close(ops.edited_attention(*made), explicit(*made), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", range(7))
@pytest.mark.filterwarnings("ignore:(All-NaN slice|invalid value) encountered:RuntimeWarning")  # NumPy, interpreting
def test_nan_reaches_what_it_reaches_in_explicit_maps(backend, where):
    made = operands((1, 1, 2, 7, 17, 70, 40), torch.float32)
    made[where][(0, 1, 3, 5)[-made[where].ndim :]] = math.nan
    with ops.use_backend(backend, "edited_attention"):
        assert torch.equal(ops.edited_attention(*made).isnan(), explicit(*made).isnan())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_large_logits(backend, factor):
    made = operands((1, 1, 2, 20, 17, 70, 40), torch.float32)
    with ops.use_backend(backend, "edited_attention"):
        ours = ops.edited_attention(*made, scale=factor)
    torch.testing.assert_close(ours.double(), explicit(*(x.double() for x in made), factor), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_attends_to_nothing(backend):
    for shape in ((2, 1, 2, 0, 77, 5, 8), (0, 0, 2, 3, 77, 5, 8)):
        made = operands(shape, torch.float32)
        with ops.use_backend(backend, "edited_attention"):
            assert ops.edited_attention(*made).shape == made[0].shape


@pytest.mark.parametrize("backend", [TRITON, CPP])
def test_compiles_without_graph_breaks(backend):
    torch._dynamo.reset()

    def loss(*given):
        return ops.edited_attention(*given).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with ops.use_backend(backend, "edited_attention"):
        for shape in ((2, 1, 1, 5, 7, 9, 8), (4, 2, 1, 6, 9, 12, 8)):
            leaves = [x.requires_grad_() for x in operands(shape, torch.float64)]
            expected, value = loss(*leaves), compiled(*leaves)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
            for a, b in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [7, 4])
def test_gradients(backend, count):
    made = operands((4, 2, 2, 5, 6, 7, 8), torch.float64)[:count]
    leaves = [x.clone().requires_grad_() for x in made]
    with ops.use_backend(backend, "edited_attention"):
        assert torch.autograd.gradcheck(lambda *given: ops.edited_attention(*given), leaves, fast_mode=True)
        ours = torch.autograd.grad(ops.edited_attention(*leaves).sin().sum(), leaves)
    theirs = torch.autograd.grad(explicit(*leaves).sin().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [7, 4])
def test_values_may_be_mixed_beforehand(backend, count):
    made = operands((4, 2, 2, 5, 6, 7, 8), torch.float64)[:count]
    mixed = mix_values(made[2], made[3], made[6] if count == 7 else None)
    with ops.use_backend(backend, "edited_attention"):
        assert torch.equal(ops.edited_attention(*made, mixed=mixed), ops.edited_attention(*made))


@needs_triton
def test_opcheck():
    source_q, source_k, v, mix, q, k, keep = operands((2, 1, 2, 5, 6, 7, 8), torch.float32)
    leaves = [x.clone().requires_grad_() for x in (source_q, source_k, mix @ v, q, k, keep[:, None] * v)]
    torch.library.opcheck(torch.ops.difffast.edited_attention.triton, (*leaves, 0.3))


def test_no_own_map_costs_one_attention():
    made = operands((1, 1, 1, 4, 5, 6, 8), torch.float32)
    zero = torch.zeros_like(made[6])
    torch.testing.assert_close(ops.edited_attention(*made[:4]), ops.edited_attention(*made[:6], zero))


def test_what_does_not_fit_is_refused():
    made = operands((2, 1, 2, 5, 6, 7, 8), torch.float32)
    wrong = {
        "q, k and keep must all be given": [*made[:6], None],
        r"mix must be \[6, 7\], got \[7, 6\]": [*made[:3], made[3].T, *made[4:]],
        r"keep must be \[7\], got \[6\]": [*made[:6], made[6][:6]],
        "mix must be torch.float32 on cpu like source_q": [*made[:3], made[3].double(), *made[4:]],
        r"q must be \[2, 2, 5, 8\]": [*made[:4], made[4][:, :, :4], *made[5:]],
        "source_k must have 1 to 128 keys, got 0": [made[0], made[1][:, :, :0], *made[2:]],
        "v must have 1 to 128 keys, got 0": [*made[:2], made[2][:, :, :0], made[3][:, :0]],
    }
    for error, given in wrong.items():
        with pytest.raises(ValueError, match=error):
            ops.edited_attention(*given)
    short = made[2][:, :, :3]
    for mixed in ((short, made[2]), (made[1], short), (made[1].double(), made[2])):
        with pytest.raises(ValueError, match=r"mixed\[[01]\] must be"):
            ops.edited_attention(*made, mixed=mixed)
    with pytest.raises(ValueError, match=r"mixed\[1\] must be given where keep is"):
        ops.edited_attention(*made, mixed=(made[1], None))
    with pytest.raises(ValueError, match="scale must be finite"):
        ops.edited_attention(*made, scale=float("nan"))


def test_forced_backends_that_cannot_run():
    wide, half = (operands((1, 1, 1, 2, 3, 4, dim), torch.float16) for dim in (257, 8))
    with pytest.raises(ValueError, match="head_dim"):
        ops.edited_attention(*wide)
    if absent("cpp") is None:
        with (
            ops.use_backend("cpp", "edited_attention"),
            pytest.raises(RuntimeError, match=r"'cpp' was forced .*bfloat16, got float16"),
        ):
            ops.edited_attention(*half)
    if absent("triton") is None:
        many = operands((2**16, 1, 1, 1, 1, 1, 1), torch.float32)
        with (
            ops.use_backend("triton", "edited_attention"),
            pytest.raises(RuntimeError, match=r"edited_attention: backend 'triton' was forced .*65535"),
        ):
            ops.edited_attention(*many)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 2, 8, 1024, 77, 77, 80)], ids=str)
@pytest.mark.usefixtures("_nan_memory")
def test_gpu_kernels(shape, dtype):
    """What a row of the proof table stands for."""
    if ops.missing("triton"):
        pytest.fail(str(ops.missing("triton")))
    leaves = [x.cuda().requires_grad_() for x in operands(shape, dtype)]
    results = {}
    for name, each in (("exact", [x.detach().double().requires_grad_() for x in leaves]), ("theirs", leaves)):
        out = explicit(*each)
        results[name] = (out, *torch.autograd.grad(out.sum(), each))
    with ops.use_backend("triton", "edited_attention"):
        out = ops.edited_attention(*leaves)
        ours = (out, *torch.autograd.grad(out.sum(), leaves))
    for a, b, c in zip(ours, results["theirs"], results["exact"], strict=True):
        assert_as_good(a.detach(), b.detach(), c.detach())
