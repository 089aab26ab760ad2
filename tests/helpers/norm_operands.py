"""Operands of group_norm_silu, and its definition."""

import pytest
import torch

from difffast import ops

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
