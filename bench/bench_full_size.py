"""Stable Diffusion 1.5's UNet at its full size on a CPU: one image, and exact's savings in a short run.

It takes an hour, so ``difffast bench`` runs it by name only.  On a GPU the other suites are of full size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import bench_unet
import pytest
import registry
import torch
import workloads
from registry import Case
from session import REPLAY
from workloads import Images

NAME, STEPS = "SD1.5", 50
LATENT = workloads.latent_size(NAME, full=True)


def cases(size: str, model: str | None) -> list[Case]:
    if model is not None or size != "cpu":
        return []
    return [
        image(),
        bench_unet.savings(
            f"{NAME} in full", {"pipeline": NAME, "latent": LATENT}, _stages, steps=2, rounds=(3, 9), weight=12
        ),
    ]


@pytest.mark.benchmark(timer=REPLAY)
def test_full_size(benchmark, session, case):
    session.report(benchmark, case)


def image() -> Case:
    presets = {provider.name: provider for provider in registry.presets()}
    turbo = presets["difffast turbo"]
    # Not gated against the same plan run in the plainest way: that is the unet suite's work, and would take long here.
    balanced = replace(presets["difffast balanced"], gate=turbo.gate)
    return Case(
        group="full size",
        name=f"{NAME} in full at {LATENT}x{LATENT}, {STEPS} DDIM steps, guidance on, one image",
        shapes={"pipeline": NAME, "latent": LATENT, "steps": STEPS, "batch": 1},
        dtype="float32",
        device="cpu",
        build=lambda: Images(_stages(), STEPS, latent=True, unet_only=True),
        providers=(registry.stock(), balanced, turbo, registry.deepcache(3), registry.reuse(3)),
        timed="seconds inside the UNet",
        headline="difffast balanced",
        rounds=(2, 3),
        weight=50,
    )


def _stages() -> Sequence[workloads.Stage]:
    return workloads.stages(NAME, full=True, batch=1, device="cpu", dtype=torch.float32)
