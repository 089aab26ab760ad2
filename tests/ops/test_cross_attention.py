"""cross_attention: results and gradients against float64, and what PyTorch asks of an operator."""

import math

import instruction_sets
import pytest
import torch
import torch.nn.functional as F
from attention_operands import DTYPES, LAYOUTS, absent, assert_as_good

from difffast import ops
from difffast.ops.cross_attention import reference, reference_backward

needs_cpp = pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))
KERNELS = [
    pytest.param(b, marks=pytest.mark.skipif(absent(b) is not None, reason=str(absent(b)))) for b in ("cpp", "triton")
]
BACKENDS = ["reference", "sdpa", *KERNELS]
WITH_MAPS = ["reference", *KERNELS]
#: (batch, key batch, heads, queries, keys, head_dim): every key count, odd sizes, sizes that are no multiple of a tile.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 2, 3, 65, 77, 40),
    (1, 1, 8, 64, 77, 160),
    (2, 1, 2, 129, 76, 80),
    (4, 2, 1, 7, 2, 64),
    (16, 16, 2, 5, 77, 8),
    (1, 1, 2, 66, 128, 256),
    (3, 3, 5, 31, 17, 33),
    (8, 2, 2, 100, 80, 96),
]


def operands(shape, dtype, layout="by row"):
    torch.manual_seed(0)
    batch, key_batch, heads, queries, keys, dim = shape
    make = LAYOUTS[layout]
    k, v = (make(key_batch, heads, keys, dim, dtype) for _ in range(2))
    return make(batch, heads, queries, dim, dtype), k, v


def tokens_of(keys):
    return sorted({0, keys // 2, keys - 1, min(63, keys - 1), min(64, keys - 1)})


def eager(q, k, v, scale, sink, tokens):
    """What one writes without us, in the operands' own dtype."""
    repeats = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    if sink:
        k, v = F.pad(k, (0, 0, 0, sink)), F.pad(v, (0, 0, 0, sink))
    p = (q @ k.transpose(-1, -2) * scale).softmax(-1)
    return p @ v, p[..., tokens].mean(1)


@pytest.mark.parametrize("sink", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("_nan_memory")
def test_error_is_no_worse_than_eager(shape, dtype, sink):
    q, k, v = operands(shape, dtype)
    scale, tokens = 0.9 * shape[-1] ** -0.5, tokens_of(shape[4])
    exact = eager(q.double(), k.double(), v.double(), scale, sink, tokens)
    theirs = eager(q, k, v, scale, sink, tokens)
    for backend in ("reference", "sdpa", "cpp"):
        if ops.missing(backend) or (backend == "cpp" and dtype == torch.float16):
            continue
        with ops.use_backend(backend):
            alone = ops.cross_attention(q, k, v, scale=scale, sink=sink)
            assert_as_good(alone, theirs[0], exact[0])
            if backend == "sdpa":
                continue
            out, maps = ops.cross_attention(q, k, v, scale=scale, sink=sink, map_tokens=tokens)
        assert torch.equal(out, alone), "maps change nothing"
        assert out.transpose(1, 2).is_contiguous()
        assert out.dtype == dtype
        assert maps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_as_good(maps, theirs[1], exact[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_does_not_matter(dtype, layout):
    q, k, v = operands((2, 2, 3, 65, 77, 40), dtype, layout)
    same = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)]
    for backend in ("reference", "cpp"):
        if ops.missing(backend) is None:
            with ops.use_backend(backend):
                for a, b in zip(
                    ops.cross_attention(q, k, v, map_tokens=[3, 7]),
                    ops.cross_attention(*same, map_tokens=[3, 7]),
                    strict=True,
                ):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@needs_cpp
@pytest.mark.usefixtures("_nan_memory")
def test_gradients_are_no_worse_than_eager(shape, dtype):
    sink, tokens, scale = 3, tokens_of(shape[4]), shape[-1] ** -0.5
    made = operands(shape, dtype)
    d_out, d_maps = torch.randn_like(made[0].double()), torch.randn(shape[0], shape[3], len(tokens)).double()

    def gradients(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in made]
        out, maps = function(*leaves)
        return torch.autograd.grad((out, maps), leaves, (d_out.to(out.dtype), d_maps.to(maps.dtype)))

    exact = gradients(lambda q, k, v: eager(q, k, v, scale, sink, tokens), torch.float64)
    theirs = gradients(lambda q, k, v: eager(q, k, v, scale, sink, tokens), dtype)
    with ops.use_backend("cpp"):
        ours = gradients(lambda q, k, v: ops.cross_attention(q, k, v, scale=scale, sink=sink, map_tokens=tokens), dtype)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        assert_as_good(a, b, c)


@pytest.mark.parametrize(
    ("leaf", "wanted"),
    # Maps do not depend on v.
    [
        pytest.param(leaf, wanted, marks=[pytest.mark.slow] * (leaf != "all"))
        for leaf in (*"qkv", "all")
        for wanted in ("out", "maps", "both")
        if (leaf, wanted) != ("v", "maps")
    ],
)
@pytest.mark.parametrize("backend", WITH_MAPS)
def test_gradcheck(backend, leaf, wanted):
    leaves = dict(zip("qkv", operands((4, 2, 2, 5, 7, 6), torch.float64), strict=True))
    for name, x in leaves.items():
        x.requires_grad_(leaf in (name, "all"))

    def function(q, k, v):
        out, maps = ops.cross_attention(q, k, v, sink=2, map_tokens=[4, 0, 6])
        return {"out": out, "maps": maps, "both": (out, maps)}[wanted]

    with ops.use_backend(backend):
        # Interpreted kernels are too slow for one call per element: random directions.
        assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=backend == "triton")


@pytest.mark.parametrize("backend", KERNELS)
def test_a_second_derivative_is_refused(backend):
    q, k, v = (x.requires_grad_() for x in operands((1, 1, 1, 3, 4, 2), torch.float64))
    with ops.use_backend(backend):
        (grad,) = torch.autograd.grad(ops.cross_attention(q, k, v).sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_closed_form_is_autograd(shape):
    q, k, v = (x.requires_grad_() for x in operands(shape, torch.float64))
    tokens, scale = tokens_of(shape[4]), 0.3
    out, maps = reference(q, k, v, scale, 4, tokens)
    d_out, d_maps = torch.randn_like(out), torch.randn_like(maps)
    for pair, outputs in (((d_out, d_maps), (out, maps)), ((d_out, None), (out,)), ((None, d_maps), (maps,))):
        given = tuple(x for x in pair if x is not None)
        expected = torch.autograd.grad(outputs, (q, k, v), given, retain_graph=True, materialize_grads=True)
        for a, b in zip(reference_backward(*pair, q, k, v, scale, 4, tokens), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_sink_is_zero_rows():
    """What semantic binding needs: absorbed rows that are zero in K and V need not be stored."""
    q, k, v = operands((2, 2, 3, 9, 12, 16), torch.float64)
    full_k, full_v = F.pad(k, (0, 0, 0, 5)), F.pad(v, (0, 0, 0, 5))
    for backend in ("reference", "sdpa", "cpp"):
        if ops.missing(backend) is None:
            with ops.use_backend(backend):
                torch.testing.assert_close(
                    ops.cross_attention(q, k, v, sink=5), ops.cross_attention(q, full_k, full_v), rtol=1e-12, atol=1e-12
                )


@pytest.mark.parametrize("backend", WITH_MAPS)
def test_large_logits_with_and_without_sink(backend):
    q, k, v = operands((1, 1, 2, 70, 77, 40), torch.float32)
    with ops.use_backend(backend):
        for factor in (1e4, -1e4):
            for sink in (0, 7):
                out, maps = ops.cross_attention(q, k, v, scale=factor, sink=sink, map_tokens=[1])
                exact = reference(q.double(), k.double(), v.double(), factor, sink, [1])
                torch.testing.assert_close(out.double(), exact[0], rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(maps.double(), exact[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # numpy, in Triton's interpreter
def test_nan_is_not_hidden(backend, where):
    made = dict(zip("qkv", operands((1, 1, 2, 70, 77, 40), torch.float32), strict=True))
    made[where][0, 1, 3, 5] = math.nan
    with ops.use_backend(backend):
        out = ops.cross_attention(**made)
    exact = eager(*made.values(), 40**-0.5, 0, [0])[0]
    assert torch.equal(out.isnan(), exact.isnan())


@needs_cpp
def test_rows_do_not_depend_on_their_batch():
    """A batch of decoders must equal one at a time to the last bit."""
    q, k, v = operands((8, 2, 3, 130, 77, 40), torch.float32)
    out, maps = ops.cross_attention(q, k, v, map_tokens=[1, 2])
    for row in range(8):
        alone = slice(row, row + 1), slice(row // 4, row // 4 + 1)
        one, one_map = ops.cross_attention(q[alone[0]], k[alone[1]], v[alone[1]], map_tokens=[1, 2])
        assert torch.equal(one[0], out[row])
        assert torch.equal(one_map[0], maps[row])
    assert torch.equal(ops.cross_attention(q, k.repeat_interleave(4, 0), v.repeat_interleave(4, 0)), out)


def test_map_tokens_keep_their_order():
    q, k, v = operands((1, 1, 2, 9, 77, 8), torch.float32)
    _, maps = ops.cross_attention(q, k, v, map_tokens=range(77))
    _, some = ops.cross_attention(q, k, v, map_tokens=[70, 3, 3])
    assert torch.equal(some, maps[..., [70, 3, 3]])
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, 9))


def test_empty_queries():
    q, k, v = operands((2, 2, 2, 0, 77, 8), torch.float32)
    out, maps = ops.cross_attention(q, k, v, map_tokens=[1, 2])
    assert out.shape == (2, 2, 0, 8)
    assert maps.shape == (2, 0, 2)


@pytest.mark.parametrize(
    ("backend", "shape", "layout"),
    [
        pytest.param(
            kernel.values[0],
            shape,
            layout,
            # The interpreter takes half a minute for each of these.
            marks=kernel.marks if kernel.values[0] == "cpp" else [*kernel.marks, pytest.mark.slow],
            id=f"{kernel.values[0]}-{shape}-{layout}",
        )
        for kernel in KERNELS
        for shape in ((4, 2, 3, 5, 7, 6), (2, 2, 1, 65, 77, 40))
        for layout in LAYOUTS
        if kernel.values[0] == "cpp" or (shape[-1], layout) == (6, "sliced")
    ],
)
def test_opcheck(backend, shape, layout):
    operator = getattr(torch.ops.difffast.cross_attention, backend)
    backward = getattr(torch.ops.difffast.cross_attention_backward, backend)
    q, k, v = (x.requires_grad_() for x in operands(shape, torch.float32, layout))
    for tokens, sink in (([], 0), ([0, 2], 3)):
        torch.library.opcheck(operator, (q, k, v, 0.3, sink, tokens))
    q, k, v = q.detach(), k.detach(), v.detach()
    out, maps = operator(q, k, v, 0.3, 1, [0, 2])
    # What is asked for is crossed once: how operands lie changes none of it.
    once = shape[-1] == 6 and layout == "sliced"
    for grads in ((out, maps), (out, None), (None, maps)) if once else ((out, maps),):
        for needs in ((True, True), (True, False), (False, True)) if once else ((True, True),):
            arguments = (*grads, q, k, v, 0.3, 1, [0, 2], *needs)
            torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend, dynamic):
    torch._dynamo.reset()
    tokens = None if backend == "sdpa" else [5, 1]

    def loss(q, k, v):
        result = ops.cross_attention(q, k, v, sink=1, map_tokens=tokens)
        return sum(x.sin().sum() for x in ([result] if tokens is None else result))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with ops.use_backend(backend):
        for shape in ((2, 2, 3, 20, 7, 8), (4, 4, 3, 33, 9, 8)):
            leaves = [x.requires_grad_() for x in operands(shape, torch.float64)]
            expected, value = loss(*leaves), compiled(*leaves)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
            for a, b in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


Q, K = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("q", "k", "v", "options", "message"),
    [
        (Q[0], K, K, {}, r"must be \[batch, heads, rows, head_dim\], got \(2, 5, 8\)"),
        (Q, K, K[:, :, :6], {}, r"k and v must have the same shape, got \(2, 2, 7, 8\) and \(2, 2, 6, 8\)"),
        (Q, K[:, :1], K[:, :1], {}, "same heads and head_dim"),
        (Q, K[..., :4], K[..., :4], {}, "same heads and head_dim"),
        (Q[:1], K, K, {}, "k's batch must divide q's, got 2 and 1"),
        (Q, K[:0], K[:0], {}, "k's batch must divide q's, got 0 and 2"),
        (Q, K[:, :, :0], K[:, :, :0], {}, "1 to 128 keys, got 0"),
        (Q, torch.ones(2, 2, 129, 8), torch.ones(2, 2, 129, 8), {}, "1 to 128 keys, got 129"),
        (torch.ones(1, 1, 1, 257), torch.ones(1, 1, 1, 257), torch.ones(1, 1, 1, 257), {}, "head_dim of 1 to 256"),
        (Q.long(), K.long(), K.long(), {}, "one dtype of float16, .*got torch.int64"),
        (Q, K.double(), K.double(), {}, "one dtype of .*got torch.float32, torch.float64"),
        (Q, K.to("meta"), K.to("meta"), {}, "on one device, got cpu, meta"),
        (Q, K, K, {"scale": math.nan}, "scale must be finite, got nan"),
        (Q, K, K, {"scale": math.inf}, "scale must be finite, got inf"),
        (Q, K, K, {"sink": -1}, "sink must be an int of at least 0, got -1"),
        (Q, K, K, {"sink": 1.5}, "sink must be an int of at least 0, got 1.5"),
        (Q, K, K, {"map_tokens": [7]}, r"map_tokens must be ints in 0 .. 6, got 7"),
        (Q, K, K, {"map_tokens": [-1]}, r"map_tokens must be ints in 0 .. 6, got -1"),
        (Q, K, K, {"map_tokens": []}, "at least one token"),
        (Q, K, K, {"map_tokens": [0.5]}, "must be ints in 0 .. 6, got 0.5"),
    ],
)
def test_bad_input(backend, q, k, v, options, message):
    with ops.use_backend(backend), pytest.raises(ValueError, match=message):
        ops.cross_attention(q, k, v, **options)


@needs_cpp
@pytest.mark.parametrize("instruction_set", instruction_sets.EVERY)
def test_every_instruction_set(instruction_set):
    """The same numbers from every instruction set that this machine has."""
    code = """
        import torch
        from difffast.ops.cross_attention import reference
        torch.manual_seed(0)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 5e-2)):
            for batch, keys, dim in ((2, 77, 40), (1, 128, 256), (3, 1, 1), (2, 5, 33)):
                leaves = [torch.randn(batch, 2, n, dim, dtype=dtype, requires_grad=True) for n in (67, keys, keys)]
                exact = [x.detach().double().requires_grad_() for x in leaves]
                with ops.use_backend("cpp"):
                    ours = ops.cross_attention(*leaves, sink=2, map_tokens=[0])
                theirs = reference(*exact, dim**-0.5, 2, [0])
                for results in ((ours, theirs), (
                    torch.autograd.grad(sum(x.sum() for x in ours), leaves),
                    torch.autograd.grad(sum(x.sum() for x in theirs), exact),
                )):
                    for a, b in zip(*results):
                        assert float((a - b).abs().max()) <= tolerance * (1 + float(b.abs().max())), (dtype, keys, dim)
    """
    instruction_sets.run(code, instruction_set)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sink", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.usefixtures("_nan_memory")
def test_gpu_kernels(backend, shape, dtype, sink):
    """What a row of the proof table stands for."""
    if ops.missing(backend):
        pytest.fail(str(ops.missing(backend)))
    q, k, v = (x.cuda().requires_grad_() for x in operands(shape, dtype))
    if backend == "cuda" and (dtype == torch.float32 or shape[-1] % 8):
        with ops.use_backend(backend), pytest.raises(RuntimeError, match="was forced but cannot run"):
            ops.cross_attention(q, k, v)
        return
    scale, tokens = 0.9 * shape[-1] ** -0.5, tokens_of(shape[4])
    results = {}
    for name, leaves in (
        ("exact", [x.detach().double().requires_grad_() for x in (q, k, v)]),
        ("theirs", [q, k, v]),
    ):
        out, maps = eager(*leaves, scale, sink, tokens)
        results[name] = (out, maps, *torch.autograd.grad(out.sum() + maps.sum(), leaves))
    with ops.use_backend(backend):
        out, maps = ops.cross_attention(q, k, v, scale=scale, sink=sink, map_tokens=tokens)
        ours = (out, maps, *torch.autograd.grad(out.sum() + maps.sum(), (q, k, v)))
    for a, b, c in zip(ours, results["theirs"], results["exact"], strict=True):
        assert_as_good(a.detach(), b.detach(), c.detach())
