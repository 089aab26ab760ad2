"""What is put into a module's layers, which depends on where its weights are and on their dtype, and follows both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..layers.kind import LayerKind
from ..ops._local import has_kernel
from ..surgery.memory_format import ChannelsLast, suits_channels_last


class FusedLayers:
    """The kinds of layers that have been put into one module, and how its convolutions' weights lie in memory.

    A module that is moved or cast after it was patched runs as if it had been patched there.

    Args:
        kinds: the kinds of layers; those that are added to the list later are put in from then on.
    """

    def __init__(self, kinds: Sequence[LayerKind]) -> None:
        self._known, self._kinds = kinds, list[LayerKind]()
        self._layout = ChannelsLast()
        self._seen: tuple[object, ...] | None = None
        #: Whether weights lie otherwise than the user has them: then outputs are to be given to :meth:`give_back`.
        self.laid_out = False

    def put_in(self, module: nn.Module, *, always: bool = False, lay_out: bool = True) -> None:
        """Put in all that pays for the module's weights as of now.

        Args:
            module: a UNet, or a half of a VAE.
            always: also layers that cannot pay, if they can be edited.
            lay_out: whether weights may be laid out.
        """
        self._seen = None  # whatever interrupts this, the next run begins anew
        for kind in self._known:
            if kind not in self._kinds:
                self._kinds.append(kind)
            kind.put_in(module, always=always)
        weight = next(module.parameters())
        if lay_out and _channels_last_pays(weight):
            self._layout.put_in(module)
        else:
            self._layout.take_out()
        self.laid_out = self._layout.is_in
        self._seen = weight.device, weight.dtype, always, lay_out

    def follow(self, module: nn.Module, *, always: bool = False, lay_out: bool = True) -> None:
        """Do what :meth:`put_in` does, if anything that it depends on has changed since."""
        weight = next(module.parameters())
        if (weight.device, weight.dtype, always, lay_out) != self._seen:
            self.put_in(module, always=always, lay_out=lay_out)

    def give_back(self, output: Any, sample: Any) -> Any:
        """Return a module's output as it would lie in memory if the module's weights were as the user has them.

        Args:
            output: what the module has made.
            sample: of what.
        """
        plain = isinstance(output, Tensor) and isinstance(sample, Tensor) and sample.is_contiguous()
        return output.contiguous() if plain else output

    def take_out(self, module: nn.Module) -> None:
        """Undo :meth:`put_in`, also of what was put in by another object of this class, which is gone."""
        self._layout.take_out()
        for kind in reversed(self._kinds or self._known):
            kind.take_out(module)


def _channels_last_pays(weight: Tensor) -> bool:
    """Return whether weights in channels_last are the faster ones, and no norm has to copy for them."""
    device, dtype = weight.device, weight.dtype
    if not suits_channels_last(device, dtype):
        return False
    return device.type == "cpu" or has_kernel(device, "group_norm_silu", dtype, "channels_last")
