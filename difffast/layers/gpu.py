"""Layers that are fused on GPUs alone: transformers' norms, and how their results lie in memory.

On a CPU these are a few percent of a UNet call, and asking at every call costs as much as it would save.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._local import has_kernel
from ..ops.group_norm_silu import choose as choose_norm
from ..surgery.pristine import is_plain
from ..surgery.subclass import is_swapped, plain_class
from .kind import LayerKind

#: Types of devices on which the layers of this file are put in; on the meta device to see what they would ask for.
DEVICES = ("cuda", "meta")


class TransformerNorm(LayerKind):
    """The GroupNorm at the entrance of a transformer, and that of the UNet's output.

    PyTorch has no GroupNorm for channels_last on GPUs: it copies the operand there and back.
    """

    name = "transformers' norms"

    def find(self, unet: nn.Module) -> dict[str, nn.Module]:
        return {
            name: module
            for name, module in unet.named_modules()
            if plain_class(module) is nn.GroupNorm and (name.endswith(".norm") or name == "conv_norm_out")
        }

    def may_pay(self, weight: Tensor) -> bool:
        return weight.device.type in DEVICES

    def pays(self, layer: Any, hidden: Tensor) -> bool:
        return hidden.ndim == 4 and choose_norm("group_norm_silu", hidden, _size(layer)) != "reference"

    def refuse(self, layer: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        if not hidden.is_meta and not is_plain(layer, nn.GroupNorm):
            return "one has hooks, or a forward of its own"
        return None if layer.weight.dtype == hidden.dtype else "its weights have another dtype than its input"

    def forward(self, layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return ops.group_norm_silu(hidden, layer.num_groups, layer.weight, layer.bias, layer.eps, silu=False)

    def describe(self, layers: Mapping[str, Any], weight: Tensor, *, compiled: bool) -> Iterator[tuple[str, str]]:
        if layers and not compiled and has_kernel(weight.device, "group_norm_silu", weight.dtype):
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
        if next(unet.parameters()).device.type in DEVICES:
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
