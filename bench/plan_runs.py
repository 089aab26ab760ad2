"""Pictures by plans of forecasts, made fast: what a plan runs as stock does is run once for all plans."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difffast.plan import EncoderPropagation, Plan
from difffast.sites import find_site
from difffast.tuning.profile import Record, Stopped, Trial

#: Pictures a batch.
BATCH = 8


@dataclass(frozen=True)
class Expected:
    """Pictures of prompts in which every step runs.

    Attributes:
        captions: the prompts; the seed of a picture is its place among them.
        images: what the VAE makes of them [N, 3, H, W], from 0 to 1.
        records: of the runs, a batch each.
    """

    captions: tuple[str, ...]
    images: Tensor
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Figures:
    """What a plan gives.

    Attributes:
        calls: of the UNet, a picture, in the mean.
        median, low: PSNR [dB] against :class:`Expected`, the median and the 10th percentile.
    """

    calls: float
    median: float
    low: float


class PlanRuns:
    """Runs of one patched pipeline with one solver and number of steps, each compared with those in full.

    A plan's run begins where its first forecast is: what comes before is replayed from the run in full, which is the
    same up to there.

    Args:
        pipe: the embedded pipeline, patched by "exact".
        report: its report.
        steps: denoising steps.
        fewer: the pictures of fewer steps, by solver, steps and prompts: shared by the cells of a solver.
    """

    def __init__(self, pipe: Any, report: Any, steps: int, fewer: dict[tuple[Any, ...], Tensor]) -> None:
        self._pipe, self._report, self._steps, self._fewer = pipe, report, steps, fewer
        self._settings = find_site(pipe).settings

    def expect(self, captions: Sequence[str]) -> Expected:
        """Make the pictures of prompts with every step in full."""
        made, records = [], []
        for batch in _batches(captions):
            trial = Trial()
            made.append(self.run(EncoderPropagation(key_steps=1), trial, *batch))
            records.append(trial.record)
        return Expected(tuple(captions), self._decode(torch.cat(made)), tuple(records))

    def try_plan(self, plan: Plan, expected: Expected, guard: float | None = None) -> Figures:
        """Make the pictures by a plan, with a guard, and compare them."""
        first = min(plan.forecasts, default=plan.total)
        made, calls = [], []
        for batch, record in zip(_batches(expected.captions), expected.records, strict=True):
            made.append(self.run(replace(plan, guard=guard), Trial(record, first), *batch))
            asked: Counter[int] = self._report.last_run.guarded_for
            calls += [len(plan.key_steps) + asked[number] for number in range(len(batch[0]))]
        median, low = self._compare(torch.cat(made), expected)
        return Figures(statistics.fmean(calls), median, low)

    def try_fewer(self, solver: str, steps: int, expected: Expected) -> tuple[float, float]:
        """Return the PSNR [dB] of pictures with fewer steps, the median and the 10th percentile."""
        key = solver, steps, expected.captions
        if key not in self._fewer:
            full = EncoderPropagation(key_steps=1)
            batches = _batches(expected.captions)
            self._fewer[key] = torch.cat([self.run(full, None, *batch, steps=steps) for batch in batches])
        return self._compare(self._fewer[key], expected)

    def run(
        self, plan: Any, trial: Trial | None, captions: Sequence[str], first: int, steps: int | None = None
    ) -> Tensor | None:
        """Return the latents of a batch of prompts, or None where the trial has stopped the run.

        Args:
            plan: how steps share.
            trial: records or replays; None: neither.
            captions: the prompts.
            first: the seed of the first.
            steps: other than the cell's.
        """
        self._settings.propagation, self._settings.extensions = plan, () if trial is None else (trial,)
        seeds = [torch.Generator().manual_seed(first + number) for number in range(len(captions))]
        try:
            return self._pipe(
                list(captions), num_inference_steps=steps or self._steps, generator=seeds, output_type="latent"
            ).images
        except Stopped:
            return None

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self._pipe.vae
        with torch.no_grad():
            parts = [vae.decode(part / vae.config.scaling_factor).sample for part in latents.split(BATCH)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def _compare(self, latents: Tensor, expected: Expected) -> tuple[float, float]:
        errors = (self._decode(latents) - expected.images).square().flatten(1).mean(1).clamp(min=1e-12)
        psnr = (-10 * errors.log10()).tolist()
        return statistics.median(psnr), float(np.quantile(psnr, 0.1))


def _batches(captions: Sequence[str]) -> list[tuple[Sequence[str], int]]:
    """Return the prompts of every batch with the seed of its first."""
    return [(captions[first : first + BATCH], first) for first in range(0, len(captions), BATCH)]
