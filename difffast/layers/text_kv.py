"""Keys and values of a text, made once a prompt instead of once a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery.unchanged import (
    ProjectionWatch,
    are_same,
    have_equal_bits,
    read_autocast,
    read_projection,
    read_version,
)


class TextKV:
    """Keys and values of one text tensor, per layer: they do not change over the steps.

    An entry holds as long as the layer's weights do: LoRA, hot-swaps, moves and updates are noticed, and so is autocast
    that is switched on or off.

    Args:
        text: the tensor [B * frames, T, D].
        counts: where "computed" and "reused" are counted.
        frames: rows of the text for each sample.  If they are all equal, keys and values are made for one of them; to
            find out, they are compared, which waits for the device once a text.

    Attributes:
        rows: rows of keys and values for each sample.
    """

    def __init__(self, text: Tensor, counts: Counter[str], frames: int = 1) -> None:
        self.text, self._version = text, read_version(text)
        # On CPUs comparing takes microseconds, and tells edits through ``.data`` and NumPy, which are not counted.
        self._values = text.detach().clone() if text.device.type == "cpu" else None
        first = text[::frames]
        equal = frames > 1 and torch.equal(text, first.repeat_interleave(frames, 0))
        self._distinct, self.rows = (first, 1) if equal else (text, frames)
        self._entries: dict[nn.Module, tuple[Any, Any, Tensor, Tensor]] = {}
        self._projected: tuple[list[Any], TextKV] | None = None
        self._all: tuple[Any, ...] | None = None
        self._counts = counts

    def belongs_to(self, text: Any) -> bool:
        """Return whether they are of this very tensor, unchanged."""
        if text is not self.text:
            return False
        return read_version(text) == self._version if self._values is None else have_equal_bits(self._values, text)

    def project(self, projection: nn.Module) -> TextKV:
        """Return those of the text that ``projection`` makes of this one; it is made once as well."""
        state = read_projection(projection)
        if state is not None:
            state.append(read_autocast(self.text.device))
        if state is not None and self._projected is not None and are_same(self._projected[0], state):
            return self._projected[1]
        projected = TextKV(projection(self.text), self._counts)
        self._projected = None if state is None else (state, projected)
        return projected

    def recall_all(self, layers: Any, how: Any) -> Any:
        """Return what :meth:`remember_all` was given for these layers, if all of it still holds, or None."""
        if self._all is None or self._all[0] is not layers or not self._all[3].is_unchanged():
            return None
        if self._all[1] != (how, read_autocast(self.text.device)):
            return None
        self._counts["reused"] += len(self._all[2])
        return self._all[2]

    def remember_all(self, layers: Any, how: Any, found: Any, watch: ProjectionWatch | None) -> None:
        """Remember keys and values of all layers at once.

        Args:
            layers: by name.
            how: what else decides which of them have any.
            found: the pairs (keys, values) by name.
            watch: tells whether they still hold; None: nothing is remembered.
        """
        self._all = None if watch is None else (layers, (how, read_autocast(self.text.device)), found, watch)

    def get(
        self,
        layer: nn.Module,
        state: list[Any] | None,
        project: Callable[[Any, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return the pair (keys, values) of a layer.

        Args:
            layer: the layer.
            state: all that they depend on besides the text, or None where that cannot be told: they are made anew.
            project: makes them.
        """
        entry, autocast = self._entries.get(layer), read_autocast(self.text.device)
        if state is not None and entry is not None and entry[0] is autocast and are_same(entry[1], state):
            self._counts["reused"] += 1
            return entry[2:]
        keys, values = project(layer, self._distinct)
        self._counts["computed"] += 1
        if state is not None:
            self._entries[layer] = (autocast, state, keys, values)
        return keys, values


class LatestTexts:
    """The texts that a run has met last: the whole, and its half.

    Args:
        counts: where "computed" and "reused" are counted.
    """

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        self._known: list[TextKV] = []

    def __len__(self) -> int:
        return len(self._known)

    def find(self, text: Tensor, frames: int) -> TextKV:
        """Return where keys and values of a text [B * frames, T, D] are kept."""
        for kv in self._known:
            if kv.belongs_to(text):
                return kv
        self._known = [TextKV(text, self._counts, frames), *self._known[:1]]
        return self._known[0]

    def forget(self) -> None:
        """Drop all of them."""
        self._known = []
