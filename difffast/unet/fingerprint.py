"""What a call of the UNet is given besides latents and time: has it changed since the key step?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..surgery.unchanged import are_same, flatten_leaves, read_autocast
from .parts import RESIDUALS

_ABSENT: list[Any] = [None]
#: Arguments that differ at every step as a matter of course.
FREE = ("sample", "timestep", "return_dict")


class Fingerprint:
    """The arguments that an output depends on besides the latents' values and the time, compared by identity.

    What is in the UNet is not among them (:mod:`.contents`).

    Of ``RESIDUALS`` only presence and shapes are compared: ControlNet says itself when it has run anew
    (:mod:`difffast.sampling.controlnet`), and an adapter's features are copies of the same tensors.

    Args:
        call: the arguments by name.
    """

    def __init__(self, call: Mapping[str, Any]) -> None:
        sample = call["sample"]
        self._parts: dict[str, list[Any]] = {
            "the latents' shape": [sample.shape, sample.dtype, sample.device],
            "autocast's dtype": [read_autocast(sample.device)],
        }
        for name, value in call.items():
            if name not in FREE:
                self._parts[name] = _shapes(value) if name in RESIDUALS else flatten_leaves(value)

    def find_change(self, other: Fingerprint) -> str | None:
        """Return the name of something that may differ, or None."""
        for name in {**self._parts, **other._parts}:
            ours, theirs = self._parts.get(name, _ABSENT), other._parts.get(name, _ABSENT)
            if ours is not theirs and not are_same(ours, theirs):
                return name
        return None


def _shapes(value: Any) -> list[Any]:
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in flatten_leaves(value)]
