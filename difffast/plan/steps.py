"""A plan: what every step of a schedule does, as data that prints, plots and travels as JSON."""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..renamed import warn_renamed
from .batches import count_together
from .key_steps import check_int
from .plot import plot_plan
from .rows import OuterReuse, PlanStep

#: Most UNet calls in a plan: no schedule has as many, and what is written by hand or damaged cannot fill the memory.
MAX_STEPS = 100_000

#: Fields of plans in JSON under names that they had before.
_RENAMED = {"keys": "key_steps", "optimised": "full_steps"}


@dataclass(frozen=True)
class Plan:
    """What every step of a schedule does; pure data.  ``print(plan)`` shows it as a table.

    Args:
        total: the number of UNet calls.
        key_steps: the key steps in order, beginning with 0.
        max_batch: the most steps decoded in one batch; 1 decodes step by step.
        batches: the sizes that a batch may have, in order and beginning with 1, so that few programs serve all; None
            allows any.
        reuse: if it is given, steps between key steps run the outer layers alone, and nothing is decoded ahead.
        full_steps: the steps at which embeddings or latents are changed on purpose; all of them are key steps.
        halves: the steps that run only the conditional half of the batch.  Where a key step does, the steps up to the
            next key step have to do so too: the other half has left them nothing to reuse.
        forecasts: the steps at which nothing of the UNet runs: their output is forecast from what the steps before have
            returned.  None of them is a key step, runs one half, or is part of a decoder's batch.
        extrapolate: the degree of a forecast that stands alone between two other steps: 0 repeats the last output, 1
            extends the line through the last two.  In longer rows forecasts repeat it, because lines leave the truth.
        guard: the largest error that a forecast may be expected to have, by what is measured at the steps that run:
            relative, times the share of noise in the latents; with more the step runs.  None never measures.
        start: the first step that is executed, which is the first key step; later than 0 in img2img, for instance.

    Raises:
        TypeError, ValueError: a value of the wrong type, or one that does not fit the others.
    """

    total: int
    key_steps: tuple[int, ...]
    max_batch: int
    batches: tuple[int, ...] | None = None
    reuse: OuterReuse | None = None
    full_steps: tuple[int, ...] = ()
    halves: tuple[int, ...] = ()
    start: int = 0
    forecasts: tuple[int, ...] = ()
    extrapolate: int = 0
    guard: float | None = None

    def __post_init__(self) -> None:
        for name in ("total", "max_batch", "start"):
            object.__setattr__(self, name, check_int(name, getattr(self, name)))
        if not 1 <= self.total <= MAX_STEPS:
            raise ValueError(f"total must lie in 1 .. {MAX_STEPS}, got {self.total}")
        if self.max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {self.max_batch}")
        for name in (
            "key_steps",
            "full_steps",
            "halves",
            "forecasts",
            *(("batches",) if self.batches is not None else ()),
        ):
            object.__setattr__(self, name, _check_ascending(name, getattr(self, name)))
        if self.batches is not None and self.batches[:1] != (1,):
            raise ValueError(f"batches must ascend from 1, got {self.batches}")
        self._check_reuse()
        self._check_steps()

    def _check_reuse(self) -> None:
        if self.reuse is None:
            return
        if not isinstance(self.reuse, OuterReuse):
            raise TypeError(f"reuse must be an OuterReuse or None, got {self.reuse!r}")
        if self.max_batch != 1:
            raise ValueError(f"reuse steps depend on the latents: max_batch must be 1, got {self.max_batch}")

    def _check_steps(self) -> None:
        keys = self.key_steps
        if not 0 <= self.start < self.total:
            raise ValueError(f"start must lie in 0 .. {self.total - 1}, got {self.start}")
        if keys[:1] != (self.start,) or keys[-1] >= self.total:
            shown = f"{keys[0]} .. {keys[-1]}" if keys else "none"
            raise ValueError(f"key_steps must begin with {self.start} and end before step {self.total}, got {shown}")
        others = sorted(set(self.full_steps) - set(keys))
        if others:
            raise ValueError(f"full_steps must be key steps, got {others[0]}, which is none")
        halves, first = set(self.halves), self.start + 1
        wrong = [step for step in self.halves if not first <= step < self.total]
        wrong = wrong or sorted(halves & set(self.full_steps))
        if wrong:
            raise ValueError(f"halves must lie in {first} .. {self.total - 1} and not be full steps, got {wrong[0]}")
        for key in keys:
            rest = set(range(key, self.segment_end(key))) - halves - set(self.forecasts) if key in halves else ()
            if rest:
                raise ValueError(f"step {min(rest)} needs both halves of key step {key}, which runs one")
        self._check_forecasts()

    def _check_forecasts(self) -> None:
        forecasts, runs, first = self.forecasts, set(self.key_steps) | set(self.halves), self.start + 1
        wrong = [step for step in forecasts if not first <= step < self.total]
        if wrong:
            raise ValueError(f"forecasts must lie in {first} .. {self.total - 1}, got {wrong[0]}")
        if runs & set(forecasts):
            raise ValueError(f"step {min(runs & set(forecasts))} is a forecast, and so no key step and no half step")
        if check_int("extrapolate", self.extrapolate) not in (0, 1):
            raise ValueError(f"extrapolate must be 0 or 1, got {self.extrapolate!r}")
        for step in forecasts if self.extrapolate else ():
            if self.forecast_degree(step) and bisect_left(self.key_steps, step) < 2:
                raise ValueError(f"a forecast of degree 1 needs 2 steps that run before it, got forecasts {forecasts}")
        check_guard(self.guard)

    def add_full_steps(self, steps: Iterable[int]) -> Plan:
        """Return this plan with more steps that run in full, because embeddings or latents are changed at them."""
        steps = tuple(sorted({*self.full_steps, *steps}))
        halves = tuple(step for step in self.halves if step not in steps)
        return replace(self.add_key_steps(steps), full_steps=steps, halves=halves)

    def add_key_steps(self, steps: Iterable[int]) -> Plan:
        """Return this plan with more key steps, whatever it has for them now."""
        steps = set(steps)
        forecasts = tuple(step for step in self.forecasts if step not in steps)
        return replace(self, key_steps=tuple(sorted({*self.key_steps, *steps})), forecasts=forecasts)

    def check_total(self, total: int) -> Plan:
        """Return this plan.

        Raises:
            ValueError: it is not for schedules with ``total`` UNet calls.
        """
        if total != self.total:
            raise ValueError(f"this plan is for schedules with {self.total} UNet calls, got one with {total}")
        return self

    def cut(self, total: int) -> Plan:
        """Return the first ``total`` steps of this plan."""
        names = ("key_steps", "full_steps", "halves", "forecasts")
        return replace(self, total=total, **{n: tuple(s for s in getattr(self, n) if s < total) for n in names})

    def extend(self, total: int) -> Plan:
        """Return this plan for a schedule of ``total`` UNet calls, the further ones of which run in full."""
        return replace(self, total=total, key_steps=(*self.key_steps, *range(self.total, total)))

    @property
    def shares(self) -> bool:
        """Whether any step takes from another what it does not compute itself."""
        return len(self.key_steps) < self.total - self.start or bool(self.halves)

    def run_in_full(self) -> Plan:
        """Return this plan with every step a key step that runs both halves."""
        return replace(self, key_steps=tuple(range(self.start, self.total)), halves=(), forecasts=())

    def begin_at(self, start: int) -> Plan:
        """Return this plan for a run that executes the steps from ``start`` on."""
        names = ("key_steps", "full_steps", "halves", "forecasts")
        later = {name: {step for step in getattr(self, name) if step > start} for name in names}
        keys, forecasts = later["key_steps"], later["forecasts"]
        keys.add(start)
        forecasts.discard(start)
        # Forecasts that would need more steps before them run in full.
        for step in sorted(forecasts) if self.extrapolate else ():
            if not forecasts & {step - 1, step + 1} and sum(key < step for key in keys) < 2:
                keys.add(step)
                forecasts.remove(step)
        if start in self.full_steps:
            later["full_steps"].add(start)
        return replace(self, start=start, **{name: tuple(sorted(steps)) for name, steps in later.items()})

    def is_key(self, step: int) -> bool:
        """Return whether the plan runs the encoder at this step."""
        return self.key_steps[bisect_right(self.key_steps, step) - 1] == step

    def is_half(self, step: int) -> bool:
        """Return whether the plan runs only the conditional half of the batch at this step."""
        return _contains(self.halves, step)

    def is_forecast(self, step: int) -> bool:
        """Return whether the plan forecasts the output of this step."""
        return _contains(self.forecasts, step)

    def forecast_degree(self, step: int) -> int:
        """Return the degree of this step's forecast."""
        alone = not self.is_forecast(step - 1) and not self.is_forecast(step + 1)
        return self.extrapolate if alone else 0

    def builds_on(self, step: int) -> bool:
        """Return whether a step after ``step``, before the next key step, runs a part of the UNet."""
        return any(not self.is_forecast(each) for each in range(step + 1, self.segment_end(step)))

    def segment_end(self, step: int) -> int:
        """Return the next key step after ``step``, or ``total``."""
        after = bisect_right(self.key_steps, step)
        return self.key_steps[after] if after < len(self.key_steps) else self.total

    def batch(self, step: int) -> range:
        """Return the steps that are decoded in one batch beginning with ``step``.

        Steps that run one half never share a batch with those that run both.
        """
        end = self.segment_end(step)
        if self.forecasts:
            end = next((each for each in range(step + 1, end) if self.is_forecast(each)), end)
        if self.halves:
            half = self.is_half(step)
            end = next((each for each in range(step, end) if self.is_half(each) != half), end)
        return range(step, step + count_together(end - step, self.max_batch, self.batches))

    def step(self, step: int) -> PlanStep:
        """Return the row of a step whose batch begins with it."""
        key = self.is_key(step)
        forecast = self.is_forecast(step)
        reuse = self.reuse is not None and not key and not forecast
        together = (step,) if forecast else tuple(self.batch(step))
        return PlanStep(step, key, together, reuse, self.is_half(step), step in self.full_steps, forecast)

    def steps(self) -> tuple[PlanStep, ...]:
        """Return the rows of the steps that are executed."""
        rows: list[PlanStep] = []
        while len(rows) < self.total - self.start:
            together = self.step(self.start + len(rows)).decoded_with
            rows += [replace(self.step(step), decoded_with=together) for step in together]
        return tuple(rows)

    def plot(self, path: str | Path) -> None:
        """Draw which parts of the UNet run at which step, as PNG or SVG.

        Steps that are decoded in one batch share a frame.  Steps that run only the conditional half of the batch are
        half as high.

        Raises:
            ImportError: matplotlib is missing.
        """
        plot_plan(self.steps(), path)

    def picture(self, path: str | Path) -> None:
        """Do what :meth:`plot` does, under its old name."""
        warn_renamed("Plan.picture", "Plan.plot")
        self.plot(path)

    def to_json(self) -> str:
        """Return the plan as JSON; :meth:`from_json` makes it again."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, unknown or missing fields, or no valid plan; it says what is required.
        """
        try:
            return cls(**_read_fields(json.loads(text)))
        except (TypeError, ValueError, RecursionError) as error:
            message = str(error) if len(str(error)) < 300 else f"{str(error)[:300]} ..."
            raise ValueError(f"this is no plan in JSON: {message}") from None

    def __str__(self) -> str:
        lines = ["step  key  decoded with"]
        for row in self.steps():
            first, last = row.decoded_with[0], row.decoded_with[-1]
            together = "alone" if first == last else f"{first}..{last} (batch of {last - first + 1})"
            if row.reuse:
                together = f"outer layers alone (branch {self.reuse.branch})"
            if row.forecast:
                together = f"forecast, degree {self.forecast_degree(row.step)}"
            more = ", optimised" if row.full else ", conditional half" if row.half else ""
            lines.append(f"{row.step:4d}  {'key' if row.key else '   '}  {together}{more}")
        ahead = self.reuse is None and len(self.key_steps) + len(self.forecasts) < self.total - self.start
        what = "encoder" if ahead else "whole UNet"
        lines.append(f"{len(self.key_steps)} of {self.total - self.start} steps run the {what}")
        if self.forecasts:
            lines.append(f"{len(self.forecasts)} run nothing: their output is forecast")
        return "\n".join(lines)


def check_guard(guard: Any) -> None:
    """Check the error above which forecasts become key steps.

    Raises:
        TypeError, ValueError: it is no number, or not positive and finite.
    """
    if guard is None:
        return
    if isinstance(guard, bool) or not isinstance(guard, (int, float)):
        raise TypeError(f"guard must be a number or None, got {guard!r}")
    if not 0 < guard < math.inf:
        raise ValueError(f"guard must be positive and finite, or None, got {guard}")


def _contains(steps: tuple[int, ...], step: int) -> bool:
    """Return whether a step is one of some in order."""
    at = bisect_left(steps, step)
    return at < len(steps) and steps[at] == step


def _check_ascending(name: str, steps: Any) -> tuple[int, ...]:
    """Return a sequence of integers that increase, as a tuple.

    Raises:
        TypeError, ValueError: it is none, or they do not.
    """
    if not isinstance(steps, Sequence) or isinstance(steps, (str, bytes)):
        raise TypeError(f"{name} must be a sequence of integers, got {steps!r}")
    steps = tuple(check_int(name, step) for step in steps)
    for a, b in pairwise(steps):
        if a >= b:
            raise ValueError(f"{name} must increase strictly, got {b} after {a}")
    return steps


def _read_fields(given: Any) -> dict[str, Any]:
    """Return the arguments of :class:`Plan` from what was in the JSON, whose values :class:`Plan` checks.

    Raises:
        TypeError, ValueError: names that a plan does not have, or lacks.
    """
    if not isinstance(given, dict):
        raise TypeError(f"a plan must be an object, got {given!r}")
    found = {}
    for name, value in given.items():
        new = _RENAMED.get(name, name)
        if new not in Plan.__dataclass_fields__:
            raise ValueError(f"a plan has no {name!r}; it has {', '.join(Plan.__dataclass_fields__)}")
        if new in found:
            raise ValueError(f"{name!r} must be given once, and is also there by its other name")
        found[new] = value
    for name in ("total", "key_steps", "max_batch"):
        if name not in found:
            raise ValueError(f"a plan needs {name!r}, got {', '.join(found) or 'nothing'}")
    if found.get("reuse") is not None:
        found["reuse"] = _read_reuse(found["reuse"])
    return found


def _read_reuse(given: Any) -> OuterReuse:
    """Return how outer layers are reused; plans of 0.1 hold the whole configuration, whose degree was called order."""
    if not isinstance(given, dict) or "branch" not in given:
        raise TypeError(f"reuse must be an object with a branch, got {given!r}")
    return OuterReuse(given["branch"], given.get("extrapolate", given.get("order", 0)))
