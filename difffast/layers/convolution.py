"""Convolutions on CPUs: with few products, or as matrix products of pixels or patches; in bfloat16 in float32.

**Few products** (:mod:`difffast.ops.convolution`): at most of a UNet's and a VAE's convolutions, in float32 and, where
float32 is at least half as fast, in bfloat16.

**Matrix products** (:mod:`difffast.layers.products`): those of 1x1 pixels, and those of many weights where pixels are
few, in float32.

**Packed weights** (:mod:`difffast.layers.packed`): in bfloat16 on processors with AMX, of 3x3 pixels.

**Products in float32**: of the others in bfloat16.  PyTorch gives them to oneDNN.  Processors with AMX multiply
bfloat16 many times as fast as float32; AVX-512 alone takes up to twice as long for it, and AVX2 has no instruction for
it at all.  Each process measures once which of them it is on.  Operands are widened, which is exact, and the product is
rounded once, as stock's is.  Linear layers gain next to nothing in a whole UNet: their products are small beside what
would have to be widened.
"""

from __future__ import annotations

import enum
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import _dispatch, _installed
from ..ops import _local as _local_table
from ..ops.convolution import choose, run, run_into
from ..ops.linear import SIDE, compare
from ..surgery.pristine import HOOKS, is_plain
from ..surgery.subclass import is_swapped, plain_class
from . import packed, products
from .context import CURRENT
from .kind import LayerKind
from .transformed import forget, transform

#: Channels below which most of what few products compute would be padding.
_FEW_INPUTS, _FEW_OUTPUTS = 16, 32
#: Pixels of an image from which on tiles of 4x4 pixels are filled; or, where their weights stay in a cache, fewer.
_MANY_PIXELS, _SOME_PIXELS, _CACHED = 576, 256, 1 << 18
#: Pixels below which even the weights of 2x2 have to stay there; and pairs of channels from which on these, at just so
#: many pixels, gain too little for their memory.
_FEW_PIXELS, _SMALL_WEIGHTS, _HEAVY = 64, 1 << 16, 1 << 20

#: Pixels, and multiply-adds, below which widening costs more than it gains.
_FEW, _SMALL = 64, 16_000_000
#: They are widened where float32 is so many times faster: widening takes a part of what is gained.
_WORTH = 1.5
#: From here on few products gain more than float32 loses.
_HALF = 0.5

_SHORT = "convolutions run stock: too little memory is left for their transformed weights"

_local = threading.local()
_is_autocast = functools.partial(torch.is_autocast_enabled, "cpu")
_kernel = torch.ops.difffast.winograd_convolution


class Way(enum.IntEnum):
    """How a convolution is computed; few products have the side of their tiles for a value."""

    STOCK = 0
    PIXELS = 1
    SMALL_TILES = 2
    PATCHES = 3
    LARGE_TILES = 4
    PACKED = 5


#: The ways of few products.
TILES = Way.SMALL_TILES, Way.LARGE_TILES
#: Looked up once, and not at every call of every layer.
_STOCK, _PIXELS, _PATCHES, _PACKED = Way.STOCK, Way.PIXELS, Way.PATCHES, Way.PACKED


class _Weight(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class _Layer(NamedTuple):
    """What the choice may know of a layer, under the names that the layer has for it."""

    weight: _Weight
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    padding_mode: str


class Convolution(LayerKind):
    """Convolutions on CPUs; those that LoRA wraps among them."""

    name = "convolutions"
    input_name = "input"

    def find(self, unet: nn.Module) -> dict[str, nn.Module]:
        return {n: m for n, m in unet.named_modules() if plain_class(m) is nn.Conv2d}

    def may_pay(self, weight: Tensor) -> bool:
        if weight.device.type != "cpu" or weight.dtype == torch.float32:
            return weight.device.type == "cpu"
        return _has_few_products(weight) or _is_widened(weight) or packed.can_be(weight)

    def suits(self, layer: Any) -> bool:
        return _is_widened(layer.weight) or may_have_few_products(layer) or _may_be_product(layer)

    def pays(self, layer: Any, hidden: Tensor) -> bool:
        weight = layer.weight
        if hidden.dtype != weight.dtype or hidden.ndim != 4 or hidden.device.type != "cpu":
            return False
        return choose_way(layer, hidden) is not _STOCK or _pays_to_widen(layer, hidden)

    def refuse(self, layer: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        if args or kwargs:
            return "one was called with more than its input"
        if torch.is_grad_enabled() and requires_gradient(layer, hidden):
            return ""  # what is made of the weights is not kept for a backward pass
        if torch.is_autocast_enabled("cpu"):
            return "autocast chooses their dtype"
        if not is_plain(layer, nn.Conv2d):
            return "one has hooks, a forward of its own, or is quantised or offloaded"
        return None if layer.padding_mode == "zeros" else "one pads with other values than zeros"

    def wrap(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """As for any kind, in fewer calls of Python: of so many layers, each of which is asked at every step."""
        fused = super().wrap(plain)

        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            context = None if torch.compiler.is_compiling() else CURRENT.get()
            if context is None or not context.fused or context.only_text:
                return plain(layer, *args, **kwargs)
            if kwargs or len(args) != 1 or (args[0].dtype != torch.float32 and _is_widened(args[0])):
                return fused(layer, *args, **kwargs)
            (hidden,) = args
            way = choose_way(layer, hidden)
            if way is _STOCK:
                return plain(layer, hidden)
            own = layer.__dict__
            plainly = (
                type(layer.weight) is nn.Parameter and "forward" not in own and not any(map(own.__getitem__, HOOKS))
            )
            if not plainly or torch.is_grad_enabled() or _is_autocast():
                return fused(layer, hidden)  # says why it runs stock, if it does
            if way is _PIXELS:
                return products.multiply_pixels(layer, hidden)
            if way is _PATCHES:
                return products.multiply_patches(layer, hidden)
            weights = transform(layer, way, context.within, hidden.shape)
            if weights.tile == 0:
                context.record(_SHORT)
                return plain(layer, hidden)
            if way is _PACKED:
                return packed.convolve(hidden, weights.transformed, layer.bias)
            return _kernel(hidden, weights.transformed, layer.bias, weights.original.shape[0], way)

        return call

    def forward(self, layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        way = choose_way(layer, hidden)
        if way is _PIXELS:
            return products.multiply_pixels(layer, hidden)
        if way is _PATCHES:
            return products.multiply_patches(layer, hidden)
        if way in TILES or way is _PACKED:
            context = CURRENT.get()
            weights = transform(layer, way, None if context is None else context.within, hidden.shape)
            if weights.tile == 0 and context is not None:
                context.record(_SHORT)
            if weights.tile == _PACKED:
                return packed.convolve(hidden, weights.transformed, layer.bias)
            return run(hidden, weights, layer.bias)
        return _convolve_widened(layer, hidden)

    def forget(self, layer: nn.Module) -> None:
        forget(layer)

    def describe(self, layers: Mapping[str, Any], weight: Tensor, *, compiled: bool) -> Iterator[tuple[str, str]]:
        if not layers or compiled or not self.may_pay(weight):
            return
        few = [layer for layer in layers.values() if may_have_few_products(layer)] if _has_few_products(weight) else []
        if few:
            yield f"{self.name} of 3x3 ({len(few)})", "few products (cpp)"
        pointwise = sum(map(products.is_pointwise, layers.values()))
        if pointwise and weight.dtype == torch.float32:
            yield f"{self.name} of 1x1 ({pointwise})", "matrix products"
        many = sum(map(products.has_many_weights, layers.values()))
        if many:
            yield f"{self.name} of many weights ({many})", "matrix products, where pixels are few and that is faster"
        if packed.can_be(weight):
            small = sum(map(may_have_few_products, layers.values()))
            yield f"{self.name} of 3x3 ({small})", "weights laid out once (oneDNN), where pixels are few"
        if _is_widened(weight) and len(few) < len(layers):
            rest = len(layers) - len(few)
            yield f"bfloat16 {self.name} ({rest})", f"products in float32, {advantage():.1f} times as fast here"


def requires_gradient(layer: Any, hidden: Tensor) -> bool:
    """Return whether a layer's result has a gradient, by its input or by what the layer holds, where any is wanted."""
    return any(each is not None and each.requires_grad for each in (hidden, layer.weight, layer.bias))


def convolve_channels(layer: Any, hidden: Tensor, channels: slice, bias: Tensor | None) -> Tensor:
    """Compute the part of a layer's result that some of its input channels give, by what the layer would take for all.

    Args:
        layer: a plain convolution of one group, with a border of zeros.
        hidden: [B, C, H, W], these channels.
        channels: which they are; start or stop may be None.
        bias: added to it.
    """
    weight = layer.weight
    begin, end, _ = channels.indices(weight.shape[1])
    context = None if torch.compiler.is_compiling() or hidden.device.type != "cpu" else CURRENT.get()
    fused = context is not None and context.fused and not context.only_text and not _is_autocast()
    fused = fused and not (torch.is_grad_enabled() and requires_gradient(layer, hidden))
    way = choose_way(layer, hidden, end - begin) if fused else _STOCK
    if context is not None and way in TILES:
        weights = transform(layer, way, context.within, hidden.shape)
        if weights.tile:
            return _kernel(hidden, weights.transformed, bias, weight.shape[0], way, begin, weight.shape[1])
        context.record(_SHORT)
    part = products.Part(weight[:, begin:end], bias, layer.stride, layer.padding, layer.dilation)
    if way is _PIXELS:
        return products.multiply_pixels(part, hidden)
    if way is _PATCHES:
        return products.multiply_patches(part, hidden)
    widened = fused and hidden.dtype == torch.bfloat16 and _pays_to_widen(part, hidden)
    return _convolve_widened(part, hidden) if widened else F.conv2d(hidden, *part)


def _convolve_widened(layer: Any, hidden: Tensor) -> Tensor:
    weight, bias = _widen(layer.weight), None if layer.bias is None else layer.bias.float()
    settings = layer.stride, layer.padding, layer.dilation, layer.groups
    return F.conv2d(hidden.float(), weight, bias, *settings).to(hidden.dtype)


def convolve_onto(layer: Any, hidden: Tensor, addend: Tensor, memory: Tensor) -> Tensor | None:
    """Return a layer's result plus an addend, put into memory that is there already; None: few products do not pay.

    Args:
        layer: a plain convolution, of which no gradient is wanted.
        hidden: its input.
        addend: [B, O, H, W].
        memory: as the addend, or the addend itself, which nobody else has; not ``hidden``.
    """
    context = CURRENT.get()
    if context is None or not context.fused or context.only_text or not is_swapped(layer):
        return None
    result = (hidden.shape[0], layer.weight.shape[0], *hidden.shape[2:])
    for each in (addend, memory):
        if each.shape != result or each.dtype != hidden.dtype or not each.is_contiguous():
            return None
    way = choose_way(layer, hidden)
    if way not in TILES:
        return None
    weights = transform(layer, way, context.within, hidden.shape)
    if weights.tile == 0:
        return None
    run_into(memory, hidden, weights, layer.bias, addend)
    return memory


def choose_way(layer: Any, hidden: Tensor, channels: int | None = None, *, doubled: bool = False) -> Way:
    """Return how a layer's result is computed for an input.

    The size of tiles depends on the image alone, not on how many there are: what is kept of the weights serves any
    batch, and any of the input channels.

    Args:
        channels: how many of the layer's input channels the input has; None: all of them.
        doubled: whether each pixel of the input stands for 2x2.
    """
    weight, shape = layer.weight, hidden.shape
    if (
        len(shape) != 4
        or shape[1] != (weight.shape[1] * layer.groups if channels is None else channels)
        or hidden.dtype != weight.dtype
        or hidden.device != weight.device
    ):
        return _STOCK  # which says what is wrong
    settings = layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode
    known = weight.shape, weight.dtype, weight.device, *settings
    if not weight.is_contiguous():  # who has laid weights out in channels_last wants results in it
        whole = channels is None and not doubled and weight.is_contiguous(memory_format=torch.channels_last)
        packs = whole and packed.can_be(weight, layer.bias)
        return _find_packed(_dispatch.forced_backends, shape, *known) if packs else _STOCK
    if weight.dtype == torch.bfloat16 and advantage() < _HALF:
        return _STOCK
    if doubled:
        shape = torch.Size((*shape[:2], 2 * shape[2], 2 * shape[3]))
    way = _find_way(_dispatch.forced_backends, _local_table.state, shape, *known)
    return _STOCK if way in (_PIXELS, _PATCHES) and not hidden.is_contiguous() else way  # channels_last stays


@functools.lru_cache(_dispatch.REMEMBERED)
def _find_way(forced: Any, _state: Any, images: torch.Size, *known: Any) -> Way:
    layer = _Layer(_Weight(*known[:3]), *known[3:])
    if _dispatch.find_forced("convolution", forced, layer.weight.device) == "reference":
        return _STOCK
    if products.is_pointwise(layer):
        return _PIXELS if products.pixel_advantage() > 1 else _STOCK
    tiles = _find_tiles(*images[2:], *known)
    few = tiles is _STOCK and products.has_many_weights(layer) and products.has_few_results(layer, images)
    return _PATCHES if few and products.patches_pay(layer, images) else tiles


@functools.lru_cache(_dispatch.REMEMBERED)
def _find_packed(forced: Any, images: torch.Size, *known: Any) -> Way:
    """Return whether weights are laid out once, or the layer runs stock."""
    is_stock = _dispatch.find_forced("convolution", forced, known[2]) == "reference"
    return _PACKED if _suits(*known) and packed.pay(images) and not is_stock else _STOCK


def _find_tiles(height: int, width: int, *layer: Any) -> Way:
    """Return which tiles few products have, or stock's way."""
    shape, dtype, device = layer[:3]
    if not _suits(*layer) or min(height, width) < 2 or choose(dtype, device) == "reference":
        return _STOCK
    pixels, pairs = height * width, shape[0] * shape[1]
    if pixels >= _MANY_PIXELS or (pixels >= _SOME_PIXELS and pairs <= _CACHED):
        return Way.LARGE_TILES
    if pixels < _FEW_PIXELS:
        return Way.SMALL_TILES if pairs <= _SMALL_WEIGHTS else _STOCK
    return Way.SMALL_TILES if pixels > _FEW_PIXELS or pairs < _HEAVY else _STOCK


def may_have_few_products(layer: Any) -> bool:
    """Return whether few products can be taken for some input of a layer."""
    weight, settings = layer.weight, (layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    return _suits(weight.shape, weight.dtype, weight.device, *settings)


def _may_be_product(layer: Any) -> bool:
    return products.is_pointwise(layer) or products.has_many_weights(layer)


def _suits(shape: Any, dtype: torch.dtype, device: torch.device, *settings: Any) -> bool:
    """Whether a convolution is one of 3x3 pixels with as many channels as pay."""
    stride, padding, dilation, groups, mode = settings
    return (
        (shape[2:], stride, dilation, groups, mode) == ((3, 3), (1, 1), (1, 1), 1, "zeros")
        and padding in ((1, 1), 1)
        and shape[1] >= _FEW_INPUTS
        and shape[0] >= _FEW_OUTPUTS
        and dtype in (torch.float32, torch.bfloat16)
        and device.type == "cpu"
    )


def _has_few_products(weight: Tensor) -> bool:
    if weight.dtype not in (torch.float32, torch.bfloat16) or choose(weight.dtype, weight.device) == "reference":
        return False
    return weight.dtype == torch.float32 or advantage() >= _HALF


def _is_widened(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and advantage() >= _WORTH


def _pays_to_widen(layer: Any, hidden: Tensor) -> bool:
    weight = layer.weight
    if not _is_widened(weight):
        return False
    rows = hidden.numel() // hidden.shape[1] // (layer.stride[0] * layer.stride[1])
    return rows >= _FEW and rows * weight.numel() >= _SMALL


@functools.cache
def advantage() -> float:
    """Measure how many times faster matrices are multiplied here in float32 than in bfloat16.

    With AMX a third of the time or less is known without it, and a busy machine would now and then measure more.
    """
    if _installed.has_amx():
        return 1 / 3
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
