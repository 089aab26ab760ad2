"""Fused self-attention in a stock UNet, where the operator beats PyTorch's attention: on CPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .fusion import NOTE, is_wrapped
from .ops._attention_checks import MAX_HEAD_DIM
from .swap import swap_calls, swap_out

#: Processors that can be fused.
_PROCESSORS = ("AttnProcessor2_0", "FusedAttnProcessor2_0")
#: Those that compute something else on purpose: perturbed-attention guidance, Text2Video-Zero.  No report complains.
_ON_PURPOSE = (
    "PAGIdentitySelfAttnProcessor2_0",
    "PAGCFGIdentitySelfAttnProcessor2_0",
    "CrossFrameAttnProcessor",
    "CrossFrameAttnProcessor2_0",
)
#: Arguments that a pipeline gives to every layer and these processors ignore.
_IGNORED = ("ip_adapter_masks",)


def install(unet: nn.Module) -> None:
    """Put :func:`_call` in front of every layer that can be fused; outside :func:`.fusion.fused` nothing changes."""
    swap_calls(layers_of(unet), _call)


def uninstall(unet: nn.Module) -> None:
    """Undo :func:`install`."""
    for layer in layers_of(unet).values():
        swap_out(layer)


def layers_of(unet: nn.Module) -> dict[str, nn.Module]:
    """The self-attention layers that can be fused, by name."""
    from diffusers.models.attention_processor import Attention

    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention)
        and not module.is_cross_attention
        and module.added_kv_proj_dim is None
        and module.inner_dim // module.heads <= MAX_HEAD_DIM
        and not any(
            getattr(module, part, None) for part in ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
        )
        and not module.residual_connection
        and module.rescale_output_factor == 1
    }


def wins(x: Tensor) -> bool:
    """Whether a kernel is the faster one for an input like this; every layer asks at every call, on GPUs in vain."""
    return x.device.type == "cpu" and ops.default_backend("self_attention", x.device, x.dtype) != "sdpa"


def obstacle(layer: Any, positional: Sequence[Any], named: Mapping[str, Any]) -> str | None:
    """Why a layer cannot be fused in this call, or None; decided by the processor that is there now."""
    processor = type(layer.processor)
    if not processor.__module__.startswith("diffusers.") or processor.__name__ not in _PROCESSORS:
        return f"attention processor {processor.__qualname__}"
    given = [key for key, value in named.items() if value is not None and key not in _IGNORED]
    if given or any(value is not None for value in positional):
        return f"arguments {', '.join(given) or 'by position'}"
    return "the layer has hooks, or a forward of its own" if is_wrapped(layer) else None


def forward(layer: Any, hidden: Tensor) -> Tensor:
    """What the layer's processor computes of [B, N, C], through the operator."""
    # Modules are called, never their weights used: PEFT's `.weight` is the base weight.
    if type(layer.processor).__name__ == "FusedAttnProcessor2_0":
        projected = layer.to_qkv(hidden).chunk(3, -1)
    else:
        projected = (layer.to_q(hidden), layer.to_k(hidden), layer.to_v(hidden))
    query, key, value = (x.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in projected)
    out = ops.self_attention(query, key, value).transpose(1, 2).flatten(2)
    return layer.to_out[1](layer.to_out[0](out))


def _call(_name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        note = None if torch.compiler.is_compiling() else NOTE.get()
        if note is None or hidden_states.ndim != 3 or not wins(hidden_states):
            return plain(self, hidden_states, *args, **kwargs)
        reason = obstacle(self, args, kwargs)
        if reason is None:
            return forward(self, hidden_states)
        if type(self.processor).__name__ not in _ON_PURPOSE:
            note(f"self-attention layers run stock: {reason}")
        return plain(self, hidden_states, *args, **kwargs)

    return call


class Fused:
    """In place of a layer in a compiled program, which cannot ask whether it is to be fused.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return forward(self._layer, hidden_states)
