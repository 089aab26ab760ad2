"""The fastest plans for each error: dynamic programming over what rows of steps cost and what they do to the picture.

A schedule is cut into rows: a key step that runs in full, and a few steps behind it that run less.  The errors of rows
add up, as long as they are small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .rows import OuterReuse
from .steps import Plan

#: What a step behind a key step runs, by its letter in :attr:`RowCost.kinds`.
KINDS = {
    "forecast": "nothing: its output is that of the key step",
    "line": "nothing: its output lies on the line through the last two",
    "half": "the conditional half of the batch",
    "outer": "the outer layers",
    "decoder": "the decoder, on the key step's features",
}
#: Units of time in a full call; times are rounded to them.
_UNITS = 20


@dataclass(frozen=True)
class RowCost:
    """A key step and what the steps behind it run.

    Attributes:
        kind: of the steps behind the key step, one of ``KINDS``.
        length: how many there are; 0 for a key step alone.
        seconds: of the whole row.
        errors: what the row adds to the final error, by its key step; inf where it is not allowed.
    """

    kind: str
    length: int
    seconds: float
    errors: tuple[float, ...]


@dataclass(frozen=True)
class FoundPlan:
    """A plan with the seconds and the error that it should have."""

    plan: Plan
    seconds: float
    error: float


def search_plans(total: int, rows: Sequence[RowCost], branch: int = 0, start: int = 0) -> list[FoundPlan]:
    """Return the plans with the least error for every time that a plan can take, the fastest first.

    No plan of the list is slower than another and has a larger error.

    Args:
        total: UNet calls in the schedule.
        rows: what may be used; one of them is the key step alone.
        branch: of outer steps.
        start: the first step that is executed.

    Raises:
        ValueError: a row of length 0 is missing, or two kinds of steps are there that no plan can mix: outer and
            decoder steps, or lone forecasts of both degrees.
    """
    alone = next((row for row in rows if row.length == 0), None)
    if alone is None:
        raise ValueError("rows must hold the key step alone, of length 0")
    if {"outer", "decoder"} <= {row.kind for row in rows}:
        raise ValueError("a plan has outer steps or decoder steps, not both")
    if {("forecast", 1), ("line", 1)} <= {(row.kind, row.length) for row in rows}:
        raise ValueError("lone forecasts of a plan are all of one degree, not both")
    unit = alone.seconds / _UNITS
    units = [max(1, round(row.seconds / unit)) for row in rows]
    #: By step: time in units -> (error, row that ends here).
    best: list[dict[int, tuple[float, int]]] = [{} for _ in range(total + 1)]
    best[start] = {0: (0.0, -1)}
    for step in range(start, total):
        for number, row in enumerate(rows):
            end = step + 1 + row.length
            if end > total or not math.isfinite(row.errors[step]):
                continue
            for time, (error, _) in best[step].items():
                reached = best[end].get(time + units[number])
                if reached is None or error + row.errors[step] < reached[0]:
                    best[end][time + units[number]] = (error + row.errors[step], number)
    found, least = [], math.inf
    for time, (error, _) in sorted(best[total].items()):
        if error < least:
            least = error
            cut = _trace(best, units, rows, (start, total), time)
            seconds = sum(rows[number].seconds for _, number in cut)
            plan = _make_plan((start, total), [(step, rows[number]) for step, number in cut], branch)
            found.append(FoundPlan(plan, seconds, error))
    return found


def _trace(
    best: Sequence[dict[int, tuple[float, int]]],
    units: Sequence[int],
    rows: Sequence[RowCost],
    steps: tuple[int, int],
    time: int,
) -> list[tuple[int, int]]:
    """Return the rows, as (key step, number), that lead from the first step to the end in a time."""
    start, step = steps
    cut = []
    while step > start:
        number = best[step][time][1]
        step, time = step - 1 - rows[number].length, time - units[number]
        cut.append((step, number))
    return cut[::-1]


def _make_plan(steps: tuple[int, int], cut: Sequence[tuple[int, RowCost]], branch: int) -> Plan:
    """Return the plan that is cut into these rows."""
    keys, halves, forecasts = [], [], []
    for key, row in cut:
        keys.append(key)
        behind = range(key + 1, key + 1 + row.length)
        if row.kind == "half":
            keys += behind
            halves += behind
        elif row.kind in ("forecast", "line"):
            forecasts += behind
    kinds = {row.kind for _, row in cut if row.length}
    return Plan(
        total=steps[1],
        start=steps[0],
        key_steps=tuple(keys),
        max_batch=1,
        reuse=OuterReuse(branch) if "outer" in kinds else None,
        halves=tuple(halves),
        forecasts=tuple(forecasts),
        extrapolate=int("line" in kinds),
    )
