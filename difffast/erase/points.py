"""Where on a trajectory a concept is erased: latents after some guided moves, and a timestep that fits them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoise import Denoiser
from .text import Conditions


@dataclass(frozen=True)
class Point:
    """One place to erase at.

    Attributes:
        concept: which one, an index.
        moves: how many moves the latents have made from noise.
        latents: [1, C, H, W].
    """

    concept: int
    moves: int
    latents: Tensor


class Points:
    """Draws points: the moves uniform in 0 .. steps - 1, each from a trajectory of its own, or several from one.

    Nine tenths of the work of an ESD step are its trajectory.  With a pool, one trajectory serves several points,
    drawn without repetition: every point alone is as likely as without, only neighbours depend on each other.

    Args:
        denoiser: the model.
        prompts: what trajectories are guided to, one row for each concept.
        guidance_scale: of the trajectories.
        sampler: a context in which the UNet holds the weights that trajectories are made with.
        pool: points for each trajectory; None: one trajectory for each point.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        prompts: Conditions,
        guidance_scale: float,
        sampler: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        pool: int | None = None,
    ) -> None:
        self._denoiser, self._prompts, self._scale = denoiser, prompts, guidance_scale
        self._sampler, self._pool = sampler, pool
        self.waiting: list[Point] = []

    def draw(self, generator: torch.Generator) -> Point:
        """Take the next point, and make a trajectory first if none is waiting."""
        if not self.waiting:
            self.waiting = self._make(generator)
        return self.waiting.pop()

    def choose_moves(self, generator: torch.Generator) -> list[int]:
        """Draw after how many moves the points of one trajectory are."""
        if self._pool is None:
            return [int(torch.randint(self._denoiser.steps, (), generator=generator))]
        return torch.randperm(self._denoiser.steps, generator=generator)[: self._pool].tolist()

    def _make(self, generator: torch.Generator) -> list[Point]:
        concept = int(torch.randint(len(self._prompts), (), generator=generator))
        chosen = self.choose_moves(generator)
        noise = self._denoiser.draw_noise(1, generator)
        with self._sampler():
            moves = self._denoiser.move(noise, max(chosen), self._prompts.take([concept]), self._scale)
            kept = {i: latents for i, latents in enumerate(moves) if i in chosen}
        return [Point(concept, i, kept[i]) for i in chosen]
