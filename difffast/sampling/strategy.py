"""How a run answers its UNet calls: one object for each way in which steps share work."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .state import RunState, Step


class Strategy(ABC):
    """A way to answer UNet calls from what earlier ones have left.

    Args:
        state: the run's plan and counts.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state

    @abstractmethod
    def predict(self, step: Step) -> Tensor:
        """Return the UNet's output [B, C_out, H, W] at a step."""

    def recall(self, index: int) -> tuple[bool, Tensor] | None:
        """Return an output that was made ahead, with whether it is the conditional half alone; None: there is none."""
        return None

    def forget(self) -> None:  # noqa: B027 - a strategy need not keep anything
        """Drop all that earlier steps have left: the next step is a key step."""


class WholeUNet(Strategy):
    """The whole UNet at every step."""

    def predict(self, step: Step) -> Tensor:
        self._state.count_key(step.index)
        return step.run_whole()


def weigh(known: Sequence[int], step: int, device: torch.device) -> Tensor:
    """Return Lagrange's weights [n] with which values at ``known`` steps make the value at ``step``."""
    weights = torch.empty(len(known), device=device)
    for weight, a in zip(weights, known, strict=True):
        # Filled, not copied: a copy to a GPU would make the sampling loop wait for it.
        weight.fill_(math.prod((step - b) / (a - b) for b in known if b != a))
    return weights
