"""Plans that were found by measuring, shipped as data, and fitted to schedules that were not measured."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from .key_steps import check_int
from .steps import Plan, check_guard

#: Columns of the table.
NAMES = ("balanced", "turbo")
#: With fewer UNet calls every step is too different from its neighbours.
LEAST_CALLS = 12
#: Where nothing was measured: the share of the log-SNR's range that runs in full.
_FULL_SHARE = 0.4
#: Log-SNR by which measured steps and others may differ and still count as the same.
_SAME = 0.05


@dataclass(frozen=True)
class Schedule:
    """What a plan may know of the schedule that it is for.

    Attributes:
        solver: the name of what makes its steps, as in "DPM++ 2M Karras".
        log_snr: the logarithm of the signal-to-noise ratio at every UNet call, natural, of powers; None where it is not
            known.
    """

    solver: str
    log_snr: tuple[float, ...] | None

    @property
    def noise(self) -> tuple[float, ...] | None:
        """The share of noise in the latents at every UNet call: its scale where theirs is 1."""
        if self.log_snr is None:
            return None
        return tuple(1 / math.sqrt(1 + math.exp(min(each, 700.0))) for each in self.log_snr)


@dataclass(frozen=True)
class MeasuredRow:
    """One row of the table: plans for one solver and number of steps.

    Attributes:
        solver, log_snr: of the schedule that was measured.
        steps: denoising steps, as a pipeline is asked for them.
        plans: by name: for every UNet call "K" where it runs and "-" where its output is forecast.
        guards: by name: the guard that the plan was measured with; None: no guard is worth its time.
    """

    solver: str
    steps: int
    log_snr: tuple[float, ...]
    plans: dict[str, str]
    guards: dict[str, float | None]


@functools.cache
def read_rows() -> tuple[MeasuredRow, ...]:
    """Return the table, which bench/measure_plans.py has made with the embedded model."""
    text = resources.files(__package__).joinpath("measured.json").read_text(encoding="utf-8")
    return tuple(
        MeasuredRow(row["solver"], row["steps"], tuple(row["log_snr"]), row["plans"], row["guards"])
        for row in json.loads(text)["rows"]
    )


@dataclass(frozen=True)
class MeasuredPlan:
    """Run the UNet where measurements on a small model say that it must run, and forecast its output elsewhere.

    The table holds plans by solver and number of steps.  Of another number of steps, the nearest is fitted by the
    signal-to-noise ratio: no forecast reaches further in its logarithm than a measured one from the same noise.  Of a
    solver without a row, the first 40% of the logarithm's range run in full, then every other step, and the last.
    Schedules with fewer than 12 UNet calls run in full.

    Args:
        name: of a column of the table, "balanced" or "turbo".
        guard: the largest error that a forecast may be expected to have; with more the step runs.  What a forecast
            would have been off by is measured at the steps that run: relative, times the share of noise in the latents,
            because late errors change little.  Every picture of a batch has a guard of its own: where the UNet runs for
            another, its forecast stands, so that it is the same in any batch.  "measured" takes the table's, and where
            nothing was measured the strictest of them; None never looks.

    Raises:
        TypeError, ValueError: a value of the wrong type, or no such column.
    """

    name: str = "balanced"
    guard: float | Literal["measured"] | None = "measured"

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"name must be one of {', '.join(NAMES)}, got {self.name!r}")
        if self.guard != "measured":
            if isinstance(self.guard, str):
                raise ValueError(f'guard must be "measured", a number or None, got {self.guard!r}')
            check_guard(self.guard)

    def plan(self, total: int, *, start: int = 0, schedule: Schedule | None = None) -> Plan:
        """Return the plan of a schedule with ``total`` UNet calls, of which ``start`` is executed first.

        Args:
            total: the number of UNet calls.
            start: the first step that is executed.
            schedule: what is known of the schedule; None: nothing.

        Raises:
            ValueError: ``total`` < 1, or a schedule of another length.
        """
        if check_int("total", total) < 1:
            raise ValueError(f"a schedule needs at least one step, got {total}")
        known = schedule.log_snr if schedule is not None else None
        if known is not None and len(known) != total:
            raise ValueError(f"the schedule has {len(known)} UNet calls, and the plan is to have {total}")
        forecasts: tuple[int, ...] = ()
        row = self._find_row(schedule)
        if total >= LEAST_CALLS:
            if row is None or known is None:
                forecasts = _choose_without_row(known or tuple(range(total)))
            else:
                forecasts = _fit(row.plans[self.name], row.log_snr, known)
        keys = tuple(step for step in range(total) if step not in set(forecasts))
        plan = Plan(total=total, key_steps=keys, max_batch=1, forecasts=forecasts, guard=self._choose_guard(row))
        return plan.begin_at(start)

    def _choose_guard(self, row: MeasuredRow | None) -> float | None:
        if self.guard != "measured":
            return self.guard
        if row is not None:
            return row.guards[self.name]
        return min(guard for each in read_rows() if (guard := each.guards[self.name]) is not None)

    def _find_row(self, schedule: Schedule | None) -> MeasuredRow | None:
        """Return the row of the solver that has the nearest number of UNet calls, or None."""
        if schedule is None or schedule.log_snr is None:
            return None
        calls, solver = len(schedule.log_snr), schedule.solver
        rows = [row for row in read_rows() if self.name in row.plans]
        same = [row for row in rows if row.solver == solver]
        # The same solver at times that are spaced in another way: forecasts are fitted by the noise.
        same = same or [row for row in rows if row.solver.removesuffix(" Karras") == solver.removesuffix(" Karras")]
        return min(same, key=lambda row: (abs(math.log(calls / len(row.log_snr))), len(row.log_snr)), default=None)


def _fit(plan: str, measured: Sequence[float], schedule: Sequence[float]) -> tuple[int, ...]:
    """Return the steps of a schedule that are forecast, as a measured plan allows."""
    if len(measured) == len(schedule) and all(abs(a - b) < _SAME for a, b in zip(measured, schedule, strict=True)):
        return tuple(step for step, kind in enumerate(plan) if kind == "-")
    keys = [step for step, kind in enumerate(plan) if kind == "K"]
    reach = {}  # key step -> (how many forecasts follow it, how far the last of them is)
    for key, after in zip(keys, [*keys[1:], len(plan)], strict=True):
        reach[key] = (after - key - 1, measured[after - 1] - measured[key])
    forecasts: list[int] = []
    step = 0
    while step < len(schedule):
        key = max((k for k in keys if measured[k] <= schedule[step] + _SAME), default=keys[0])
        most, far = reach[key]
        row = range(step + 1, min(step + 1 + most, len(schedule)))
        near = [each for each in row if schedule[each] - schedule[step] <= far + 1e-9]
        forecasts += near
        step += 1 + len(near)
    return tuple(forecasts)


def _choose_without_row(log_snr: Sequence[float]) -> tuple[int, ...]:
    """Return the steps that are forecast where nothing was measured."""
    full = min(log_snr) + _FULL_SHARE * (max(log_snr) - min(log_snr))
    first = next((step for step, value in enumerate(log_snr) if value >= full), len(log_snr))
    return tuple(step for step in range(max(first, 1), len(log_snr) - 1) if (step - first) % 2 == 1)
