"""Output forecasts: steps whose output is made of those of earlier steps, without the UNet.

Source: AdaptiveDiffusion (arXiv:2410.09873), section 3: late in the schedule the noise prediction changes so slowly
that the last one will do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .state import RunState


class Forecasts:
    """Answers the steps that the plan forecasts, and thins them out where they turn out wrong.

    Args:
        state: the run's plan and counts.
        noise: the share of noise in the latents at each step, by which errors count; None: all errors count alike.
    """

    def __init__(self, state: RunState, noise: Sequence[float] | None = None) -> None:
        self._state, self._noise = state, noise
        self._known: list[tuple[int, Tensor]] = []  # (step, output) of steps that ran, latest first
        self._errors: list[tuple[int, Tensor, torch.cuda.Event | None]] = []  # on their way to the host

    def answer(self, index: int) -> Tensor | None:
        """Return the forecast of a step's output, or None where the UNet must run."""
        self._heed_errors()
        if not self._state.plan.is_forecast(index) or not self._known:
            return None
        self._state.stats.forecast += 1
        return self._predict(index)

    def learn(self, index: int, output: Tensor) -> None:
        """Remember what a step that ran has returned, and measure the forecast before it."""
        plan = self._state.plan
        if not plan.forecasts:
            return
        if plan.guard is not None and self._known and plan.is_forecast(index - 1):
            self._measure(index, output)
        # A copy: the pipeline may write into what it gets.
        self._known = [(index, output.clone()), *self._known[: plan.extrapolate]]

    def forget(self) -> None:
        """Drop all outputs: the next step runs."""
        self._known.clear()
        self._errors.clear()

    def _predict(self, index: int) -> Tensor:
        known = self._known[: self._state.plan.forecast_degree(index) + 1]
        if len(known) == 1:
            return known[0][1].clone()
        (last, output), (before, earlier) = known
        return torch.lerp(earlier, output, (index - before) / (last - before))

    def _measure(self, index: int, output: Tensor) -> None:
        """Send the error of the last forecast on its way: nothing waits for it here."""
        wrong = (self._predict(index - 1).float() - output.float()).norm() / output.float().norm()
        if self._noise is not None:
            wrong = wrong * self._noise[index]
        if not wrong.is_cuda:
            self._errors.append((index, wrong, None))
            return
        received = torch.empty((), pin_memory=True)
        received.copy_(wrong, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._errors.append((index, received, arrived))

    def _heed_errors(self) -> None:
        """Turn half of the forecasts that are left into key steps where an error that has arrived is too large."""
        while self._errors and self._has_arrived(self._errors[0][2]):
            index, error, _ = self._errors.pop(0)
            # It is on the host, where NumPy reads it: an operator of PyTorch's would count as waiting for a device.
            wrong, state = float(error.detach().numpy() if error.is_cpu else error), self._state
            state.stats.forecast_errors[index] = wrong
            left = [step for step in state.plan.forecasts if step > index]
            if left and not wrong <= state.plan.guard:  # an error that is no number is too large
                kept = set(left[1::2])
                state.plan = state.plan.add_key_steps(step for step in left if step not in kept)
                state.record(
                    f"{len(left) - len(kept)} of {len(left)} forecasts became key steps: the one before step {index} "
                    f"was off by {wrong:.3f}, more than guard={state.plan.guard:g}"
                )

    def _has_arrived(self, arrived: torch.cuda.Event | None) -> bool:
        if arrived is not None and self._state.division is not None:
            arrived.synchronize()  # all processes have to change their plans at the same step
        return arrived is None or arrived.query()
