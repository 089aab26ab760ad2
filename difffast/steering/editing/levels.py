"""Levels of a UNet, as edits count them: 0 has the latents' size, and each further one half of it, rounded up."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

#: Levels from which self-attention is edited, and that of the unconditional half.
SELF_LEVEL, UNCOND_SELF_LEVEL = 2, 1
#: The level whose maps the local blend looks at.
BLEND_LEVEL = 2


def find_size(size: tuple[int, int], level: int) -> tuple[int, int]:
    """Return the (height, width) of a level of latents of a size."""
    return -(-size[0] // 2**level), -(-size[1] // 2**level)


def find_levels(unet: nn.Module, layers: Iterable[str]) -> set[int] | None:
    """Return the levels on which layers of a UNet are, by their names; None: its blocks do not tell.

    Args:
        unet: the UNet.
        layers: names of its modules.
    """
    down, up = getattr(unet, "down_blocks", None), getattr(unet, "up_blocks", None)
    if down is None or up is None or not all(hasattr(block, "downsamplers") for block in down):
        return None
    halved = [block.downsamplers is not None for block in down]
    deepest, found = sum(halved), set()
    doubled = [getattr(block, "upsamplers", None) is not None for block in up]
    for name in layers:
        kind, place = (*name.split("."), "")[:2]
        if kind == "mid_block":
            found.add(deepest)
        elif kind in ("down_blocks", "up_blocks") and place.isdecimal():
            index = int(place)
            found.add(sum(halved[:index]) if kind == "down_blocks" else deepest - sum(doubled[:index]))
        else:
            return None
    return found
