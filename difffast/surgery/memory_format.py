"""channels_last: how convolutions' weights lie in memory, changed in place and exactly back.

cuDNN's convolutions in half precision work on channels_last; from and to the default format it copies every operand,
on an H100 a quarter of a Stable Diffusion UNet's time.  So do oneDNN's in bfloat16 on processors with AMX, which
multiply so fast that copying takes up to half of a convolution's time.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from ..ops import _installed


def suits_channels_last(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether convolutions on a device are faster in channels_last, if no other layer has to copy for it."""
    if device.type == "cpu":
        return dtype == torch.bfloat16 and _installed.has_amx()
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def lies_channels_last(module: nn.Module) -> bool:
    """Return whether the weights of a module's convolutions lie in channels_last; the first one that can tell does."""
    first = next((weight for weight in find_weights(module) if not weight.is_contiguous()), None)
    return first is not None and first.is_contiguous(memory_format=torch.channels_last)


def find_weights(module: nn.Module) -> list[Tensor]:
    """Return the weights of a module's two-dimensional convolutions."""
    return [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d)]


class ChannelsLast:
    """Which weights have been laid out in channels_last.

    A weight that the user replaces or lays out again meanwhile is left as it is found.
    """

    def __init__(self) -> None:
        self._changed: list[weakref.ref[Tensor]] = []

    @property
    def is_in(self) -> bool:
        """Whether any weight has been laid out."""
        return bool(self._changed)

    def put_in(self, module: nn.Module) -> None:
        """Lay out all weights that are contiguous; values, parameters and references to them stay."""
        for weight in find_weights(module):
            if weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last):
                self._changed.append(weakref.ref(weight))  # first: whatever happens next, it is laid out as before
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def take_out(self) -> None:
        """Lay the weights out as they were."""
        while self._changed:
            weight = self._changed[-1]()
            if weight is not None and weight.is_contiguous(memory_format=torch.channels_last):
                weight.data = weight.data.contiguous()
            self._changed.pop()
