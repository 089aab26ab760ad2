"""PyTorch's fused attention by one chosen kernel.

The public ``torch.nn.attention.sdpa_kernel`` sets flags of the whole process, so that another thread would follow, and
costs the host more than the attention's own call.  The operators below are what ``scaled_dot_product_attention``
itself calls once it has chosen; they can be differentiated, exported and compiled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import Operand
from ._installed import SDPA_KERNELS
from ._library import ignore_autocast


@ignore_autocast
def attend(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend by PyTorch's order of kernels ("sdpa") or by one of :data:`~difffast.ops._installed.SDPA_KERNELS`.

    Args:
        q, k, v: [B, H, N, d] and [B, H, M, d].

    Raises:
        RuntimeError: the kernel cannot run here.
    """
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    aten = torch.ops.aten
    if backend == "flash":
        return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if backend == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, gradient, scale=scale)[0]
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, gradient, scale=scale)[0]


def find_obstacle(backend: str, q: Operand, maps: bool = False) -> str | None:
    """Say why PyTorch's attention by this backend cannot serve operands, or return None; other backends always can.

    What is not said here, the proof of a kernel finds out.
    """
    if maps and (backend == "sdpa" or backend in SDPA_KERNELS):
        return "PyTorch's fused attention returns no maps"
    if backend not in SDPA_KERNELS:
        return None
    if backend != "efficient" and q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, got {q.dtype}"
    if q.shape[3] % 8:
        return f"head_dim must be a multiple of 8, got {q.shape[3]}"
    return None
