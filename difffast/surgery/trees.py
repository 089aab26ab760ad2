"""Nested dicts, lists and tuples with tensors in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

#: Arguments whose rows are adapters, not samples.
_PER_ADAPTER = ("ip_adapter_masks",)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply ``function`` to every tensor inside nested dicts, lists and tuples; other leaves stay as they are.

    So do tensors in entries of dicts that are not made of samples.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: item if key in _PER_ADAPTER else map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def take_second_half(value: Any, batch: int) -> Any:
    """Take the second half, as :func:`take_half` does."""
    return take_half(value, batch, 1)


def take_half(value: Any, batch: int, half: int) -> Any:
    """Take one half of all tensors with rows for a batch of ``batch`` samples; others stay as they are.

    With classifier-free guidance a UNet's batch is [unconditional, conditional]: half 1 is conditional.
    """

    def take(tensor: Tensor) -> Tensor:
        rows = tensor.shape[0] if tensor.ndim else 1
        if rows % batch:
            return tensor
        return tensor[rows // 2 :] if half else tensor[: rows // 2]

    return map_tensors(take, value)
