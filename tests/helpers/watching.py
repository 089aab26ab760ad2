"""Looking at modules from outside: nothing in the UNet tells that anybody does, as a hook on one of them would."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook


@contextlib.contextmanager
def watching(see: Callable[[nn.Module, Any], None], *modules: nn.Module) -> Iterator[None]:
    """Call ``see(module, output)`` after each of these modules has run inside the block."""

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        if any(module is each for each in modules):
            see(module, output)

    handle = register_module_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()
