"""group_norm_silu: what PyTorch asks of an operator, bad input, and which backend runs."""

import math

import instruction_sets
import pytest
import torch
from norm_operands import EVERY, KERNELS, needs_cpp, operands

from difffast import ops
from difffast.ops import _dispatch, _installed
from difffast.ops._norm_choice import choose, find_obstacle


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


@pytest.mark.parametrize("operator", ["group_norm_silu", "skip_norm_silu"])
def test_the_default_in_channels_last_and_bfloat16(operator):
    """PyTorch's is fast where groups fill its vectors, and slow for few pixels where they do not."""
    cpp = "reference" if ops.missing("cpp") else "cpp"
    for channels, side, expected in ((192, 8, cpp), (256, 16, cpp), (512, 8, "reference"), (512, 32, cpp)):
        x = torch.zeros(2, channels, side, side, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        assert choose(operator, x, channels // 32) == expected
    assert choose(operator, x.double(), 6) == "reference"


@needs_cpp
@pytest.mark.parametrize("instruction_set", instruction_sets.SMALLER)
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
