"""group_norm_silu: results and gradients against float64, in every layout, and no bit that depends on threads."""

import math

import pytest
import torch
import torch.nn.functional as F
from norm_operands import EVERY, FORMATS, FUSED, SHAPES, doubled, needs_cpp, operands, run, run_backend

from difffast import ops
from difffast.ops.group_norm_silu import reference, reference_backward


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
