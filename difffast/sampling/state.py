"""What the parts of a run share: the plan, the counts, and one step as it travels between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from ..plan import Plan
from ..unet.parts import Execute, execute_eagerly, run_whole
from .division import RunDivision
from .stats import RunStats


@dataclass(frozen=True)
class Step:
    """One UNet call of a run.

    Attributes:
        index: its position in the schedule.
        unet: the UNet.
        call: its arguments by name, as ``execute`` takes them.
        execute: runs functions of :mod:`difffast.unet`.
        stock: runs the unpatched call.
        half: whether the call is the conditional half of the batch alone.
        stock_compiled: whether ``stock`` runs the user's own compiled UNet.
    """

    index: int
    unet: nn.Module
    call: Mapping[str, Any]
    execute: Execute
    stock: Callable[[], Tensor]
    half: bool
    stock_compiled: bool = False

    @property
    def rows(self) -> int:
        """Samples in the call's batch."""
        return self.call["sample"].shape[0]

    def run_whole(self) -> Tensor:
        """Run the whole UNet."""
        if self.stock_compiled or self.execute is execute_eagerly:
            return self.stock()
        return self.execute(run_whole, self.unet, self.call)


class RunState:
    """The plan and the counts of a run; the plan may change on the way.

    Args:
        plan: the plan that the settings ask for.
        stats: where everything is counted.
        timesteps: the schedule, of which only a weak reference is kept.
    """

    def __init__(self, plan: Plan, stats: RunStats, timesteps: Tensor) -> None:
        self.plan, self.asked, self.stats = plan, plan, stats
        #: Whether the next step must build on nothing that was before it.
        self.restart = False
        #: Whether what follows this step may be conditioned on something else.
        self.alone = False
        #: The other processes that compute parts of this run's calls, or None.
        self.division: RunDivision | None = None
        self._timesteps = TensorWeakRef(timesteps)

    def timesteps(self) -> Tensor | None:
        """Return the schedule while anything but the run still holds it: a new schedule ends the run and frees it."""
        return self._timesteps()

    def note(self, reason: str) -> None:
        """Put a reason into the report and warn of it, once."""
        if self.record(reason):
            warnings.warn(f"difffast: {reason}", stacklevel=6)

    def record(self, reason: str) -> bool:
        """Put a reason into the report; returns whether it is new."""
        new = reason not in self.stats.reasons
        if new:
            self.stats.reasons.append(reason)
        return new

    def join(self, output: Tensor) -> Tensor:
        """Return the whole output of a call of which other processes may have computed parts."""
        return output if self.division is None else self.division.join_halves(output)

    def count_key(self, index: int) -> None:
        """Count a key step, and whether the plan did not ask for it."""
        self.stats.key += 1
        self.stats.forced += not self.plan.is_key(index)
