"""convolution: 3x3 pixels, stride 1, padding 1, with few products (Winograd's minimal filtering, arXiv:1509.09308).

    y[b, o, i, j] = bias[o] + sum_{c, u, v} x[b, c, i + u - 1, j + v - 1] weight[o, c, u, v]

Shapes: x [B, C, H, W]; weight [O, C, 3, 3]; bias [O]; y [B, O, H, W].  Doubled, x stands for [B, C, 2H, 2W], in which
each of its pixels is there four times.

A tile of m x m pixels of the result takes (m + 2)^2 products for every pair of channels instead of 9 m^2: a quarter of
them for m = 4, 4/9 for m = 2.  Libraries for CPUs compute all of them, and are at the limit of the processor's
multipliers with that.  The points of interpolation for m = 4 are 0, +-5/8, +-3/2 and infinity: rounding errors are
1.5 times those of adding up products one by one, where the usual +-1 and +-2 have 3.9 times.

Weights are transformed once (:class:`Weights`) and take (m + 2)^2 / 9 of their memory then, in float32 for bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch, _installed
from ._dispatch import Forced
from ._library import LIBRARY, ignore_autocast

TILES = (2, 4)


class Weights(NamedTuple):
    """Weights as :func:`convolution` takes them.

    Attributes:
        original: [O, C, 3, 3].
        tile: m; 0: there is no kernel here, or it is not to be used, and ``original`` is used as it is.
        transformed: what the kernel reads, in an order of its own; empty where ``tile`` is 0.
    """

    original: Tensor
    tile: int
    transformed: Tensor


@ignore_autocast
def reference(x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool = False) -> Tensor:
    """Compute the convolution in plain PyTorch: the definition."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest") if doubled else x, weight, bias, padding=1)


def convolution_weights(weight: Tensor, tile: int) -> Weights:
    """Transform the weights of a convolution.

    Args:
        weight: [O, C, 3, 3] in float32, float64 or bfloat16.
        tile: m, 2 or 4.

    Returns:
        The weights, with the tile 0 where there is no kernel for them.

    Raises:
        ValueError: wrong shape or tile.
        RuntimeError: a forced backend cannot run (:func:`difffast.ops.use_backend`).
    """
    if not weight.dtype.is_floating_point:
        raise ValueError(f"weight must be of a floating-point dtype, got {weight.dtype}")
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or 0 in weight.shape:
        raise ValueError(f"weight must be [O, C, 3, 3], got shape {tuple(weight.shape)}")
    if tile not in TILES:
        raise ValueError(f"tile must be 2 or 4, got {tile}")
    if choose(weight.dtype, weight.device) == "reference":
        return Weights(weight, 0, weight.new_empty(0))
    with torch.no_grad():
        return Weights(weight, tile, torch.ops.difffast.winograd_weights(weight, tile))


def convolution(
    x: Tensor, weights: Weights, bias: Tensor | None = None, *, first: int | None = None, doubled: bool = False
) -> Tensor:
    """Convolve x with weights of 3x3 pixels, with stride 1 and a border of zeros of one pixel.

    Where a gradient is wanted, the reference runs.

    Args:
        x: the input [B, C, H, W].
        weights: what :func:`convolution_weights` returned.
        bias: [O], or None.
        first: x has the weights' input channels from this one on; None: it has all of them.  Transformed once, weights
            serve any of their channels.
        doubled: each pixel of x stands for 2x2 of the image that is convolved, as after nearest interpolation, which is
            never in memory.

    Returns:
        The result [B, O, H, W], or twice as high and wide, which our kernel stores in this order, and PyTorch's as it
        likes.  What holds of errors, NaN and infinity is in :mod:`difffast.ops`; NaN and infinity reach all pixels of
        the tiles that they touch.

    Raises:
        ValueError: wrong shapes, dtypes or devices.
        RuntimeError: a forced backend cannot run (:func:`difffast.ops.use_backend`).
    """
    weight = weights.original
    channels = weight.shape[1]
    if x.ndim != 4 or (first is None and x.shape[1] != channels):
        raise ValueError(f"x must be [B, {channels}, H, W] as weight's channels, got shape {tuple(x.shape)}")
    first = first or 0
    if not 0 <= first < first + x.shape[1] <= channels:
        raise ValueError(f"weight has {channels} channels, got first {first} for x of {x.shape[1]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and (operand.dtype != x.dtype or operand.device != x.device):
            raise ValueError(f"{name} must be {x.dtype} on {x.device} as x, got {operand.dtype} on {operand.device}")
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if weights.tile == 0 or wanted or choose(x.dtype, x.device, not doubled and 1 in x.shape[2:]) == "reference":
        return reference(x, weight[:, first : first + x.shape[1]], bias, doubled)
    return run(x, weights, bias, first, doubled)


def run(x: Tensor, weights: Weights, bias: Tensor | None, first: int = 0, doubled: bool = False) -> Tensor:
    """Do what :func:`convolution` does, for operands that it would give to the kernel; nothing is checked here."""
    if weights.tile == 0:
        return reference(x, weights.original[:, first : first + x.shape[1]], bias, doubled)
    out_channels, channels = weights.original.shape[:2]
    return torch.ops.difffast.winograd_convolution(
        x, weights.transformed, bias, out_channels, weights.tile, first, channels, doubled
    )


def run_into(out: Tensor, x: Tensor, weights: Weights, bias: Tensor | None, addend: Tensor) -> None:
    """Put the convolution of x plus an addend into memory that is there already; no gradient is taken.

    Args:
        out: [B, O, H, W], contiguous; not x.
        x, bias: of the convolution.
        weights: transformed ones.
        addend: as out, or out itself.
    """
    torch.ops.difffast.winograd_convolution_into(out, x, weights.transformed, bias, weights.tile, addend)


def choose(dtype: torch.dtype, device: torch.device, line: bool = False) -> str:
    """Return the backend for operands of a dtype on a device, for images or for such of one row or column.

    Raises:
        RuntimeError: the forced backend cannot run.
    """
    return _decide(dtype, device, line)


@_dispatch.remember
def _decide(forced: Forced, dtype: torch.dtype, device: torch.device, line: bool) -> str:
    return _dispatch.choose(
        "convolution", forced, device, dtype, lambda backend: _find_obstacle(backend, dtype, line), _loses
    )


def _find_obstacle(backend: str, dtype: torch.dtype, line: bool) -> str | None:
    if backend == "cpp" and dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"it takes float32, float64 and bfloat16, got {str(dtype).removeprefix('torch.')}"
    if backend == "cpp" and line:
        return (
            "of weights that meet the border alone it would have the rounding errors; the image has one row or column"
        )
    return None


def _loses(backend: str) -> bool:
    """Of processors that are not x86, libraries have kernels of the same kind, for longer vectors."""
    return backend == "cpp" and _installed.INSTRUCTION_SET == "baseline"


def _count_transformed(weight_shape: tuple[int, ...], dtype: torch.dtype, tile: int) -> int:
    """Return how many numbers the kernel's weights are: output channels come in panels of two vectors."""
    vector = {"amx": 64, "emulated_amx": 64, "avx512_bf16": 64, "avx512": 64, "avx2": 32}.get(
        _installed.INSTRUCTION_SET or "", 16
    )
    width = 2 * vector // (8 if dtype == torch.float64 else 4)
    return -(-weight_shape[0] // width) * width * weight_shape[1] * (tile + 2) ** 2


def count_transformed_bytes(weight: Tensor, tile: int) -> int:
    """Return the bytes of a weight's transformed ones."""
    size = 8 if weight.dtype == torch.float64 else 4
    return size * _count_transformed(tuple(weight.shape), weight.dtype, tile)


LIBRARY.define("winograd_weights(Tensor weight, int tile) -> Tensor")
LIBRARY.define(
    "winograd_convolution(Tensor x, Tensor weights, Tensor? bias, int out_channels, int tile, int first_channel=0,"
    " int? weight_channels=None, bool doubled=False) -> Tensor"
)
LIBRARY.define(
    "winograd_convolution_into(Tensor(a!) out, Tensor x, Tensor weights, Tensor? bias, int tile, Tensor addend) -> ()"
)
torch.library.register_fake("difffast::winograd_convolution_into", lambda *_: None, lib=LIBRARY)


@torch.library.register_fake("difffast::winograd_weights", lib=LIBRARY)
def _fake_weights(weight: Tensor, tile: int) -> Tensor:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.new_empty(_count_transformed(tuple(weight.shape), dtype, tile), dtype=dtype)


@torch.library.register_fake("difffast::winograd_convolution", lib=LIBRARY)
def _fake(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    out_channels: int,
    tile: int,
    first_channel: int = 0,
    weight_channels: int | None = None,
    doubled: bool = False,
) -> Tensor:
    return x.new_empty(x.shape[0], out_channels, *(side * (1 + doubled) for side in x.shape[2:]))


def _refuse(_ctx: object, *_grads: object) -> None:
    raise RuntimeError("convolution: the kernels have no backward pass; difffast.ops.convolution takes another way")


for _name in ("winograd_weights", "winograd_convolution"):
    torch.library.register_autograd(f"difffast::{_name}", _refuse, lib=LIBRARY)
