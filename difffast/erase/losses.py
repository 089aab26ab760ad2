"""Losses that erase a concept: what the student's prediction for its prompt is pulled to.

e0, ep and ef are predictions for no prompt, for the concept and for the prompt it is erased from; the loss is the mean
square of the student's prediction minus the target.  Predictions are noise or v: the targets are affine combinations
whose weights sum to 1, and so mean the same in both.

| method   | latents come from                       | target                                             |
|----------|-----------------------------------------|----------------------------------------------------|
| esd      | the student                             | e0 - eta (ep - e0) of the stock model              |
| esd-2025 | the stock model                         | ef - eta (ep - e0) of the stock model; ef: ep      |
| sdd      | an average of students (or stock)       | the student's own e0, not differentiated           |

ESD: arXiv 2303.07345 and its implementation of 2025, whose eta is larger by one; SDD: arXiv 2307.05977.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Method:
    """The conventions of one method; ``rate`` and ``eta`` are for Stable Diffusion 1 and 2, and for XL.

    Attributes:
        rate: learning rate.
        eta: strength of the negative guidance; None: the method has none.
        student_samples: whether latents are the student's.
        ema_decay: of the average of students that is the teacher; None: the teacher is the stock model.
    """

    rate: tuple[float, float] = (1e-5, 1e-5)
    eta: tuple[float, float] | None = None
    student_samples: bool = False
    ema_decay: float | None = None


METHODS: dict[str, Method] = {
    "esd": Method(eta=(3.0, 3.0), student_samples=True),
    "esd-2025": Method(rate=(5e-5, 2e-4), eta=(2.0, 1.0)),
    "sdd": Method(ema_decay=0.999),
}


def lead_away(origin: Tensor, null: Tensor, concept: Tensor, eta: float) -> Tensor:
    """Return ESD's target, ``origin`` - eta (concept - null): of 2023 with e0 for the origin, of 2025 with ef or ep."""
    return origin - eta * (concept - null)


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean of the squared differences, in at least float32."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().mean()
