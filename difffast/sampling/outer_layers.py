"""Feature reuse: the whole UNet at key steps, its outer layers around a cached deep feature in between.

Source: DeepCache (arXiv 2312.00858), section 3.2.
"""

from __future__ import annotations

from torch import Tensor

from ..surgery.trees import take_second_half
from ..unet.outer_layers import run_recording, run_reuse
from ..unet.parts import refuse_freeu
from .state import RunState, Step
from .strategy import Strategy, weigh


class OuterLayers(Strategy):
    """Run the outer layers alone between key steps.

    Args:
        state: the run's plan and counts.
    """

    def __init__(self, state: RunState) -> None:
        super().__init__(state)
        self._deep: list[tuple[int, Tensor, int]] = []  # (step, deep feature, batch) of key steps, latest first

    def predict(self, step: Step) -> Tensor:
        state = self._state
        reason = refuse_freeu(step.unet)
        if reason is not None:
            self.forget()
            state.restart = True  # nothing may build on this step
            state.stats.stock += 1
            state.note(f"stock forward: features cannot be reused: {reason}")
            return step.stock()
        reuse, rows = state.plan.reuse, step.rows
        if self._deep and not state.plan.is_key(step.index):
            state.stats.reused += 1
            deep = [x if batch == rows else take_second_half(x, batch) for _, x, batch in self._deep]
            weights = weigh([at for at, *_ in self._deep], step.index, deep[0].device)
            return step.execute(run_reuse, step.unet, step.call, deep, weights, reuse.branch)
        state.count_key(step.index)
        if not state.plan.builds_on(step.index) and not reuse.extrapolate:
            self._deep.clear()
            return step.run_whole()
        output, feature = step.execute(run_recording, step.unet, step.call, reuse.branch)
        earlier = [each for each in self._deep[: reuse.extrapolate] if each[-1] >= rows]  # half is of no use to both
        self._deep = [(step.index, feature, rows), *earlier]
        return output

    def forget(self) -> None:
        self._deep.clear()
