"""Stable Diffusion 1.5 at its full size on a CPU: what exact is made of, and whole pictures of few steps by engines.

An hour and 21 GB, so ``difffast bench`` runs it by name only.  On a GPU the other suites are of full size.
"""

from __future__ import annotations

from typing import Any

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
#: Who is compared with stock and with plain OpenVINO, by precision.
_EXACT = {
    "f32": ("difffast exact", "difffast exact OpenVINO f32"),
    "bf16": ("difffast exact bfloat16", "difffast exact OpenVINO bf16"),
}


def cases(size: str, model: str | None) -> list[Case]:
    if model is not None or size != "cpu":
        return []
    shapes = {"pipeline": NAME, "latent": pipelines.latent_size(NAME, full=True)}
    return [
        bench_unet.exact_savings(f"{NAME} in full", shapes, _stages, steps=2, rounds=(3, 9), weight=1),
        *(_by_engine(precision) for precision in _EXACT),
        *(_few_steps(shapes, precision) for precision in _EXACT),
    ]


def _by_engine(precision: str) -> Case:
    """In one precision: the models of all would not fit into memory together."""
    return bench_unet.by_engine(
        f"{NAME} in full, {precision}",
        pipelines.latent_size(NAME, full=True),
        _stages,
        steps=2,
        weight=2,
        precisions=(precision,),
        rounds=(2, 5),
        bars=[bar for bar in bench_unet.ENGINE_BARS if precision in bar.provider],
    )


def _few_steps(shapes: dict[str, Any], precision: str) -> Case:
    stocks = [] if precision == "f32" else [providers.stock_bfloat16(), providers.stock_bfloat16(channels_last=True)]
    ours = (*providers.presets(), *providers.openvino_presets(), providers.exact_bfloat16())
    return bench_pipelines.engines(
        f"{NAME} in full, 4 steps, guidance 1, {precision}",
        lambda: _stages()[0],
        {**shapes, "steps": 4, "batch": 1},
        1.0,
        (
            providers.stock(),
            *stocks,
            providers.plain_openvino(precision),
            *(each for each in ours if each.name in _EXACT[precision]),
        ),
        headline=_EXACT[precision][-1],
        rounds=(2, 5),
        weight=2,
        bars=bench_pipelines.FEW_STEPS if precision == "f32" else (),
    )


@pytest.mark.benchmark(timer=REPLAY)
def test_full_size(benchmark, session, case):
    session.report(benchmark, case)


def _stages() -> tuple[workloads.Stage, ...]:
    return pipelines.stages(NAME, full=True, batch=1, device="cpu", dtype=torch.float32)
