"""Convolutions in bfloat16, multiplied in float32 where the processor does that faster.

PyTorch gives them to oneDNN.  Processors with AMX multiply bfloat16 many times as fast as float32; AVX-512 alone takes
up to twice as long for it, and AVX2 has no instruction for it at all.  Each process measures once which of them it is
on.  Operands are widened, which is exact, and the product is rounded once, as stock's is.  Linear layers gain next
to nothing in a whole UNet: their products are small beside what would have to be widened.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear import SIDE, compare
from ..surgery.pristine import is_plain
from ..surgery.subclass import plain_class
from .kind import LayerKind

#: Pixels, and multiply-adds, below which widening costs more than it gains.
_FEW, _SMALL = 64, 16_000_000
#: They are widened where float32 is so many times faster: widening takes a part of what is gained.
_WORTH = 1.5

_local = threading.local()


class Convolution(LayerKind):
    """Convolutions with bfloat16 weights on CPUs; those that LoRA wraps among them."""

    name = "bfloat16 convolutions"
    input_name = "input"

    def find(self, unet: nn.Module) -> dict[str, nn.Module]:
        return {n: m for n, m in unet.named_modules() if plain_class(m) is nn.Conv2d}

    def may_pay(self, weight: Tensor) -> bool:
        return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and advantage() >= _WORTH

    def pays(self, layer: Any, hidden: Tensor) -> bool:
        weight = layer.weight
        if hidden.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
            return False
        rows = hidden.numel() // hidden.shape[1] // (layer.stride[0] * layer.stride[1])
        return rows >= _FEW and rows * weight.numel() >= _SMALL

    def refuse(self, layer: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        if args or kwargs:
            return "one was called with more than its input"
        if torch.is_grad_enabled() and (hidden.requires_grad or layer.weight.requires_grad):
            return ""  # the widened weights are not kept for a backward pass
        if torch.is_autocast_enabled("cpu"):
            return "autocast chooses their dtype"
        if not is_plain(layer, nn.Conv2d):
            return "one has hooks, a forward of its own, or is quantised or offloaded"
        return None if layer.padding_mode == "zeros" else "one pads with other values than zeros"

    def forward(self, layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, bias = _widen(layer.weight), None if layer.bias is None else layer.bias.float()
        settings = layer.stride, layer.padding, layer.dilation, layer.groups
        return F.conv2d(hidden.float(), weight, bias, *settings).to(hidden.dtype)

    def describe(self, layers: Mapping[str, Any], weight: Tensor, *, compiled: bool) -> Iterator[tuple[str, str]]:
        if layers and not compiled and self.may_pay(weight):
            yield f"{self.name} ({len(layers)})", f"products in float32, {advantage():.1f} times as fast here"


@functools.cache
def advantage() -> float:
    """Measure how many times faster matrices are multiplied here in float32 than in bfloat16."""
    wide = torch.ones(2, SIDE, SIDE, dtype=torch.float32, device="cpu")
    half = wide.to(torch.bfloat16)
    return compare(lambda: F.linear(*half), lambda: F.linear(*wide))


def _widen(weight: Tensor) -> Tensor:
    """Return the weights in float32, in memory that this thread's next call takes again.

    Memory from the system, which a call would be given for large weights, comes page by page, and takes longer than the
    product gains.
    """
    held = getattr(_local, "held", None)
    if held is None or held.numel() < weight.numel():
        with torch.inference_mode(False):
            held = _local.held = torch.empty(weight.numel(), dtype=torch.float32)
    with torch.no_grad():
        return held[: weight.numel()].view(weight.shape).copy_(weight)
