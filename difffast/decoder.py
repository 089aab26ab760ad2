"""The shared-skip decoder: what depends on the skips alone is computed once for all time steps that share them.

In an up block every resnet works on cat([hidden, skip]).  Time steps decoded from one key step's features have the same
skips, and the time embedding enters only after the first convolution.  So of norm1, conv1 and conv_shortcut the part
over the skip's channels is computed once and added to the part over the hidden channels at each step.  The one norm
group that may straddle the boundary depends on both and is computed with the hidden channels.  The first resnet's
hidden input is the bottleneck, which is cached as well: its whole part before the time embedding is computed once.

Nothing is re-implemented and no weight is copied: blocks run their own ``forward`` on skips without channels, resnets
theirs with stand-ins for norm1, conv1 and conv_shortcut, which work on views of channel ranges of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import group_norm_silu, repeat_batch, skip_norm_silu
from .resnets import StandIn, is_plain, is_wrapped
from .swap import plain_class


class SharedSkips:
    """One key step's skips, and the parts of the decoder that depend on them alone: made when first needed, then kept.

    Args:
        skips: the encoder's skip tensors [B, C, H, W] in the order in which it made them.
    """

    def __init__(self, skips: Sequence[Tensor]) -> None:
        self.skips = tuple(skips)
        self._parts: dict[str, tuple[list[tuple[Tensor, int]], tuple[Tensor, Tensor]]] = {}

    def parts(self, name: str, resnet: nn.Module, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What ``make`` made for a resnet; made anew if its weights have changed since."""
        modules = (resnet.norm1, resnet.conv1, resnet.conv_shortcut)
        weights = [w for module in modules for w in (module.weight, module.bias) if w is not None]
        state = [(weight, 0 if weight.is_inference() else weight._version) for weight in weights]
        held = self._parts.get(name)
        if held is None or any(a is not b or v != w for (a, v), (b, w) in zip(held[0], state, strict=True)):
            held = self._parts[name] = (state, make())
        return held[1]


def obstacle(unet: nn.Module, call: Mapping[str, Any]) -> str | None:
    """Why no resnet can share its skip in a decode call, or None."""
    from diffusers import UNet2DConditionModel

    if plain_class(unet) is not UNet2DConditionModel:
        return f"{plain_class(unet).__name__} is not UNet2DConditionModel"
    if call.get("down_block_additional_residuals") is not None or call.get("mid_block_additional_residual") is not None:
        return "residuals are added to the skips"
    if any(getattr(block, name, None) for block in unet.up_blocks for name in ("s1", "s2", "b1", "b2")):
        return "FreeU changes the skips"
    return None


def resnet_obstacle(resnet: nn.Module) -> str | None:
    """Why a resnet cannot share its skip, or None."""
    from diffusers.models.resnet import ResnetBlock2D

    if plain_class(resnet) is not ResnetBlock2D or is_wrapped(resnet):
        return f"the {type(resnet).__name__} is wrapped, or another class than ResnetBlock2D"
    if resnet.upsample is not None or resnet.downsample is not None:
        return "it resamples"
    for name, kind in (("norm1", nn.GroupNorm), ("conv1", nn.Conv2d), ("conv_shortcut", nn.Conv2d)):
        module = getattr(resnet, name)
        if not is_plain(module, kind):
            return f"{name} is wrapped, quantised, offloaded, or no plain {kind.__name__}"
        if kind is nn.Conv2d and (module.groups != 1 or module.padding_mode != "zeros"):
            return f"{name} is grouped, or padded with other than zeros"
    return None


def up_blocks(
    unet: nn.Module,
    shared: SharedSkips,
    repeats: int,
    view: Callable[[nn.Module, Mapping[str, Any]], nn.Module],
    unshared: Callable[[str, str], None],
) -> list[nn.Module]:
    """Views of the up blocks whose resnets share the skips.

    Each is to be called with skips [B * repeats, 0, H, W] and returns what the block would; but the first resnet takes
    the bottleneck and a skip without channels for [B, ...], not yet repeated.

    Args:
        repeats: time steps in the batch, batch-major.
        view: ``view(module, children)`` makes an object that is ``module`` in all but the given children.
        unshared: told (name, reason) of each resnet that runs as it is.
    """
    waiting = list(shared.skips)
    blocks = []
    for i, block in enumerate(unet.up_blocks):
        stand_ins = []
        for j, resnet in enumerate(block.resnets):
            name = f"up_blocks.{i}.resnets.{j}"
            reason = resnet_obstacle(resnet)
            if reason is not None:
                unshared(name, reason)
            kind = _Whole if reason is not None else _Split if i or j else _First
            stand_ins.append(kind(name, resnet, waiting.pop(), shared, repeats, view))
        blocks.append(view(block, {"resnets": stand_ins}))
    return blocks


class _Resnet:
    """In place of an up block's resnet: called with the hidden channels only, it knows the skip."""

    def __init__(
        self, name: str, resnet: Any, skip: Tensor, shared: SharedSkips, repeats: int, view: Callable[..., Any]
    ) -> None:
        self._name, self._resnet, self._skip, self._shared = name, resnet, skip, shared
        self._repeats, self._view = repeats, view

    def _each(self, x: Tensor) -> Tensor:
        """[B, ...] for every time step."""
        return repeat_batch(x, self._repeats) if self._repeats > 1 else x


class _Whole(_Resnet):
    """The resnet as it is, on the concatenation."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden.shape[0] == self._skip.shape[0]:  # the bottleneck
            hidden = self._each(hidden)
        return self._resnet(torch.cat([hidden, self._each(self._skip)], 1), *args, **kwargs)


class _First(_Resnet):
    """The first resnet: up to the time embedding everything is shared."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def make() -> tuple[Tensor, Tensor]:
            resnet, both = self._resnet, torch.cat([hidden, self._skip], 1)
            return resnet.conv1(resnet.nonlinearity(resnet.norm1(both))), resnet.conv_shortcut(both)

        conv1, shortcut = self._shared.parts(self._name, self._resnet, make)
        stand_ins = {
            "norm1": StandIn(self._resnet.norm1, lambda x, _: x[:0]),
            "conv1": lambda _: self._each(conv1),
            "conv_shortcut": lambda _: self._each(shortcut),
        }
        return self._view(self._resnet, stand_ins)(hidden, *args, **kwargs)


class _Split(_Resnet):
    """Any other: the skip's channels are shared, but for those in a norm group with hidden channels."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        resnet, skip = self._resnet, self._skip
        norm, conv, shortcut = resnet.norm1, resnet.conv1, resnet.conv_shortcut
        size, own = norm.num_channels // norm.num_groups, hidden.shape[1]
        groups = -(-own // size)  # that contain hidden channels
        end = groups * size
        straddling = skip[:, : end - own]

        def make() -> tuple[Tensor, Tensor]:
            through = _convolve(shortcut, skip, slice(own, None), None)
            if groups == norm.num_groups:
                return through.new_zeros(()), through
            normed = F.group_norm(
                skip[:, end - own :], norm.num_groups - groups, norm.weight[end:], norm.bias[end:], norm.eps
            )
            return _convolve(conv, resnet.nonlinearity(normed), slice(end, None), None), through

        once, through = self._shared.parts(self._name, resnet, make)

        def norm_silu(x: Tensor, silu: bool) -> Tensor:
            rest = (groups, norm.weight[:end], norm.bias[:end], norm.eps)
            if silu and end > own:
                return skip_norm_silu(x, straddling, *rest)[0]
            if silu:
                return group_norm_silu(x, *rest)
            return F.group_norm(torch.cat([x, self._each(straddling)], 1) if end > own else x, *rest)

        stand_ins = {
            "norm1": StandIn(norm, norm_silu),
            "conv1": lambda x: self._sum(_convolve(conv, x, slice(end), conv.bias), once),
            "conv_shortcut": lambda x: self._sum(_convolve(shortcut, x, slice(own), shortcut.bias), through),
        }
        return self._view(resnet, stand_ins)(hidden, *args, **kwargs)

    def _sum(self, each: Tensor, once: Tensor) -> Tensor:
        """Add a shared part [B, ...] (or a scalar) to each time step's [B * repeats, ...], in place."""
        if once.ndim:
            each.unflatten(0, (-1, self._repeats)).add_(once[:, None])
        return each


def _convolve(conv: nn.Conv2d, x: Tensor, channels: slice, bias: Tensor | None) -> Tensor:
    """A convolution over some of its input channels."""
    return F.conv2d(x, conv.weight[:, channels], bias, conv.stride, conv.padding, conv.dilation)
