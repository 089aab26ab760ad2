"""The bars of what semantic binding may cost, counted at full size on the meta device."""

import bench_guidance_flops
import bench_style_flops
import bench_suppression_flops
import pytest

from difffast import Suppression


@pytest.mark.slow
def test_cost_on_sdxl():
    found = bench_guidance_flops.costs("sdxl")
    iteration = found["entropy iteration"]
    assert iteration.forward <= bench_guidance_flops.ITERATION_BARS["forward"] * 1e12
    assert iteration.backward <= bench_guidance_flops.ITERATION_BARS["backward"] * 1e12
    assert iteration.saved <= bench_guidance_flops.ITERATION_BARS["saved"] * 2**30
    for preset, bar in bench_guidance_flops.BARS.items():
        assert bench_guidance_flops.image(found, preset) <= bar
    # The counter sees everything: a stock step is what the published configuration is known to take.
    assert abs(found["stock step"].forward / 13.522e12 - 1) < 1e-3


@pytest.mark.slow
def test_cost_of_suppression_on_sd15():
    found = bench_suppression_flops.costs()
    assert bench_suppression_flops.count_image(found, Suppression("word")) <= bench_suppression_flops.BAR
    assert abs(found["stock step"].forward / 1.606e12 - 1) < 1e-3


@pytest.mark.slow
def test_cost_of_style_diffusion_on_sd15():
    found = bench_style_flops.costs()
    assert found["iteration"].total <= bench_style_flops.BAR * 1e12
    assert abs(found["prediction"].forward / (1.606e12 / 2) - 1) < 1e-3
