"""Fused norms in a stock UNet: ResnetBlock2D with GroupNorm, time embedding and SiLU in one operator.

A resnet is fused inside :func:`.fusion.fused` only; elsewhere it is stock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .fusion import NOTE, is_plain, is_wrapped
from .ops.group_norm_silu import choose
from .swap import plain_class, swap_calls, swap_out


def install(unet: nn.Module) -> None:
    """Put :func:`_call` in front of every resnet that can be fused; outside :func:`.fusion.fused` nothing changes."""
    swap_calls(resnets_of(unet), _call)


def uninstall(unet: nn.Module) -> None:
    """Undo :func:`install`."""
    for resnet in resnets_of(unet).values():
        swap_out(resnet)


def resnets_of(unet: nn.Module) -> dict[str, nn.Module]:
    """The resnets that can be fused, by name."""
    from diffusers.models.resnet import ResnetBlock2D

    return {
        name: module
        for name, module in unet.named_modules()
        if plain_class(module) is ResnetBlock2D
        and type(module.nonlinearity) is nn.SiLU
        and module.upsample is None
        and module.downsample is None
        and module.time_embedding_norm in ("default", "scale_shift")
    }


def _call(_name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: nn.Module, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        # Groups of one channel rule no backend out.
        note = None if torch.compiler.is_compiling() else NOTE.get()
        if note is None or temb is None or choose("group_norm_silu", input_tensor, 1) == "reference":
            return plain(self, input_tensor, temb, *args, **kwargs)
        reason = "it was called with more than two arguments" if args or kwargs else _obstacle(self, input_tensor)
        if reason is not None:
            note(f"resnets run stock: {reason}")
            return plain(self, input_tensor, temb, *args, **kwargs)
        return _forward(self, input_tensor, temb)

    return call


def _obstacle(resnet: Any, hidden: Tensor) -> str | None:
    """Why a resnet cannot be fused in this call, or None."""
    if is_wrapped(resnet):
        return "one has hooks, or a forward of its own"
    if resnet.time_emb_proj is None:
        return "one has no time projection"
    if torch.is_autocast_enabled(hidden.device.type):
        return "autocast chooses the norms' dtype"
    for norm in (resnet.norm1, resnet.norm2):
        if isinstance(norm, StandIn):
            norm = norm.norm
        if not is_plain(norm, nn.GroupNorm):
            return "a norm is wrapped, quantised, offloaded, without weights, or no plain GroupNorm"
        if norm.weight.dtype != hidden.dtype:
            return f"a norm's weights are {norm.weight.dtype}, its input {hidden.dtype}"
    return None


class StandIn:
    """In place of a resnet's norm1: makes norm and SiLU, or the norm alone for a resnet that runs stock.

    Args:
        norm: the norm in whose place it is.
        norm_silu: makes norm and, if the second argument says so, SiLU of hidden channels.
    """

    def __init__(self, norm: nn.Module, norm_silu: Callable[[Tensor, bool], Tensor]) -> None:
        self.norm, self.norm_silu = norm, norm_silu

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.norm_silu(hidden, False)


def _forward(resnet: Any, hidden: Tensor, temb: Tensor) -> Tensor:
    """What ResnetBlock2D.forward computes, through the operator."""
    norm1, norm2 = resnet.norm1, resnet.norm2
    if isinstance(norm1, StandIn):
        x = norm1.norm_silu(hidden, True)
    else:
        x = ops.group_norm_silu(hidden, norm1.num_groups, norm1.weight, norm1.bias, norm1.eps)
    x = resnet.conv1(x)

    temb = resnet.time_emb_proj(temb if resnet.skip_time_act else resnet.nonlinearity(temb)).expand(x.shape[0], -1)
    if resnet.time_embedding_norm == "default":
        modulation = {"addend": temb}
    else:
        modulation = dict(zip(("scale", "shift"), temb.chunk(2, 1), strict=True))
    x = ops.group_norm_silu(x, norm2.num_groups, norm2.weight, norm2.bias, norm2.eps, **modulation)

    x = resnet.conv2(resnet.dropout(x))
    if resnet.conv_shortcut is not None:
        hidden = resnet.conv_shortcut(hidden)
    out = hidden + x
    return out if resnet.output_scale_factor == 1 else out / resnet.output_scale_factor
