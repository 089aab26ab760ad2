"""What the launches of several kernels share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def bits(columns: Sequence[int]) -> tuple[int, int]:
    """Two signed 64-bit words with a bit for every one of the columns 0 .. 127."""
    mask = sum(1 << column for column in columns)
    low, high = mask & (2**64 - 1), mask >> 64
    return low - ((low >> 63) << 64), high - ((high >> 63) << 64)


#: Compiler options of kernels that exponentiate s * scale - peak.  Contracted to one fused operation, the rounding of
#: the peak alone would be left where s is largest: hundreds where logits are in the billions, which overflows.
ROUND_PRODUCTS = {"enable_fp_fusion": False}


def registers(most: int) -> dict[str, int]:
    """The compiler option for at most so many registers a thread.

    NVIDIA's compiler alone has it; for other makers' GPUs a launch with a name that the compiler does not know fails.
    """
    return {"maxnreg": most} if torch.version.hip is None else {}


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
