"""Facades: objects that are a module in all but some of its descendants.  The module itself is never written to."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any

from torch import nn


def make_facade(module: nn.Module, children: Mapping[str, Any]) -> Any:
    """Make an object that is ``module`` in all but the given children.

    Attributes found in the instance dict win over registered children, so that the shared ``_modules`` need not
    be touched.  accelerate's offload hooks replace ``forward`` on the instance by functions bound to the module:
    these are bound to the facade instead.
    """
    result = object.__new__(type(module))
    attributes = vars(result)
    attributes.update(vars(module))
    for name in ("forward", "_old_forward"):
        if name in attributes:
            attributes[name] = _rebind(attributes[name], module, result)
    attributes.update(children)
    return result


def replace_descendants(module: Any, descendants: Mapping[str, Any]) -> Any:
    """Make an object that is ``module`` in all but the given descendants, named as by ``named_modules``."""
    children: dict[str, Any] = {}
    deeper: dict[str, dict[str, Any]] = {}
    for name, descendant in descendants.items():
        head, _, rest = name.partition(".")
        if rest:
            deeper.setdefault(head, {})[rest] = descendant
        else:
            children[head] = descendant
    is_list = isinstance(module, (nn.ModuleList, list))
    for name, inside in deeper.items():
        children[name] = replace_descendants(module[int(name)] if is_list else getattr(module, name), inside)
    if is_list:
        return [children.get(str(i), child) for i, child in enumerate(module)]
    return make_facade(module, children)


def get_descendant(module: Any, name: str) -> Any:
    """Return the descendant of a module or a facade, named as by ``named_modules``."""
    for part in name.split("."):
        module = module[int(part)] if isinstance(module, (nn.ModuleList, list)) else getattr(module, part)
    return module


def _rebind(function: Any, old: nn.Module, new: nn.Module) -> Any:
    if isinstance(function, types.MethodType) and function.__self__ is old:
        return types.MethodType(function.__func__, new)
    if isinstance(function, functools.partial):
        return functools.partial(function.func, *(new if a is old else a for a in function.args), **function.keywords)
    return function
