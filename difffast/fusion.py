"""Where layers may be fused: inside :func:`fused` only, which the patched UNet's call enters."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from torch import nn

from .swap import plain_class

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

#: Inside :func:`fused`: who is told why a layer runs stock; None: all do.  Layers read it themselves: every one asks at
#: every call.  Compiled regions cannot ask, and run stock.
NOTE: ContextVar[Callable[[str], object] | None] = ContextVar("difffast_fused", default=None)


@contextlib.contextmanager
def fused(note: Callable[[str], object] | None) -> Iterator[None]:
    """Let this thread's layers use the operators inside the block; ``note`` is told why one does not.  None: stock."""
    token = NOTE.set(note)
    try:
        yield
    finally:
        NOTE.reset(token)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is just a ``kind`` whose weights are there to be used."""
    if (type(module) is not kind and plain_class(module) is not kind) or is_wrapped(module):
        return False
    return type(module.weight) is nn.Parameter and not module.weight.is_meta


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module does anything else than its class's forward when called."""
    own = vars(module)
    # accelerate leaves the class's own method behind on the instance when its hooks go.
    plain = own.get("forward") in (None, types.MethodType(type(module).forward, module))
    return not plain or "parametrizations" in own["_modules"] or any(own[name] for name in _HOOKS)
