"""Layers that are fused where channels_last is the faster format: transformers' norms, and how their results lie.

That is on GPUs, and in bfloat16 on processors with AMX.  On other CPUs the norms are a few percent of a UNet call, and
asking at every call costs as much as it would save.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._local import has_kernel
from ..ops._norm_choice import choose as choose_norm
from ..surgery.memory_format import suits_channels_last
from ..surgery.pristine import is_plain
from ..surgery.subclass import is_swapped, plain_class
from .kind import LayerKind

#: Pixels from which on PyTorch's norm of CPUs is the faster one where nothing follows it.
_MANY_PIXELS = 1024
#: Types of devices on which the layers of this file are always put in; meta to see what they would ask for.
DEVICES = ("cuda", "meta")


class TransformerNorm(LayerKind):
    """The GroupNorm at the entrance of a transformer, and that of the UNet's output.

    PyTorch has no GroupNorm for channels_last on GPUs: it copies the operand there and back.  Its one for CPUs is slow
    where groups are narrow and pixels few.
    """

    name = "transformers' norms"

    def find(self, unet: nn.Module) -> dict[str, nn.Module]:
        return {
            name: module
            for name, module in unet.named_modules()
            if plain_class(module) is nn.GroupNorm and (name.endswith(".norm") or name == "conv_norm_out")
        }

    def may_pay(self, weight: Tensor) -> bool:
        return weight.device.type in DEVICES or suits_channels_last(weight.device, weight.dtype)

    def pays(self, layer: Any, hidden: Tensor) -> bool:
        if hidden.ndim != 4 or (hidden.is_cpu and hidden.shape[2:].numel() >= _MANY_PIXELS):
            return False
        return choose_norm("group_norm_silu", hidden, _size(layer)) != "reference"

    def refuse(self, layer: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        if not hidden.is_meta and not is_plain(layer, nn.GroupNorm):
            return "one has hooks, or a forward of its own"
        return None if layer.weight.dtype == hidden.dtype else "its weights have another dtype than its input"

    def forward(self, layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return ops.group_norm_silu(hidden, layer.num_groups, layer.weight, layer.bias, layer.eps, silu=False)

    def describe(self, layers: Mapping[str, Any], weight: Tensor, *, compiled: bool) -> Iterator[tuple[str, str]]:
        if not layers or compiled:
            return
        if weight.device.type == "cpu" and suits_channels_last(weight.device, weight.dtype):
            yield f"{self.name} ({len(layers)})", "group_norm_silu, where groups are narrow and pixels few"
        elif has_kernel(weight.device, "group_norm_silu", weight.dtype):
            yield f"{self.name} ({len(layers)})", "group_norm_silu (by proof)"


class TransformerOutput(LayerKind):
    """The end of a Transformer2DModel: its result goes back to pixels without a copy where its input is channels_last.

    Stock makes it contiguous, so that what follows meets two memory formats, and each convolution makes a copy.
    """

    name = "transformers' outputs"

    def find(self, unet: nn.Module) -> dict[str, nn.Module]:
        from diffusers import Transformer2DModel

        return {name: module for name, module in unet.named_modules() if plain_class(module) is Transformer2DModel}

    def put_in(self, unet: nn.Module, *, always: bool = False) -> None:
        first = next(unet.parameters())
        if first.device.type in DEVICES or suits_channels_last(first.device, first.dtype):
            for layer in self.find(unet).values():
                if not is_swapped(layer) and hasattr(layer, _OUTPUT):
                    self.override(unet, layer, {_OUTPUT: _to_pixels})

    def refuse(self, layer: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        return None  # its own forward runs, all but the end

    def forward(self, layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return plain_class(layer).forward(layer, hidden, *args, **kwargs)

    def describe(self, layers: Mapping[str, Any], weight: Tensor, *, compiled: bool) -> Iterator[tuple[str, str]]:
        yield from ()  # the same values, elsewhere in memory


#: The method of a Transformer2DModel that makes pixels of its tokens.
_OUTPUT = "_get_output_for_continuous_inputs"


def _to_pixels(
    layer: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
) -> Tensor:
    """Do what the method of :data:`_OUTPUT` does, in the memory format of ``residual``."""
    if torch.compiler.is_compiling() or residual.is_contiguous():
        plain = getattr(plain_class(layer), _OUTPUT)
        return plain(layer, hidden_states, residual, batch_size, height, width, inner_dim)
    if layer.use_linear_projection:
        hidden_states = layer.proj_out(hidden_states)
    pixels = hidden_states.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
    return (pixels if layer.use_linear_projection else layer.proj_out(pixels)) + residual


def _size(norm: nn.GroupNorm) -> int:
    """Return the channels of a group."""
    return norm.num_channels // norm.num_groups
