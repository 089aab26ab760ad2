"""Linear layers of a stock UNet through :func:`difffast.ops.linear`, on processors on which that is the faster way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .fusion import NOTE, is_plain
from .ops.linear import choose, through_onednn
from .swap import plain_class, swap_calls, swap_out

#: Parts of names of layers with a row for each sample: too few ever to win.
_ONE_ROW = ("time_emb", "add_embedding", "class_embedding")


def install(unet: nn.Module) -> None:
    """Put :func:`_call` in front of every linear layer; outside :func:`.fusion.fused` nothing changes."""
    swap_calls(layers_of(unet), _call)


def uninstall(unet: nn.Module) -> None:
    """Undo :func:`install`."""
    for layer in layers_of(unet).values():
        swap_out(layer)


def layers_of(unet: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that see pixels or tokens, by name; those that LoRA wraps among them."""
    return {
        name: module
        for name, module in unet.named_modules()
        if plain_class(module) is nn.Linear and not any(part in name for part in _ONE_ROW)
    }


def _call(_name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or input.device.type != "cpu":
            return plain(self, input, *args, **kwargs)
        note = None if torch.compiler.is_compiling() else NOTE.get()
        if note is None or choose(input, self.weight, self.bias) == "reference":
            return plain(self, input)
        if is_plain(self, nn.Linear):
            return through_onednn(input, self.weight, self.bias)
        note("linear layers run stock: one has hooks, a forward of its own, or is quantised or offloaded")
        return plain(self, input)

    return call


class Fused:
    """In place of a layer in a compiled program, which cannot ask whether it is to be fused.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, input: Tensor) -> Tensor:
        return ops.linear(input, self._layer.weight, self._layer.bias)
