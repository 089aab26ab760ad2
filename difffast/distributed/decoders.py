"""The steps that are decoded together, on several processes: each decodes a part of them and gets all outputs.

Source: the independence of propagated steps in Faster Diffusion (arXiv 2312.09608), section 3.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..plan import Plan
from .exchange import gather


class Decoders:
    """Divides the decoder batches of one run.

    Args:
        group: the processes.
        place: this process's place among them.
        count: how many they are.
        counts: where "calls" and "bytes" are counted.
    """

    def __init__(self, group: Any, place: int, count: int, counts: Counter[str]) -> None:
        self._group, self._place, self._count, self._counts = group, place, count, counts

    def widen(self, plan: Plan) -> Plan:
        """Return a plan with the batches of all processes together."""
        if self._count == 1:
            return plan
        sizes = plan.batches and (1, *(self._count * size for size in plan.batches))
        return replace(plan, max_batch=self._count * plan.max_batch, batches=sizes)

    def take(self, together: range) -> range:
        """Return this process's steps; one that has none left to do decodes the last one as well."""
        if len(together) == 1:
            return together
        first = self._place * self._share(together)
        return together[first : first + self._share(together)] or together[-1:]

    def join(self, outputs: Sequence[Tensor], together: range) -> Sequence[Tensor]:
        """Return the outputs of all steps; shorter parts are padded with what is dropped again."""
        if self._count == 1 or len(together) == 1:
            return outputs
        padded = [*outputs, *(outputs[-1:] * (self._share(together) - len(outputs)))]
        found = gather(torch.stack(padded), self._group, "decoded steps", self._counts)
        return found.flatten(0, 1)[: len(together)].unbind()

    def _share(self, together: range) -> int:
        return -(-len(together) // self._count)
