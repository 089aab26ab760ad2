"""geglu: the gate of a feed-forward layer in one pass.

    out = value * gelu(gate),  x = [value, gate],  gelu(z) = z * (1 + erf(z / sqrt(2))) / 2

Shapes: x [..., 2 C]; out [..., C].  These are the activations of Diffusers' GEGLU (Shazeer, arXiv 2002.05202, section
2).  PyTorch makes two passes, the second over halves that lie apart: on an H100 2.7 to 3.3 times this kernel's time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, _installed
from ._dispatch import Case, Forced, Operand
from ._library import LIBRARY


def geglu(x: Tensor) -> Tensor:
    """Multiply the first half of the last dimension by the GELU of the second.

    The result can be differentiated: where a gradient is wanted, PyTorch's own operators run.

    Args:
        x: the operand [..., 2 C], in float16, bfloat16, float32 or float64 and with any strides.

    Returns:
        The result [..., C].
        What holds of errors, NaN and infinity is in :mod:`difffast.ops`.

    Raises:
        ValueError: wrong shape or dtype.
        RuntimeError: a forced backend cannot run (:func:`difffast.ops.use_backend`).
    """
    backend = choose(x, x.shape)
    if backend == "reference":
        return reference(x)
    try:
        return torch.ops.difffast.geglu.cpp(x) if backend == "cpp" else torch.ops.difffast.geglu.triton(x)
    except Exception as error:
        return _dispatch.answer_otherwise("geglu", backend, x.device, error, lambda: geglu(x))


def reference(x: Tensor) -> Tensor:
    """Compute the definition in plain PyTorch, in the dtype of ``x``."""
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def choose(like: Tensor, shape: tuple[int, ...]) -> str:
    """Return the backend for an operand of a shape.

    Args:
        like: what has its dtype and device, and wants a gradient if it does.
    """
    gradient = torch.is_grad_enabled() and like.requires_grad
    return _decide((torch.Size(shape), like.dtype, like.device), gradient)


@_dispatch.remember
def _decide(forced: Forced, x: tuple[Any, ...], gradient: bool) -> str:
    """Check the operand, and return the backend.

    Args:
        x: an :class:`Operand` as a plain tuple.
        gradient: whether the call will be differentiated.
    """
    x = Operand(*x)
    if not x.shape or x.shape[-1] % 2:
        raise ValueError(f"x must have an even last dimension, got {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must be of a floating-point dtype, got {x.dtype}")
    return _dispatch.choose(
        "geglu",
        forced,
        x.device,
        x.dtype,
        lambda backend: find_obstacle(backend, x.dtype, gradient),
        case=Case((tuple(x.shape),), None, (("gradient", gradient),)),
    )


def find_obstacle(backend: str, dtype: torch.dtype, gradient: bool) -> str | None:
    """Say why a backend that exists here cannot serve these operands, or return None."""
    if backend == "reference":
        return None
    if gradient:
        return "it has no backward pass"
    if backend == "cpp":
        return "it does not take float16" if dtype == torch.float16 else None
    return "it takes float64 in the interpreter only" if dtype == torch.float64 and not _installed.INTERPRETED else None


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _refuse(_ctx: Any, *_grads: Any) -> None:
    raise RuntimeError("geglu: its kernels have no backward pass; difffast.ops.geglu takes another way")


def _triton(x: Tensor) -> Tensor:
    from difffast.triton_kernels import geglu as kernels

    return kernels.forward(x)


for _name in ("cpp", "triton"):
    LIBRARY.define(f"geglu.{_name}(Tensor x) -> Tensor")
    torch.library.register_fake(f"difffast::geglu.{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(f"difffast::geglu.{_name}", _refuse, lib=LIBRARY)
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("geglu.triton", _triton, _device)
