"""What is put into a UNet's layers, which depends on where its weights are and on their dtype, and follows both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..layers.kind import LayerKind
from ..layers.registry import LAYERS
from ..ops._local import has_kernel
from ..surgery.memory_format import ChannelsLast, suits_channels_last
from .settings import Settings


class FusedLayers:
    """The kinds of layers that have been put into one UNet, and how its convolutions' weights lie in memory.

    A UNet that is moved or cast after it was patched runs as if it had been patched there.
    """

    def __init__(self) -> None:
        self._kinds: list[LayerKind] = []
        self._layout = ChannelsLast()
        self._seen: tuple[object, ...] | None = None

    def put_in(self, unet: nn.Module, settings: Sequence[Settings]) -> None:
        """Put in all that pays for the UNet's weights as of now.

        Args:
            unet: the UNet.
            settings: of all patched pipelines that use it.
        """
        self._seen = None  # whatever interrupts this, the next run begins anew
        seen = edited, last, *_ = _find_conditions(unet, settings)
        for kind in LAYERS:
            if kind not in self._kinds:
                self._kinds.append(kind)
            kind.put_in(unet, always=edited)
        if last:
            self._layout.put_in(unet)
        else:
            self._layout.take_out()
        self._seen = seen

    def follow(self, unet: nn.Module, settings: Sequence[Settings]) -> None:
        """Do what :meth:`put_in` does, if anything that it depends on has changed since."""
        if _find_conditions(unet, settings) != self._seen:
            self.put_in(unet, settings)

    def take_out(self, unet: nn.Module) -> None:
        """Undo :meth:`put_in`; what was put in by a controller that is gone is found all the same."""
        self._layout.take_out()
        for kind in reversed(self._kinds or LAYERS):
            kind.take_out(unet)


def _find_conditions(unet: nn.Module, settings: Sequence[Settings]) -> tuple[bool, bool, torch.device, torch.dtype]:
    """Return whether attention is edited, whether weights are to lie in channels_last, where they are and of what."""
    weight = next(unet.parameters())
    device, dtype = weight.device, weight.dtype
    edited = any(each.edits_attention for asked in settings for each in asked.extensions)
    return edited, any(_channels_last_pays(device, dtype, asked) for asked in settings), device, dtype


def _channels_last_pays(device: torch.device, dtype: torch.dtype, asked: Settings) -> bool:
    """Return whether weights in channels_last are the faster ones and no norm has to copy for them.

    Engines of CPUs lay weights out as they like it.
    """
    if not asked.fused or not suits_channels_last(device, dtype):
        return False
    if device.type == "cpu":
        return not asked.runs_programs(device)
    return has_kernel(device, "group_norm_silu", dtype, "channels_last")
