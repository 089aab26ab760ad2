"""Upsampling in a stock UNet or VAE decoder: Upsample2D, whose convolution reads every pixel where it lies, four times.

The image of twice the height and width, in Stable Diffusion's decoder up to 256 MiB in float32, is never made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.convolution import run
from ..surgery.pristine import HOOKS, is_plain, is_wrapped
from ..surgery.subclass import MARK, plain_class
from .context import CURRENT
from .convolution import TILES, Way, choose_way, may_have_few_products, requires_gradient
from .kind import LayerKind
from .transformed import transform

_kernel = torch.ops.difffast.winograd_convolution


class Upsampler(LayerKind):
    """Upsample2D by nearest interpolation and a convolution with few products."""

    name = "upsamplers"

    def find(self, unet: nn.Module) -> dict[str, nn.Module]:
        from diffusers.models.upsampling import Upsample2D

        return {
            name: module
            for name, module in unet.named_modules()
            if plain_class(module) is Upsample2D
            and module.use_conv
            and module.interpolate
            and not module.use_conv_transpose
            and module.norm is None
            and module.name == "conv"
        }

    def may_pay(self, weight: Tensor) -> bool:
        return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)

    def suits(self, layer: Any) -> bool:
        return plain_class(layer.conv) is nn.Conv2d and may_have_few_products(layer.conv)

    def pays(self, layer: Any, hidden: Tensor) -> bool:
        if not hidden.is_contiguous() or not is_plain(layer.conv, nn.Conv2d):  # few products give the default format
            return False
        return choose_way(layer.conv, hidden, doubled=True) in TILES

    def refuse(self, layer: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        if any(each is not None for each in (*args, *kwargs.values())):
            return ""  # another size than twice its own
        if torch.is_grad_enabled() and requires_gradient(layer.conv, hidden):
            return ""
        if torch.is_autocast_enabled("cpu"):
            return "autocast chooses their dtype"
        return "one has hooks, or a forward of its own" if is_wrapped(layer) else None

    def wrap(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """As for any kind, in fewer calls of Python, for a layer and a convolution that nobody has touched."""
        fused = super().wrap(plain)

        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            context = None if torch.compiler.is_compiling() else CURRENT.get()
            if context is None or not context.fused or context.only_text:
                return plain(layer, *args, **kwargs)
            conv = layer.conv
            kind, owns = type(conv), (layer.__dict__, conv.__dict__)
            if (
                kwargs
                or args[1:] not in ((), (None,))
                or torch.is_grad_enabled()
                or torch.is_autocast_enabled("cpu")
                or not (kind is nn.Conv2d or kind.__dict__.get(MARK) is nn.Conv2d)
                or type(conv.weight) is not nn.Parameter
                or any([own.get("forward") or own[hooks] for own in owns for hooks in HOOKS])
            ):
                return fused(layer, *args, **kwargs)
            hidden = args[0]
            way = choose_way(conv, hidden, doubled=True) if hidden.is_contiguous() else Way.STOCK
            weights = transform(conv, way, context.within, hidden.shape) if way in TILES else None
            if weights is None or weights.tile == 0:
                return plain(layer, hidden)
            return _kernel(hidden, weights.transformed, conv.bias, conv.out_channels, way, 0, None, True)

        return call

    def forward(self, layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        conv, context = layer.conv, CURRENT.get()
        within = None if context is None else context.within
        weights = transform(conv, choose_way(conv, hidden, doubled=True), within, hidden.shape)
        return run(hidden, weights, conv.bias, doubled=True)

    def describe(self, layers: Mapping[str, Any], weight: Tensor, *, compiled: bool) -> Iterator[tuple[str, str]]:
        return iter(())  # of its convolutions, the reports' row of convolutions tells
