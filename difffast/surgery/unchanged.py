"""Has a value changed since?  The one answer to that question, for weights as for the arguments of a call.

Tensors are compared by identity, not by value, so that nothing waits for the device.  Whoever holds a tensor makes
identity safe (its address cannot be used again), and its version counter tells in-place edits.  Tensors that were made
under ``torch.inference_mode`` have no such counter: their in-place edits cannot be seen.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .subclass import MARK, plain_class

#: Integers by their size in bytes.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (str, int, float, complex, bytes, tuple, torch.dtype, torch.device, type(None))


def read_version(tensor: Tensor) -> int | None:
    """Return how often a tensor has been written to, or None where that is not counted."""
    return None if tensor.is_inference() else tensor._version


def have_equal_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two tensors on the CPU, of one shape and dtype, have the same bits.

    NumPy compares them: no operator of PyTorch's is called that would wait for a device, were they on one.
    """
    words = _WORDS[ours.element_size()]
    return np.array_equal(ours.detach().view(words).numpy(), theirs.detach().view(words).numpy())


def read_autocast(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast has layers on a device compute in; None: it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # which meta has none of
        return None
    return torch.get_autocast_dtype(device.type)


def flatten_leaves(value: Any) -> list[Any]:
    """Return what decides whether a nested value is unchanged: keys, lengths, tensors with versions, other leaves."""
    found: list[Any] = []
    waiting = [value]
    while waiting:  # no recursion: this runs for every argument of every UNet call
        each = waiting.pop()
        if isinstance(each, Tensor):
            found += (each, None if each.is_inference() else each._version)
        elif isinstance(each, Mapping):
            found.append(tuple(each))
            waiting.extend(reversed(list(each.values())))
        elif isinstance(each, (list, tuple)):
            found.append(len(each))
            waiting.extend(reversed(each))
        else:
            found.append(each)
    return found


def are_same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Return whether two lists of leaves are of the same values, unchanged; two views of the same elements are."""
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a is b:
            continue
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            if not (isinstance(a, Tensor) and isinstance(b, Tensor) and is_same_view(a, b)):
                return False
        elif not (isinstance(a, _PLAIN) and isinstance(b, _PLAIN) and a == b):
            return False
    return True


def is_same_view(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are views of the same elements."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0
    )


#: Layers whose output depends on nothing but their input and their parameters.
_PLAIN_LAYERS = (nn.Linear, nn.GroupNorm, nn.LayerNorm)


def read_projection(projection: nn.Module) -> list[Any] | None:
    """Return all that a projection's output depends on besides its input, for :func:`are_same`.

    These are identity, version and address of every weight, and the switches of LoRA layers.

    Returns:
        the leaves, or None where that cannot be told: a quantised layer, one with hooks, or one of an unknown kind.
    """
    # This runs for every layer at every step: for plain layers nothing is called and no tree is walked.
    cls = type(projection)
    if vars(cls).get(MARK, cls) in _PLAIN_LAYERS:
        own = vars(projection)
        if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return None  # offloaded layer by layer, or observed
        state: list[Any] = []
        for weight in own["_parameters"].values():
            if weight is not None:
                state += (weight, None if weight.is_inference() else weight._version, weight.data_ptr())
        return state
    if type(projection).__module__ != "peft.tuners.lora.layer" or plain_class(projection.base_layer) is not nn.Linear:
        return None
    for module in projection.modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return None
    weights = list(projection.parameters())
    return [
        *flatten_leaves(weights),
        *(weight.data_ptr() for weight in weights),
        tuple(projection.active_adapters),
        tuple(projection.merged_adapters),
        projection.disable_adapters,
        tuple(sorted(projection.scaling.items())),
        projection.training,
    ]


class ProjectionWatch:
    """Tells whether the projections of many layers are unchanged, in a few Python calls for all of them together.

    It is for programs, which ask at every call and whose layers torch.compile guards besides.
    """

    def __init__(self) -> None:
        self._layers: list[Any] = []
        self._processors: list[Any] = []
        self._slots: list[tuple[dict[str, Any], str]] = []
        self._held: list[Any] = []
        self._weights: list[Tensor] = []
        self._versions: list[int] = []
        self._addresses: list[int] = []

    def add(self, layer: nn.Module, names: Sequence[str]) -> bool:
        """Watch some projections of an attention layer as they are now; returns whether that can be done."""
        self._layers.append(layer)
        self._processors.append(layer.processor)
        for name in names:
            module = layer._modules.get(name)
            if module is None:
                continue
            if plain_class(module) not in _PLAIN_LAYERS or read_projection(module) is None:
                return False
            self._hold(layer._modules, name)
            for key, weight in module._parameters.items():
                self._hold(module._parameters, key)
                if weight is not None:
                    if weight.is_inference():
                        return False
                    self._weights.append(weight)
        self._versions = [weight._version for weight in self._weights]
        self._addresses = [weight.data_ptr() for weight in self._weights]
        return True

    def _hold(self, entries: dict[str, Any], name: str) -> None:
        self._slots.append((entries, name))
        self._held.append(entries[name])

    def is_unchanged(self) -> bool:
        """Return whether everything watched is what it was."""
        return (
            all(map(operator.is_, [layer.processor for layer in self._layers], self._processors))
            and all(map(operator.is_, [entries.get(name) for entries, name in self._slots], self._held))
            and [weight._version for weight in self._weights] == self._versions
            and [weight.data_ptr() for weight in self._weights] == self._addresses
        )
