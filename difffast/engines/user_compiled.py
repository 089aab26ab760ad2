"""A UNet that the user has compiled: with which settings, so that its parts can be compiled alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class UserCompile:
    """The settings of a user's ``torch.compile``: backend, mode, options, fullgraph and dynamic.

    Attributes:
        context: what ``torch.compile`` has made of them; it compiles any function.
        captures: whether CUDA graphs are among them.
    """

    context: Callable[[Callable[..., Any]], Callable[..., Any]]
    captures: bool


def find_user_compile(module: Any) -> UserCompile | None:
    """Return the settings with which a user has compiled a module, or None.

    Args:
        module: from ``torch.compile(module)``, or one whose ``compile()`` was called.
    """
    if is_compiled_wrapper(module):
        context = module.dynamo_ctx
    else:
        call = getattr(module, "_compiled_call_impl", None)
        # torch.compile leaves its settings to a function in no other place than the closure of this one.
        cells = getattr(getattr(call, "get_compiler_config", None), "__closure__", None) or ()
        context = next((cell.cell_contents for cell in cells if callable(cell.cell_contents)), None)
    if context is None:
        return None
    return UserCompile(context, bool((context.compiler_config or {}).get("triton.cudagraphs")))


def is_compiled_wrapper(module: Any) -> bool:
    """Return whether a module is what ``torch.compile(module)`` returns."""
    return "dynamo_ctx" in getattr(module, "__dict__", ())


def unwrap(module: Any) -> Any:
    """Return the plain module of one that ``torch.compile`` has wrapped; others as they are."""
    return module._orig_mod if is_compiled_wrapper(module) else module


def has_compiled_parts(modules: Iterable[nn.Module]) -> bool:
    """Return whether ``compile()`` was called for any of a UNet's modules."""
    return any(module._compiled_call_impl is not None for module in modules)
