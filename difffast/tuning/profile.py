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

import numpy as np
import torch
from torch import Tensor

from ..plan import EncoderPropagation, Plan
from ..plan.rows import OuterReuse
from ..plan.search import RowCost
from ..sampling.extension import Extension, ExtensionRun, RunInfo
from .costs import PromptCosts

#: Longest rows of steps behind a key step that are tried, by kind.
LONGEST = {"forecast": 3, "line": 1, "half": 2, "outer": 3, "decoder": 2}
#: Steps from which an error is followed to the end.
_FOLLOWED = 8


class Stopped(Exception):  # noqa: N818 - nothing is wrong
    """A trial has seen what it was made for."""


@dataclass
class Record:
    """A run as it was without any approximation.

    Attributes:
        samples: the UNet's input by step; behind the last, the final latents.
        outputs: what the UNet returned, by step.
        calls: the steps in the order in which they were called.
    """

    calls: list[int] = field(default_factory=list)
    samples: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)


class Trial(Extension, ExtensionRun):
    """Replays a record up to a step, looks at the latents from there on, and stops when it has seen enough.

    Args:
        record: what is replayed; None: everything runs, and is recorded.
        replayed: how many steps are.
        stop: the step at whose call the pipeline is stopped; None: it runs to the end.

    Attributes:
        total: UNet calls in the schedule, whether they are executed or not.
    """

    alone = True

    def __init__(self, record: Record | None = None, replayed: int = 0, stop: int | None = None) -> None:
        self.record, self._replayed, self._stop = record or Record(), replayed, stop
        self._recording = record is None
        self.seen: dict[int, Tensor] = {}
        self.seconds: dict[int, float] = {}
        self._began = 0.0
        self.total = 0

    def begin(self, info: RunInfo) -> ExtensionRun:
        self.total = info.total
        return self

    def edit_call(
        self, call: Mapping[str, Any], step: int, scheduler: Any, stock: Callable[..., Any]
    ) -> Mapping[str, Any]:
        if self._recording:
            self.record.calls.append(step)
            self.record.samples[step] = call["sample"].clone()
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
            self.record.outputs[step] = output.clone()


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


class Profile:
    """What rows of steps cost, measured on one prompt, or one batch of prompts, after another.

    Args:
        run: runs the pipeline once with a plan, or all steps in full, and an extension that takes part, on prompts;
            returns the final latents, or None where the extension has stopped it.
        executed: the UNet calls of the schedule that are executed.
        total: how many there are in it.
        kinds: the kinds of steps that are tried, of ``difffast.plan.search.KINDS``.
        branch: of outer steps.
    """

    def __init__(
        self,
        run: Callable[[Plan | EncoderPropagation, Trial, Any], Tensor | None],
        executed: range,
        total: int,
        kinds: Sequence[str],
        branch: int = 0,
    ) -> None:
        self._run, self.total, self._kinds, self._branch = run, total, kinds, branch
        self.start, self.end = executed.start, executed.stop
        #: What was measured, prompt by prompt.
        self.measured: list[PromptCosts] = []

    def count_trials(self) -> int:
        """Return how many times :meth:`measure` runs the pipeline for a prompt."""
        return 1 + sum(1 for _ in self._trials())

    def measure(self, prompt: Any) -> Iterator[None]:
        """Measure one prompt, or a batch of them; yields after every run."""
        recorder, costs = Trial(), PromptCosts()
        final = self._run(EncoderPropagation(key_steps=1), recorder, prompt)
        record = recorder.record
        record.samples[self.end] = final
        seconds = defaultdict(list, full=list(recorder.seconds.values()))
        yield
        for kind, key, length, to_end in self._trials():
            end = key + 1 + length
            seen, trial = self._try_row(record, prompt, kind, key, length, to_end=to_end)
            images = len(final)
            if to_end:
                here, there = (_square(seen[at], record.samples[at], images) for at in (end, self.end))
                costs.followed[str(end)] = list(zip(here, there, strict=True))
            else:
                for behind in range(1, length + 1):
                    at = key + 1 + behind
                    costs.local[f"{kind} {key} {behind}"] = _square(seen[at], record.samples[at], images)
                seconds[kind] += [trial.seconds[step] for step in range(key + 1, end)]
            yield
        costs.seconds = {kind: statistics.median(each) for kind, each in seconds.items()}
        self.measured.append(costs)

    def _trials(self) -> Iterator[tuple[str, int, int, bool]]:
        """Yield (kind, key step, length of the row, whether the run goes on to the end)."""
        for key in range(self.start, self.end - 1):
            for kind in self._kinds:
                if kind != "line" or key > self.start:
                    yield kind, key, min(LONGEST[kind], self.end - 1 - key), False
        last = self.end - 3 - self.start
        for key in sorted(
            {self.start + round(n * last / (_FOLLOWED - 1)) for n in range(_FOLLOWED)} if last >= 0 else ()
        ):
            yield "forecast", key, 1, True

    def _try_row(
        self, record: Record, prompt: Any, kind: str, key: int, length: int, *, to_end: bool
    ) -> tuple[dict[int, Tensor], Trial]:
        """Return the latents by step behind a row that was run, and the trial."""
        end = key + 1 + length
        stop = None if to_end or end == self.end else end
        trial = Trial(record, key if kind in ("outer", "decoder") else key + 1, stop)
        final = self._run(self._plan(kind, key, length), trial, prompt)
        return {**trial.seen, **({} if final is None else {self.end: final})}, trial

    def _plan(self, kind: str, key: int, length: int) -> Plan:
        """Return the plan in which one row is of a kind, and all other steps run in full."""
        behind = tuple(range(key + 1, key + 1 + length))
        keys = tuple(step for step in range(self.start, self.total) if step not in behind or kind == "half")
        return Plan(
            total=self.total,
            start=self.start,
            key_steps=keys,
            max_batch=1,
            reuse=OuterReuse(self._branch) if kind == "outer" else None,
            halves=behind if kind == "half" else (),
            forecasts=behind if kind in ("forecast", "line") else (),
            extrapolate=int(kind == "line"),
        )

    def rows(self) -> list[RowCost]:
        """Return what has been measured, for :func:`difffast.plan.search.search_plans`."""
        seconds = {
            kind: statistics.median(each.seconds[kind] for each in self.measured) for kind in ("full", *self._kinds)
        }
        full = seconds["full"]
        found = [RowCost("full", 0, full, (0.0,) * self.end)]
        for kind in self._kinds:
            for length in range(1, LONGEST[kind] + 1):
                errors = tuple(self._error(kind, key, length) for key in range(self.end))
                found.append(RowCost(kind, length, full + length * seconds[kind], errors))
        return found

    def _error(self, kind: str, key: int, length: int) -> float:
        """Return the mean over the images of what a row adds to the final latents' squared error."""
        local = [error for each in self.measured for error in each.local.get(f"{kind} {key} {length}", ())]
        return statistics.fmean(local) * self._growth(key + 1 + length) if local else math.inf

    def _growth(self, at: int) -> float:
        """Return by how much a squared error at a step has grown by the end, between measured steps on a log scale."""
        known = {self.end: 0.0}
        for step in {step for each in self.measured for step in each.followed}:
            pairs = [pair for each in self.measured for pair in each.followed.get(step, ())]
            here, there = (sum(each) for each in zip(*pairs, strict=True))
            if here and there:
                known[int(step)] = math.log(there / here)
        steps = sorted(known)
        return math.exp(float(np.interp(at, steps, [known[step] for step in steps])))


def _square(found: Tensor, expected: Tensor, images: int) -> list[float]:
    """Return the mean squared error of each image; guidance has a second row for it, which is the same."""
    return (found[:images].float() - expected[:images].float()).square().flatten(1).mean(1).tolist()
