"""The shared-skip decoder: what depends on the skips alone is computed once for all time steps that share them.

In an up block every resnet works on cat([hidden, skip]).  Time steps decoded from one key step's features have the same
skips, and the time embedding enters only after the first convolution.  So of norm1, conv1 and conv_shortcut the part
over the skip's channels is computed once and added to the part over the hidden channels at each step.  The one norm
group that may straddle the boundary depends on both and is computed with the hidden channels.  The first resnet's
hidden input is the bottleneck, which is cached as well: its whole part before the time embedding is computed once.

Nothing is re-implemented and no weight is copied: blocks run their own ``forward`` on skips without channels, resnets
theirs with stand-ins for norm1, conv1 and conv_shortcut, which work on channel ranges of the weights
(:func:`difffast.layers.convolution.convolve_channels`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.convolution import convolve_channels
from ..layers.resnet import NormStandIn
from ..ops import group_norm_silu, repeat_batch, skip_norm_silu
from ..surgery.facade import make_facade
from ..surgery.pristine import is_plain, is_wrapped
from ..surgery.subclass import MARK, plain_class
from ..surgery.unchanged import flatten_leaves
from .parts import refuse_freeu


def refuse_sharing(unet: nn.Module) -> str | None:
    """Return why no resnet can share its skip, or None."""
    from diffusers import UNet2DConditionModel

    if plain_class(unet) is not UNet2DConditionModel:
        return f"{plain_class(unet).__name__} is not UNet2DConditionModel"
    return refuse_freeu(unet)


def find_shareable(unet: nn.Module) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the names of the up-resnets that can share their skips, and why the others cannot."""
    reason = refuse_sharing(unet)
    if reason is not None:
        return (), {"up_blocks": reason}
    reasons = {name: refuse_resnet(resnet) for name, resnet in _list_resnets(unet)}
    unshared = {name: reason for name, reason in reasons.items() if reason is not None}
    return tuple(name for name in reasons if name not in unshared), unshared


def _list_resnets(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the up blocks' resnets in the order in which they run; the last skip is the first's."""
    blocks = enumerate(unet.up_blocks)
    return [(f"up_blocks.{i}.resnets.{j}", resnet) for i, block in blocks for j, resnet in enumerate(block.resnets)]


def read_weights(unet: nn.Module, names: Sequence[str]) -> list[Any]:
    """Return the weights that shared parts depend on, for :func:`difffast.surgery.unchanged.are_same`."""
    modules = [
        getattr(unet.get_submodule(name), part) for name in names for part in ("norm1", "conv1", "conv_shortcut")
    ]
    return flatten_leaves([weight for module in modules for weight in (module.weight, module.bias)])


def share(
    unet: nn.Module, skips: Sequence[Tensor], bottleneck: Tensor, names: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute what depends on the skips alone, per resnet in ``names``: parts of conv1's and conv_shortcut's outputs.

    Args:
        skips: the encoder's skip tensors [B, C, H, W] in the order in which it made them.
        bottleneck: what the mid block returned.
    """
    parts = {}
    for i, ((name, resnet), skip) in enumerate(zip(_list_resnets(unet), reversed(skips), strict=True)):
        if name in names:
            parts[name] = _shared_part(resnet, skip) if i else _whole_part(resnet, bottleneck, skip)
    return parts


def _whole_part(resnet: Any, hidden: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the first resnet's parts: up to the time embedding everything is shared."""
    both = torch.cat([hidden, skip], 1)
    return resnet.conv1(resnet.nonlinearity(resnet.norm1(both))), resnet.conv_shortcut(both)


def _shared_part(resnet: Any, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Compute any other's parts: the skip's channels but for those in a norm group with some hidden channels."""
    norm = resnet.norm1
    own = norm.num_channels - skip.shape[1]
    groups, end = _cut(norm, own)
    through = convolve_channels(resnet.conv_shortcut, skip, slice(own, None), None)
    if groups == norm.num_groups:
        return through.new_zeros(()), through
    normed = F.group_norm(skip[:, end - own :], norm.num_groups - groups, norm.weight[end:], norm.bias[end:], norm.eps)
    return convolve_channels(resnet.conv1, resnet.nonlinearity(normed), slice(end, None), None), through


def _cut(norm: nn.GroupNorm, own: int) -> tuple[int, int]:
    """Return the norm groups that contain some of the first ``own`` channels, and where the last of them ends."""
    size = norm.num_channels // norm.num_groups
    groups = -(-own // size)
    return groups, groups * size


def refuse_resnet(resnet: nn.Module) -> str | None:
    """Return why a resnet cannot share its skip, or None."""
    from diffusers.models.resnet import ResnetBlock2D

    cls = type(resnet)
    if vars(cls).get(MARK, cls) is not ResnetBlock2D or is_wrapped(resnet):  # asked of every resnet at every key step
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


def make_up_blocks(
    unet: nn.Module,
    skips: Sequence[Tensor],
    parts: Mapping[str, tuple[Tensor, Tensor]],
    repeats: int,
) -> list[nn.Module]:
    """Return facades of the up blocks whose resnets share the skips.

    Each is to be called with skips [B * repeats, 0, H, W] and returns what the block would; but the first resnet takes
    the bottleneck and a skip without channels for [B, ...], not yet repeated.

    Args:
        skips: the encoder's skip tensors [B, C, H, W] in the order in which it made them.
        parts: from :func:`share`; resnets that are not in it run as they are.
        repeats: time steps in the batch, batch-major.
    """
    waiting, blocks = list(skips), []
    for i, block in enumerate(unet.up_blocks):
        stand_ins = []
        for j, resnet in enumerate(block.resnets):
            part = parts.get(f"up_blocks.{i}.resnets.{j}")
            kind = _Whole if part is None else _Split if i or j else _First
            stand_ins.append(kind(resnet, waiting.pop(), part, repeats))
        blocks.append(make_facade(block, {"resnets": stand_ins}))
    return blocks


class _Resnet:
    """In place of an up block's resnet: called with the hidden channels only, it knows the skip and its parts."""

    def __init__(self, resnet: Any, skip: Tensor, part: tuple[Tensor, Tensor] | None, repeats: int) -> None:
        self._resnet, self._skip, self._part, self._repeats = resnet, skip, part, repeats

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
    """The first resnet: only what follows the first convolution is left to do."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        conv1, shortcut = self._part
        stand_ins = {
            "norm1": NormStandIn(self._resnet.norm1, lambda x, _: x[:0]),
            "conv1": lambda _: self._each(conv1),
            "conv_shortcut": lambda _: self._each(shortcut),
        }
        return make_facade(self._resnet, stand_ins)(hidden, *args, **kwargs)


class _Split(_Resnet):
    """Any other: hidden channels, and the skip's channels in a norm group with them."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        resnet, own = self._resnet, hidden.shape[1]
        norm, conv, shortcut = resnet.norm1, resnet.conv1, resnet.conv_shortcut
        groups, end = _cut(norm, own)
        straddling = self._skip[:, : end - own]
        once, through = self._part

        def norm_silu(x: Tensor, silu: bool) -> Tensor:
            rest = (groups, norm.weight[:end], norm.bias[:end], norm.eps)
            if silu and end > own:
                return skip_norm_silu(x, straddling, *rest)[0]
            if silu:
                return group_norm_silu(x, *rest)
            return F.group_norm(torch.cat([x, self._each(straddling)], 1) if end > own else x, *rest)

        stand_ins = {
            "norm1": NormStandIn(norm, norm_silu),
            "conv1": functools.partial(self._convolve, conv, slice(end), once),
            "conv_shortcut": functools.partial(self._convolve, shortcut, slice(own), through),
        }
        return make_facade(resnet, stand_ins)(hidden, *args, **kwargs)

    def _convolve(self, layer: Any, channels: slice, once: Tensor, hidden: Tensor) -> Tensor:
        """Convolve each time step's channels [B * repeats, ...], and add a shared part [B, ...] (or a scalar)."""
        each = convolve_channels(layer, hidden, channels, layer.bias)
        if not once.ndim:
            return each
        by_step = each.unflatten(0, (-1, self._repeats))
        if torch.jit.is_tracing():  # OpenVINO takes the view that is written to for what it is a view of
            return (by_step + once[:, None]).flatten(0, 1)
        by_step.add_(once[:, None])  # in place
        return each
