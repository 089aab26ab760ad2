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
    """Return the signature of ``forward``, or of the one that it hands all its arguments on to."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for base in cls.__mro__:
        signature = inspect.signature(base.forward)
        if not any(parameter.kind in variable for parameter in signature.parameters.values()):
            return signature
    raise TypeError(f"{cls.__qualname__}.forward must name its arguments")
