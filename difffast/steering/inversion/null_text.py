"""Null-text inversion: a text in place of the empty prompt, optimised at every step (arXiv 2211.09794)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..guidance import guide
from .inversion import Inversion
from .moves import Moves

#: Most updates of the null text in a step.
_UPDATES = 10
#: Adam's first rate, and the error at which a step ends early; both methods that optimise have the same.
RATE, ENOUGH = 1e-2, 1e-5


def rate_at(step: int) -> float:
    """Return Adam's rate at a step."""
    return RATE * max(1 - step / 100, 1 / 100)


def is_enough(loss: float, step: int) -> bool:
    """Return whether a step's error is small enough to end it."""
    return loss < ENOUGH * (1 + 2 * step)


def measure_error(moved: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean square error of latents, in float32 at least: half precision has no squares this small."""
    return (moved - wanted).to(torch.promote_types(moved.dtype, torch.float32)).square().mean()


class NullFit:
    """Null texts, step by step.

    Args:
        moves: of the pipeline.
        guidance: the guidance scale.
    """

    def __init__(self, moves: Moves, guidance: float) -> None:
        self._moves, self._guidance = moves, guidance
        self._done: list[Tensor] = []

    def resume(self, earlier: Inversion) -> None:
        """Go on from the steps that an inversion has."""
        if earlier.null is None:
            raise ValueError("it has no null texts")
        self._done = list(earlier.null.to(self._moves.null))

    def optimise(self, latents: Tensor, wanted: Tensor, step: int) -> float:
        """Add a step's text, and return its error; takes latents [1, C, h, w] before and [C, h, w] after the step."""
        before = self._done[-1] if self._done else self._moves.null[0]
        null, loss = optimise_null_text(self._moves, latents, wanted, before, step, self._guidance)
        self._done.append(null)
        return loss

    def predict(self, latents: Tensor, step: int) -> Tensor:
        """Return a done step's guided noise."""
        return self._moves.guide(latents, step, self._guidance, self._done[step][None])

    def collect(self) -> dict[str, Any]:
        """Return what an :class:`Inversion` keeps of it, by field."""
        return {"null": torch.stack(self._done)}


def optimise_null_text(
    moves: Moves, latents: Tensor, wanted: Tensor, null: Tensor, step: int, guidance: float
) -> tuple[Tensor, float]:
    """Return the text [T, D] with which a guided step comes nearest to where it should, and its mean square error.

    Args:
        moves: of the pipeline.
        latents: [1, C, h, w], before the step.
        wanted: [C, h, w], after it.
        null: [T, D], where to begin.
        step: which one.
        guidance: the guidance scale.
    """
    text = null.detach().to(torch.promote_types(null.dtype, torch.float32), copy=True).requires_grad_()
    optimiser = torch.optim.Adam([text], lr=rate_at(step))
    with torch.no_grad():
        own = moves.predict_text(latents, step)
    best, least = null, math.inf
    for _ in range(_UPDATES):
        with torch.enable_grad():
            nothing = moves.predict_null(latents, step, text[None].to(null.dtype))
            moved = moves.forwards(latents, guide(nothing, own, guidance), step)
            loss = measure_error(moved, wanted)
        if not math.isfinite(loss.item()):
            warnings.warn(f"difffast: the null text of step {step} diverged; the best one is kept", stacklevel=5)
            break
        if loss.item() < least:
            best, least = text.detach().to(null.dtype, copy=True), loss.item()
        if is_enough(loss.item(), step):
            break
        (text.grad,) = torch.autograd.grad(loss, [text])
        optimiser.step()
    return best, least
