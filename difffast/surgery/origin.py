"""Where code comes from: the libraries whose modules do the same at every call, or somebody else."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

#: Libraries whose layers depend on their inputs, weights and switches alone, and treat every sample for itself.
_KNOWN = (
    "torch",
    "diffusers",
    "peft",
    "accelerate",
    "transformers",
    "bitsandbytes",
    "torchao",
    "optimum",
    "xformers",
    "difffast",
)


def is_known(module: str) -> bool:
    """Return whether a module, by its name, belongs to one of the libraries."""
    return module.partition(".")[0] in _KNOWN


def find_origin(function: Any) -> str:
    """Return the name of the module where a function was written, also of one that ``functools.wraps`` has renamed."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__func__"):
            function = function.__func__
        elif hasattr(function, "__globals__"):
            return function.__globals__.get("__name__", "")
        else:
            return getattr(function, "__module__", None) or type(function).__module__


def find_replaced(cls: type) -> str | None:
    """Return which of a class's methods that run it was not written by any of the libraries, or None."""
    methods = [name for name in ("forward", "__call__") if hasattr(cls, name)]
    return next((name for name in methods if not is_known(find_origin(getattr(cls, name)))), None)


def name_foreign_class(cls: type) -> str | None:
    """Return what a class is that none of the libraries has written, or whose methods it has not; or None."""
    if not is_known(cls.__module__):
        return f"{cls.__qualname__}, which is not one of Diffusers' own"
    replaced = find_replaced(cls)
    return None if replaced is None else f"{cls.__qualname__}, whose {replaced} has been replaced"


def name_foreign_hook(module: nn.Module) -> str | None:
    """Return what somebody else has wrapped around a module, or None.

    A hook with a true attribute ``observes`` only looks on, and need not see every step.
    """
    own = vars(module)
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = (hook for hook in own[kind].values() if not getattr(hook, "observes", False))
        if any(not is_known(find_origin(hook)) for hook in hooks):
            return "a hook that is not one of Diffusers' own"
    forward = own.get("forward")
    if forward is not None and not is_known(find_origin(forward)):
        return "a forward of its own"
    registry = own.get("_diffusers_hook")
    for hook in (*getattr(registry, "hooks", {}).values(), own.get("_hf_hook")):
        if hook is not None and not is_known(type(hook).__module__):
            return f"the hook {type(hook).__qualname__}"
    return None
