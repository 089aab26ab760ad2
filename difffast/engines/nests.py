"""Nested arguments and results as a list of tensors and the structure around them."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ..surgery.origin import is_known

#: Values that are compared, and written to files, as they are.
_PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype, torch.device)

#: A nest without its tensors: ("tensor", place), ("value", value), or a kind of nest with its parts.  It can be
#: compared, hashed and written to files.
Structure = Any


class UnknownValueError(TypeError):
    """An argument or a result is neither a tensor, nor a plain value, nor a nest of them."""


def take_apart(value: Any, tensors: list[Tensor]) -> Structure:
    """Append the distinct tensors of a nest to a list; returns the structure around them.

    Raises:
        UnknownValueError: something else is in it.
    """
    if isinstance(value, Tensor):
        place = next((i for i, each in enumerate(tensors) if each is value), len(tensors))
        if place == len(tensors):
            tensors.append(value)
        return ("tensor", place)
    if isinstance(value, _PLAIN):
        return ("value", value)
    if is_dataclass(value) and not isinstance(value, type):  # what Diffusers and transformers return
        parts = {field.name: getattr(value, field.name, None) for field in fields(value)}
        return (type(value), tuple((name, take_apart(part, tensors)) for name, part in parts.items()))
    if isinstance(value, Mapping):
        return ("dict", tuple((name, take_apart(part, tensors)) for name, part in value.items()))
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return (kind, tuple(take_apart(part, tensors) for part in value))
    raise UnknownValueError(f"a value is a {type(value).__name__}")


def fill(structure: Structure, tensors: Sequence[Tensor]) -> Any:
    """Return the nest of a structure with tensors in it: the inverse of :func:`take_apart`."""
    kind, content = structure
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind == "list":
        return [fill(part, tensors) for part in content]
    if kind == "tuple":
        return tuple([fill(part, tensors) for part in content])
    parts = {name: fill(part, tensors) for name, part in content}
    return parts if kind == "dict" else kind(**parts)


def describe_tensors(tensors: Sequence[Tensor]) -> Hashable:
    """Return what a model is chosen by: shapes and dtypes."""
    return tuple([(tensor.shape, tensor.dtype) for tensor in tensors])


def encode(structure: Structure) -> Any:
    """Return a structure as what JSON can hold.

    Raises:
        TypeError: a value that it cannot.
    """
    kind, content = structure
    if kind == "value" and not isinstance(content, (str, int, float, bool, type(None))):
        raise TypeError(f"a result is a {type(content).__name__}")
    if kind in ("tensor", "value"):
        return [kind, content]
    if kind in ("list", "tuple"):
        return [kind, [encode(part) for part in content]]
    name = kind if kind == "dict" else f"{kind.__module__}:{kind.__qualname__}"
    return [name, [[key, encode(part)] for key, part in content]]


def decode(encoded: Any) -> Structure:
    """Return the structure of which :func:`encode` has made this.

    Raises:
        ValueError: a class that is none of the known libraries'.
    """
    kind, content = encoded
    if kind in ("tensor", "value"):
        return (kind, content)
    if kind in ("list", "tuple"):
        return (kind, tuple([decode(part) for part in content]))
    if kind != "dict":
        module, _, name = kind.partition(":")
        if not is_known(module):
            raise ValueError(f"{kind} is none of the known libraries' classes")
        kind = getattr(importlib.import_module(module), name)
    return (kind, tuple([(key, decode(part)) for key, part in content]))
