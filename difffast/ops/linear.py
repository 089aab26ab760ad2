"""linear: multiply by the weights of a layer, with the faster of PyTorch's two libraries.

    y[..., o] = sum_k x[..., k] weight[o, k] + bias[o]

Shapes: x [..., K]; weight [O, K]; bias [O]; y [..., O].

On a CPU PyTorch multiplies float32 matrices with MKL, which leaves AVX-512 unused on processors that are not Intel's.
A 1x1 convolution of pixels whose channels lie side by side is the same product of the same memory.  PyTorch gives it to
oneDNN, which does use AVX-512 and takes half of the time on some AMD EPYCs (bench/ops/bench_linear.py).  On others it
takes no less for small products, but 0.7 to 0.95 of it for large ones, where there are two threads.  Each process
measures once which of the two is faster, for either.  Rounding errors are those of float32, and up to 2.5 times MKL's
for thousands of columns.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, _installed
from ._dispatch import Forced, Operand
from ._library import LIBRARY

#: Multiply-adds, and rows, below which oneDNN loses: it reorders the weights at every call.
_SMALL, _FEW = 6_000_000, 64
#: Numbers in one image above which PyTorch gives convolutions of it to oneDNN at all.
_ACCEPTED = 20480
#: Multiply-adds from which on a product is large.
_LARGE = 400_000_000
#: oneDNN is used where it is so many times faster than F.linear: less may be noise, and elsewhere they are equal.
_WORTH = 1.25
#: The same for large products, which are measured with less noise.
_WORTH_LARGE = 1.1
#: Settings of oneDNN's precision that leave float32 as exact as it is.
_EXACT = ("none", "ieee")
#: Side of the square matrices that tell: short enough to finish undisturbed now and then, however busy the machine is.
SIDE = 320
#: Rows and channels of the product that tells of large ones, as of SD 1.5's first level at 512 x 512 pixels.
_ROWS, _CHANNELS = 8192, 320
#: Most rounds, and seconds, that they are given.
_ROUNDS, _SECONDS = 100, 0.2


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x weight^T + bias.  The result can be differentiated.

    Args:
        x: the operand [..., K], in any floating-point dtype and with any strides.
        weight: the weights [O, K].
        bias: the bias [O], or None.

    Returns:
        The product [..., O], contiguous.
        What holds of errors, NaN and infinity is in :mod:`difffast.ops`.

    Raises:
        ValueError: wrong shapes, dtypes or devices.
        RuntimeError: a forced backend cannot run (:func:`difffast.ops.use_backend`).
    """
    _check(
        (x.shape, x.dtype, x.device),
        (weight.shape, weight.dtype, weight.device),
        None if bias is None else (bias.shape, bias.dtype, bias.device),
    )
    return F.linear(x, weight, bias) if choose(x, weight, bias) == "reference" else through_onednn(x, weight, bias)


def through_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Do what :func:`linear` does, for operands for which :func:`choose` says "onednn"."""
    if torch.compiler.is_compiling():  # around a convolution Inductor would change layouts
        return torch.ops.difffast.linear.onednn(x, weight, bias)
    return _convolution(x, weight, bias)


def choose(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Return the backend that :func:`linear` takes for these operands.

    It depends on what is forced, on the operands' sizes, dtypes and device, on whether the call will be differentiated,
    and on PyTorch's settings.  Nothing is remembered: every linear layer of a UNet asks at every call, and the sizes,
    which settle almost all of these, are compared faster than they are looked up.

    Raises:
        RuntimeError: the forced backend cannot run.
    """
    forced = _dispatch.forced_backends
    if forced:
        backend = _dispatch.find_forced("linear", forced, x.device)
        reason = _find_obstacle(x, weight, bias) if backend == "onednn" else None
        if reason is not None:
            raise _dispatch.make_error("linear", backend, reason)
        if backend is not None:
            return backend
    size = x.numel()
    if size <= _ACCEPTED or size < _FEW * x.shape[-1] or size * weight.shape[0] < _SMALL or x.device.type != "cpu":
        return "reference"
    # A program exported with symbols as sizes would hold for one side of the limit alone.
    large = not torch.compiler.is_exporting() and size * weight.shape[0] >= _LARGE
    pays = _pays_if_large() if large else _pays()
    return "onednn" if pays and _find_obstacle(x, weight, bias) is None else "reference"


def backend_of_large(like: Tensor) -> str:
    """Return the backend of large products whose operands have the dtype and the device of ``like``.

    Raises:
        RuntimeError: the forced backend cannot run.
    """
    if like.dtype != torch.float32 or like.device.type != "cpu":
        return "reference"
    return _dispatch.find_forced("linear", _dispatch.forced_backends, like.device) or (
        "onednn" if _pays() or _pays_if_large() else "reference"
    )


def advantage() -> float:
    """Measure how many times faster oneDNN is here than F.linear; it is 1 without oneDNN.

    The first call in a process takes some 50 ms, and the others with as many threads return what it has found.
    """
    return _measure(SIDE, SIDE, torch.get_num_threads())


def advantage_if_large() -> float:
    """Measure the same for large products, of which MKL is slower to make use of several threads.

    The first call in a process takes 0.2 s.
    """
    return _measure(_ROWS, _CHANNELS, torch.get_num_threads())


@functools.cache
def _measure(rows: int, channels: int, _threads: int) -> float:
    if _installed.missing("onednn") is not None:
        return 1.0
    x, weight = (torch.ones(n, channels, dtype=torch.float32, device="cpu") for n in (rows, channels))
    return compare(lambda: F.linear(x, weight), lambda: _convolution(x, weight, None))


def compare(one: Callable[[], Tensor], other: Callable[[], Tensor], seconds: float = _SECONDS) -> float:
    """Measure how many times faster ``other`` is than ``one``, both of them products on a CPU.

    Args:
        one, other: to be called in turn, each at least twice: the first call meets memory that is cold.
        seconds: after which no further turn begins.
    """
    best = dict.fromkeys((one, other), float("inf"))
    begin = time.perf_counter()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for turn in range(_ROUNDS):
            for product in best:
                start = time.perf_counter()
                product()
                best[product] = min(best[product], time.perf_counter() - start)
            if turn and time.perf_counter() - begin > seconds:
                break
    return best[one] / best[other]


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the product as a convolution of one image [1, K, rows, 1] in channels_last; no operand is copied.

    But for an x whose pixels lie next to each other: the result does as well, and is laid out anew.
    """
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(rows, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0]).contiguous()


@_dispatch.remember
def _check(_forced: Forced, x: tuple[Any, ...], weight: tuple[Any, ...], bias: tuple[Any, ...] | None) -> None:
    """Check the operands, :class:`Operand` s as plain tuples."""
    x, weight = Operand(*x), Operand(*weight)
    bias = None if bias is None else Operand(*bias)
    if len(weight.shape) != 2 or not x.shape or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., K] and weight [O, K], got shapes {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] as weight's rows, got shape {tuple(bias.shape)}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must be of a floating-point dtype, got {x.dtype}")
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and (operand.dtype != x.dtype or operand.device != x.device):
            raise ValueError(f"{name} must be {x.dtype} on {x.device} as x, got {operand.dtype} on {operand.device}")


def _find_obstacle(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Say why oneDNN cannot serve these operands, or return None."""
    if x.dtype != torch.float32:
        return f"it takes float32, got {str(x.dtype).removeprefix('torch.')}"
    if x.numel() == 0 or weight.numel() == 0:
        return "an operand is empty"
    wanting = any(each is not None and each.requires_grad for each in (x, weight, bias))
    if wanting and torch.is_grad_enabled() and torch.compiler.is_compiling():
        return "compiled it has no backward pass"
    return _find_setting()


def _keep_in_graphs(function: Callable[[], Any]) -> Callable[[], Any]:
    """Let a compiled graph keep what ``function`` returned when it was traced.

    It is ``torch.compiler.assume_constant_result``, which does this and imports the compiler: a second of CPU time.
    """
    function._dynamo_marked_constant = True
    return function


@_keep_in_graphs
def _find_setting() -> str | None:
    """Say why PyTorch would not give float32 convolutions to oneDNN as they are, or return None."""
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn is switched off"
    precision = _allowed_precision("conv")
    if precision not in _EXACT:
        return f"convolutions may be {precision}"
    return "autocast chooses the dtype" if torch.is_autocast_enabled("cpu") else None


@_keep_in_graphs
def _pays() -> bool:
    # Who allows lower precision gets it from F.linear, which is the faster one then.
    return _allowed_precision("matmul") in _EXACT and advantage() >= _WORTH


@_keep_in_graphs
def _pays_if_large() -> bool:
    return _allowed_precision("matmul") in _EXACT and advantage_if_large() >= _WORTH_LARGE


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


LIBRARY.define("linear.onednn(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
LIBRARY.impl("linear.onednn", _convolution, "CPU")
torch.library.register_fake("difffast::linear.onednn", _fake, lib=LIBRARY)
torch.library.register_autograd("difffast::linear.onednn", _refuse, lib=LIBRARY)
