"""Operands of the attention operators in every layout, and how exact a result has to be."""

import pytest
import torch

from difffast import ops
from difffast.ops._installed import INTERPRETED

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def absent(backend):
    """Why a backend cannot take CPU tensors here, or None."""
    if backend == "triton" and not INTERPRETED:
        return "the Triton kernels take CPU tensors in the interpreter only (TRITON_INTERPRET=1)"
    return ops.missing(backend)


def with_dtypes(backends, dtypes=DTYPES):
    """Pairs of a backend and a dtype that it takes, to parametrise a test by."""
    pairs = []
    for each in backends:
        name, marks = (each, ()) if isinstance(each, str) else (each.values[0], each.marks)
        taken = [dtype for dtype in dtypes if (name, dtype) != ("cpp", torch.float16)]
        pairs += [pytest.param(name, dtype, marks=marks, id=f"{name}-{dtype}") for dtype in taken]
    return pairs


def _contiguous(batch, heads, rows, dim, dtype):
    return torch.randn(batch, heads, rows, dim, dtype=torch.float64).to(dtype)


def _by_row(batch, heads, rows, dim, dtype):
    return _contiguous(batch, rows, heads, dim, dtype).transpose(1, 2)


#: How operands lie in memory; ``by row`` is what Diffusers' layers make.
LAYOUTS = {
    "contiguous": _contiguous,
    "by row": _by_row,
    "channels_last": lambda *a: _contiguous(*a).contiguous(memory_format=torch.channels_last),
    "strided head_dim": lambda b, h, n, d, t: _contiguous(b, h, d, n, t).transpose(2, 3),
    "expanded batch": lambda b, h, n, d, t: _contiguous(1, h, n, d, t).expand(b, h, n, d),
    "sliced": lambda b, h, n, d, t: _contiguous(b, h, 2 * n, d + 3, t)[:, :, ::2, 2 : d + 2],
}


def assert_as_good(ours, theirs, exact):
    """Error against float64 at most 1.2x the eager composition's (root mean square), and three times its largest."""
    assert ours.shape == exact.shape
    error, other = ((x.double() - exact).abs() for x in (ours, theirs))
    # Two root mean squares of n numbers are told apart to about 1 / sqrt(n) only; in float64, `exact` is the eager
    # composition itself.
    floor = torch.finfo(ours.dtype).eps * float(exact.abs().max())
    floor *= 100 if ours.dtype == torch.float64 else 4 / ours.numel() ** 0.5
    assert float(error.square().mean().sqrt()) <= 1.2 * float(other.square().mean().sqrt()) + floor
    assert float(error.max()) <= 3 * float(other.max()) + floor
