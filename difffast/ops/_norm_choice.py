"""Which backend computes a norm: what each cannot take, and where it is slower than the next."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _dispatch, _installed
from ._dispatch import Case, Forced, Operand
from ._norm_checks import Layout, lies_channels_last, make_case

#: Numbers in channels_last below which the C++ kernel loses in bfloat16, and pixels below which PyTorch's may be fast.
_FEW_LAST, _FEW_PIXELS = 3 << 13, 1024
#: Of a group, in the CUDA kernel (kMaxGroupChannels of csrc/cuda/group_norm_silu.h).
_CUDA_CHANNELS = 2048


def find_obstacle(backend: str, dtype: torch.dtype, size: int) -> str | None:
    """Say why a backend that exists here cannot serve operands whose groups have ``size`` channels, or return None."""
    if backend == "cpp" and dtype == torch.float16:
        return "it takes float32, float64 and bfloat16, got float16"
    if backend == "triton" and dtype == torch.float64 and not _installed.INTERPRETED:
        # A compiled Triton kernel takes eps as float32.
        return "it takes float64 in the interpreter only"
    if backend == "cuda" and dtype == torch.float64:
        return "it takes float16, bfloat16 and float32, got float64"
    if backend == "cuda" and size > _CUDA_CHANNELS:
        return f"it takes groups of at most {_CUDA_CHANNELS} channels, got {size}"
    return None


def choose(operator: str, x: Tensor, size: int) -> str:
    """Return the backend of this operator or of skip_norm_silu for x alone, whose groups have ``size`` channels."""
    return _choose(operator, (x.shape, x.dtype, x.device), (x.stride(), x.is_contiguous()), size)


@_dispatch.remember
def _choose(forced: Forced, operator: str, x: tuple[Any, ...], layout: Layout, size: int) -> str:
    x = Operand(*x)
    case = make_case(x, layout, x.shape[1] // size) if operator == "group_norm_silu" else None
    return choose_for(operator, forced, x, layout, size, case)


def choose_for(operator: str, forced: Forced, x: Operand, layout: Layout, size: int, case: Case | None) -> str:
    """Return the backend of this operator or of skip_norm_silu for x, whose groups have ``size`` channels."""
    return _dispatch.choose(
        operator,
        forced,
        x.device,
        x.dtype,
        lambda backend: find_obstacle(backend, x.dtype, size),
        lambda backend: _loses(backend, x, layout, size),
        case,
    )


def _loses(backend: str, x: Operand, layout: Layout, size: int) -> bool:
    """Whether a backend that could run is slower than the next (measured, bench/ops)."""
    if backend != "cpp":
        return False
    if x.dtype == torch.float64:  # its exponential takes one at a time, PyTorch's a vector: 2.5 times slower in all
        return True
    if lies_channels_last(layout):
        if x.dtype == torch.bfloat16:
            # PyTorch's takes small images group by group, up to eight times as long where groups do not fill vectors.
            is_fast = math.prod(x.shape[2:]) < _FEW_PIXELS and size % 16 == 0
            return is_fast or math.prod(x.shape) < _FEW_LAST
        return math.prod(x.shape) < 1 << 19  # it lost at 2 x 2560 x 8 x 8 and won at 2 x 1280 x 16 x 16, in float32
    return math.prod(x.shape) < 1 << 16  # a call takes some 20 us, in which PyTorch has done small operands
