"""Attention maps of chosen layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .cross_attention import find_layers


@dataclass
class AttentionMaps:
    """The cross-attention maps of one image, averaged over heads; :func:`difffast.collect_maps` makes them.

    B is the batch of the UNet.  With guidance, its first half belongs to the negative prompt.

    Attributes:
        layers: the names of the chosen layers.
        tokens: the chosen positions in the tokenised prompt; None means all.
        latest: for each layer, the maps [B, N, M] of the latest step, with their graph where gradients are enabled.
        steps: for each layer, over how many steps :meth:`mean` goes.  Steps that do not run the encoder add nothing for
            its layers.
    """

    layers: tuple[str, ...]
    tokens: tuple[int, ...] | None
    latest: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    _sums: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _size: tuple[int, int] = (0, 0)

    def mean(self, layer: str | None = None) -> Tensor:
        """Return the mean over the steps [B, N, M] of one layer, or of all chosen layers if they are of one size.

        Raises:
            ValueError: unknown layer, nothing collected yet, or layers of several sizes.
        """
        if layer is not None and layer not in self.layers:
            raise ValueError(f"layer must be one of {', '.join(self.layers)}, got {layer!r}")
        names = [name for name in ((layer,) if layer else self.layers) if name in self._sums]
        if not names:
            raise ValueError("no maps have been collected yet: run the pipeline inside the `with` block")
        sizes = {name: self._sums[name].shape[1] for name in names}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"the chosen layers differ in size (pixels: {sizes}); name one, or choose layers of one size"
            )
        return torch.stack([self._sums[name] / self.steps[name] for name in names]).mean(0)

    def grid(self, layer: str | None = None) -> Tensor:
        """Return :meth:`mean` as pictures [B, M, height, width].

        Raises:
            ValueError: as :meth:`mean`.
        """
        mean = self.mean(layer)
        return mean.unflatten(1, self.picture_size(mean.shape[1])).permute(0, 3, 1, 2)

    def picture_size(self, pixels: int) -> tuple[int, int]:
        """Return the (height, width) of maps with this number of pixels."""
        height, width = self._size
        while height * width > pixels:
            height, width = -(-height // 2), -(-width // 2)  # each level halves both, rounding up
        return height, width

    def reset(self) -> None:
        """Forget everything that was collected, as at the start of a new image."""
        for values in (self.latest, self.steps, self._sums):
            values.clear()

    def columns(self, keys: int) -> list[int]:
        """Return the chosen positions in a text of ``keys`` tokens.

        Raises:
            ValueError: a chosen position is beyond its end.
        """
        if self.tokens is None:
            return list(range(keys))
        if max(self.tokens) >= keys:
            raise ValueError(f"tokens must lie in 0 .. {keys - 1}, got {max(self.tokens)}")
        return list(self.tokens)

    def add(self, layer: str, maps: Tensor, size: tuple[int, int]) -> None:
        """Add maps [B, steps, N, M] of a layer; ``size`` is the latents' height and width."""
        self._size = size
        self.latest[layer] = maps[:, -1]
        total = maps.detach().sum(1)
        self._sums[layer] = self._sums[layer] + total if layer in self._sums else total
        self.steps[layer] = self.steps.get(layer, 0) + maps.shape[1]


def choose_layers(unet: nn.Module, layers: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of cross-attention layers that match any of the shell-style patterns; None: all.

    Raises:
        ValueError: a pattern that matches none.
    """
    names = tuple(find_layers(unet))
    if layers is None:
        return names
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"no cross-attention layer matches {pattern!r}; there are: {', '.join(names)}")
    return tuple(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
