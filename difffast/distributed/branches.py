"""Guidance's halves on two processes: each runs the UNet on one half of the batch, and gets the other's output.

Source: the batch of classifier-free guidance, [unconditional, conditional], as Diffusers' pipelines make it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..surgery.trees import take_half
from .exchange import gather


class Branches:
    """Divides the calls of one run.

    Args:
        group: the two processes.
        half: which half is this process's, 0 or 1.
        counts: where "calls" and "bytes" are counted.
    """

    def __init__(self, group: Any, half: int, counts: Counter[str]) -> None:
        self._group, self._half, self._counts = group, half, counts
        self._divided: bool | None = None  # at the last call
        self._text: tuple[Tensor, Tensor] | None = None

    def take(self, call: Mapping[str, Any], reason: str | None) -> tuple[Mapping[str, Any], bool]:
        """Return this process's half of a call, or all of it, and whether it was the other way before."""
        divided = reason is None
        changed = self._divided is not None and divided != self._divided
        self._divided = divided
        if not divided:
            return call, changed
        half = take_half(dict(call), call["sample"].shape[0], self._half)
        text = call.get("encoder_hidden_states")
        if isinstance(text, Tensor):  # the same tensor at every step, so that its keys and values are made once
            if self._text is None or self._text[0] is not text:
                self._text = (text, half["encoder_hidden_states"])
            half["encoder_hidden_states"] = self._text[1]
        return half, changed

    def join(self, output: Tensor) -> Tensor:
        """Return the output of the whole batch."""
        if not self._divided:
            return output
        return gather(output, self._group, "guidance's halves", self._counts).flatten(0, 1)
