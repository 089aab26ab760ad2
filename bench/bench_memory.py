"""Peak tensor memory of one image: the weights, and the most that was held above them at once."""

from __future__ import annotations

import pipelines
import providers
import pytest
import torch
from registry import STOCK, Bar, Case
from session import REPLAY
from workloads import Images

STEPS = 50


def cases(size: str, model: str | None) -> list[Case]:
    if model is not None:
        return []
    if size == "cpu":
        return [_memory("SD1.5 (small)", "SD1.5", full=False)]
    return [_memory(name, name, full=True) for name in ("SD1.5", "SDXL", "IF-I")]


@pytest.mark.benchmark(timer=REPLAY)
def test_memory(benchmark, session, case):
    session.report(benchmark, case)


def _memory(title: str, name: str, *, full: bool) -> Case:
    device, dtype = ("cuda", torch.float16) if full else ("cpu", torch.float32)
    return Case(
        group="memory",
        name=f"{title}, {STEPS} steps, batch 1",
        shapes={"pipeline": name, "steps": STEPS, "batch": 1},
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        build=lambda: Images(
            pipelines.stages(name, full=full, batch=1, device=device, dtype=dtype), STEPS, latent=True, memory=True
        ),
        providers=(
            providers.stock(),
            *([providers.stock_compiled()] if full else []),  # what a compiled program holds is only seen on a GPU
            *providers.presets(),
            *(providers.presets(compiled=True) if full else ()),
            *providers.competitors(),
        ),
        timed="peak memory",
        rounds=(0, 0),
        weight=20,
        bars=(Bar("difffast balanced", STOCK, 1.5, of="peak_bytes", source="the decoder's issue"),),
    )
