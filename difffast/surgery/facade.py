"""Facades: objects that are a module in all but some of its descendants.  The module itself is never written to."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


def make_facade(module: nn.Module, children: Mapping[str, Any]) -> Any:
    """Make an object that is ``module`` in all but the given children.

    Inside torch.compile's trace it is no ``nn.Module``, but does what one does.

    Attributes found in the instance dict win over registered children, so that the shared ``_modules`` need not
    be touched.  accelerate's offload hooks replace ``forward`` on the instance by functions bound to the module:
    these are bound to the facade instead.
    """
    if torch.compiler.is_compiling():
        return _View(module, children)
    result = object.__new__(type(module))
    attributes = vars(result)
    attributes.update(vars(module))
    attributes.pop("_compiled_call_impl", None)  # a program of the module, not of the facade
    for name in ("forward", "_old_forward"):
        if name in attributes:
            attributes[name] = _rebind(attributes[name], module, result)
    attributes.update(children)
    if isinstance(module, nn.Sequential):  # it looks into `_modules` for what it calls
        attributes["_modules"] = {**module._modules, **children}
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
    for name, inside in deeper.items():
        children[name] = replace_descendants(_get_child(module, name), inside)
    # These find what they contain in `_modules`, which an attribute does not hide, and are called nothing.
    if isinstance(module, (nn.ModuleList, list)):
        return [children.get(str(i), child) for i, child in enumerate(module)]
    if isinstance(module, (nn.ModuleDict, dict)):
        return {name: children.get(name, child) for name, child in module.items()}
    return make_facade(module, children)


def get_descendant(module: Any, name: str) -> Any:
    """Return the descendant of a module or a facade, named as by ``named_modules``."""
    for part in name.split("."):
        module = _get_child(module, part)
    return module


def _get_child(module: Any, name: str) -> Any:
    if isinstance(module, (nn.ModuleList, list)):
        return module[int(name)]
    return module[name] if isinstance(module, (nn.ModuleDict, dict)) else getattr(module, name)


def _rebind(function: Any, old: nn.Module, new: nn.Module) -> Any:
    if isinstance(function, types.MethodType) and function.__self__ is old:
        return functools.partial(function.__func__, new)  # torch.compile makes no methods
    if isinstance(function, functools.partial):
        return functools.partial(function.func, *(new if a is old else a for a in function.args), **function.keywords)
    return function


class _View:
    """The facade of a module inside torch.compile's trace, where no module can be made.

    Its attributes are the module's own, looked up when they are asked for: a program guards those alone.
    """

    def __init__(self, module: Any, children: Mapping[str, Any]) -> None:
        if isinstance(module, _View):
            module, children = module._module, {**module._children, **children}
        self._module, self._children = module, children
        for name, child in children.items():
            setattr(self, name, child)

    def __getattr__(self, name: str) -> Any:
        return _rebind(getattr(self._module, name), self._module, self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _rebind(self._module.forward, self._module, self)(*args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        """Of ``nn.Sequential``, whose forward runs through itself."""
        return iter([self._children.get(name, child) for name, child in self._module._modules.items()])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return nn.Module._call_impl(self, *args, **kwargs)


class StandIn:
    """In place of a child module: calls ``run``, and is the child for everything else (``resnets``, flags, ...)."""

    def __init__(self, child: nn.Module, run: Callable[..., Any]) -> None:
        self._child, self._run = child, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)
