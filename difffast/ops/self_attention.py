"""self_attention: attend to any number of keys.

    out = softmax(scale * q k^T) v

Shapes: q [B, H, N, d]; k, v [B, H, M, d]; out [B, H, N, d].  On a GPU PyTorch's attention leaves little to win, and is
what runs.  On a CPU the C++ kernel takes half of its time or less (bench/ops/bench_self_attention.py).  A vector of the
kernel holds several rows of queries, so that heads of any width fill it and softmax needs no sums across it.  In
bfloat16 it rounds probabilities as PyTorch's does, where the processor multiplies pairs of bfloat16 fast, or has AMX.

Sources: softmax with a running maximum is from arXiv 1805.02867, its use on tiles of keys is FlashAttention's (arXiv
2205.14135, section 3.1).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from . import _dispatch, _installed, _sdpa
from ._attention_checks import check_attention, check_scale
from ._dispatch import Case, Forced, Operand
from ._installed import SDPA_KERNELS
from ._library import LIBRARY
from .cross_attention import reference

#: Products q k below which the C++ kernel loses to PyTorch's attention; in bfloat16 keys, or rows and width of heads.
_SMALL, _FEW = 1 << 14, 64


def self_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attend to the keys of the same rows of the batch, such as those of all pixels.

    The result can be differentiated: where a gradient is wanted, PyTorch's own attention runs.

    Args:
        q: the queries [B, H, N, d], in float16, bfloat16, float32 or float64 and with any strides; d <= 256.
        k, v: the keys and values [B, H, M, d] with M >= 1.
        scale: the factor of the logits; None means 1 / sqrt(d).

    Returns:
        The output [B, H, N, d], which kernels of ours store as [B, N, H, d], and PyTorch's attention as it likes.
        What holds of errors, NaN and infinity is in :mod:`difffast.ops`.

    Raises:
        ValueError: wrong shapes, dtypes, devices or values.
        RuntimeError: a forced backend cannot run (:func:`difffast.ops.use_backend`).
    """
    scale = None if scale is None else check_scale(scale)
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    operands = (q.shape, q.dtype, q.device), (k.shape, k.dtype, k.device), (v.shape, v.dtype, v.device)
    strides = None if q.is_cpu else (q.stride(), k.stride(), v.stride())
    backend, factor = _decide(operands, scale, gradient, strides)
    if backend == "reference":
        return reference(q, k, v, factor)[0]
    if backend == "sdpa":
        return _sdpa.attend(backend, q, k, v, factor)
    try:
        if backend in SDPA_KERNELS:
            return _sdpa.attend(backend, q, k, v, factor)
        return torch.ops.difffast.self_attention.cpp(q, k, v, factor)
    except Exception as error:
        again = functools.partial(self_attention, q, k, v, scale=scale)
        return _dispatch.answer_otherwise("self_attention", backend, q.device, error, again)


def choose(like: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> str:
    """Return the backend for queries, keys and values of one shape and strides.

    Args:
        like: what has their dtype and device, and wants a gradient if they do.
    """
    operand = (torch.Size(shape), like.dtype, like.device)
    gradient = torch.is_grad_enabled() and like.requires_grad
    return _decide((operand,) * 3, None, gradient, None if like.is_cpu else (strides,) * 3)[0]


@_dispatch.remember
def _decide(
    forced: Forced,
    operands: tuple[tuple[Any, ...], ...],
    scale: float | None,
    gradient: bool,
    strides: tuple[tuple[int, ...], ...] | None,
) -> tuple[str, float]:
    """Check the operands; return the backend, and the factor of the logits.

    Args:
        operands: :class:`Operand` s q, k and v, as plain tuples.
        scale: None: the default.
        gradient: whether the call will be differentiated.
        strides: of q, k and v; None on a CPU.
    """
    q, k, v = (Operand(*each) for each in operands)
    check_attention(q, k, v, most=None)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"q and k must have the same batch, got {q.shape[0]} and {k.shape[0]}")
    backend = _dispatch.choose(
        "self_attention",
        forced,
        q.device,
        q.dtype,
        lambda backend: find_obstacle(backend, q, gradient),
        lambda backend: _loses(backend, q, k),
        Case((q.shape, k.shape, v.shape), strides, (("gradient", gradient),)),
    )
    return backend, q.shape[3] ** -0.5 if scale is None else scale


def find_obstacle(backend: str, q: Operand, gradient: bool) -> str | None:
    """Say why a backend that exists here cannot serve these operands, or return None."""
    if backend != "cpp":
        return _sdpa.find_obstacle(backend, q)
    if q.dtype == torch.float16:
        return "it takes float32, float64 and bfloat16, got float16"
    return "it has no backward pass" if gradient else None


def _loses(backend: str, q: Operand, k: Operand) -> bool:
    """Whether a backend that could run is slower than the next on this shape (measured, bench/ops)."""
    if backend != "cpp":
        return False
    if math.prod(q.shape) * k.shape[2] < _SMALL:  # a few thousand products do not pay for the call
        return True
    if q.dtype != torch.bfloat16:
        return False
    if _installed.has_amx():  # where heads are wide, rows pay for being laid out in tiles from twice as many on
        return _FEW <= k.shape[2] < 2 * q.shape[3]
    return k.shape[2] < _FEW  # and few keys not for widening them


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    batch, heads, rows, dim = q.shape
    return q.new_empty(batch, rows, heads, dim).transpose(1, 2)


def _refuse(_ctx: Any, *_grads: Any) -> None:
    raise RuntimeError("self_attention: the C++ kernel has no backward pass; difffast.ops.self_attention takes another")


LIBRARY.define("self_attention.cpp(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
torch.library.register_fake("difffast::self_attention.cpp", _fake, lib=LIBRARY)
torch.library.register_autograd("difffast::self_attention.cpp", _refuse, lib=LIBRARY)
