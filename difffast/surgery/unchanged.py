"""Has a value changed since?  The one answer to that question, for weights as for the arguments of a call.

Tensors are compared by identity, not by value, so that nothing waits for the device.  Whoever holds a tensor makes
identity safe (its address cannot be used again), and its version counter tells in-place edits.  Tensors that were made
under ``torch.inference_mode`` have no such counter: their in-place edits cannot be seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .subclass import plain_class

_PLAIN = (str, int, float, complex, bytes, tuple, torch.dtype, torch.device, type(None))


def read_version(tensor: Tensor) -> int | None:
    """Return how often a tensor has been written to, or None where that is not counted."""
    return None if tensor.is_inference() else tensor._version


def flatten_leaves(value: Any) -> Iterator[Any]:
    """Yield what decides whether a nested value is unchanged: keys, lengths, tensors with versions, other leaves."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from flatten_leaves(item)
    elif isinstance(value, (list, tuple)):
        yield len(value)
        for item in value:
            yield from flatten_leaves(item)
    elif isinstance(value, Tensor):
        yield value
        yield read_version(value)
    else:
        yield value


def are_same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Return whether two lists of leaves are of the same values, unchanged."""
    if len(ours) != len(theirs):
        return False
    return all(a is b or _is_same(a, b) for a, b in zip(ours, theirs, strict=True))


def _is_same(a: Any, b: Any) -> bool:
    """Compare two leaves that are not one object: two views of the same elements are the same."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and _is_same_view(a, b)
    return isinstance(a, _PLAIN) and isinstance(b, _PLAIN) and a == b


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0
    )


def read_projection(projection: nn.Module) -> list[Any] | None:
    """Return all that a projection's output depends on besides its input, for :func:`are_same`.

    These are identity, version and address of every weight, and the switches of LoRA layers.

    Returns:
        the leaves, or None where that cannot be told: a quantised layer, one with hooks, or one of an unknown kind.
    """
    if plain_class(projection) in (nn.Linear, nn.GroupNorm, nn.LayerNorm):
        # This runs for every layer at every step: walking a plain layer's tree would cost more than all the rest.
        own = vars(projection)
        if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return None  # offloaded layer by layer, or observed
        return _read_weights(own["_parameters"].values())
    if type(projection).__module__ != "peft.tuners.lora.layer" or plain_class(projection.base_layer) is not nn.Linear:
        return None
    for module in projection.modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return None
    return [
        *_read_weights(projection.parameters()),
        tuple(projection.active_adapters),
        tuple(projection.merged_adapters),
        projection.disable_adapters,
        tuple(sorted(projection.scaling.items())),
        projection.training,
    ]


def _read_weights(weights: Any) -> list[Any]:
    state: list[Any] = []
    for weight in weights:
        if weight is not None:
            state += (weight, None if weight.is_inference() else weight._version, weight.data_ptr())
    return state
