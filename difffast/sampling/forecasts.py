"""Output forecasts: steps whose output is made of those of earlier steps, without the UNet.

Source: AdaptiveDiffusion (arXiv:2410.09873), section 3: late in the schedule the noise prediction changes so slowly
that the last one will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .state import RunState


class Forecasts:
    """Answers the steps that the plan forecasts, but for those whose forecast the guard does not trust.

    Args:
        state: the run's plan and counts.
        noise: the share of noise in the latents at each step, by which errors count; None: all errors count alike.
    """

    def __init__(self, state: RunState, noise: Sequence[float] | None = None) -> None:
        self._state, self._noise = state, noise
        self._known: list[tuple[int, Tensor]] = []  # (step, output) of steps that ran, latest first
        self._measured: list[_Measured] = []  # on their way to the host
        self._change: float | None = None  # of the output from one step to the next, as far as is known

    def heed_guard(self, index: int) -> None:
        """Make this step a key step where its forecast would be further off than the guard allows, or may be."""
        plan = self._state.plan
        if plan.guard is None or not self._known or not plan.is_forecast(index):
            return
        self._read(index)
        distance = index - self._known[0][0]
        if self._change is not None and self._change * distance <= plan.guard:
            return
        if not self._state.stats.guarded:
            expected = "an unknown part" if self._change is None else f"{self._change * distance:.3f}"
            self._state.record(
                f"forecasts became key steps, that of step {index} first: by then the output was expected to have "
                f"changed by {expected} of itself, with guard={plan.guard:g}"
            )
        self._state.stats.guarded += 1
        self._state.plan = plan.add_key_steps([index])

    def answer(self, index: int) -> Tensor | None:
        """Return the forecast of a step's output, or None where the UNet must run."""
        if not self._state.plan.is_forecast(index) or not self._known:
            return None
        self._state.stats.forecast += 1
        return self._predict(index)

    def learn(self, index: int, output: Tensor) -> None:
        """Remember what a step that ran has returned, and measure what a forecast of it would have been off by."""
        plan = self._state.plan
        if not plan.forecasts:
            return
        # What is measured is asked for one step later, or two: see _read.
        if plan.guard is not None and self._known and (plan.is_forecast(index + 1) or plan.is_forecast(index + 2)):
            self._measure(index, output)
        # A copy: the pipeline may write into what it gets.
        self._known = [(index, output.clone()), *self._known[: plan.extrapolate]]

    def forget(self) -> None:
        """Drop all outputs: the next step runs."""
        self._known.clear()
        self._measured.clear()
        self._change = None

    def _predict(self, index: int) -> Tensor:
        known = self._known[: self._state.plan.forecast_degree(index) + 1]
        if len(known) == 1:
            return known[0][1].clone()
        (last, output), (before, earlier) = known
        return torch.lerp(earlier, output, (index - before) / (last - before))

    def _measure(self, index: int, output: Tensor) -> None:
        """Send the error that a forecast would have had on its way: nothing waits for it here.

        It is that of the picture, and of guidance's half of it, that changes most: others have to wait for it.
        """
        true = output.float().flatten(1)
        wrong = ((self._predict(index).float().flatten(1) - true).norm(dim=1) / true.norm(dim=1)).amax()
        if self._noise is not None:
            wrong = wrong * self._noise[index]
        distance = index - self._known[0][0]
        if not wrong.is_cuda:
            self._measured.append(_Measured(index, distance, wrong))
            return
        received = torch.empty((), pin_memory=True)
        received.copy_(wrong, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._measured.append(_Measured(index, distance, received, arrived))

    def _read(self, index: int) -> None:
        """Read the errors that are there.

        A GPU's are read two steps later, when it works at the step in between: it never waits for the host then, and
        a run is the same each time.  Processes that share a run all have to change their plans at the same step.
        """
        shared = self._state.division is not None
        while self._measured and (self._measured[0].arrived is None or shared or self._measured[0].step < index - 1):
            each = self._measured.pop(0)
            if each.arrived is not None:
                each.arrived.synchronize()
            # It is on the host, where NumPy reads it: an operator of PyTorch's would count as waiting for a device.
            error = float(each.error.detach().numpy() if each.error.is_cpu else each.error)
            self._state.stats.forecast_errors[each.step] = error
            self._change = error / each.distance


class _Measured(NamedTuple):
    """An error of a forecast, on its way from a device to the host.

    Attributes:
        step: the step that ran.
        distance: from the step before it that ran.
        error: relative, times the share of noise.
        arrived: when it is on the host; None: it is.
    """

    step: int
    distance: int
    error: Tensor
    arrived: torch.cuda.Event | None = None
