"""linear: a layer's product with its weights, by the faster of PyTorch's two libraries.

    y[..., o] = sum_k x[..., k] weight[o, k] + bias[o]

Shapes: x [..., K]; weight [O, K]; bias [O]; y [..., O].  On a CPU PyTorch multiplies float32 matrices with MKL, which
leaves AVX-512 unused on processors that are not Intel's.  A 1x1 convolution of pixels whose channels lie side by side
is the same product of the same memory, and goes to oneDNN, which does use it: half of the time on an AMD EPYC
(bench/ops/bench_linear.py).  Which is faster here is measured once a process.  Rounding errors are float32's, up to 2.5
times MKL's for thousands of columns.
"""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _registry

#: Multiply-adds, and rows, below which oneDNN loses: it reorders the weights at every call.
_SMALL, _FEW = 6_000_000, 64
#: Numbers in one image above which PyTorch gives convolutions of it to oneDNN at all.
_ACCEPTED = 20480
#: oneDNN is used where it is so many times faster than F.linear: less may be noise, and elsewhere they are equal.
_WORTH = 1.25
#: Settings of oneDNN's precision that leave float32 as exact as it is.
_EXACT = ("none", "ieee")
#: Side of the square matrices that tell: short enough to finish undisturbed now and then, however busy the machine is.
_SIDE = 320
#: Most rounds, and seconds, that they are given.
_ROUNDS, _SECONDS = 100, 0.2


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, differentiable.

    Args:
        x: [..., K]; any strides and floating-point dtype.
        weight: [O, K].
        bias: [O], or None.

    Returns:
        y [..., O], contiguous.

    Raises:
        ValueError: wrong shapes, dtypes or devices.
        RuntimeError: a forced backend cannot run (:func:`difffast.ops.use_backend`).
    """
    _check(x, weight, bias)
    return F.linear(x, weight, bias) if choose(x, weight, bias) == "reference" else through_onednn(x, weight, bias)


def through_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`linear` for operands for which :func:`choose` says "onednn"."""
    if torch.compiler.is_compiling():  # around a convolution Inductor would change layouts
        return torch.ops.difffast.linear.onednn(x, weight, bias)
    return _convolution(x, weight, bias)


def choose(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """The backend that :func:`linear` takes for these operands.

    Raises:
        RuntimeError: the forced backend cannot run.
    """
    if not _registry.forces():  # every linear layer of a UNet asks at every call: 2 us instead of 12
        lost = x.device.type != "cpu" or _loses("onednn", x, weight) or _obstacle("onednn", x, weight, bias) is not None
        return "reference" if lost else "onednn"
    return _registry.choose(
        "linear", x, lambda backend: _obstacle(backend, x, weight, bias), lambda backend: _loses(backend, x, weight)
    )


def backend_of_large(like: Tensor) -> str:
    """The backend of products of operands with the dtype and device of ``like``, where they are large.

    Raises:
        RuntimeError: the forced backend cannot run.
    """
    if like.dtype != torch.float32 or like.device.type != "cpu":
        return "reference"
    return _registry.forced("linear", like.device) or ("onednn" if _pays() else "reference")


@functools.cache
def advantage() -> float:
    """How many times faster oneDNN is here than F.linear, measured once a process, in some 50 ms; 1 without oneDNN."""
    if _registry.missing("onednn") is not None:
        return 1.0
    x, weight = torch.ones(2, _SIDE, _SIDE, dtype=torch.float32, device="cpu")
    best = dict.fromkeys((F.linear, _convolution), float("inf"))
    begin = time.perf_counter()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(_ROUNDS):
            for product in best:
                start = time.perf_counter()
                product(x, weight, None)
                best[product] = min(best[product], time.perf_counter() - start)
            if time.perf_counter() - begin > _SECONDS:
                break
    return best[F.linear] / best[_convolution]


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product as a convolution of one image [1, K, rows, 1] in channels_last; no operand is copied."""
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(rows, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., K] and weight [O, K], got shapes {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] as weight's rows, got shape {tuple(bias.shape)}")
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and (operand.dtype != x.dtype or operand.device != x.device):
            raise ValueError(f"{name} must be {x.dtype} on {x.device} as x, got {operand.dtype} on {operand.device}")


def _obstacle(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why a backend that exists here cannot serve these operands, or None."""
    if backend != "onednn":
        return None
    if x.dtype != torch.float32:
        return f"it takes float32, got {str(x.dtype).removeprefix('torch.')}"
    if x.numel() == 0 or weight.numel() == 0:
        return "an operand is empty"
    if torch.compiler.is_compiling() and _registry.wants_gradient(x, weight, *([] if bias is None else [bias])):
        return "compiled it has no backward pass"
    return _setting()


@torch.compiler.assume_constant_result
def _setting() -> str | None:
    """Why PyTorch would not give float32 convolutions to oneDNN as they are, or None."""
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn is switched off"
    precision = _allowed_precision("conv")
    if precision not in _EXACT:
        return f"convolutions may be {precision}"
    return "autocast chooses the dtype" if torch.is_autocast_enabled("cpu") else None


def _loses(backend: str, x: Tensor, weight: Tensor) -> bool:
    """Whether a backend that could run is slower than the next for these operands (measured, bench/ops)."""
    if backend != "onednn":
        return False
    size = x.numel()
    small = size <= _ACCEPTED or size < _FEW * x.shape[-1] or size * weight.shape[0] < _SMALL
    return small or not _pays()


@torch.compiler.assume_constant_result
def _pays() -> bool:
    # Who allows lower precision gets it from F.linear, which is the faster one then.
    return _allowed_precision("matmul") in _EXACT and advantage() >= _WORTH


def _allowed_precision(operation: str) -> str:
    """The precision that oneDNN may use for float32 operands of an operation, "conv" or "matmul"."""
    settings = getattr(torch.backends.mkldnn, operation, None)
    if settings is not None:
        return settings.fp32_precision
    # Before torch 2.9 there is one setting for matrix products and none for convolutions, which are exact.
    allowed = torch.get_float32_matmul_precision()
    return "ieee" if operation == "conv" or allowed == "highest" else allowed


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _refuse(_ctx: object, *_grads: object) -> None:
    raise RuntimeError("linear: the operator has no backward pass; difffast.ops.linear takes another way")


_registry.LIBRARY.define("linear.onednn(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_registry.LIBRARY.impl("linear.onednn", _convolution, "CPU")
torch.library.register_fake("difffast::linear.onednn", _fake, lib=_registry.LIBRARY)
torch.library.register_autograd("difffast::linear.onednn", _refuse, lib=_registry.LIBRARY)
