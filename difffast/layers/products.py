"""Convolutions in float32 on CPUs as one product of two matrices: of pixels or of patches.

**Pixels**: weights of 1x1 times an image as it lies in memory.  PyTorch's own way goes by oneDNN, which first lays the
image out anew: that takes 1.05 to 1.15 times as long for SD 1.5's layers, twice for a VAE's at 512 pixels, and two to
three times for small ones.

**Patches**: where there are many weights and few pixels.  oneDNN lays the weights out anew at every call, and where all
of a batch's results are a hundred pixels or two, that takes longer than the products themselves.  Here it is the image
that is laid out: a column of its patch for each result.  Stock takes 1.3 to 3 times as long for 1280 channels at 8x8
and 4x4 pixels, as in SD 1.5's innermost levels.

Each process measures once whether these are the faster ways: of pixels for one shape; of patches for every one.  On a
Xeon with AMX stock takes 2.5 times as long for 1280 channels at 8x8 pixels, .95 at 4x4, and .8 to 1.1 for 768 channels.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.linear import compare

#: Pairs of channels from which on laying out weights may take longer than laying out images, and the pixels that all of
#: a batch's results may have for it.
_MANY_WEIGHTS, _FEW_RESULTS = 1 << 19, 256
#: Products of patches are taken where they are so many times faster.
_WORTH = 1.1
#: Seconds after which a measurement of them ends.
_SECONDS = 0.1


class Part(NamedTuple):
    """What is computed of a convolution of one group: a layer without its surroundings, or over some input channels."""

    weight: Tensor
    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int = 1


def is_pointwise(layer: Any) -> bool:
    """Return whether a convolution is one of 1x1 pixels in float32 on a CPU."""
    weight = layer.weight
    return (
        (weight.shape[2:], layer.stride, layer.groups) == ((1, 1), (1, 1), 1)
        and layer.padding in ((0, 0), 0, "valid")
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )


def has_many_weights(layer: Any) -> bool:
    """Return whether a convolution has many weights, of more than 1x1 pixels, in float32 on a CPU."""
    weight = layer.weight
    return (
        math.prod(weight.shape[2:]) > 1
        and weight.shape[0] * weight.shape[1] >= _MANY_WEIGHTS
        and isinstance(layer.padding, tuple)
        and (layer.groups, layer.padding_mode) == (1, "zeros")
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )


def has_few_results(layer: Any, images: torch.Size) -> bool:
    """Return whether the results of a batch of images [B, C, H, W] have few pixels, but any at all."""
    sides = count_results(layer, images)
    return min(images[0], *sides) > 0 and images[0] * math.prod(sides) <= _FEW_RESULTS


def count_results(layer: Any, images: torch.Size) -> tuple[int, ...]:
    """Return height and width of a convolution's result."""
    return tuple(
        (pixels + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for pixels, padding, dilation, kernel, stride in zip(
            images[2:], layer.padding, layer.dilation, layer.weight.shape[2:], layer.stride, strict=True
        )
    )


def multiply_pixels(layer: Any, hidden: Tensor) -> Tensor:
    """Compute a convolution of 1x1 pixels; images [B, C, H, W] are matrices [C, H W]."""
    images, weight = hidden.flatten(2), layer.weight.flatten(1)
    weights = weight.expand(len(images), *weight.shape)  # torch.matmul would transpose the images instead, by copies
    bias = layer.bias
    out = torch.bmm(weights, images) if bias is None else torch.baddbmm(bias[:, None], weights, images)
    return out.unflatten(2, hidden.shape[2:])


def multiply_patches(layer: Any, hidden: Tensor) -> Tensor:
    """Compute a convolution as one product for the whole batch: weights [O, C k k] times patches [C k k, B H W]."""
    weight, bias = layer.weight, layer.bias
    patches = F.unfold(hidden, weight.shape[2:], layer.dilation, layer.padding, layer.stride)
    columns, weight = patches.transpose(0, 1).flatten(1), weight.flatten(1)
    out = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
    images = out.unflatten(1, (len(hidden), -1)).transpose(0, 1).contiguous()
    return images.unflatten(2, count_results(layer, hidden.shape))


@functools.cache
def pixel_advantage() -> float:
    """Measure how many times faster a small convolution of 1x1 pixels is here as a product."""
    image, weight = torch.ones(2, 64, 16, 16, device="cpu"), torch.ones(64, 64, 1, 1, device="cpu")
    return compare(
        lambda: F.conv2d(image, weight), lambda: torch.bmm(weight.flatten(1).expand(2, 64, 64), image.flatten(2))
    )


def patches_pay(layer: Any, images: torch.Size) -> bool:
    """Return whether products of patches are faster here for a layer's images [B, C, H, W]."""
    settings = layer.stride, layer.padding, layer.dilation
    return patch_advantage(layer.weight.shape, images[0], *images[2:], *settings) >= _WORTH


@functools.lru_cache(1024)
def patch_advantage(weight: torch.Size, batch: int, height: int, width: int, *settings: Any) -> float:
    """Measure how many times faster a convolution of many weights and few pixels is here as a product of patches.

    The first call for a shape takes 0.1 s, or as long as both of them twice.

    Args:
        weight: shape of the weights.
        batch, height, width: of the images.
        settings: stride, padding and dilation.
    """
    layer = Part(torch.ones(weight, device="cpu"), None, *settings)
    images = torch.ones(batch, weight[1], height, width, device="cpu")
    return compare(lambda: F.conv2d(images, *layer), lambda: multiply_patches(layer, images), _SECONDS)
