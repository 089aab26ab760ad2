"""repeat_batch: repeat every sample of a batch, and keep the memory format.

Shapes: x [B, ...] -> [B * repeats, ...], where row b * repeats + j is x[b]: the order is batch-major.  The tensor
may have any dtype and be on any device, as there is no arithmetic.  The operator lays out cached encoder features for
parallel decoding (Faster Diffusion, arXiv 2312.09608, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _dispatch
from ._dispatch import Forced
from ._library import LIBRARY


def reference(x: Tensor, repeats: int) -> Tensor:
    """Repeat every sample in plain PyTorch: the definition."""
    if _is_channels_last(x):
        # repeat_interleave returns contiguous tensors; permuting around it keeps channels_last without a second copy.
        return x.permute(0, 2, 3, 1).repeat_interleave(repeats, dim=0).permute(0, 3, 1, 2)
    return x.repeat_interleave(repeats, dim=0)


def _is_channels_last(x: Tensor) -> bool:
    """Whether x is channels_last without gaps, and nothing else; vmap knows of strides alone."""
    if x.ndim != 4 or x.is_contiguous():
        return False
    _, channels, height, width = x.shape
    return x.stride() == (channels * height * width, 1, width * channels, channels)


def repeat_batch(x: Tensor, repeats: int) -> Tensor:
    """Repeat every sample of ``x`` ``repeats`` times; the copies of a sample are neighbours.

    The result can be differentiated.

    Args:
        x: the batch [B, ...].  Contiguous and channels_last tensors are the fastest.
        repeats: how often each sample occurs in the result, at least once.

    Returns:
        The samples [B * repeats, ...], in the memory format of ``x``.
        What holds of errors, NaN and infinity is in :mod:`difffast.ops`.

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
