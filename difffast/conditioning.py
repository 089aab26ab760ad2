"""What an output of the UNet depends on besides the latents' values and the time: has it changed since the key step?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Conditioning:
    """Everything that an output depends on besides the latents' values and the time, compared by identity.

    Holding the tensors makes identity safe (an address cannot be used again); their version counters catch
    in-place edits, except under inference_mode, which has none.
    """

    def __init__(self, call: Mapping[str, Any]) -> None:
        sample = call["sample"]
        self._sample = (sample.shape, sample.dtype, sample.device)
        self._leaves: list[Any] = []
        skipped = ("sample", "timestep", "return_dict")
        self._collect({name: value for name, value in call.items() if name not in skipped})

    def _collect(self, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                self._leaves.append(key)
                self._collect(item)
        elif isinstance(value, (list, tuple)):
            self._leaves.append(len(value))
            for item in value:
                self._collect(item)
        elif isinstance(value, Tensor):
            self._leaves += (value, None if value.is_inference() else value._version)
        else:
            self._leaves.append(value)

    def same(self, other: Conditioning | None) -> bool:
        """Whether nothing but the latents' values and the time may differ."""
        if other is None or self._sample != other._sample or len(self._leaves) != len(other._leaves):
            return False
        return all(a is b or _equal(a, b) for a, b in zip(self._leaves, other._leaves, strict=True))


def _equal(a: Any, b: Any) -> bool:
    plain = (str, int, float, complex, bytes, torch.dtype, torch.device)
    return isinstance(a, plain) and isinstance(b, plain) and a == b
