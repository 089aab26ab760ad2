"""What content suppression does and when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...plan.key_steps import check_int
from .embeds import check_words

MODES = ("paper", "reference")
#: Denoising steps that the numbers of :class:`SuppressionConfig` are for.
_STEPS = 50


@dataclass(frozen=True)
class SuppressionConfig:
    """Take words of a prompt out of its picture, and leave the rest of the picture: SuppressEOT with optimisation.

    Patch with ``difffast.patch(pipe, steering=difffast.Suppression("glasses"))`` and call the pipeline with a prompt
    that has the word.  The first fifth of the steps has the prompt's own text; then that of :func:`difffast.suppress`,
    which up to two fifths is optimised at every step, so that the words' attention maps change and the others' stay.
    Images of a call whose prompt has none of the words are left as they are.

    Args:
        words: what is not wanted, each as the prompts write it.
        mode: "paper" is the loss of the paper, with steps adapted to any schedule, and a guard that goes back to the
            best text where a loss rises or is not finite.  "reference" is what the released code does: cosine distances
            of the maps, and of the self-attention maps at the words' pixels; steps as for 50; no guard.
        alpha: how fast large singular values fall (:func:`difffast.suppress`).
        reencode: take the other words' rows from the prompt without the words (:func:`difffast.suppress`).
        optimise: the steps that optimise, the first and the one after the last, of 50.
        iterations: updates in such a step; 0 optimises nothing.
        step_size: of the text at the first step; it falls as the root of a line from 1 to 0.1 over the schedule.  For
            inverted pictures the authors take 5.
        weight: of the words' own maps against the others'.
        layers: the attn2 layers whose maps are used, as names or shell-style patterns, all of one size.  None takes the
            deepest level of the encoder that has any, with its counterpart in the decoder.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    words: str | Sequence[str]
    mode: Literal["paper", "reference"] = "paper"
    alpha: float = 1.0
    reencode: bool = False
    optimise: tuple[int, int] = (10, 20)
    iterations: int = 10
    step_size: float = 20.0
    weight: float = 0.5
    layers: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", check_words(self.words))
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        for name in ("alpha", "step_size", "weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number and not negative, got {value!r}")
        if check_int("iterations", self.iterations) < 0:
            raise ValueError(f"iterations must not be negative, got {self.iterations}")
        steps = tuple(check_int("optimise", each) for each in self.optimise)
        if len(steps) != 2 or not 0 <= steps[0] <= steps[1] <= _STEPS:
            raise ValueError(f"optimise must be two steps of {_STEPS} in order, got {self.optimise!r}")
        object.__setattr__(self, "optimise", steps)

    def find_window(self, total: int) -> tuple[int, int]:
        """Return the steps of ``total`` that optimise: the first, and the one after the last."""
        if self.mode == "reference":
            return min(self.optimise[0], total), min(self.optimise[1], total)
        return round(self.optimise[0] * total / _STEPS), round(self.optimise[1] * total / _STEPS)

    def step_size_at(self, step: int, total: int) -> float:
        """Return the step size of the text at a step of ``total``."""
        return self.step_size * math.sqrt(1 - 0.9 * step / max(total - 1, 1))
