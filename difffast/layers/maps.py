"""Attention maps of chosen layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..plots import new_figure, save_figure
from ..words import Words
from .cross_attention import find_layers

#: Which rows of the UNet's batch are meant.
Rows = Literal["prompt", "negative", "all"]


@dataclass(repr=False)
class AttentionMaps:
    """The cross-attention maps of one image, averaged over heads; :func:`difffast.collect_maps` makes them.

    ``print(maps)`` shows what there is.  B are the rows of the prompts, one for each image, or those of the negative
    prompts, or all rows of the UNet's batch.  Where the batch has three parts, they are not told apart.

    Attributes:
        layers: the names of the chosen layers.
        tokens: the chosen words, and positions in the tokenised prompt; None means all.
        latest: for each layer, the maps [all rows, N, M] of the latest step, with their graph where gradients are
            enabled.
        steps: for each layer, over how many steps :meth:`mean` goes.  Steps that do not run the encoder add nothing for
            its layers.
        prompts: the words of each prompt; empty where the pipeline was not given its prompt as text.
    """

    layers: tuple[str, ...]
    tokens: tuple[int | str, ...] | None
    latest: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    prompts: tuple[Words, ...] = ()
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _size: tuple[int, int] = (0, 0)
    _guided: bool = False
    _chosen: tuple[int, ...] | None = None

    @property
    def positions(self) -> tuple[int, ...] | None:
        """The positions of the chosen tokens in the tokenised prompt, in the order of the maps' M; None means all.

        Raises:
            ValueError: a chosen word is in none of the prompts, or the prompt is not known as text.
        """
        if self._chosen is None and self.tokens is not None:
            return self._resolve(self.tokens)
        return self._chosen

    def _resolve(self, tokens: Sequence[int | str]) -> tuple[int, ...]:
        found = [(each,) if isinstance(each, int) else self._find(each) for each in tokens]
        return tuple(dict.fromkeys(position for each in found for position in each))

    def _find(self, word: str) -> tuple[int, ...]:
        """Return the positions that a word has in any of the prompts."""
        if not self.prompts:
            raise ValueError(f"the word {word!r} cannot be found: the pipeline got no prompt as text; choose positions")
        found: set[int] = set()
        for number, prompt in enumerate(self.prompts, 1):
            try:
                found.update(prompt.find(word))
            except ValueError:
                if number == len(self.prompts) and not found:
                    raise
        return tuple(sorted(found))

    def mean(self, layer: str | None = None, *, rows: Rows = "prompt") -> Tensor:
        """Return the mean over the steps [B, N, M] of one layer, or of all chosen layers if they are of one size.

        Args:
            layer: its name; None: all.
            rows: those of the "prompt", of the "negative" prompt, or "all" rows of the UNet's batch.

        Raises:
            ValueError: unknown layer or rows, nothing collected yet, layers of several sizes, or no negative prompt.
        """
        means = self._means(layer, rows)
        sizes = {name: each.shape[1] for name, each in means.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"the chosen layers differ in size (pixels: {sizes}); name one, or choose layers of one size"
            )
        return torch.stack(list(means.values())).mean(0)

    def grid(self, layer: str | None = None, *, rows: Rows = "prompt") -> Tensor:
        """Return the mean over the steps as pictures [B, M, height, width].

        Takes the arguments of :meth:`mean`.  Of layers of several sizes, the smaller ones are enlarged (bilinear) to
        the size of the largest.

        Raises:
            ValueError: unknown layer or rows, nothing collected yet, or no negative prompt.
        """
        pictures = [
            mean.unflatten(1, self.picture_size(mean.shape[1])).permute(0, 3, 1, 2)
            for mean in self._means(layer, rows).values()
        ]
        size = max(each.shape[2:] for each in pictures)
        large = [
            each if each.shape[2:] == size else functional.interpolate(each, size, mode="bilinear") for each in pictures
        ]
        return torch.stack(large).mean(0)

    def locate(self, word: str, layer: str | None = None) -> Tensor:
        """Return where a word of the prompt, or several in a row, went: [B, height, width], the mean over its tokens.

        Args:
            word: as the prompt writes it; all places where the prompt has it count.
            layer: its name; None: the mean over all, as :meth:`grid` makes it.

        Raises:
            ValueError: a prompt does not have the word, its tokens were not collected, or as :meth:`grid`.
        """
        pictures = self.grid(layer)
        self._find(word)
        columns = self.positions or tuple(range(pictures.shape[1]))
        found = []
        for row, picture in enumerate(pictures):
            positions = self.prompts[row * len(self.prompts) // len(pictures)].find(word)
            if not set(positions) <= set(columns):
                raise ValueError(f"the tokens {positions} of {word!r} were not collected, only {columns}")
            found.append(picture[[columns.index(each) for each in positions]].mean(0))
        return torch.stack(found)

    def plot(self, path: str | Path, layer: str | None = None) -> None:
        """Draw where every chosen word of the prompt went, as PNG or SVG: a row of maps for each image.

        Each map goes from its own least value (dark) to its largest.  Where the prompt is not known as text, the maps
        are those of positions.

        Args:
            path: of the picture.
            layer: its name; None: the mean over all, as :meth:`grid` makes it.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: as :meth:`grid`.
        """
        pictures = self.grid(layer)
        columns = self.positions or tuple(range(pictures.shape[1]))
        rows = []
        for row, picture in enumerate(pictures):
            named = [(str(each), (each,)) for each in columns]
            if self.prompts:
                words = self.prompts[row * len(self.prompts) // len(pictures)].words
                named = [(word, places) for word, places in words if set(places) <= set(columns)] or named
            rows.append([(word, picture[[columns.index(each) for each in places]].mean(0)) for word, places in named])
        across = max(map(len, rows))
        figure = new_figure(figsize=(max(4, 1.3 * across), 1.7 * len(rows)))
        for axes, maps in zip(figure.subplots(len(rows), across, squeeze=False), rows, strict=True):
            for axis in axes:
                axis.set_axis_off()
            for axis, (word, each) in zip(axes, maps, strict=False):
                axis.imshow(each.float().cpu().numpy(), cmap="magma")
                axis.set_title(word, size=9)
        save_figure(figure, path)

    def __repr__(self) -> str:
        chosen = "all tokens" if self.tokens is None else f"tokens {self.tokens}"
        if not self.steps:
            return f"AttentionMaps of {len(self.layers)} layers, {chosen}; nothing has been collected yet"
        lines = [f"AttentionMaps of {len(self.steps)} layers, {chosen}"]
        for prompt in self.prompts:
            words = (f"{word} {' '.join(map(str, places))}" for word, places in prompt.words)
            lines.append(f"  {prompt.text!r}, words with their tokens: {', '.join(words)}")
        groups: dict[tuple[str, tuple[int, int], int], list[str]] = {}
        for name, steps in self.steps.items():
            size = self.picture_size(self._sums[name].shape[1])
            groups.setdefault((".".join(name.split(".")[:2]), size, steps), []).append(name)
        for (place, (height, width), steps), names in groups.items():
            lines.append(f"  {place}: {len(names)} layers of {height}x{width}, {steps} steps")
        total = len(next(iter(self._sums.values())))
        negative = self._count_negative(total)
        lines.append(f"  rows: {total - negative} of the prompt, {negative} of the negative prompt")
        return "\n".join(lines)

    def picture_size(self, pixels: int) -> tuple[int, int]:
        """Return the (height, width) of maps with this number of pixels."""
        height, width = self._size
        while height * width > pixels:
            height, width = -(-height // 2), -(-width // 2)  # each level halves both, rounding up
        return height, width

    def reset(self, prompts: Sequence[Words] = (), guided: bool = False) -> None:
        """Forget everything that was collected, as at the start of a new image.

        Args:
            prompts: the words of the new image's prompts.
            guided: whether the first half of the UNet's batch belongs to negative prompts.

        Raises:
            ValueError: none of the prompts has a chosen word.
        """
        for values in (self.latest, self.steps, self._sums):
            values.clear()
        self.prompts, self._guided, self._chosen = tuple(prompts), guided, None
        if self.prompts and self.tokens is not None:
            self._chosen = self._resolve(self.tokens)

    def columns(self, keys: int) -> list[int]:
        """Return the chosen positions in a text of ``keys`` tokens.

        Raises:
            ValueError: a chosen position is beyond its end.
        """
        positions = self.positions
        if positions is None:
            return list(range(keys))
        if max(positions) >= keys:
            raise ValueError(f"tokens must lie in 0 .. {keys - 1}, got {max(positions)}")
        return list(positions)

    def add(self, layer: str, maps: Tensor, size: tuple[int, int]) -> None:
        """Add maps [B, steps, N, M] of a layer; ``size`` is the latents' height and width."""
        self._size = size
        self.latest[layer] = maps[:, -1]
        total, kept = maps.detach().sum(1), self._sums.get(layer)
        if kept is not None and len(kept) != len(total):
            # Guidance was switched on or off on the way: the rows that all steps have are the prompt's.
            rows, self._guided = min(len(kept), len(total)), False
            kept, total = kept[-rows:], total[-rows:]
        self._sums[layer] = total if kept is None else kept + total
        self.steps[layer] = self.steps.get(layer, 0) + maps.shape[1]

    def _count_negative(self, total: int) -> int:
        """Return how many of the batch's rows, which come first, belong to negative prompts."""
        return total // 2 if self._guided and total % 2 == 0 else 0

    def _means(self, layer: str | None, rows: Rows) -> dict[str, Tensor]:
        """Return the mean over the steps of every layer that is meant."""
        if layer is not None and layer not in self.layers:
            raise ValueError(f"layer must be one of {', '.join(self.layers)}, got {layer!r}")
        if rows not in ("prompt", "negative", "all"):
            raise ValueError(f'rows must be "prompt", "negative" or "all", got {rows!r}')
        names = [name for name in ((layer,) if layer else self.layers) if name in self._sums]
        if not names:
            raise ValueError("no maps have been collected yet: run the pipeline inside the `with` block")
        first = self._count_negative(len(self._sums[names[0]]))
        if rows == "negative" and not first:
            raise ValueError("no row is known to belong to a negative prompt: no guidance, or a batch of three parts")
        meant = {"prompt": slice(first, None), "negative": slice(first), "all": slice(None)}[rows]
        return {name: self._sums[name][meant] / self.steps[name] for name in names}


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
