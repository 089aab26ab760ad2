"""Diffusers' GEGLU, a linear layer and a gate, by :func:`difffast.ops.geglu`.

PyTorch makes two passes for the gate, of what is the widest tensor of a transformer block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops import _dispatch
from ..ops import _local as _local_table
from ..ops._local import has_kernel
from ..ops.geglu import choose, find_obstacle
from ..ops.linear import choose as choose_linear
from ..ops.linear import through_onednn
from ..surgery.pristine import HOOKS, is_wrapped
from ..surgery.subclass import MARK, plain_class
from .channels_last import DEVICES
from .context import CURRENT
from .kind import LayerKind

_kernel = torch.ops.difffast.geglu.cpp
_is_autocast = functools.partial(torch.is_autocast_enabled, "cpu")


class Geglu(LayerKind):
    """GEGLU layers, those whose linear layer LoRA wraps among them."""

    name = "GEGLU layers"

    def find(self, unet: nn.Module) -> dict[str, nn.Module]:
        from diffusers.models.activations import GEGLU

        return {name: module for name, module in unet.named_modules() if plain_class(module) is GEGLU}

    def may_pay(self, weight: Tensor) -> bool:
        return weight.device.type in DEVICES or _is_fused(weight)

    def wrap(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """As for any kind, but in two calls of Python on a CPU."""
        fused = super().wrap(plain)

        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            context = None if torch.compiler.is_compiling() else CURRENT.get()
            if context is None or not context.fused or context.only_text:
                return plain(layer, *args, **kwargs)
            if kwargs or len(args) != 1 or args[0].device.type != "cpu":
                return fused(layer, *args, **kwargs)
            (hidden,) = args
            linear = layer.proj
            if torch.is_grad_enabled() or _is_autocast() or not _is_linear(type(linear)):
                return fused(layer, hidden)
            weight, own, inner = linear.weight, layer.__dict__, linear.__dict__
            plainly = (
                type(weight) is nn.Parameter
                and hidden.dtype == weight.dtype
                and not ("forward" in own or "forward" in inner)
                and not (any(map(own.__getitem__, HOOKS)) or any(map(inner.__getitem__, HOOKS)))
            )
            operand = hidden.shape, len(weight), weight.dtype, weight.device
            if not plainly or _find_backend(_dispatch.forced_backends, _local_table.state, *operand) != "cpp":
                return fused(layer, hidden)
            multiply = through_onednn if choose_linear(hidden, weight, linear.bias) == "onednn" else F.linear
            return _kernel(multiply(hidden, weight, linear.bias))

        return call

    def pays(self, layer: Any, hidden: Tensor) -> bool:
        wide = (*hidden.shape[:-1], layer.proj.out_features) if hasattr(layer.proj, "out_features") else None
        return wide is not None and choose(hidden, wide) != "reference"

    def refuse(self, layer: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        if args or kwargs:
            return "it was called with other arguments than its input"
        return "one has hooks, or a forward of its own" if is_wrapped(layer) else None

    def forward(self, layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return ops.geglu(layer.proj(hidden))

    def describe(self, layers: Mapping[str, Any], weight: Tensor, *, compiled: bool) -> Iterator[tuple[str, str]]:
        if not layers or compiled:
            return
        if has_kernel(weight.device, "geglu", weight.dtype):
            yield f"{self.name} ({len(layers)})", "geglu (by proof)"
        elif _is_fused(weight):
            yield f"{self.name} ({len(layers)})", "geglu (cpp)"


def _is_fused(weight: Tensor) -> bool:
    """Whether the operator's kernel runs on a CPU for weights like this one."""
    if weight.device.type != "cpu" or find_obstacle("cpp", weight.dtype, gradient=False) is not None:
        return False
    return ops.default_backend("geglu", weight.device, weight.dtype) == "cpp"


@functools.lru_cache(_dispatch.REMEMBERED)
def _find_backend(
    _forced: Any, _state: Any, shape: torch.Size, columns: int, dtype: torch.dtype, device: torch.device
) -> str:
    """Return the backend for a call that no gradient is wanted of: what :func:`choose` says, without a call of it."""
    return choose(torch.empty(0, dtype=dtype, device=device), (*shape[:-1], columns))


def _is_linear(kind: type) -> bool:
    """Whether modules of a class are plain linear layers, patched or not."""
    return vars(kind).get(MARK, kind) is nn.Linear
