"""repeat_batch: every sample of a batch ``repeats`` times, batch-major, keeping the memory format.

Shapes: x [B, ...] -> [B * repeats, ...], row b * repeats + j = x[b].  Any dtype, any device; no arithmetic.
It lays cached encoder features out for parallel decoding (Faster Diffusion, arXiv 2312.09608, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _dispatch
from ._dispatch import Forced
from ._library import LIBRARY


def reference(x: Tensor, repeats: int) -> Tensor:
    """The definition in plain PyTorch."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        # repeat_interleave returns contiguous tensors; permuting around it keeps channels_last without a second copy.
        return x.permute(0, 2, 3, 1).repeat_interleave(repeats, dim=0).permute(0, 3, 1, 2)
    return x.repeat_interleave(repeats, dim=0)


def repeat_batch(x: Tensor, repeats: int) -> Tensor:
    """Repeat every sample of ``x`` [B, ...] ``repeats`` times -> [B * repeats, ...], batch-major.

    Args:
        x: at least one dimension; contiguous or channels_last tensors take the fast path.
        repeats: at least 1.

    Raises:
        ValueError: ``repeats`` < 1 or a 0-d ``x``.
        RuntimeError: a forced backend cannot run (:func:`difffast.ops.use_backend`).
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if x.ndim == 0:
        raise ValueError("x must have a batch dimension, got a 0-d tensor")
    if _decide(x.dtype, x.device) == "cpp" and not (x.requires_grad and torch.is_grad_enabled()):
        return torch.ops.difffast.repeat_batch(x, repeats)
    return reference(x, repeats)


@_dispatch.remember
def _decide(forced: Forced, dtype: torch.dtype, device: torch.device) -> str:
    """Return the backend; a call that will be differentiated takes the reference all the same."""
    return _dispatch.choose("repeat_batch", forced, device, dtype, lambda backend: None)


LIBRARY.define("repeat_batch(Tensor x, int repeats) -> Tensor")


@torch.library.register_fake("difffast::repeat_batch", lib=LIBRARY)
def _fake(x: Tensor, repeats: int) -> Tensor:
    return reference(x, repeats)
