"""Convolutions with weights that oneDNN has laid out for itself: in bfloat16, on processors with AMX, of small images.

PyTorch hands oneDNN the weights as they lie, which copies them into an order of its own at every call.  AMX multiplies
so fast that for 32x32 pixels and fewer this is up to two thirds of a convolution's time.  It is the same convolution on
a copy that is made once, so that its results are the same bits.  Measured on an Intel Xeon (2 threads, 3x3 pixels,
channels_last): 2 x 512 channels at 8x8 pixels take .36 of the time, 256 at 16x16 .58, 1280 at 16x16 .86, 128 at 32x32
.79, and 320 at 64x64 .93, too little for the memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import _installed

#: Pixels of an image beyond which the weights are a small part of what is to be copied.
_MANY_PIXELS = 1024
#: Padding, stride, dilation and groups of the convolutions that are taken, whichever way their layers write them.
_SETTINGS = (1, 1), (1, 1), (1, 1), 1


def can_be(weight: Any, bias: Tensor | None = None) -> bool:
    """Return whether weights like these are laid out once, for images that are small.

    Not with a bias of another dtype, which stock refuses and oneDNN would take.
    """
    return (
        weight.dtype == torch.bfloat16
        and (bias is None or bias.dtype == torch.bfloat16)
        and weight.device.type == "cpu"
        and _installed.has_amx()
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
    )


def pay(images: torch.Size) -> bool:
    """Return whether the weights are a large part of what a convolution of images [B, C, H, W] copies."""
    return 0 < images[2] * images[3] <= _MANY_PIXELS and images[0] > 0


def pack(weight: Tensor, images: torch.Size) -> Tensor:
    """Return weights [O, C, 3, 3] in an opaque layout, for images of a size; others can be convolved with them too."""
    return torch._C._nn.mkldnn_reorder_conv2d_weight(weight.detach().to_mkldnn(), *_SETTINGS, list(images))


def convolve(hidden: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a convolution with weights from :func:`pack`; the result lies in channels_last."""
    return torch.ops.mkldnn._convolution_pointwise(hidden, weights, bias, *_SETTINGS, "none", [], "")
