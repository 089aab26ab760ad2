"""Output forecasts: steps whose output is made of those of earlier steps, without the UNet.

Source: AdaptiveDiffusion (arXiv:2410.09873), section 3: late in the schedule the noise prediction changes so slowly
that the last one will do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .state import RunState


class Forecasts:
    """Answers the steps that the plan forecasts, but for those whose forecast the guard does not trust.

    The guard asks for each picture of a batch.  Where it makes the UNet run for some of them, the others keep their
    forecasts all the same: a picture is the same in any batch.

    Args:
        state: the run's plan and counts.
        count_pictures: tells how many pictures the batch of a call, by its arguments, is known to hold, in what order
            they are in each half of it: 1 where that is not known, and the guard decides for all rows together.
        noise: the share of noise in the latents at each step, by which errors count; None: all errors count alike.
    """

    def __init__(
        self,
        state: RunState,
        count_pictures: Callable[[Mapping[str, Any]], int],
        noise: Sequence[float] | None = None,
    ) -> None:
        self._state, self._count, self._noise = state, count_pictures, noise
        self._pictures: list[_Picture] = []  # none before the first step
        self._trusted: Collection[int] = ()  # numbers of those whose forecast stands, although the step runs
        self._measured: list[_Measured] = []  # on their way to the host

    def heed_guard(self, index: int) -> None:
        """Make this step a key step where a forecast would be further off than the guard allows, or may be."""
        plan = self._state.plan
        if plan.guard is None or not self._pictures or not plan.is_forecast(index):
            return
        self._read(index)
        expected = [each.expect(index) for each in self._pictures]
        trusted = [number for number, change in enumerate(expected) if change is not None and change <= plan.guard]
        if len(trusted) == len(expected):
            return
        if not self._state.stats.guarded:
            known = [change for change in expected if change is not None]
            much = f"{max(known):.3f}" if len(known) == len(expected) else "an unknown part"
            self._state.record(
                f"forecasts became key steps, that of step {index} first: by then the output was expected to have "
                f"changed by {much} of itself, with guard={plan.guard:g}"
            )
        self._state.stats.guarded += 1
        self._state.stats.guarded_for.update(set(range(len(expected))) - set(trusted))
        self._state.plan = plan.add_key_steps([index])
        self._trusted = trusted

    def answer(self, index: int) -> Tensor | None:
        """Return the forecast of a step's output, or None where the UNet must run."""
        if not self._state.plan.is_forecast(index) or not self._pictures:
            return None
        self._state.stats.forecast += 1
        return _join([self._predict(each, index) for each in self._pictures])

    def learn(self, index: int, output: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Remember what a step that ran has returned, and measure what a forecast of it would have been off by.

        Args:
            index: the step.
            output: what it has returned.
            call: the arguments of the UNet call by name.

        Returns:
            ``output``, with the forecasts of the pictures whose guard did not ask for the step.
        """
        plan, trusted = self._state.plan, self._trusted
        self._trusted = ()
        if not plan.forecasts and not trusted:
            return output
        if not self._pictures:
            count = self._count(call) if plan.guard is not None else 1
            self._pictures = [_Picture() for _ in range(count)]
        # What is measured is asked for one step later, or two: see _read.
        wanted = plan.guard is not None and (plan.is_forecast(index + 1) or plan.is_forecast(index + 2))
        # A copy: the pipeline may write into what it gets.
        parts = list(output.clone().unflatten(0, (-1, len(self._pictures))).unbind(1))
        learning = [number for number in range(len(parts)) if number not in trusted]
        if wanted and self._pictures[learning[0]].known:
            self._measure(index, learning, parts)
        for number in learning:
            self._pictures[number].learn(index, parts[number], plan.extrapolate)
        if not trusted:
            return output
        for number in trusted:
            parts[number] = self._predict(self._pictures[number], index)
        return _join(parts)

    def forget(self) -> None:
        """Drop all outputs: the next step runs."""
        self._pictures.clear()
        self._measured.clear()
        self._trusted = ()

    def _predict(self, picture: _Picture, index: int) -> Tensor:
        plan = self._state.plan
        if plan.extrapolate and not plan.is_forecast(index + 1):
            return picture.extend(index)
        return picture.known[0][1]

    def _measure(self, index: int, numbers: Sequence[int], outputs: Sequence[Tensor]) -> None:
        """Send the errors that forecasts would have had on their way: nothing waits for them here.

        A picture's is that of guidance's half of it that changes most.
        """
        distances = {number: index - self._pictures[number].known[0][0] for number in numbers}
        true = torch.stack([outputs[number].float().flatten(1) for number in numbers])
        made = torch.stack([self._predict(self._pictures[number], index).float().flatten(1) for number in numbers])
        wrong = ((made - true).norm(dim=2) / true.norm(dim=2)).amax(1)
        if self._noise is not None:
            wrong = wrong * self._noise[index]
        if not wrong.is_cuda:
            self._measured.append(_Measured(index, distances, wrong))
            return
        received = torch.empty(len(numbers), pin_memory=True)
        received.copy_(wrong, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._measured.append(_Measured(index, distances, received, arrived))

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
            # They are on the host, where NumPy reads them: PyTorch's operators would count as waiting for a device.
            errors = (each.errors.detach().numpy() if each.errors.is_cpu else each.errors).tolist()
            self._state.stats.forecast_errors[each.step] = max(errors)
            for (number, distance), error in zip(each.distances.items(), errors, strict=True):
                self._pictures[number].change = error / distance


class _Picture:
    """What is known of one picture's outputs, or of a whole batch's where its pictures are not told apart.

    Attributes:
        known: (step, output) of the steps that ran for it, latest first.
        change: of its output from one step to the next, as far as it was measured.
    """

    def __init__(self) -> None:
        self.known: list[tuple[int, Tensor]] = []
        self.change: float | None = None

    def learn(self, index: int, output: Tensor, extrapolate: int) -> None:
        """Take in what a step that ran for it has returned."""
        self.known = [(index, output), *self.known[:extrapolate]]

    def expect(self, index: int) -> float | None:
        """Return by what its output is expected to have changed at a step since the last that ran."""
        return None if self.change is None else self.change * (index - self.known[0][0])

    def extend(self, index: int) -> Tensor:
        """Return the line through the last two outputs where it begins one step before, and else the last output."""
        if len(self.known) < 2 or self.known[0][0] < index - 1:
            return self.known[0][1]
        (last, output), (before, earlier) = self.known
        return torch.lerp(earlier, output, (index - before) / (last - before))


@dataclass(frozen=True)
class _Measured:
    """Errors of forecasts, on their way from a device to the host.

    Attributes:
        step: the step that ran.
        distances: of the pictures measured: from the step before it that ran for them, by their number.
        errors: of those pictures: relative, times the share of noise.
        arrived: when they are on the host; None: they are.
    """

    step: int
    distances: Mapping[int, int]
    errors: Tensor
    arrived: torch.cuda.Event | None = None


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Return a new batch of the outputs of its pictures [rows of each, C, H, W]."""
    return torch.stack(parts, 1).flatten(0, 1)
