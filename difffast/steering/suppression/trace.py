"""What content suppression makes of prompts, and its record of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Suppressed:
    """One prompt of a call.

    Attributes:
        removed, kept: positions of the words that go, and of the others.
        text: [T, D], regularised; None: the prompt has none of the words.
        pooled: SDXL's pooled embedding of the prompt without the words, [1, D'], or None.
    """

    removed: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    text: Tensor | None = None
    pooled: Tensor | None = None


@dataclass
class SuppressionTrace:
    """What happened in a run.

    Attributes:
        removed: per prompt, the positions of the words that were suppressed.
        losses: (step, image) -> the losses before every update.
        outcomes: (step, image) -> "iterations" (all were used) or "diverged" (the best text was put back).
    """

    removed: tuple[tuple[int, ...], ...] = ()
    losses: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    outcomes: dict[tuple[int, int], str] = field(default_factory=dict)
