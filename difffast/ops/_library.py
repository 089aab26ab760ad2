"""The schemas of all operators, and what their definitions share.

They exist without the compiled extension, which only adds implementations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

#: Holds every schema, fake, formula and kernel that Python registers.
LIBRARY = torch.library.Library("difffast", "DEF")


Function = TypeVar("Function", bound=Callable[..., Any])


def ignore_autocast(function: Function) -> Function:
    """Make plain PyTorch compute in the dtype that it is given, as the kernels do, also where autocast has another."""

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        device = next(x.device.type for x in arguments if isinstance(x, torch.Tensor))
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*arguments, **named)
        with torch.autocast(device, enabled=False):
            return function(*arguments, **named)

    return run


def refuse_second_derivative(operator: str, backward: str) -> None:
    """Make differentiating the backward operator ``backward`` of ``operator`` an error.

    Without a formula PyTorch would take the gradient for a constant.
    """

    def refuse(_ctx: Any, *_grads: Any) -> None:
        raise RuntimeError(
            f"{operator}: the kernels' gradient cannot be differentiated again; "
            f"use_backend('reference', '{operator}') can"
        )

    torch.library.register_autograd(f"difffast::{backward}", refuse, lib=LIBRARY)
