import math

import pytest
import torch
import torch.nn.functional as F

from difffast import ops
from difffast.ops.skip_norm_silu import own_channels

# On CPU tensors; the CUDA kernel is emulated in test_group_norm_silu_cuda.py and runs in tests/test_gpu.py.
EVERY = [
    pytest.param(b, marks=pytest.mark.skipif(ops.missing(b) is not None, reason=str(ops.missing(b))))
    for b in ops.OPERATORS["skip_norm_silu"]
    if b != "cuda"
]
KERNELS = EVERY[:-1]
needs_cpp = pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))

#: (hidden channels, skip channels, groups): of Stable Diffusion, SDXL and DeepFloyd IF; the second half straddles.
PUBLISHED = [
    (1280, 1280, 32),
    (320, 320, 32),
    (1280, 640, 32),
    (640, 320, 32),
    (2816, 2112, 32),
    (2112, 1408, 32),
    (1408, 704, 32),
]
#: (samples, steps, hidden channels, skip channels, pixels, groups): groups that end with hidden, that straddle, that
#: take all of the skip, one group in all, groups of one channel.
SHAPES = [
    (2, 2, 24, 8, (5, 7), 8),
    (2, 3, 20, 12, (5, 7), 4),
    (1, 4, 40, 20, (3, 3), 4),
    (1, 2, 8, 24, (5,), 1),
    (3, 1, 31, 1, (2, 3), 16),
    (1, 16, 5, 3, (1, 1), 8),
    (2, 2, 2, 164, (4, 4), 2),
    (1, 2, 22, 20, (40, 30), 2),
]
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def operands(samples, steps, of_hidden, of_skip, pixels, groups, *, dtype=torch.float64, layout="NCHW", mean=0.5):
    hidden = torch.randn(samples * steps, of_hidden, *pixels, dtype=torch.float64) + mean
    skip = 2 * torch.randn(samples, of_skip, *pixels, dtype=torch.float64) - mean
    if hidden.ndim == 4:
        hidden, skip = (t.to(memory_format=FORMATS[layout]) for t in (hidden, skip))
    weight, bias = torch.randn(2, of_hidden + of_skip, dtype=torch.float64)
    hidden, skip, weight, bias = (t.to(dtype) for t in (hidden, skip, weight, bias))
    return hidden, skip, groups, weight, bias


def eager(hidden, skip, groups, weight, bias, silu=True):
    """What Diffusers computes, cut into what is made for each step and what is shared."""
    repeats, own = hidden.shape[0] // skip.shape[0], own_channels(hidden.shape[1], skip.shape[1], groups)
    both = F.group_norm(torch.cat([hidden, skip.repeat_interleave(repeats, 0)], 1), groups, weight, bias)
    both = F.silu(both) if silu else both
    return both[:, :own], both[::repeats, own:]


def run(function, *arguments, **options):
    """-> both outputs and the four gradients"""
    leaves = [t.detach().requires_grad_() if torch.is_tensor(t) else t for t in arguments]
    outputs = function(*leaves, **options)
    loss = sum(
        # In float64: float16 cannot count the elements.
        (t * torch.linspace(-1, 2, t.numel(), dtype=torch.float64, device=t.device).sin().view(t.shape).to(t)).sum()
        for t in outputs
    )
    gradients = torch.autograd.grad(loss, [t for t in leaves if torch.is_tensor(t)])
    return *(t.detach() for t in outputs), *gradients


def run_backend(backend, *arguments, **options):
    with ops.use_backend(backend, "skip_norm_silu"):
        return run(ops.skip_norm_silu, *arguments, **options)


def doubled(arguments):
    return [t.double() if torch.is_tensor(t) else t for t in arguments]


def check_definition(backend, shape, layout, silu=True):
    torch.manual_seed(0)
    arguments = operands(*shape, layout=layout)
    ours, exact = run_backend(backend, *arguments, silu=silu), run(eager, *arguments, silu=silu)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * (1 + float(b.abs().max() if b.numel() else 0)))
    if arguments[0].ndim == 4:
        assert all(t.is_contiguous(memory_format=FORMATS[layout]) for t in ours[:2])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.usefixtures("_nan_memory")
def test_definition(backend, shape, layout):
    if ops.missing(backend):
        pytest.skip(str(ops.missing(backend)))
    check_definition(backend, shape, layout)
    check_definition(backend, shape, layout, silu=False)


#: Triton's interpreter takes seconds a case.
LONG = [
    *((shape, layout) for shape in SHAPES for layout in FORMATS),
    *(((1, 2, *channels, (3, 3), groups), "NHWC") for *channels, groups in PUBLISHED),
]


@pytest.mark.skipif(ops.missing("triton") is not None, reason=str(ops.missing("triton")))
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *((shape, list(FORMATS)[i % 2]) for i, shape in enumerate(SHAPES[:7])),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG),
    ],
    ids=str,
)
# Of Triton's interpreter: 1 / (1 + exp(inf)) is 0.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.usefixtures("_nan_memory")
def test_triton_is_the_definition(shape, layout):
    check_definition("triton", shape, layout)


@pytest.mark.parametrize("channels", PUBLISHED, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@needs_cpp
def test_published_channels(channels, layout):
    *channels, groups = channels
    check_definition("cpp", (1, 2, *channels, (2, 3), groups), layout)


def test_straddling_groups_of_the_published_models():
    straddling = [own_channels(*channels) - channels[0] for channels in PUBLISHED]
    assert straddling == [0, 0, 40, 20, 110, 88, 44]


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_the_convolution_that_follows_takes_views(shape):
    """One cut through the weight's input channels, without a copy of it."""
    torch.manual_seed(0)
    hidden, skip, groups, weight, bias = operands(*shape)
    kernel = torch.randn(4, weight.shape[0], *(3 for _ in shape[4]), dtype=torch.float64)
    conv = F.conv2d if hidden.ndim == 4 else F.conv1d
    steps = shape[1]
    both = torch.cat([hidden, skip.repeat_interleave(steps, 0)], 1)
    whole = conv(F.silu(F.group_norm(both, groups, weight, bias)), kernel, padding=1)
    per_step, shared = ops.skip_norm_silu(hidden, skip, groups, weight, bias)
    own = per_step.shape[1]
    parts = conv(per_step, kernel[:, :own], padding=1)
    if shared.shape[1]:
        parts = parts + conv(shared, kernel[:, own:], padding=1).repeat_interleave(steps, 0)
    torch.testing.assert_close(parts, whole)


ERROR_CASES = [("cpp", dtype, (2, 2, 640, 320, (8, 8), 32)) for dtype in (torch.float32, torch.bfloat16)]
ERROR_CASES += [
    ("triton", dtype, (1, 2, 20, 12, (9, 13), 4)) for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


def check_error(backend, dtype, shape, layout, device="cpu"):
    """Root mean square of all errors against float64, ours at most 1.2 times that of eager in NCHW."""
    torch.manual_seed(0)
    arguments = operands(*shape, dtype=dtype, layout=layout, mean=5.0)
    arguments = [t.to(device) if torch.is_tensor(t) else t for t in arguments]
    exact = run(eager, *doubled(arguments))
    contiguous = [t.contiguous() if torch.is_tensor(t) else t for t in arguments]

    def error(result):
        assert all(t.dtype == dtype for t in result)
        return torch.stack([(a - b).norm() / b.norm() for a, b in zip(result, exact, strict=True) if b.numel()]).norm()

    ours, theirs = error(run_backend(backend, *arguments)), error(run(eager, *contiguous))
    assert ours <= 1.2 * theirs, f"{float(ours / theirs):.3f} of eager's"


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("backend", "dtype", "shape"), ERROR_CASES, ids=str)
@pytest.mark.usefixtures("_nan_memory")
def test_error_is_no_worse_than_eager(backend, dtype, shape, layout):
    if ops.missing(backend):
        pytest.skip(str(ops.missing(backend)))
    check_error(backend, dtype, shape, layout)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.usefixtures("_nan_memory")
def test_gpu_kernels(backend, dtype, layout):
    """What a row of the proof table stands for."""
    if ops.missing(backend):
        pytest.fail(str(ops.missing(backend)))
    for *channels, groups in PUBLISHED:
        check_error(backend, dtype, (2, 4, *channels, (32, 32), groups), layout, "cuda")
    check_error(backend, dtype, (2, 2, 22, 20, (41, 31), 2), layout, "cuda")


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.usefixtures("_nan_memory")
def test_layouts(backend):
    """Views, and a skip in another layout than hidden, whose layout the results have."""
    torch.manual_seed(0)
    hidden, skip, groups, weight, bias = operands(1, 2, 10, 6, (3, 5), 2, dtype=torch.float32)
    last = torch.channels_last
    with ops.use_backend(backend, "skip_norm_silu"):
        plain = ops.skip_norm_silu(hidden, skip, groups, weight, bias)
        for view in (
            lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
            lambda x: torch.cat([x, x], 1).contiguous(memory_format=last)[:, : x.shape[1]],
            lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        ):
            for arguments in ((view(hidden), skip), (hidden, view(skip)), (view(hidden), view(skip))):
                ours = ops.skip_norm_silu(*arguments, groups, weight, bias)
                for a, b in zip(ours, plain, strict=True):
                    torch.testing.assert_close(a, b)
                    layout = last if arguments[0].stride(1) == 1 else torch.contiguous_format
                    assert a.is_contiguous(memory_format=layout)


def leaves_of(*shape):
    hidden, skip, groups, weight, bias = operands(*shape)
    return lambda h, s, w, b: ops.skip_norm_silu(h, s, groups, w, b, 0.1), [
        t.requires_grad_() for t in (hidden, skip, weight, bias)
    ]


@pytest.mark.parametrize("shape", [(1, 2, 3, 3, (2,), 2), (1, 2, 2, 1, (3,), 1)], ids=str)
@pytest.mark.parametrize("backend", EVERY)
def test_gradcheck(backend, shape):
    torch.manual_seed(0)
    function, leaves = leaves_of(*shape)
    with ops.use_backend(backend, "skip_norm_silu"):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=backend == "triton")


@pytest.mark.parametrize("backend", EVERY)
def test_second_derivatives(backend):
    torch.manual_seed(0)
    function, leaves = leaves_of(1, 2, 2, 4, (2,), 2)
    with ops.use_backend(backend, "skip_norm_silu"):
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("pixels", "layout", "channels"),
    [
        ((5,), "NCHW", (4, 4)),
        pytest.param((2, 3), "NCHW", (5, 3), marks=pytest.mark.slow),
        pytest.param((2, 3), "NHWC", (5, 3), marks=pytest.mark.slow),
        pytest.param((2, 3), "NHWC", (7, 1), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend, pixels, layout, channels):
    torch.manual_seed(0)
    hidden, skip, groups, weight, bias = operands(1, 2, *channels, pixels, 2, dtype=torch.float32, layout=layout)
    hidden, skip, weight, bias = (t.requires_grad_() for t in (hidden, skip, weight, bias))
    operator = getattr(torch.ops.difffast.skip_norm_silu, backend)
    torch.library.opcheck(operator, (hidden, skip, groups, weight, bias, 1e-5, True))


# None: a size that changes becomes symbolic.
@pytest.mark.parametrize("dynamic", [False, None])
@pytest.mark.parametrize("backend", EVERY)
def test_compiles_without_graph_breaks(backend, dynamic):
    torch._dynamo.reset()

    def loss(hidden, skip, weight, bias):
        per_step, shared = ops.skip_norm_silu(hidden * 2, skip, 2, weight, bias)
        return per_step.sin().sum() + shared.cos().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with ops.use_backend(backend, "skip_norm_silu"):
        for size in (3, 4):
            leaves = [
                t.requires_grad_() for t in operands(2, 2, 3, 5, (2, size), 2, layout="NHWC") if torch.is_tensor(t)
            ]
            expected, value = loss(*leaves), compiled(*leaves)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
            for a, b in zip(*(torch.autograd.grad(y, leaves) for y in (value, expected)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("backend", EVERY)
def test_a_step_does_not_change_the_others(backend, layout):
    hidden, skip, groups, weight, bias = operands(1, 3, 5, 7, (3, 4), 2, dtype=torch.float32, layout=layout)
    hidden[1, 4, 2, 3] = math.nan
    with ops.use_backend(backend, "skip_norm_silu"):
        per_step, shared = ops.skip_norm_silu(hidden, skip, groups, weight, bias)
    # Channels 0 to 5 are one group, in which hidden and skip meet.
    assert per_step.shape[1] == 6
    assert per_step.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert not per_step[::2].isnan().any()
    assert not shared.isnan().any()


@needs_cpp
def test_bits_depend_on_neither_threads_nor_batch():
    torch.manual_seed(0)
    for layout in FORMATS:
        hidden, skip, *rest = operands(2, 2, 64, 44, (30, 40), 4, dtype=torch.float32, layout=layout)
        threads, results = torch.get_num_threads(), []
        with ops.use_backend("cpp"):  # by itself it is chosen for larger operands only
            try:
                for count in (2, 1):
                    torch.set_num_threads(count)
                    results.append(ops.skip_norm_silu(hidden, skip, *rest))
            finally:
                torch.set_num_threads(threads)
            alone = [ops.skip_norm_silu(hidden[2 * i : 2 * i + 2], skip[i : i + 1], *rest) for i in range(2)]
        results.append([torch.cat(parts) for parts in zip(*alone, strict=True)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


H, S, W = torch.rand(4, 6, 2, 3), torch.rand(2, 4, 2, 3), torch.rand(10)


@pytest.mark.parametrize(
    ("hidden", "skip", "groups", "weight", "message"),
    [
        (H[0, 0], S[0, 0], 2, W, r"hidden must be \[B, C, H, W\] or \[B, C, N\], got \(2, 3\)"),
        (H, S[..., 0], 2, W, r"skip must have channels and the pixels of hidden, got \(2, 4, 2\) and \(4, 6, 2, 3\)"),
        (H, S[..., :2], 2, W, r"the pixels of hidden, got \(2, 4, 2, 2\) and \(4, 6, 2, 3\)"),
        (H, S[:, :0], 2, W, r"skip must have channels and the pixels of hidden, got \(2, 0, 2, 3\)"),
        (H[:, :0], S, 2, W, r"hidden must have at least one channel and one pixel, got \(4, 0, 2, 3\)"),
        (H, S, 4, W, "groups must be an int that divides channels, got 4 and 10"),
        (H, S, 2, W[:6], r"weight must be \[10\], got \(6,\)"),
        (H, S.double(), 2, W, "skip must be torch.float32 on cpu like hidden, got torch.float64 on cpu"),
        (H[:3], S, 2, W, "skip's batch must divide hidden's, got 2 and 3"),
        (H, S[:0], 2, W, "skip's batch must divide hidden's, got 0 and 4"),
        (H[:0], S, 2, W, "skip's batch must divide hidden's, got 2 and 0"),
    ],
)
def test_bad_input(hidden, skip, groups, weight, message):
    with pytest.raises(ValueError, match=message):
        ops.skip_norm_silu(hidden, skip, groups, weight, W)


@needs_cpp
@pytest.mark.parametrize(
    ("hidden", "skip", "groups", "weight"),
    [
        (H[0], S, 2, W),
        (H, S[..., :2], 2, W),
        (H, S.double(), 2, W),
        (H[:3], S, 2, W),
        (H, S[:0], 2, W),
        (H[:0], S, 2, W),
        (H, S, 4, W),
        (H, S, 2, W[:6]),
        (H.half(), S.half(), 2, W.half()),
    ],
)
def test_the_kernel_checks_for_itself(hidden, skip, groups, weight):
    """Called without the public function, e.g. from an exported graph."""
    with pytest.raises(RuntimeError):
        torch.ops.difffast.skip_norm_silu.cpp(hidden, skip, groups, weight, weight, 1e-5, True)
