"""Seconds inside the UNet for one image, every provider in turn in one run (A B C D, A B C D, ...).

``make bench`` prints the table and writes JSON; the correctness gate comes first.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from difffast import EncoderPropagation, models, patched

STEPS = 50
#: Interleaved rounds per UNet, by its widths.
ROUNDS = {(64, 128, 192): 11}
LATENT_TOLERANCE = 1e-4
#: UNet time of preset "balanced" against stock: the encoder-propagation issue's.
BAR = 0.66


class TimedUNet:
    """In place of ``pipe.unet``: adds up the seconds spent in its calls."""

    def __init__(self, unet: Any) -> None:
        self._unet, self.seconds = unet, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._unet(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)


@dataclass(frozen=True)
class Provider:
    """One way to make the image: a pipeline and the context that it runs in."""

    name: str
    pipe: Any
    context: Callable[[], Any] = nullcontext

    def run(self) -> tuple[torch.Tensor, float]:
        """-> (latents, seconds inside the UNet)"""
        with self.context():
            timed = vars(self.pipe)["unet"] = TimedUNet(self.pipe.unet)
            try:
                latents = self.pipe(
                    "a red circle on a blue square",
                    num_inference_steps=STEPS,
                    generator=torch.Generator().manual_seed(0),
                    output_type="latent",
                ).images
            finally:
                self.pipe.unet = timed._unet
        return latents, timed.seconds


def providers(channels: tuple[int, ...]) -> dict[str, Provider]:
    pipe = models.tiny_pipeline("sd", channels=channels, sample_size=32)
    pipe.set_progress_bar_config(disable=True)
    compiled = copy.deepcopy(pipe)
    compiled.unet = torch.compile(compiled.unet)
    step_by_step = EncoderPropagation(parallel=False, share_skips=False)
    parallel, shared = EncoderPropagation(share_skips=False), EncoderPropagation()
    return {
        provider.name: provider
        for provider in (
            Provider("stock", pipe),
            Provider("stock, torch.compile", compiled),
            Provider("difffast exact", pipe, lambda: patched(pipe, preset="exact")),
            Provider(
                "propagation alone, step by step", pipe, lambda: patched(pipe, propagation=step_by_step, fused=False)
            ),
            Provider("propagation alone, parallel", pipe, lambda: patched(pipe, propagation=parallel, fused=False)),
            Provider("the same with shared skips", pipe, lambda: patched(pipe, propagation=shared, fused=False)),
            Provider("difffast balanced", pipe, lambda: patched(pipe, preset="balanced")),
        )
    }


def _gap(a: Provider, b: Provider) -> float:
    return float((a.run()[0] - b.run()[0]).abs().max())


@pytest.mark.parametrize("channels", ROUNDS, ids=str)
@pytest.mark.benchmark(group="unet")
def test_unet_time(benchmark, environment, channels):
    everyone = providers(channels)
    balanced = everyone["difffast balanced"]
    gaps = {
        "exact against stock": _gap(everyone["difffast exact"], everyone["stock"]),
        "parallel against step by step": _gap(
            everyone["propagation alone, parallel"], everyone["propagation alone, step by step"]
        ),
        "balanced against propagation alone": _gap(balanced, everyone["propagation alone, parallel"]),
    }
    assert max(gaps.values()) <= LATENT_TOLERANCE, f"a wrong result must not be timed: {gaps}"
    everyone["stock, torch.compile"].run()

    seconds: dict[str, list[float]] = {name: [] for name in everyone}

    def others() -> None:
        for name in list(everyone)[:-1]:
            seconds[name].append(everyone[name].run()[1])

    def ours() -> None:
        seconds[balanced.name].append(balanced.run()[1])

    benchmark.pedantic(ours, setup=others, rounds=ROUNDS[channels], iterations=1)

    ratios = {name: [a / b for a, b in zip(s, seconds["stock"], strict=True)] for name, s in seconds.items()}
    benchmark.extra_info.update(
        environment,
        case=f"UNet {channels} at 32x32, {STEPS} DDIM steps, guidance on, one image",
        dtype="float32",
        gate=", ".join(f"{pair}: {gap:.1e}" for pair, gap in gaps.items()) + ", on latents",
        unet_seconds=seconds,
        against_stock=ratios,
    )
    print()
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        median = statistics.median(seconds[name])
        print(f"{name:32s} {median:6.2f} s  {middle:.3f} of stock (quartiles {low:.3f} to {high:.3f})")
    assert statistics.median(ratios[balanced.name]) <= BAR
