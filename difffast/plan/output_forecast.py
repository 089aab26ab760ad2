"""Whole steps without the UNet, as a user asks for them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .key_steps import check_int, check_key_steps, count_from, resolve_key_steps
from .steps import Plan, check_guard


@dataclass(frozen=True)
class OutputForecast:
    """Run the UNet at some steps only; elsewhere its output is forecast from what it returned at the steps before.

    The scheduler, callbacks and progress bar run at every step.  Where a step is skipped decides what it costs: an
    early one changes the picture, a late one hardly anything.  So the steps before ``start``, and the last one, run.

    Sources: AdaptiveDiffusion (arXiv:2410.09873) for repeated outputs, ZEUS and Spectrum for forecasts at 20 to 30
    steps.

    Args:
        key_steps: which steps run the UNet.
            - An int m: every m-th step from ``start`` on, all before it, and the last.
            - A sequence: these steps, 0 among them.
        start: the share of the schedule that runs in full before the first forecast, where ``key_steps`` is an int.
        extrapolate: 0 repeats the last output.  1 extends the line through the last two where a forecast stands alone;
            rows of forecasts repeat it.
        longest: the most forecasts in a row.
        guard: the largest error that a forecast may be expected to have; with more the step runs.  What a forecast
            would have been off by is measured at the steps that run: relative, times the share of noise in the latents,
            because late errors change little.  Every picture of a batch has a guard of its own: where the UNet runs for
            another, its forecast stands, so that it is the same in any batch.  None never measures.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    key_steps: Iterable[int] | int = 2
    start: float = 0.4
    extrapolate: int = 0
    longest: int = 3
    guard: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.key_steps, Iterable) or isinstance(self.key_steps, str):
            check_int("key_steps", self.key_steps)
        object.__setattr__(self, "key_steps", check_key_steps(self.key_steps))
        if isinstance(self.start, bool) or not isinstance(self.start, (int, float)):
            raise TypeError(f"start must be a number, got {self.start!r}")
        if not 0 <= self.start <= 1:
            raise ValueError(f"start must lie between 0 and 1, got {self.start}")
        if check_int("extrapolate", self.extrapolate) not in (0, 1):
            raise ValueError(f"extrapolate must be 0 or 1, got {self.extrapolate}")
        if check_int("longest", self.longest) < 1:
            raise ValueError(f"longest must be at least 1, got {self.longest}")
        check_guard(self.guard)

    def plan(self, total: int, *, start: int = 0) -> Plan:
        """Return the plan of a schedule with ``total`` UNet calls, of which ``start`` is executed first.

        Key steps that are given are counted from there.  The share that runs in full is of the whole schedule.

        Raises:
            ValueError: ``total`` < 1, a key step outside ``0 .. total - 1``, more than ``longest`` forecasts in a row,
                or a forecast with fewer steps before it than its degree needs.
        """
        keys = set(count_from(start, resolve_key_steps("key_steps", self.key_steps, total), total))
        executed = range(start, total)
        if isinstance(self.key_steps, int):
            first = max(math.ceil(self.start * total), start + self.extrapolate + 1)
            keys = {step for step in executed if step < first or (step - first + 1) % self.key_steps == 0}
            keys.add(total - 1)
        forecasts = tuple(step for step in executed if step not in keys)
        row = 0
        for step in executed:
            row = 0 if step in keys else row + 1
            if row > self.longest:
                raise ValueError(
                    f"at most {self.longest} steps in a row may be forecast, got {row} up to step {step}: "
                    "more key steps, or a larger longest"
                )
        return Plan(
            total=total,
            key_steps=tuple(sorted(keys)),
            max_batch=1,
            forecasts=forecasts,
            extrapolate=self.extrapolate,
            guard=self.guard,
            start=start,
        )
