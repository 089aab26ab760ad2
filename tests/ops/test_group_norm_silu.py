import math

import instruction_sets
import pytest
import torch
import torch.nn.functional as F

from difffast import ops
from difffast.ops import _dispatch, _installed
from difffast.ops.group_norm_silu import choose, find_obstacle, reference, reference_backward

# On CPU tensors; the CUDA kernel is emulated in test_group_norm_silu_cuda.py and runs in tests/test_gpu.py.
EVERY = [
    pytest.param(b, marks=pytest.mark.skipif(ops.missing(b) is not None, reason=str(ops.missing(b))))
    for b in ops.OPERATORS["group_norm_silu"]
    if b != "cuda"
]
KERNELS = EVERY[:-1]
needs_cpp = pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))

#: (batch, channels, pixels, groups): sizes that are no multiple of a tile or a vector, one number, one channel a group,
#: 80 and more, several spans of pixels.
SHAPES = [
    (1, 1, (1, 1), 1),
    (2, 6, (3, 5), 3),
    (16, 4, (7,), 2),
    (2, 32, (9, 7), 32),
    (2, 40, (5, 5), 4),
    (1, 83, (4, 5), 1),
    (2, 160, (8, 8), 2),
    (2, 70, (700,), 10),
    (1, 20, (31, 45), 2),
]
#: What is fused: name -> (divisor of the addend's batch, whether the addend has pixels, scale and shift).
FUSED = {
    "plain": None,
    "a row each": (1, False, False),
    "shared rows": (2, False, True),
    "shared pixels": (2, True, False),
    "pixels": (1, True, True),
}
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def operands(batch, channels, pixels, groups, fused="plain", *, dtype=torch.float64, layout="NCHW", mean=0.5):
    """-> (x, groups, weight, bias), options"""
    x = torch.randn(batch, channels, *pixels, dtype=torch.float64) + mean
    weight, bias = torch.randn(2, channels, dtype=torch.float64)
    options = {}
    if FUSED[fused]:
        divisor, has_pixels, scaled = FUSED[fused]
        rows = batch // divisor if batch % divisor == 0 else batch
        options["addend"] = torch.randn(rows, channels, *(pixels if has_pixels else ()), dtype=torch.float64)
        if scaled:
            options["scale"], options["shift"] = torch.randn(2, batch, channels, dtype=torch.float64)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    options = {name: t.to(dtype) for name, t in options.items()}
    if x.ndim == 4:
        x = x.to(memory_format=FORMATS[layout])
    return (x, groups, weight, bias), options


def run(function, arguments, options, gradients=True):
    """-> output, and gradients of every tensor for a fixed gradient of the output"""
    x, groups, weight, bias = arguments
    leaves = {"x": x, "weight": weight, "bias": bias} | {k: v for k, v in options.items() if torch.is_tensor(v)}
    leaves = {name: t.detach().requires_grad_(gradients) for name, t in leaves.items()}
    rest = {name: leaves.get(name, value) for name, value in options.items()}
    out = function(leaves["x"], groups, leaves["weight"], leaves["bias"], **rest)
    if not gradients:
        return (out.detach(),)
    grad = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).sin().view(out.shape).to(out)
    return (out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad))


def run_backend(backend, *arguments, **options):
    with ops.use_backend(backend, "group_norm_silu"):
        return run(ops.group_norm_silu, *arguments, **options)


def doubled(arguments, options):
    """The same numbers in float64."""
    x, groups, *rest = arguments
    return (x.double(), groups, *(t.double() for t in rest)), {
        name: value.double() if torch.is_tensor(value) else value for name, value in options.items()
    }


def check_definition(backend, shape, fused, layout, silu=True):
    torch.manual_seed(0)
    arguments, options = operands(*shape, fused, layout=layout)
    options["silu"] = silu
    ours, exact = run_backend(backend, arguments, options), run(reference, arguments, options)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * (1 + float(b.abs().max())))
    for a in ours[:2]:
        assert a.stride() == arguments[0].stride()


@needs_cpp
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("_nan_memory")
def test_cpp_is_the_definition(shape, layout):
    for fused in FUSED:
        check_definition("cpp", shape, fused, layout)
    check_definition("cpp", shape, "plain", layout, silu=False)


# Of Triton's interpreter: 1 / (1 + exp(inf)) is 0.
may_overflow = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


#: Triton's interpreter takes seconds a case: each shape once, and each kind of fusion.
TRITON_CASES = [(shape, list(FUSED)[i % len(FUSED)], list(FORMATS)[i % 2]) for i, shape in enumerate(SHAPES)]
SHORT = [*TRITON_CASES[:6], ((2, 12, (5, 7), 2), "pixels", "NHWC"), ((1, 3, (33, 70), 1), "plain", "NHWC")]
LONG = [(shape, fused, layout) for shape in SHAPES for fused in FUSED for layout in FORMATS]


@pytest.mark.skipif(ops.missing("triton") is not None, reason=str(ops.missing("triton")))
@pytest.mark.parametrize(
    ("shape", "fused", "layout"), [*SHORT, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)], ids=str
)
@may_overflow
@pytest.mark.usefixtures("_nan_memory")
def test_triton_is_the_definition(shape, fused, layout):
    check_definition("triton", shape, fused, layout, silu=fused != "a row each")


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("shape", SHAPES[:7], ids=str)
def test_closed_form_is_autograd(shape, fused):
    torch.manual_seed(0)
    (x, *rest), options = operands(*shape, fused)
    for silu in (True, False):
        _, *gradients = run(reference, (x, *rest), {**options, "silu": silu})
        grad = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).sin().view(x.shape)
        ours = reference_backward(grad, x, *rest, **options, silu=silu)
        for a, b in zip((t for t in ours if t is not None), gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * (1 + float(b.abs().max())))


def eager(x, groups, weight, bias, eps=1e-5, addend=None, scale=None, shift=None):
    """What Diffusers' ResnetBlock2D computes."""

    def spread(t):
        return t.reshape(*t.shape, *(1 for _ in x.shape[t.ndim :]))

    if addend is not None:
        x = x + spread(addend).repeat_interleave(x.shape[0] // addend.shape[0], 0)
    out = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(out if scale is None else out * (1 + spread(scale)) + spread(shift))


def check_error(backend, dtype, shapes, layout, mean, fusions=("plain", "shared rows"), device="cpu"):
    """Root mean square of all errors against float64, ours at most 1.2 times eager's."""
    torch.manual_seed(0)
    ours, theirs = [], []
    for shape in shapes:
        for fused in fusions:
            (x, groups, *rest), options = operands(*shape, fused, dtype=dtype, layout=layout, mean=mean)
            arguments = (x.to(device), groups, *(t.to(device) for t in rest))
            options = {name: t.to(device) for name, t in options.items()}
            exact = run(eager, *doubled(arguments, options))
            # In NCHW: eager's statistics in channels_last are E[x^2] - mean^2.
            same = (arguments[0].contiguous(), *arguments[1:])
            for errors, result in (
                (ours, run_backend(backend, arguments, options)),
                (theirs, run(eager, same, options)),
            ):
                assert all(t.dtype == dtype for t in result)
                errors += [float((a - b).norm() / b.norm()) for a, b in zip(result, exact, strict=True)]
    ours, theirs = (torch.tensor(errors).square().mean().sqrt() for errors in (ours, theirs))
    assert ours <= 1.2 * theirs, f"{float(ours / theirs):.3f} of eager's"


@needs_cpp
@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("_nan_memory")
def test_error_is_no_worse_than_eager(dtype, layout, mean):
    shapes = [(2, 320, (16, 16), 32), (4, 80, (32, 32), 1), (2, 1280, (8, 8), 32), (8, 33, (9, 31), 11)]
    check_error("cpp", dtype, shapes, layout, mean)


@pytest.mark.skipif(ops.missing("triton") is not None, reason=str(ops.missing("triton")))
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("_nan_memory")
def test_error_of_triton_is_no_worse_than_eager(dtype, layout):
    check_error("triton", dtype, [(2, 40, (9, 13), 4)], layout, 3.0)


#: Of SD1.x, SDXL and parallel decoding, and one too large for shared memory.
PUBLISHED = [
    (2, 320, (64, 64), 32), (2, 2560, (8, 8), 32), (16, 640, (32, 32), 32), (2, 960, (128, 128), 32),
    (1, 256, (512, 512), 8),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.usefixtures("_nan_memory")
def test_gpu_kernels(backend, dtype, layout, mean):
    """What a row of the proof table stands for."""
    if ops.missing(backend):
        pytest.fail(str(ops.missing(backend)))
    # Not that of one number, which is 0 whatever the input.
    check_error(backend, dtype, SHAPES[1:] + PUBLISHED, layout, mean, FUSED, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("operator", ["group_norm_silu", "skip_norm_silu"])
def test_opcheck_on_a_gpu(operator):
    if ops.missing("cuda"):
        pytest.fail(str(ops.missing("cuda")))
    for dtype in (torch.float32, torch.float16):
        x, more = torch.randn(2, 4, 6, 2, 3, device="cuda").to(dtype)
        weight, bias = torch.randn(2, 12, device="cuda").to(dtype)
        arguments = (x, 2, weight[:6], bias[:6], 1e-5, more, None, None, True)
        if operator == "skip_norm_silu":
            arguments = (x, more, 3, weight, bias, 1e-5, True)
        torch.library.opcheck(getattr(torch.ops.difffast, operator).cuda, arguments)


@may_overflow
@pytest.mark.parametrize("backend", EVERY)
def test_statistics_are_exact(backend):
    """With a mean far from 0, E[x^2] - mean^2 would have no digit left."""
    torch.manual_seed(0)
    for layout in FORMATS:
        arguments, options = operands(2, 12, (9, 5), 3, dtype=torch.float32, layout=layout, mean=1e4)
        exact = run(reference, *doubled(arguments, options), gradients=False)[0]
        out = run_backend(backend, arguments, options, gradients=False)[0]
        # eps(1e4) is 1e-3, which is what the mean can be wrong by.
        assert float((out - exact).abs().max()) < 3e-3


@needs_cpp
def test_every_number_of_rows_and_groups():
    torch.manual_seed(0)
    for batch in range(1, 17):
        check_definition("cpp", (batch, 24, (3, 3), 4), "shared rows", "NHWC" if batch % 2 else "NCHW")
    for groups in range(1, 33):
        for size in (1, 3, 17):
            check_definition("cpp", (2, groups * size, (5, 2), groups), "plain", "NHWC" if size == 3 else "NCHW")


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels of channels_last": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, 3:15],
    "channels": lambda x: torch.cat([x, x], 1)[:, 3:15],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.usefixtures("_nan_memory")
def test_layouts(backend, layout):
    torch.manual_seed(0)
    (x, groups, weight, bias), _ = operands(2, 12, (5, 7), 3, dtype=torch.float32)
    x = LAYOUTS[layout](x)
    addend = torch.randn(2, 24)[:, ::2]
    scale, shift = torch.randn(2, 24, 1, 1).chunk(2, 1)
    with ops.use_backend(backend, "group_norm_silu"):
        out = ops.group_norm_silu(x, groups, weight, bias, addend=addend, scale=scale, shift=shift)
        plain = ops.group_norm_silu(
            x.contiguous(), groups, weight, bias, addend=addend.contiguous(), scale=scale[..., 0, 0], shift=shift
        )
    torch.testing.assert_close(out, plain)
    last = torch.channels_last if "channels_last" in layout else torch.contiguous_format
    assert out.is_contiguous(memory_format=last)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 1, 1), (1, 5), (2, 5, 3, 2)], ids=str)
def test_shapes_of_addends(backend, shape):
    torch.manual_seed(0)
    (x, groups, weight, bias), _ = operands(4, 5, (3, 2), 5)
    addend = torch.randn(shape, dtype=torch.float64)
    full = addend.reshape(*shape, *(1 for _ in range(4 - len(shape)))).repeat_interleave(4 // shape[0], 0)
    with ops.use_backend(backend, "group_norm_silu"):
        out = ops.group_norm_silu(x, groups, weight, bias, addend=addend)
    torch.testing.assert_close(out, F.silu(F.group_norm(x + full, groups, weight, bias)))


def leaves_of(arguments, options):
    x, groups, *rest = arguments
    names = list(options)

    def function(x, weight, bias, *values):
        return ops.group_norm_silu(x, groups, weight, bias, 0.1, **dict(zip(names, values, strict=True)))

    return function, [t.requires_grad_() for t in (x, *rest, *options.values())]


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("backend", EVERY)
def test_gradcheck(backend, fused):
    torch.manual_seed(0)
    shape = (2, 4, (3, 1), 2) if backend != "triton" else (2, 2, (2,), 1)
    function, leaves = leaves_of(*operands(*shape, fused))
    with ops.use_backend(backend, "group_norm_silu"):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=backend == "triton")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_second_derivatives(backend):
    if ops.missing(backend):
        pytest.skip(str(ops.missing(backend)))
    torch.manual_seed(0)
    function, leaves = leaves_of(*operands(2, 4, (3,), 2, "shared rows"))
    with ops.use_backend(backend, "group_norm_silu"):
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.skipif(ops.missing("triton") is not None, reason=str(ops.missing("triton")))
def test_no_second_derivative_from_triton():
    function, leaves = leaves_of(*operands(1, 2, (3,), 1))
    with ops.use_backend("triton"):
        (grad,) = torch.autograd.grad(function(*leaves).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    ("case", "fused"),
    [("[B, C, N]", "shared rows"), ("NCHW", "shared pixels"), ("NHWC", "plain"), ("NHWC", "shared pixels")],
)
@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend, case, fused):
    torch.manual_seed(0)
    pixels, layout = ((5,), "NCHW") if case == "[B, C, N]" else ((2, 3), case)
    arguments, options = operands(2, 6, pixels, 2, fused, dtype=torch.float32, layout=layout)
    (x, groups, weight, bias), rest = arguments, [options.get(name) for name in ("addend", "scale", "shift")]
    operator = getattr(torch.ops.difffast.group_norm_silu, backend)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(operator, (leaves[0], groups, *leaves[1:], 1e-5, *rest, True))
    if backend == "triton":
        out, coefficients = operator(x, groups, weight, bias, 1e-5, *rest, True)
        addend = rest[0] if fused == "shared pixels" else None
        saved = (out.detach(), x.detach(), coefficients.detach(), groups, addend, True)
        torch.library.opcheck(torch.ops.difffast.group_norm_silu_backward.triton, saved)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", EVERY)
def test_compiles_without_graph_breaks(backend, dynamic):
    torch._dynamo.reset()

    def loss(x, weight, bias, addend):
        return ops.group_norm_silu(x * 2, 2, weight, bias, addend=addend).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with ops.use_backend(backend, "group_norm_silu"):
        for size in (3, 4):
            (x, _, weight, bias), options = operands(2, 4, (2, size), 2, "a row each", layout="NHWC")
            leaves = [t.requires_grad_() for t in (x, weight, bias, options["addend"])]
            expected, value = loss(*leaves), compiled(*leaves)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
            for a, b in zip(*(torch.autograd.grad(y, leaves) for y in (value, expected)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", EVERY)
def test_nan_stays_in_its_group(backend):
    for layout in FORMATS:
        (x, groups, weight, bias), _ = operands(2, 6, (3, 7), 3, dtype=torch.float32, layout=layout)
        x[1, 3, 2, 4] = math.nan
        with ops.use_backend(backend, "group_norm_silu"):
            out = ops.group_norm_silu(x, groups, weight, bias)
        expected = torch.zeros(2, 6, 3, 7, dtype=torch.bool)
        expected[1, 2:4] = True
        assert torch.equal(out.isnan(), expected)


@may_overflow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", EVERY)
def test_large_results(backend, dtype):
    """SiLU is u for a large u, and 0, not NaN, for a large -u."""
    x = torch.tensor([[[-1.0, 1.0]]], dtype=dtype)
    for factor in (100.0, 1e3, 1e30):
        weight = torch.full((1,), factor, dtype=dtype)
        with ops.use_backend(backend, "group_norm_silu"):
            out = ops.group_norm_silu(x, 1, weight, torch.zeros(1, dtype=dtype)).flatten()
        assert -1e-6 < float(out[0]) <= 0
        torch.testing.assert_close(float(out[1]), factor, rtol=1e-2, atol=0)


@pytest.mark.parametrize("backend", EVERY)
def test_empty_batch(backend):
    (x, *rest), _ = operands(0, 4, (3, 3), 2)
    out, *gradients = run_backend(backend, (x, *rest), {"addend": torch.ones(0, 4, dtype=torch.float64)})
    assert out.shape == (0, 4, 3, 3)
    assert not any(g.any() for g in gradients)


@needs_cpp
def test_bits_depend_on_neither_threads_nor_batch():
    torch.manual_seed(0)
    for layout in FORMATS:
        (x, *rest), _ = operands(3, 96, (40, 40), 8, dtype=torch.float32, layout=layout)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            (two,) = run_backend("cpp", (x, *rest), {}, gradients=False)
            torch.set_num_threads(1)
            (one,) = run_backend("cpp", (x, *rest), {}, gradients=False)
        finally:
            torch.set_num_threads(threads)
        alone = torch.cat([run_backend("cpp", (x[i : i + 1], *rest), {}, gradients=False)[0] for i in range(3)])
        assert torch.equal(one, two)
        assert torch.equal(alone, two)


X, W = torch.rand(4, 6, 2, 3), torch.rand(6)


@pytest.mark.parametrize(
    ("x", "groups", "weight", "options", "message"),
    [
        (X[0, 0], 2, W, {}, r"x must be \[B, C, H, W\] or \[B, C, N\], got \(2, 3\)"),
        (X[:, :0], 2, W, {}, r"at least one channel and one pixel, got \(4, 0, 2, 3\)"),
        (X[..., :0], 2, W, {}, r"at least one channel and one pixel, got \(4, 6, 2, 0\)"),
        (X.long(), 2, W, {}, "x must be float16, bfloat16, float32 or float64, got torch.int64"),
        (X, 4, W, {}, "groups must be an int that divides channels, got 4 and 6"),
        (X, 0, W, {}, "groups must be an int that divides channels, got 0 and 6"),
        (X, 2.0, W, {}, "groups must be an int that divides channels, got 2.0 and 6"),
        (X, 2, W[:5], {}, r"weight must be \[6\], got \(5,\)"),
        (X, 2, W, {"bias": W.double()}, "bias must be torch.float32 on cpu like x, got torch.float64 on cpu"),
        (X, 2, W, {"bias": W.to("meta")}, "bias must be torch.float32 on cpu like x, got torch.float32 on meta"),
        (X, 2, W, {"eps": 0.0}, "eps must be positive and finite, got 0.0"),
        (X, 2, W, {"eps": math.nan}, "eps must be positive and finite, got nan"),
        (X, 2, W, {"addend": W}, r"addend must be \[Ba, 6\] or \[Ba, 6, 2, 3\], got \(6,\)"),
        (X, 2, W, {"addend": X[..., :2]}, r"addend must be \[Ba, 6\] or \[Ba, 6, 2, 3\], got \(4, 6, 2, 2\)"),
        (X, 2, W, {"addend": X[:3]}, "addend's batch must divide x's, got 3 and 4"),
        (X, 2, W, {"addend": X[:0]}, "addend's batch must divide x's, got 0 and 4"),
        (X, 2, W, {"addend": X.double()}, "addend must be torch.float32 on cpu like x, got torch.float64 on cpu"),
        (X, 2, W, {"scale": X[..., 0, 0]}, "scale and shift must be given together, got only scale"),
        (X, 2, W, {"shift": X[..., 0, 0]}, "scale and shift must be given together, got only shift"),
        (X, 2, W, {"scale": X[:2, :, 0, 0], "shift": W}, r"scale must be \[4, 6\], got \(2, 6\)"),
    ],
)
def test_bad_input(x, groups, weight, options, message):
    with pytest.raises(ValueError, match=message):
        ops.group_norm_silu(x, groups, weight, **{"bias": W, **options})


@needs_cpp
@pytest.mark.parametrize(
    ("x", "groups", "weight", "addend", "scale", "shift"),
    [
        (X[0, 0], 2, W, None, None, None),
        (X.half(), 2, W.half(), None, None, None),
        (X, 4, W, None, None, None),
        (X, 2, W[:5], None, None, None),
        (X, 2, W.double(), None, None, None),
        (X, 2, W, X[:3], None, None),
        (X, 2, W, X[:, :5, 0, 0], None, None),
        (X, 2, W, None, X[..., 0, 0], None),
        (X, 2, W, None, X[:2, :, 0, 0], X[:2, :, 0, 0]),
    ],
)
def test_the_kernel_checks_for_itself(x, groups, weight, addend, scale, shift):
    """Called without the public function, e.g. from an exported graph."""
    with pytest.raises(RuntimeError):
        torch.ops.difffast.group_norm_silu.cpp(x, groups, weight, weight, 1e-5, addend, scale, shift, True)


@pytest.mark.parametrize("operator", ["group_norm_silu", "skip_norm_silu"])
def test_forced_backends(monkeypatch, operator):
    for backend in ("cpp", "triton"):
        if ops.missing(backend) is None:
            message = f"{operator}: backend '{backend}' was forced but cannot run"
            with ops.use_backend(backend, operator), pytest.raises(RuntimeError, match=message):
                choose(operator, X.to("meta"), 2)
    if ops.missing("cpp") is None:
        with ops.use_backend("cpp"), pytest.raises(RuntimeError, match="float32, float64 and bfloat16, got float16"):
            choose(operator, X.half(), 2)
    if ops.missing("triton") is None:
        monkeypatch.setattr(_installed, "INTERPRETED", False)
        _dispatch.forget()
        with ops.use_backend("triton"), pytest.raises(RuntimeError, match="it takes float64 in the interpreter only"):
            choose(operator, X.double(), 2)


def test_what_the_cuda_kernel_cannot_take():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert find_obstacle("cuda", dtype, 2048) is None
    assert find_obstacle("cuda", X.dtype, 2049) == "it takes groups of at most 2048 channels, got 2049"
    assert find_obstacle("cuda", torch.float64, 2) == "it takes float16, bfloat16 and float32, got float64"


@pytest.mark.parametrize("operator", ["group_norm_silu", "skip_norm_silu"])
def test_the_default(operator):
    cpp = "reference" if ops.missing("cpp") else "cpp"
    large, small = torch.zeros(1, 64, 32, 32), torch.zeros(2, 64, 8, 8)
    last = torch.zeros(1, 64, 96, 96).to(memory_format=torch.channels_last)
    chosen = (large, large.bfloat16(), last)
    assert [choose(operator, x, 2) for x in chosen] == [cpp] * 3
    others = (small, last[..., :32, :32].contiguous(memory_format=torch.channels_last), large.half(), large.double())
    assert [choose(operator, x, 2) for x in (*others, large.to("meta"))] == ["reference"] * 5
    with ops.use_backend("reference"):
        assert choose(operator, large, 2) == "reference"


@needs_cpp
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])
def test_smaller_instruction_sets(instruction_set):
    """The same numbers from every instruction set that this machine has; the best one runs in all other tests."""
    code = """
        import torch
        torch.manual_seed(0)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)):
            for layout in (torch.contiguous_format, torch.channels_last):
                for channels, pixels, groups in ((1, 1, 1), (6, 5, 3), (70, 9, 10), (64, 33, 2)):
                    x, more = (torch.randn(n, channels, pixels, 7).to(dtype, memory_format=layout) for n in (4, 2))
                    weight, bias = torch.randn(2, 2 * channels).to(dtype)
                    one = (x, groups, weight[:channels], bias[:channels]), {"addend": more}
                    two = (x, more, groups, weight, bias), {}
                    for operator, (arguments, options) in ((ops.group_norm_silu, one), (ops.skip_norm_silu, two)):
                        with ops.use_backend("cpp"):
                            ours = operator(*arguments, **options)
                        wide = [a.double() if torch.is_tensor(a) else a for a in arguments]
                        with ops.use_backend("reference"):
                            exact = operator(*wide, **{name: t.double() for name, t in options.items()})
                        for a, b in zip(ours, exact):
                            assert float((a - b).abs().max() if b.numel() else 0) <= tolerance * 8, (dtype, channels)
    """
    instruction_sets.run(code, instruction_set)
