"""Meta-unlearning (arXiv 2410.12777): weights from which finetuning does not bring the concept back.

theta' is where an attacker's finetuning on harmful examples leads from theta.  The gradient of a step is

    grad L_erase(theta) + g11 grad L_unrelated(theta) + g12 grad L_related(theta)
    - g21 grad L_harmful(theta') - g22 grad L_related(theta') - g23 grad L_unrelated(theta')

where L is the loss of diffusion, summed over the batches of one epoch: the attack shall fail, and ruin what is benign.
First order: the gradients at theta' are taken for gradients at theta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .denoise import Denoiser
from .examples import Batch, Examples, draw_batches, encode_examples
from .params import Weights
from .ranges import check_finite, check_positive, check_whole

#: g11, g12, g21, g22, g23 as published, and with benign losses held at theta as much as they are raised at theta'.
PUBLISHED = (0.1, 0.01, 0.01, 1.0, 1.0)
BALANCED = (1.1, 1.01, 0.01, 1.0, 1.0)
#: Of the published trainer's own optimiser: weight decay, and the largest norm of a gradient.
PUBLISHED_DECAY, PUBLISHED_CLIP = 1e-4, 1.0
#: Of finite differences, the step over the parameters' norm, as a power of the type's epsilon.
_DIFFERENCE = 1 / 3


@dataclass
class MetaTrap:
    """What an attacker is expected to do, and how much it shall cost.

    Attributes:
        harmful: pairs of a picture and a prompt that show the concept, or :class:`~.examples.Examples`.
        related, unrelated: pairs that do not: near the concept, and far from it.
        gammas: g11, g12, g21, g22, g23, at least 0.  None: :data:`PUBLISHED` with ``compat="published"``, else
            :data:`BALANCED`.  A benign loss that weighs more at theta' than at theta is raised at both, since theta' is
            near: with the published weights benign pictures of a small model were lost within 40 steps.
        batch_size: rows at once.
        learning_rate, weight_decay: of the attacker's optimiser.
        second_order: differentiate through the attack as well, by finite differences, for which it makes plain gradient
            steps; as dear again as the attack, twice over, and its weights are kept at every step.  First order has
            about half of this trap: with g22 = g23 = 0, doubling g21 comes near it for less.
        compat: "published" draws new noise for the benign losses at theta', and makes the trainer's own steps as
            published, with a weight decay of 1e-4 and gradients clipped to a norm of 1 unless it was given others.
            None draws noise once: the difference of the losses before and after the attack is free of two draws' noise.

    Raises:
        ValueError: a number out of its range, or an unknown ``compat``.
    """

    harmful: Examples | Sequence[tuple[Any, str]]
    related: Examples | Sequence[tuple[Any, str]]
    unrelated: Examples | Sequence[tuple[Any, str]]
    gammas: tuple[float, float, float, float, float] | None = None
    batch_size: int = 1
    learning_rate: float = 1e-5
    weight_decay: float = 1e-4
    second_order: bool = False
    compat: str | None = None

    def __post_init__(self) -> None:
        if self.compat not in (None, "published"):
            raise ValueError(f"compat must be None or 'published', got {self.compat!r}")
        if self.gammas is None:
            self.gammas = BALANCED if self.compat is None else PUBLISHED
        if len(self.gammas) != 5 or not all(0 <= gamma < float("inf") for gamma in self.gammas):
            raise ValueError(f"gammas must be five finite numbers of at least 0, got {self.gammas}")
        check_whole("batch_size", self.batch_size)
        check_positive("learning_rate", self.learning_rate)
        check_finite("weight_decay", self.weight_decay, 0)

    def encode(self, pipe: Any) -> None:
        """Encode the pictures and prompts, once; :class:`~.examples.Examples` stay as they are."""
        for name in ("harmful", "related", "unrelated"):
            examples = getattr(self, name)
            if not isinstance(examples, Examples):
                setattr(self, name, encode_examples(pipe, examples))


class Attack:
    """A trap that was set: it adds its gradients to those of the parameters.

    The copy of the weights that the attack moves, and its optimiser's moments, are made once.
    """

    def __init__(self, trap: MetaTrap, denoiser: Denoiser, weights: Weights, generator: torch.Generator) -> None:
        self._trap, self._denoiser, self._weights, self._generator = trap, denoiser, weights, generator
        self._shadow = weights.copy()
        if trap.second_order:
            self._optimiser = torch.optim.SGD(weights.parameters, lr=trap.learning_rate)
        else:
            self._optimiser = weights.make_adamw(trap.learning_rate, trap.weight_decay)

    def add_gradients(self) -> dict[str, float]:
        """Add all gradients but the erasing loss's to the parameters'; returns the losses, by name."""
        trap, weights = self._trap, self._weights
        g11, g12, g21, g22, g23 = trap.gammas
        before = weights.gradients()
        unrelated, related = self._draw(trap.unrelated), self._draw(trap.related)
        trail = self._attack()
        if trap.compat == "published":
            related_after, unrelated_after = self._draw(trap.related), self._draw(trap.unrelated)
        else:
            related_after, unrelated_after = related, unrelated
        with weights.hold(self._shadow):
            losses = {
                "harmful after": self._backward(self._draw(trap.harmful), -g21),
                "related after": self._backward(related_after, -g22),
                "unrelated after": self._backward(unrelated_after, -g23),
            }
        if trap.second_order:
            weights.set_gradients(self._differentiate(trail, weights.gradients()))
        losses |= {"unrelated": self._backward(unrelated, g11), "related": self._backward(related, g12)}
        for parameter, gradient in zip(weights.parameters, before, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return losses

    def _draw(self, examples: Any) -> list[Batch]:
        return list(draw_batches(self._denoiser, examples, self._trap.batch_size, self._generator))

    def _backward(self, batches: Sequence[Batch], weight: float) -> float:
        """Add the gradients of ``weight`` times the sum of the batches' losses; returns the sum without it."""
        if not weight:
            return 0.0
        total = 0.0
        for batch in batches:
            loss = batch.loss(self._denoiser)
            (weight * loss).backward()
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def _forget(self) -> None:
        """Make the optimiser a fresh one."""
        for state in self._optimiser.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def _attack(self) -> list[tuple[Batch, list[Tensor]]]:
        """Finetune the shadow on the harmful examples; of each step, the batch and, if needed, the weights before."""
        trap, weights = self._trap, self._weights
        with torch.no_grad():
            for shadow, parameter in zip(self._shadow, weights.parameters, strict=True):
                shadow.copy_(parameter)
        self._forget()
        trail = []
        with weights.hold(self._shadow):
            for batch in self._draw(trap.harmful):
                trail.append((batch, weights.copy() if trap.second_order else []))
                self._backward([batch], 1.0)
                if not trap.second_order:
                    torch.nn.utils.clip_grad_norm_(weights.parameters, 1.0)
                self._optimiser.step()
                self._optimiser.zero_grad()
        return trail

    def _differentiate(self, trail: Sequence[tuple[Batch, list[Tensor]]], gradient: list[Tensor]) -> list[Tensor]:
        """Take a gradient at the end of the attack back to its start: g <- g - lr H g, step by step."""
        weights, rate = self._weights, self._trap.learning_rate
        for batch, values in reversed(trail):
            size = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradient]))
            if not size:
                continue
            scale = 1 + torch.linalg.vector_norm(torch.stack([v.norm() for v in values]))
            epsilon = float(torch.finfo(values[0].dtype).eps ** _DIFFERENCE * scale / size)
            slopes = []
            for sign in (1, -1):
                moved = [v + sign * epsilon * g for v, g in zip(values, gradient, strict=True)]
                with weights.hold(moved):
                    self._backward([batch], 1.0)
                    slopes.append(weights.gradients())
            gradient = [g - rate * (up - down) / (2 * epsilon) for g, up, down in zip(gradient, *slopes, strict=True)]
        return gradient
