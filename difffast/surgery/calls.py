"""Calls to a module by the names of its arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .subclass import plain_class


def bind_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arguments of a call to ``module``; those that are left at their defaults are not among them."""
    arguments = _signature(plain_class(module)).bind(module, *args, **kwargs).arguments
    return {name: value for name, value in arguments.items() if name != "self"}


@functools.cache
def _signature(cls: type) -> inspect.Signature:
    return inspect.signature(cls.forward)
