"""The record of semantic binding in a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class StepTrace:
    """One image's optimisation at one step.

    Attributes:
        step: its index in the schedule.
        image: which image of the batch.
        kind: "focus" (losses on maps) or "bind".
        losses: before every update; of "bind", the mean over the subjects.
        outcome: "done" (below the threshold), "iterations" (all were used), or "diverged" (the best was kept).
    """

    step: int
    image: int
    kind: str
    losses: list[float] = field(default_factory=list)
    outcome: str = "iterations"


@dataclass
class BindingTrace:
    """What happened in a run.

    Attributes:
        steps: in the order in which they were made.
        maps: per image that was optimised, the subjects' latest maps [K, height, width], probabilities.
        subjects: per such image, the subjects' phrases.
    """

    steps: list[StepTrace] = field(default_factory=list)
    maps: dict[int, Tensor] = field(default_factory=dict)
    subjects: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = ["step  image  what   losses"]
        for each in self.steps:
            losses = " ".join(f"{loss:.4g}" for loss in each.losses)
            lines.append(f"{each.step:4d}  {each.image:5d}  {each.kind:5}  {losses}  ({each.outcome})")
        return "\n".join(lines)
