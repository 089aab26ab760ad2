"""The outer layers of a UNet around a deep feature of another step, as DeepCache (arXiv 2312.00858) reuses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..surgery.facade import StandIn, make_facade, replace_descendants
from .parts import cut_block, find_reentry, run_whole


def run_recording(unet: nn.Module, call: Mapping[str, Any], branch: int) -> tuple[Tensor, Tensor]:
    """Return the UNet's output, and the deep feature [B, C, H, W] that :func:`run_reuse` needs."""
    deep: list[Tensor] = []
    i, j = find_reentry(unet, branch)
    resnet = unet.up_blocks[i].resnets[j]
    of_skip = _count_skip_channels(unet, branch)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        both = args[0] if args else kwargs["input_tensor"]
        deep.append(both[:, : both.shape[1] - of_skip].contiguous())
        return resnet(*args, **kwargs)

    whole = replace_descendants(unet, {f"up_blocks.{i}.resnets.{j}": StandIn(resnet, run)})
    return run_whole(whole, call), deep[0]


def _count_skip_channels(unet: nn.Module, branch: int) -> int:
    """Return the number of channels of the skip with this index."""
    widths = unet.config.block_out_channels
    channels = [widths[0]]
    for width, block in zip(widths, unet.down_blocks, strict=True):
        channels += [width] * (len(block.resnets) + len(block.downsamplers or ()))
    return channels[branch]


def run_reuse(unet: nn.Module, call: Mapping[str, Any], deep: Sequence[Tensor], weights: Tensor, branch: int) -> Tensor:
    """Return the UNet's output [B, C_out, H, W] from its outer layers and deep features of key steps.

    The deep feature contains ControlNet's residual of the middle, and those of the skips below it.

    Args:
        unet: the UNet.
        call: its arguments by name.
        deep: from :func:`run_recording`, one or several.
        weights: [len(deep)], of which the feature is the sum.
        branch: skips made anew besides conv_in's.
    """
    feature = deep[0] if len(deep) == 1 else sum(w * x for w, x in zip(weights.to(deep[0].dtype), deep, strict=True))
    down: list[Any] = []
    left = branch
    for block in unet.down_blocks:
        made = len(block.resnets) + len(block.downsamplers or ())
        if left < made:
            if left:
                down.append(cut_block(block, slice(left), downsamplers=None))
            break
        down.append(block)
        left -= made
    call = _drop_deep_residuals(call, sum(block in down for block in unet.down_blocks))
    i, j = find_reentry(unet, branch)
    children = {
        "down_blocks": down,
        "mid_block": _Deep(feature),
        "up_blocks": [cut_block(unet.up_blocks[i], slice(j, None)), *list(unet.up_blocks)[i + 1 :]],
    }
    return run_whole(make_facade(unet, children), call)


def _drop_deep_residuals(call: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """Leave out what ControlNet adds to the middle, and adapters beyond the first ``blocks`` down blocks."""
    changed = dict(call)
    mid = call.get("mid_block_additional_residual")
    if mid is not None:
        changed["mid_block_additional_residual"] = mid.new_zeros(())
    if call.get("down_intrablock_additional_residuals") is not None:
        changed["down_intrablock_additional_residuals"] = list(call["down_intrablock_additional_residuals"])[:blocks]
    return changed


class _Deep:
    """In place of the mid block: returns a feature."""

    has_cross_attention = False

    def __init__(self, feature: Tensor) -> None:
        self._feature = feature

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        return self._feature
