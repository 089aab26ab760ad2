"""Classifier-free guidance by one half of the batch: the other is it less their difference at an earlier step.

Source: CFG-Cache in FasterCache (arXiv 2410.19355), without its weighting of frequencies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..surgery.trees import take_second_half
from .state import RunState


class CfgHalves:
    """Runs the conditional half of [unconditional, conditional] alone where the plan says so.

    Args:
        state: the run's plan and counts.
        refuse: tells why a call, by its arguments, is not known to have these two halves, or None.
        wants_both: tells why both must run whatever the plan says, or None.
    """

    def __init__(
        self,
        state: RunState,
        refuse: Callable[[Mapping[str, Any]], str | None],
        wants_both: Callable[[], str | None],
    ) -> None:
        self._state, self._refuse, self._wants_both = state, refuse, wants_both
        self._difference: Tensor | None = None  # of the halves, at the last step that ran both
        self._text: tuple[Tensor, Tensor] | None = None
        self._both_until = 0

    def restart(self, index: int) -> None:
        """Run both halves up to the next key step: a segment that begins with a forced key step has no difference."""
        if self._state.plan.is_half(index):
            self._both_until = self._state.plan.segment_end(index)

    def runs_half(self, index: int, call: Mapping[str, Any]) -> bool:
        """Return whether this step's call runs the conditional half alone."""
        if not self._state.plan.is_half(index) or index < self._both_until:
            return False
        reason = self._refuse(call) or self._wants_both()
        if reason is not None:
            self._state.record(f"guidance's halves run together: {reason}")
        return reason is None and self._difference is not None

    def prepare(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return the call on the conditional half; the text's half is the same tensor at every step."""
        half = take_second_half(dict(call), call["sample"].shape[0])
        text = call.get("encoder_hidden_states")
        if isinstance(text, Tensor):
            if self._text is None or self._text[0] is not text:
                self._text = (text, half["encoder_hidden_states"])
            half["encoder_hidden_states"] = self._text[1]
        return half

    def complete(self, half: bool, output: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Return what the pipeline gets: both halves, where one was run the other from their last difference.

        Args:
            half: whether the conditional half was run alone.
            output: what was run.
            call: the pipeline's call, by its arguments.
        """
        if half:
            self._state.stats.halves += 1
            return torch.cat([output - self._difference, output])
        if self._state.plan.halves and self._refuse(call) is None:
            unconditional, conditional = output.chunk(2)
            self._difference = conditional - unconditional
        return output

    def forget(self) -> None:
        """Drop what the run has left."""
        self._difference, self._text = None, None
