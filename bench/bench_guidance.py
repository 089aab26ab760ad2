"""What looking at a run, or steering it, costs on top of the image: attention maps, semantic binding."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pipelines
import providers
import pytest
import torch
from registry import Case, Gate, Missing, Provider
from session import REPLAY
from workloads import Images

import difffast

STEPS = 20
TOKENS = [2, 5]


def cases(size: str, model: str | None) -> list[Case]:
    if model is not None:
        return []
    full = size == "gpu"
    device, dtype = ("cuda", torch.float16) if full else ("cpu", torch.float32)
    return [
        Case(
            group="guidance",
            name=f"SD1.5{'' if full else ' (small)'}, {STEPS} steps, batch 1",
            shapes={"pipeline": "SD1.5", "steps": STEPS, "batch": 1, "tokens": len(TOKENS)},
            dtype=str(dtype).removeprefix("torch."),
            device=device,
            build=lambda: Images(pipelines.stages("SD1.5", full=full, batch=1, device=device, dtype=dtype), STEPS),
            providers=(
                providers.stock(),
                providers.difffast("difffast exact", "exact", Gate()),
                maps(),
                binding("object"),
                binding("attribute"),
            ),
            timed="seconds a batch",
            headline="difffast exact, maps",
            rounds=(3, 15),
            weight=6,
        )
    ]


@pytest.mark.benchmark(timer=REPLAY)
def test_guidance(benchmark, session, case):
    session.report(benchmark, case)


def maps() -> Provider:
    """Exact, with the attention maps of two tokens collected from the decoder: the image is the same."""

    def prepare(images: Images, stack: ExitStack) -> None:
        for stage in images.stages:
            stack.enter_context(difffast.patched(stage.pipe, "exact"))
            stack.enter_context(difffast.collect_maps(stage.pipe, layers="up_blocks.*", tokens=TOKENS))

    return providers.on_images("difffast exact, maps", "difffast", prepare, Gate())


def binding(preset: str) -> Provider:
    """Semantic binding: the image is another one on purpose, so that only the work is checked."""

    def prepare(images: Images, stack: ExitStack) -> None:
        if not hasattr(difffast, "SemanticBinding"):
            raise Missing("there is no difffast.SemanticBinding yet")
        for stage in images.stages:
            stack.enter_context(difffast.patched(stage.pipe, "exact", binding=difffast.SemanticBinding(preset)))

    return providers.on_images(f"binding {preset}", "difffast", prepare, Gate(tolerance=math.inf))
