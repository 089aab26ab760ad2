"""How a run is divided among processes; :mod:`difffast.distributed` divides it among those of a mesh.

Every process runs the same loop with the same scheduler.  What differs is which part of a UNet call it computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..plan import Plan
from ..unet.features import Features
from .extension import RunInfo

#: Who runs the encoder at key steps: all processes that share decoded steps, or one that sends its features.
ENCODERS = ("every process", "one process")


class RunDivision(ABC):
    """Which parts of one run are whose."""

    @abstractmethod
    def compare(self, sample: Tensor, step: int) -> None:
        """Refuse latents that cannot belong to the picture that the other processes make.

        Args:
            sample: the latents [B, C, H, W] that the pipeline gives to the UNet.
            step: the position in the schedule.

        Raises:
            ValueError: they have another shape than at the step before, or the other processes have other ones.
        """

    @abstractmethod
    def take_half(self, call: Mapping[str, Any], reason: str | None) -> tuple[Mapping[str, Any], bool]:
        """Return the part of a call that this process computes, and whether the step before had another part.

        Args:
            call: the UNet's arguments by name.
            reason: why the batch cannot be divided into guidance's halves, or None.
        """

    @abstractmethod
    def join_halves(self, output: Tensor) -> Tensor:
        """Return the whole output [B, C, H, W] of a call whose part was computed by every process."""

    @abstractmethod
    def encode(self, encode: Callable[[], Features], rows: int) -> Features:
        """Return the features of a key step, which ``encode`` makes here, or another process has made.

        Args:
            rows: samples in the batch.
        """

    @abstractmethod
    def forget(self) -> None:
        """Expect features of another structure at the next key step."""

    @abstractmethod
    def widen(self, plan: Plan) -> Plan:
        """Return a plan whose decoder batches are as large as all processes together can take."""

    @abstractmethod
    def take_steps(self, together: range) -> range:
        """Return those of the steps of a decoder batch that this process decodes, at least one."""

    @abstractmethod
    def join_steps(self, outputs: Sequence[Tensor], together: range) -> Sequence[Tensor]:
        """Return the outputs of all steps of a decoder batch, of which ``outputs`` are this process's."""


class Division(ABC):
    """How other processes share the work of one patched pipeline."""

    @abstractmethod
    def begin(self, info: RunInfo, counts: Counter[str], record: Callable[[str], object]) -> RunDivision | None:
        """Begin a run; None: no other process takes part in it.

        Args:
            info: what there is to know of it.
            counts: where "calls" and received "bytes" are counted.
            record: puts a sentence into the report.
        """

    @abstractmethod
    def describe(self) -> Iterator[tuple[str, str]]:
        """Yield (what is divided, how) for reports."""
