"""Linear layers of a stock UNet through :func:`difffast.ops.linear`, on processors on which that is the faster way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.linear import backend_of_large, choose, through_onednn
from ..surgery.pristine import is_plain
from ..surgery.subclass import plain_class
from .context import CURRENT
from .kind import LayerKind, ProgramCall

#: Parts of names of layers with a row for each sample: too few ever to win.
_ONE_ROW = ("time_emb", "add_embedding", "class_embedding")


class Linear(LayerKind):
    """Linear layers that see pixels or tokens; those that LoRA wraps among them."""

    name = "linear layers"
    input_name = "input"

    def find(self, unet: nn.Module) -> dict[str, nn.Module]:
        return {
            name: module
            for name, module in unet.named_modules()
            if plain_class(module) is nn.Linear and not any(part in name for part in _ONE_ROW)
        }

    def may_pay(self, weight: Tensor) -> bool:
        return weight.device.type == "cpu"

    def wrap(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """As for any kind, but it is asked first of all whether it pays: of so many layers most are too small."""
        fused = super().wrap(plain)

        def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            context = None if torch.compiler.is_compiling() else CURRENT.get()
            if context is None or not context.fused or context.only_text or not args or args[0].device.type != "cpu":
                return plain(layer, *args, **kwargs)
            if choose(args[0], layer.weight, layer.bias) == "reference":
                return plain(layer, *args, **kwargs)
            return fused(layer, *args, **kwargs)

        return call

    def refuse(self, layer: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        if args or kwargs:
            return "one was called with more than its input"
        if not is_plain(layer, nn.Linear):
            return "one has hooks, a forward of its own, or is quantised or offloaded"
        return None

    def forward(self, layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return through_onednn(hidden, layer.weight, layer.bias)

    def as_inputs(self, layers: Mapping[str, nn.Module], call: ProgramCall) -> dict[str, Any]:
        if not call.fused or backend_of_large(call.arguments["sample"]) == "reference":
            return {}
        return {name: () for name, layer in layers.items() if is_plain(layer, nn.Linear)}

    def stand_in(self, layer: Any, value: Any) -> Callable[..., Any]:
        return lambda hidden: ops.linear(hidden, layer.weight, layer.bias)

    def describe(self, layers: Mapping[str, Any], weight: Tensor, *, compiled: bool) -> Iterator[tuple[str, str]]:
        backend = backend_of_large(weight)
        if layers and backend != "reference":
            yield f"linear layers ({len(layers)})", f"linear ({backend}), where large enough"
