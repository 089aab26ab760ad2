"""What exact is made of, on Stable Diffusion 1.5's UNet at its full size, on a CPU.

A quarter of an hour, so ``difffast bench`` runs it by name only.  On a GPU the other suites are of full size.
"""

from __future__ import annotations

import bench_unet
import pytest
import torch
import workloads
from registry import Case
from session import REPLAY

NAME = "SD1.5"


def cases(size: str, model: str | None) -> list[Case]:
    if model is not None or size != "cpu":
        return []
    shapes = {"pipeline": NAME, "latent": workloads.latent_size(NAME, full=True)}
    return [bench_unet.exact_savings(f"{NAME} in full", shapes, _stages, steps=2, rounds=(3, 9), weight=1)]


@pytest.mark.benchmark(timer=REPLAY)
def test_full_size(benchmark, session, case):
    session.report(benchmark, case)


def _stages() -> tuple[workloads.Stage, ...]:
    return workloads.stages(NAME, full=True, batch=1, device="cpu", dtype=torch.float32)
