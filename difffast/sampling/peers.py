"""What a run asks of other processes that work on the same pictures; :mod:`difffast.distributed` makes them of a mesh.

Every process runs the same loop with the same scheduler.  What differs is which part of a UNet call it computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..plan import Plan
from .extension import RunInfo


class PeersRun(ABC):
    """The other processes in one run."""

    @abstractmethod
    def take_half(self, call: Mapping[str, Any], step: int, reason: str | None) -> tuple[Mapping[str, Any], bool]:
        """Return the part of a call that this process computes, and whether the step before had another part.

        Args:
            call: the UNet's arguments by name.
            step: the position in the schedule.
            reason: why the batch cannot be divided into guidance's halves, or None.

        Raises:
            ValueError: the other processes make another call.
        """

    @abstractmethod
    def join_halves(self, output: Tensor) -> Tensor:
        """Return the whole output [B, C, H, W] of a call whose part was computed by every process."""

    @abstractmethod
    def widen(self, plan: Plan) -> Plan:
        """Return a plan whose decoder batches are as large as all processes together can take."""

    @abstractmethod
    def take_steps(self, together: range) -> range:
        """Return those of the steps of a decoder batch that this process decodes, at least one."""

    @abstractmethod
    def join_steps(self, outputs: Sequence[Tensor], together: range) -> Sequence[Tensor]:
        """Return the outputs of all steps of a decoder batch, of which ``outputs`` are this process's."""


class Peers(ABC):
    """Other processes that work with one patched pipeline."""

    @abstractmethod
    def begin(self, info: RunInfo, counts: Counter[str]) -> PeersRun | None:
        """Begin a run; None: no other process takes part in it.

        Args:
            info: what there is to know of it.
            counts: where "calls" and received "bytes" are counted.
        """

    @abstractmethod
    def describe(self) -> Iterator[tuple[str, str]]:
        """Yield (what is divided, how) for reports."""
