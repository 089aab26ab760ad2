"""Freeze a UNet's parameters while something else is optimised through it: half of the work and memory."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import nn

_lock = threading.Lock()
#: UNet -> (how many blocks it is frozen in, the parameters to thaw, the modules that make activations anew).
_frozen: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[nn.Parameter], list[nn.Module]]] = (
    weakref.WeakKeyDictionary()
)


@contextlib.contextmanager
def freeze(unet: nn.Module) -> Iterator[None]:
    """Let parameters want no gradient inside the block, and afterwards what they wanted; threads may share a UNet.

    Gradient checkpointing is off inside the block: a forward pass that is made again in the backward pass would not
    find the context of its call, and would compute something else.
    """
    with _lock:
        blocks, parameters, checkpointing = _frozen.get(unet, (0, [], []))
        if not blocks:
            parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
            checkpointing = [module for module in unet.modules() if getattr(module, "gradient_checkpointing", False)]
            for parameter in parameters:
                parameter.requires_grad_(False)
            for module in checkpointing:
                module.gradient_checkpointing = False
        _frozen[unet] = (blocks + 1, parameters, checkpointing)
    try:
        yield
    finally:
        with _lock:
            blocks, parameters, checkpointing = _frozen.pop(unet)
            if blocks > 1:
                _frozen[unet] = (blocks - 1, parameters, checkpointing)
            else:
                for parameter in parameters:
                    parameter.requires_grad_(True)
                for module in checkpointing:
                    module.gradient_checkpointing = True
