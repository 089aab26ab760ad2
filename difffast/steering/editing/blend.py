"""Local blend: outside of where two words are, the edited picture is the source's.

Source: Prompt-to-Prompt (arXiv 2208.01626), section 3.2, "local editing".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .levels import BLEND_LEVEL, find_size


class LocalBlend:
    """The maps of a word of the source and of one of the target over the steps, and what they leave of an edit.

    Args:
        threshold: the share of a map's largest value above which its word is there.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._source: Tensor | float = 0.0
        self._target: Tensor | float = 0.0

    def add(self, source: Tensor, target: Tensor) -> None:
        """Add maps [n, height, width] of the two words, of any layer and step; all of one size."""
        self._source, self._target = self._source + source, self._target + target

    def mix(self, latents: Tensor) -> Tensor:
        """Return latents [2n, C, H, W], sources before targets, the latter changed only where a word is.

        Raises:
            ValueError: there were no maps.
        """
        if not (isinstance(self._source, Tensor) and isinstance(self._target, Tensor)):
            size = "x".join(map(str, find_size(latents.shape[-2:], BLEND_LEVEL)))
            raise ValueError(f"blend needs a cross-attention layer of {size} pixels, and the UNet's call had none")
        source, target = latents.chunk(2)
        where = self._find(self._source, latents) | self._find(self._target, latents)
        return torch.cat([source, torch.where(where, target, source)])

    def _find(self, maps: Tensor, latents: Tensor) -> Tensor:
        """Return where a word is: bool [n, 1, H, W]."""
        wide = functional.max_pool2d(maps[:, None], 3, stride=1, padding=1)
        large = functional.interpolate(wide, latents.shape[-2:])
        return large > self._threshold * large.amax((2, 3), keepdim=True)
