"""Stable Diffusion 1.5's UNet at its full size on a CPU: one image as it is drawn, exact savings in a short run.

It takes an hour, so ``difffast bench`` runs it by name only.  On a GPU the other suites are of full size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import registry
import torch
import workloads
from registry import Case, Gate, Provider
from session import REPLAY
from workloads import Images


def cases(size: str, model: str | None) -> list[Case]:
    if model is not None or size != "cpu":
        return []
    presets = {provider.name: provider for provider in registry.presets()}
    turbo, exact = presets["difffast turbo"], presets["difffast exact"]
    # Not gated against the same plan run in the plainest way: that is the unet suite's work, and would take long here.
    balanced = replace(presets["difffast balanced"], gate=turbo.gate)
    savings = [saving for saving in registry.savings() if saving.gate == Gate()]
    return [
        _image(50, [balanced, turbo, registry.deepcache(3), registry.reuse(3)], rounds=(2, 3), weight=50),
        _image(2, [exact, registry.stock_channels_last(), *savings], rounds=(5, 9), weight=12),
    ]


@pytest.mark.benchmark(timer=REPLAY)
def test_full_size(benchmark, session, case):
    session.report(benchmark, case)


def _image(steps: int, providers: Sequence[Provider], *, rounds: tuple[int, int], weight: float) -> Case:
    name, latent = "SD1.5", workloads.latent_size("SD1.5", full=True)
    return Case(
        group="full size",
        name=f"{name}, {steps} steps at {latent}x{latent}, guidance on, one image",
        shapes={"pipeline": name, "latent": latent, "steps": steps, "batch": 1},
        dtype="float32",
        device="cpu",
        build=lambda: Images(
            workloads.stages(name, full=True, batch=1, device="cpu", dtype=torch.float32),
            steps,
            latent=True,
            unet_only=True,
        ),
        providers=(registry.stock(), *providers),
        timed="seconds inside the UNet",
        headline=providers[0].name,
        rounds=rounds,
        weight=weight,
    )
