"""What each step of a schedule would cost and gain, were it run another way: the profile behind :func:`difffast.tune`.

One run of a prompt is recorded.  A row of steps is tried by replaying the record up to its key step, which takes no
UNet call, and stopping behind the row: how far the latents are off there is its error where it happens.  What becomes
of such an error by the end is measured once for every other step, by going on to the end.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .plan import EncoderPropagation, Plan
from .plan.rows import OuterReuse
from .plan.search import RowCost
from .sampling.extension import Extension, ExtensionRun, RunInfo

#: Longest rows of steps behind a key step that are tried, by kind.
LONGEST = {"forecast": 3, "half": 2, "outer": 3, "decoder": 2}


class Stopped(Exception):  # noqa: N818 - nothing is wrong
    """A trial has seen what it was made for."""


@dataclass
class Record:
    """A run as it was without any approximation.

    Attributes:
        samples: the UNet's input at each step, and the final latents.
        outputs: what the UNet returned at each step.
    """

    samples: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class Trial(Extension, ExtensionRun):
    """Replays a record up to a step, looks at the latents from there on, and stops when it has seen enough.

    Args:
        record: what is replayed; None: everything runs, and is recorded.
        replayed: how many steps are.
        stop: the step at whose call the pipeline is stopped; None: it runs to the end.
    """

    alone = True

    def __init__(self, record: Record | None = None, replayed: int = 0, stop: int | None = None) -> None:
        self.record, self._replayed, self._stop = record or Record(), replayed, stop
        self._recording = record is None
        self.seen: dict[int, Tensor] = {}
        self.seconds: dict[int, float] = {}
        self._began = 0.0

    def begin(self, info: RunInfo) -> ExtensionRun:
        return self

    def edit_call(
        self, call: Mapping[str, Any], step: int, scheduler: Any, stock: Callable[..., Any]
    ) -> Mapping[str, Any]:
        if self._recording:
            self.record.samples.append(call["sample"].clone())
        elif step > self._replayed:
            self.seen[step] = call["sample"].clone()
        if step == self._stop:
            raise Stopped
        _synchronize(call["sample"])
        self._began = time.perf_counter()
        return call

    def replace_output(self, step: int) -> Tensor | None:
        return self.record.outputs[step].clone() if step < self._replayed else None

    def see_output(self, step: int, output: Tensor) -> None:
        _synchronize(output)
        self.seconds[step] = time.perf_counter() - self._began
        if self._recording:
            self.record.outputs.append(output.clone())


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


class Profile:
    """What rows of steps cost, measured on one prompt after another.

    Args:
        run: runs the pipeline once with a plan, and an extension that takes part, on a prompt; returns the final
            latents, or None where the extension has stopped it.
        total: UNet calls in the schedule.
        kinds: the kinds of steps that are tried, of ``difffast.plan.search.KINDS``.
        branch: of outer steps.
    """

    def __init__(
        self, run: Callable[[Plan, Trial, Any], Tensor | None], total: int, kinds: Sequence[str], branch: int = 0
    ) -> None:
        self._run, self.total, self._kinds, self._branch = run, total, kinds, branch
        self._local: dict[tuple[str, int, int], list[float]] = defaultdict(list)  # (kind, key step, length)
        self._grown: dict[int, list[float]] = defaultdict(list)  # of an error of 1 at a step, by the end
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def count_trials(self) -> int:
        """Return how many times :meth:`measure` runs the pipeline for a prompt."""
        return 1 + sum(1 for _ in self._trials())

    def measure(self, prompt: Any) -> Iterator[None]:
        """Measure one prompt; yields after every run."""
        recorder = Trial()
        final = self._run(EncoderPropagation(key_steps=1).plan(self.total), recorder, prompt)
        record = recorder.record
        record.samples.append(final)
        self._seconds["full"] += recorder.seconds.values()
        yield
        for kind, key, length, to_end in self._trials():
            self._try_row(record, prompt, kind, key, length, to_end=to_end)
            yield

    def _trials(self) -> Iterator[tuple[str, int, int, bool]]:
        """Yield (kind, key step, length of the row, whether the run goes on to the end)."""
        for key in range(self.total - 1):
            for kind in self._kinds:
                yield kind, key, min(LONGEST[kind], self.total - 1 - key), False
        for key in range(0, self.total - 2, 2):
            yield "forecast", key, 1, True

    def _try_row(self, record: Record, prompt: Any, kind: str, key: int, length: int, *, to_end: bool) -> None:
        end = key + 1 + length
        stop = None if to_end or end == self.total else end
        trial = Trial(record, key if kind in ("outer", "decoder") else key + 1, stop)
        final = self._run(self._plan(kind, key, length), trial, prompt)
        seen = {**trial.seen, **({} if final is None else {self.total: final})}
        if to_end:
            here, there = (_square(seen[at], record.samples[at]) for at in (end, self.total))
            if here:
                self._grown[end].append(there / here)
            return
        for behind in range(1, length + 1):
            at = key + 1 + behind
            self._local[kind, key, behind].append(_square(seen[at], record.samples[at]))
        self._seconds[kind] += [trial.seconds[step] for step in range(key + 1, end)]

    def _plan(self, kind: str, key: int, length: int) -> Plan:
        """Return the plan in which one row is of a kind, and all other steps run in full."""
        behind = tuple(range(key + 1, key + 1 + length))
        keys = tuple(step for step in range(self.total) if step not in behind or kind == "half")
        return Plan(
            total=self.total,
            key_steps=keys,
            max_batch=1,
            reuse=OuterReuse(self._branch) if kind == "outer" else None,
            halves=behind if kind == "half" else (),
            forecasts=behind if kind == "forecast" else (),
        )

    def rows(self) -> list[RowCost]:
        """Return what has been measured, for :func:`difffast.plan.search.search_plans`."""
        full = statistics.median(self._seconds["full"])
        found = [RowCost("full", 0, full, (0.0,) * self.total)]
        for kind in self._kinds:
            each = statistics.median(self._seconds[kind])
            for length in range(1, LONGEST[kind] + 1):
                errors = tuple(self._error(kind, key, length) for key in range(self.total))
                found.append(RowCost(kind, length, full + length * each, errors))
        return found

    def _error(self, kind: str, key: int, length: int) -> float:
        """Return the mean over the prompts of what a row adds to the final latents' squared error."""
        local = self._local.get((kind, key, length))
        if not local:
            return math.inf
        return statistics.fmean(local) * self._growth(key + 1 + length)

    def _growth(self, at: int) -> float:
        """Return by how much a squared error at a step has grown by the end, between measured steps on a log scale."""
        known = {step: math.log(statistics.fmean(values)) for step, values in self._grown.items() if values}
        known[self.total] = 0.0
        before, after = (max((s for s in known if s <= at), default=min(known)), min(s for s in known if s >= at))
        if before >= after:
            return math.exp(known[after])
        share = (at - before) / (after - before)
        return math.exp((1 - share) * known[before] + share * known[after])


def _square(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).square().mean())
