"""Weights of convolutions as their operator takes them, kept as long as they are what the layers have.

Users, LoRAs and textual inversions change weights in place, some of them past PyTorch's count of versions
(``weight.data += ...``).  So whatever is kept is compared with the layer's weights: their identity, place and version
at every call, and all of their bytes once in every pass over a schedule.

Where memory is short, a layer's are not kept, and it runs stock.  Of Stable Diffusion XL in float32 all of them take
5.9 GiB beside 13, and who has 16 would be killed in the middle of a picture.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops._fingerprint import fingerprint, view_as_it_lies
from ..ops._memory import leaves_enough
from ..ops.convolution import TILES, Weights, convolution_weights, count_transformed_bytes
from . import packed


class _Kept(NamedTuple):
    weights: Weights
    tile: int
    place: tuple[int, int | None]
    fingerprint: int
    within: weakref.ref[Any] | None


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def transform(layer: Any, tile: int, within: object | None, images: torch.Size) -> Weights:
    """Return a layer's weights for tiles of a size, or packed.

    Args:
        layer: a convolution of 3x3 pixels.
        tile: of the operator, as of :func:`difffast.ops.convolution.convolution_weights`; another number stands for
            :mod:`difffast.layers.packed`.
        within: what the call is part of; in it, all weights are compared once; None: now.
        images: size of the layer's input [B, C, H, W].

    Returns:
        The weights; with the tile 0, and not transformed, where memory is short.
    """
    weight = layer.weight
    kept = _kept.get(layer)
    place = weight.data_ptr(), None if weight.is_inference() else weight._version
    if kept is not None and (kept.weights.original is not weight or kept.tile != tile):
        kept = None
    seen = None if kept is None or kept.within is None else kept.within()
    if kept is not None and kept.place == place and seen is not None and seen is within:
        return kept.weights
    found = fingerprint([view_as_it_lies(weight)])
    if kept is None or kept.fingerprint != found or kept.weights.tile == 0:
        with torch.inference_mode(False):  # others may use them where gradients are wanted
            weights = _make(layer.weight, tile, images)
    else:
        weights = kept.weights
    _kept[layer] = _Kept(weights, tile, place, found, None if within is None else weakref.ref(within))
    return weights


def _make(weight: torch.Tensor, tile: int, images: torch.Size) -> Weights:
    of_tiles = tile in TILES
    if not leaves_enough(count_transformed_bytes(weight, tile) if of_tiles else weight.nbytes):
        return Weights(weight, 0, torch.empty(0))
    return convolution_weights(weight, tile) if of_tiles else Weights(weight, tile, packed.pack(weight, images))


def forget(layer: nn.Module) -> None:
    """Drop what is kept of a layer."""
    _kept.pop(layer, None)


def forget_all(module: nn.Module) -> None:
    """Drop what is kept of all layers of a module."""
    for layer in module.modules():
        forget(layer)


def count_bytes(modules: Iterable[nn.Module]) -> int:
    """Return the bytes that are kept of all layers of some modules."""
    layers = {layer for module in modules for layer in module.modules()}
    return sum(kept.weights.transformed.nbytes for layer, kept in list(_kept.items()) if layer in layers)
