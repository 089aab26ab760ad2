"""Stable Diffusion 1.5 at its full size on a CPU: what exact is made of, and whole pictures of few steps by engines.

Half an hour and 16 GB, so ``difffast bench`` runs it by name only.  On a GPU the other suites are of full size.
"""

from __future__ import annotations

import bench_pipelines
import bench_unet
import pipelines
import providers
import pytest
import torch
import workloads
from registry import Case
from session import REPLAY

NAME = "SD1.5"
#: Who is compared with stock and with plain OpenVINO.
_EXACT = ("difffast exact", "difffast exact OpenVINO f32")


def cases(size: str, model: str | None) -> list[Case]:
    if model is not None or size != "cpu":
        return []
    shapes = {"pipeline": NAME, "latent": pipelines.latent_size(NAME, full=True)}
    return [
        bench_unet.exact_savings(f"{NAME} in full", shapes, _stages, steps=2, rounds=(3, 9), weight=1),
        bench_unet.by_engine(
            f"{NAME} in full",
            shapes["latent"],
            _stages,
            steps=2,
            weight=2,
            precisions=("f32",),
            rounds=(2, 5),
            bars=bench_unet.ENGINE_BARS[:1],
        ),
        bench_pipelines.engines(
            f"{NAME} in full, 4 steps, guidance 1",
            lambda: _stages()[0],
            {**shapes, "steps": 4, "batch": 1},
            1.0,
            (
                providers.stock(),
                providers.plain_openvino("f32"),
                *(each for each in (*providers.presets(), *providers.openvino_presets()) if each.name in _EXACT),
            ),
            rounds=(2, 5),
            weight=2,
            bars=bench_pipelines.FEW_STEPS,
        ),
    ]


@pytest.mark.benchmark(timer=REPLAY)
def test_full_size(benchmark, session, case):
    session.report(benchmark, case)


def _stages() -> tuple[workloads.Stage, ...]:
    return pipelines.stages(NAME, full=True, batch=1, device="cpu", dtype=torch.float32)
