"""Freeze a UNet's parameters while something else is optimised through it: half of the work and memory."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import nn

_lock = threading.Lock()
#: UNet -> (how many blocks it is frozen in, the parameters to thaw).
_frozen: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[nn.Parameter]]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def freeze(unet: nn.Module) -> Iterator[None]:
    """Let parameters want no gradient inside the block, and afterwards what they wanted; threads may share a UNet."""
    with _lock:
        blocks, parameters = _frozen.get(unet, (0, []))
        if not blocks:
            parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
            for parameter in parameters:
                parameter.requires_grad_(False)
        _frozen[unet] = (blocks + 1, parameters)
    try:
        yield
    finally:
        with _lock:
            blocks, parameters = _frozen.pop(unet)
            if blocks > 1:
                _frozen[unet] = (blocks - 1, parameters)
            else:
                for parameter in parameters:
                    parameter.requires_grad_(True)
