"""Whole images, from noise to pixels: Stable Diffusion, SDXL, DeepFloyd IF and its cascade, ControlNet, your own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipelines
import providers
import pytest
import registry
import torch
from registry import Bar, Case, Provider
from session import REPLAY
from workloads import Images, Stage

_GPU_BARS = (
    Bar("difffast exact", registry.COMPILED, 1 / 1.1, source="the decoder's issue"),
    Bar("difffast balanced", registry.COMPILED, 1 / 1.7, source="the decoder's issue"),
    Bar("difffast turbo", registry.COMPILED, 1 / 3.5, source="the planner's issue"),
)

_ENGINES = "the engines' issue"
#: Of whole pictures, text encoder and VAE included.
FEW_STEPS = (
    Bar("difffast exact", registry.STOCK, 0.75, source=_ENGINES),
    Bar("difffast exact OpenVINO f32", registry.STOCK, 0.55, source=_ENGINES),
    Bar("difffast exact OpenVINO f32", f"{registry.PLAIN_OPENVINO} f32", 0.97, source=_ENGINES),
)
_OPENVINO = {
    steps: tuple(
        Bar(f"difffast {preset} OpenVINO {each}", f"{registry.PLAIN_OPENVINO} {each}", at_most, source=_ENGINES)
        for each in ("f32", "bf16")
    )
    for steps, preset, at_most in ((20, "exact", 0.97), (50, "turbo", 0.45))
}


def cases(size: str, model: str | None) -> list[Case]:
    device, dtype = ("cuda", torch.float16) if size == "gpu" else ("cpu", torch.float32)
    full = size == "gpu"

    def published(name: str, steps: int, batch: int, *, scaling: bool = False, bars: Sequence[Bar] = ()) -> Case:
        return pipeline(
            f"{name}{'' if full else ' (small)'}",
            lambda: pipelines.stages(name, full=full, batch=batch, device=device, dtype=dtype),
            {"pipeline": name, "steps": steps, "batch": batch, "latent": pipelines.latent_size(name, full=full)},
            device=device,
            dtype=dtype,
            compiled=full,
            scaling=scaling,
            bars=bars,
        )

    if model is not None:
        return [
            pipeline(
                Path(model).name,
                lambda: (pipelines.checkpoint(model, device=device, dtype=dtype),),
                {"pipeline": Path(model).name, "steps": steps, "batch": 1},
                device=device,
                dtype=dtype,
                compiled=True,
                trained=True,
            )
            for steps in (20, 50)
        ]
    if full:
        return [
            published(name, steps, batch, bars=_GPU_BARS if (name, steps, batch) == ("SD1.5", 50, 1) else ())
            for name in pipelines.NAMES
            for steps in (50, 30, 20)
            for batch in (1, 4)
        ]
    return [
        *(published("SD1.5", steps, 1, scaling=steps == 30) for steps in (50, 30, 20)),
        published("SD1.5", 20, 4, scaling=True),
        *(published(name, 20, 1) for name in pipelines.NAMES[1:]),
        *(_resolution(latent) for latent in (8, 24)),
        *(_engines(steps, guidance) for steps, guidance in ((4, 1.0), (20, 7.5), (50, 7.5))),
    ]


@pytest.mark.benchmark(timer=REPLAY)
def test_pipeline(benchmark, session, case):
    session.report(benchmark, case)


def pipeline(
    name: str,
    stages: Callable[[], Sequence[Stage]],
    shapes: dict[str, Any],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    trained: bool = False,
    scaling: bool = False,
    bars: Sequence[Bar] = (),
) -> Case:
    """Everybody on one pipeline or cascade.

    Args:
        stages: makes it.
        shapes: with "steps" and "batch".
        compiled: stock and difffast with torch.compile as well.
        scaling: one more point of a curve: fewer competitors.
        trained: the weights are: how far an approximation may be from stock is then for its user to judge.
    """
    steps, batch = shapes["steps"], shapes["batch"]
    compared: tuple[Provider, ...] = (
        providers.stock(),
        *providers.presets(guarded=trained),
        *([providers.stock_compiled(), *providers.presets(compiled=True, guarded=trained)] if compiled else []),
        providers.deepcache(3, 0),
        providers.deepcache(3, 1),
        providers.published_key_steps(),
    )
    if not scaling:
        compared += (
            providers.token_merging(0.5),
            providers.pyramid_attention_broadcast(),
            providers.stock_steps(steps // 2, steps),
            providers.deepcache(5, 0),
            providers.deepcache(5, 1),
            providers.stock_channels_last(),
        )
    if trained:
        compared = tuple(
            each if each.gate.tolerance is None else replace(each, gate=replace(each.gate, tolerance=1.0))
            for each in compared
        )
    return Case(
        group="pipelines",
        name=f"{name}, {steps} steps, batch {batch}",
        shapes=shapes,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        build=lambda: Images(stages(), steps),
        providers=compared,
        timed="seconds a batch",
        headline="difffast balanced",
        rounds=(2, 15),
        weight=0.5 * steps * (0.5 + batch / 2) * (0.6 if scaling else 1),
        bars=tuple(bars),
    )


def _resolution(latent: int) -> Case:
    return pipeline(
        f"SD1.5 (small), latents {latent}x{latent}",
        lambda: [pipelines.tiny(pipelines.TINY, latent)],
        {"pipeline": "SD1.5", "steps": 20, "batch": 1, "latent": latent},
        scaling=True,
    )


def _engines(steps: int, guidance: float) -> Case:
    """Whole pictures by every engine of a CPU: text encoder, UNet and VAE."""
    return engines(
        f"engines, {steps} steps, guidance {guidance:g}",
        lambda: pipelines.tiny((64, 128, 192), 32),
        {"pipeline": "SD1.5", "steps": steps, "batch": 1, "latent": 32},
        guidance,
        (
            providers.stock(),
            *providers.presets(),
            providers.plain_openvino("f32"),
            providers.plain_openvino("bf16"),
            *providers.openvino_presets(),
            providers.stock_bfloat16(),
            providers.stock_frozen(),
        ),
        rounds=(2, 11),
        weight=60.0,
        bars=_OPENVINO.get(steps, FEW_STEPS),
    )


def engines(
    name: str,
    build: Callable[[], Stage],
    shapes: dict[str, Any],
    guidance: float,
    compared: Sequence[Provider],
    headline: str = "difffast exact",
    **options: Any,
) -> Case:
    """Return the case of whole pictures by engines; ``options`` are rounds, weight and bars."""
    return Case(
        group="pipelines",
        name=name,
        shapes=shapes,
        dtype="float32",
        device="cpu",
        build=lambda: Images([_guided(build(), guidance)], shapes["steps"]),
        providers=tuple(compared),
        timed="seconds a batch",
        headline=headline,
        **options,
    )


def _guided(stage: Stage, guidance: float) -> Stage:
    return replace(stage, arguments={**stage.arguments, "guidance_scale": guidance})
