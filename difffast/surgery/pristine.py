"""Whether a module is still what its class says: nothing wrapped around it, nothing put in its place."""

from __future__ import annotations

import types

from torch import nn

from .subclass import MARK

#: What a module keeps its hooks under.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module is just a ``kind`` whose weights are there to be used."""
    cls = type(module)
    if cls is not kind and vars(cls).get(MARK) is not kind:  # asked of every layer at many steps
        return False
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter and not weight.is_meta and not is_wrapped(module)


def is_wrapped(module: nn.Module) -> bool:
    """Return whether a module does anything else than its class's ``forward`` when it is called."""
    own = vars(module)
    # accelerate leaves the class's own method behind on the instance when its hooks go.
    plain = own.get("forward") in (None, types.MethodType(type(module).forward, module))
    return not plain or "parametrizations" in own["_modules"] or any(own[name] for name in HOOKS)
