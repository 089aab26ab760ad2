"""Fused norms in a stock UNet: ResnetBlock2D with GroupNorm, time embedding and SiLU in one operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from .. import ops
from ..ops._local import has_kernel
from ..ops._norm_choice import choose
from ..surgery.pristine import is_plain, is_wrapped
from ..surgery.subclass import plain_class
from .convolution import convolve_onto
from .kind import LayerKind

#: Bytes from which on a result is put into memory that is there: new memory comes page by page, and is cleared.
_LARGE = 1 << 20


class NormStandIn:
    """In place of a resnet's norm1: makes norm and SiLU, or the norm alone for a resnet that runs stock.

    Args:
        norm: the norm in whose place it is.
        norm_silu: makes norm and, if the second argument says so, SiLU of hidden channels.
    """

    def __init__(self, norm: nn.Module, norm_silu: Callable[[Tensor, bool], Tensor]) -> None:
        self.norm, self.norm_silu = norm, norm_silu

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.norm_silu(hidden, False)


def _knows_time_as_we_do(resnet: Any) -> bool:
    """Whether a resnet's second norm is one that is fused; a VAE's up blocks say "group", and have no time to add."""
    kind = resnet.time_embedding_norm
    return kind in ("default", "scale_shift") or (kind == "group" and resnet.time_emb_proj is None)


def _has_made_its_own(conv: nn.Module) -> bool:
    """Whether what a layer returned is a tensor that nobody else has seen, who might want to read it later."""
    return is_plain(conv, nn.Conv2d) and not modules._global_forward_hooks


class Resnet(LayerKind):
    """ResnetBlock2D; in compiled programs Inductor fuses its norms."""

    name = "resnets"
    input_name = "input_tensor"

    def find(self, unet: nn.Module) -> dict[str, nn.Module]:
        from diffusers.models.resnet import ResnetBlock2D

        return {
            name: module
            for name, module in unet.named_modules()
            if plain_class(module) is ResnetBlock2D
            and type(module.nonlinearity) is nn.SiLU
            and module.upsample is None
            and module.downsample is None
            and _knows_time_as_we_do(module)
        }

    def pays(self, layer: Any, hidden: Tensor) -> bool:
        norm = layer.norm1.norm if isinstance(layer.norm1, NormStandIn) else layer.norm1
        size = max(1, hidden.shape[1] // getattr(norm, "num_groups", 1))
        return choose("group_norm_silu", hidden, size) != "reference"

    def refuse(self, layer: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        given = [*args, *kwargs.values()]
        if not given or (given[0] is None) != (layer.time_emb_proj is None):
            return "" if not given or given[0] is None else "one has no time projection"
        if len(given) > 1 or kwargs.keys() - {"temb"}:
            return "it was called with other arguments than its input and a time embedding"
        if is_wrapped(layer):
            return "one has hooks, or a forward of its own"
        if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
            return "autocast chooses the norms' dtype"
        for norm in (layer.norm1, layer.norm2):
            if isinstance(norm, NormStandIn):
                norm = norm.norm
            if not is_plain(norm, nn.GroupNorm) and not hidden.is_meta:  # of a dry run no weight is there
                return "a norm is wrapped, quantised, offloaded, without weights, or no plain GroupNorm"
            if norm.weight.dtype != hidden.dtype:
                return f"a norm's weights are {norm.weight.dtype}, its input {hidden.dtype}"
        return None

    def forward(self, layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (temb,) = args or kwargs.values()
        norm1, norm2 = layer.norm1, layer.norm2
        if isinstance(norm1, NormStandIn):
            x = norm1.norm_silu(hidden, True)
        else:
            x = ops.group_norm_silu(hidden, norm1.num_groups, norm1.weight, norm1.bias, norm1.eps)
        made = _has_made_its_own(layer.conv1)
        may_write = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        reuses = may_write and made and x.nbytes >= _LARGE and not isinstance(norm1, NormStandIn)
        # Nobody else has seen it, and conv1 is the last to read it.  A shortcut's own result serves as well.
        spare = x if reuses and layer.conv_shortcut is None else None
        x = layer.conv1(x)

        modulation: dict[str, Tensor] = {}  # a VAE's blocks know no time
        if temb is not None:
            temb = layer.time_emb_proj(temb if layer.skip_time_act else layer.nonlinearity(temb)).expand(x.shape[0], -1)
            if layer.time_embedding_norm == "default":
                modulation = {"addend": temb}
            else:
                modulation = dict(zip(("scale", "shift"), temb.chunk(2, 1), strict=True))
        given = norm2.num_groups, norm2.weight, norm2.bias, norm2.eps
        x = ops.group_norm_silu(x, *given, **modulation, overwrite=made)

        x = layer.dropout(x)
        if layer.conv_shortcut is not None:
            hidden = layer.conv_shortcut(hidden)
            spare = hidden if reuses and _has_made_its_own(layer.conv_shortcut) else None
        may_write = may_write and _has_made_its_own(layer.conv2)
        out = convolve_onto(layer.conv2, x, hidden, spare) if may_write and spare is not None else None
        if out is None:
            x = layer.conv2(x)
            alike = hidden.dtype == x.dtype and hidden.stride() == x.stride() and hidden.shape == x.shape
            out = x.add_(hidden) if may_write and alike else hidden + x
        return out if layer.output_scale_factor == 1 else out / layer.output_scale_factor

    def describe(self, layers: Mapping[str, Any], weight: Tensor, *, compiled: bool) -> Iterator[tuple[str, str]]:
        backend = ops.default_backend("group_norm_silu", weight.device, weight.dtype)
        if has_kernel(weight.device, "group_norm_silu", weight.dtype):
            backend = "by proof"
        if layers and backend != "reference" and not compiled:
            yield f"resnets ({len(layers)} layers)", f"group_norm_silu ({backend})"
