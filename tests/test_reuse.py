"""Feature reuse: DeepCache's arithmetic at the steps that the plan names, under the stock loop."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
import zoo
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from hypothesis import given
from hypothesis import strategies as st
from sampling import largest, latents, mask, picture, scheduler
from tolerances import EXACT_FLOAT32, OUTPUT_FLOAT64
from unets import CONFIGS, call_for, make

import difffast
from difffast import FeatureReuse, patch, patched, unpatch
from difffast.sampling.strategy import weigh
from difffast.unet.outer_layers import run_recording, run_reuse
from difffast.unet.parts import count_skips


def deepcache(pipe, interval, branch, run=latents, **options):
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        return run(pipe, **options)
    finally:
        helper.disable()


def image_to_image(base):
    pipe = StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    return pipe, lambda pipe, **options: latents(pipe, image=picture(), strength=0.6, **options)


def inpainting(base):
    pipe = StableDiffusionInpaintPipeline(**base.components, requires_safety_checker=False)
    given = {"image": picture(), "mask_image": mask(), "height": 32, "width": 32, "strength": 0.6}
    return pipe, lambda pipe, **options: latents(pipe, **given, **options)


def refiner(_base):
    """As the second of two SDXL models, which takes the last 12 of 20 steps."""
    pipe = zoo.ROWS["StableDiffusionXLImg2ImgPipeline"].build()
    return pipe, lambda pipe, **options: latents(pipe, image=picture(), denoising_start=0.4, **options)


@pytest.mark.parametrize("kind", [image_to_image, inpainting, refiner])
def test_key_steps_are_counted_from_the_first_executed_one_as_in_deepcache(pipe, kind):
    """Of 20 steps the last 12 run: 8, 11, 14 and 17 are key steps, where multiples of 3 would be 8, 9, 12, 15, 18."""
    later, run = kind(pipe)
    later.set_progress_bar_config(disable=True)
    expected = deepcache(later, 3, 0, run)
    with patched(later, propagation=FeatureReuse(3), fused=False) as report:
        assert torch.equal(run(later), expected)
    stats = report.last_run
    assert (stats.key, stats.reused, stats.forced) == (4, 8, 0)
    with patched(later, propagation=FeatureReuse((0, 1, 4, 7, 10)), fused=False):
        assert largest(run(later), expected) > 1e-3


def test_a_run_that_goes_on_after_an_error_counts_from_there(pipe):
    """Steps 0 to 7, an error at 8, and on from 8: the features are gone, and so is the cadence that they had."""
    unet, steps = pipe.unet, pipe.scheduler
    text = torch.cat(pipe.encode_prompt("a red circle", "cpu", 1, True)[::-1])
    steps.set_timesteps(20)

    @torch.no_grad()
    def loop(x, places):
        for t in steps.timesteps[places]:
            x = steps.step(unet(torch.cat([x] * 2), t, text).sample.chunk(2)[1], t, x).prev_sample
        return x

    start = torch.randn(1, 4, 8, 8)
    with patched(pipe, propagation=FeatureReuse(3), fused=False) as report:
        half = loop(start, slice(0, 8))
        with pytest.raises(RuntimeError), torch.no_grad():
            unet(torch.zeros(2, 3, 8, 8), steps.timesteps[8], text)
        before = report.last_run.key
        loop(half, slice(8, 20))
    assert before == 3 + 1  # 0, 3, 6, and what failed
    assert report.last_run.key - before == 4  # 8, 11, 14, 17; by multiples of 3, 8 and 9, 12, 15, 18


@pytest.mark.parametrize(("interval", "branch"), [(2, 0), (3, 0), (5, 0), (3, 1), (3, 2)])
def test_it_is_deepcache_where_deepcache_is_right(pipe_of_all_layers, interval, branch):
    """Its branches are those of a UNet with two layers a level, whatever the UNet has."""
    pipe = pipe_of_all_layers
    expected = deepcache(pipe, interval, branch)
    with patched(pipe, propagation=FeatureReuse(interval, branch=branch), fused=False) as report:
        assert torch.equal(latents(pipe), expected)
    assert largest(latents(pipe), expected) > 0.01
    assert report.last_run.key == len(range(0, 20, interval))
    assert report.last_run.key + report.last_run.reused == 20


def test_duplicate_timesteps_are_where_deepcache_is_wrong(pipe):
    """Heun visits a time step twice; DeepCache asks for its first position in the list."""
    pipe.scheduler = scheduler("Heun")
    with patched(pipe, propagation=FeatureReuse(3), fused=False) as report:
        ours = latents(pipe, steps=12)
    calls = len(pipe.scheduler.timesteps)
    assert report.last_run.key == len(range(0, calls, 3))
    timesteps = list(pipe.scheduler.timesteps)
    seen = [timesteps.index(t) for t in timesteps]
    assert seen != list(range(calls))
    theirs = [position for position in seen if position % 3 == 0]
    assert len(theirs) != report.last_run.key
    assert largest(ours, deepcache(pipe, 3, 0, steps=12)) > 0.01


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_reuse_with_its_own_feature_is_the_whole_unet(name):
    """A feature reused at the very step that made it changes nothing, wherever the UNet is cut."""
    unet = make(name, torch.float64)
    call = call_for(unet, dtype=torch.float64)
    expected = unet(**call).sample
    for branch in range(count_skips(unet)):
        output, deep = run_recording(unet, call, branch)
        assert torch.equal(output, expected)
        weights = torch.ones(1, dtype=torch.float64)
        assert largest(run_reuse(unet, call, [deep], weights, branch), expected) <= OUTPUT_FLOAT64
        third = torch.full((3,), 1 / 3, dtype=torch.float64)
        assert largest(run_reuse(unet, call, [deep] * 3, third, branch), expected) <= 1e-10
    with pytest.raises(ValueError, match=f"got {count_skips(unet)}"):
        run_recording(unet, call, count_skips(unet))


@torch.no_grad()
def test_a_reuse_step_sees_the_latents_the_time_and_the_text():
    unet = make("if", torch.float64)  # a norm group of one channel would take an added time embedding out again
    call = call_for(unet, dtype=torch.float64)
    branch = 3
    _, deep = run_recording(unet, call, branch)
    reuse = [deep], torch.ones(1), branch
    before = run_reuse(unet, call, *reuse)
    for name, value in (
        ("sample", call["sample"] + 1),
        ("timestep", torch.tensor(7)),
        ("encoder_hidden_states", torch.randn_like(call["encoder_hidden_states"])),
    ):
        assert largest(run_reuse(unet, {**call, name: value}, *reuse), before) > 1e-6


def test_all_key_steps_are_stock_bit_for_bit(pipe):
    stock = latents(pipe)
    with patched(pipe, propagation=FeatureReuse(1), fused=False):
        assert torch.equal(latents(pipe), stock)
    assert not unpatch(pipe)
    assert torch.equal(latents(pipe), stock)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"branch": 2, "extrapolate": 1}, {"extrapolate": 2}], ids=str)
def test_fused_and_compiled_layers_give_the_same(pipe, options, monkeypatch):
    monkeypatch.setattr(difffast.engines.programs, "BACKEND", "eager")
    reuse = FeatureReuse(3, **options)
    with patched(pipe, propagation=reuse, fused=False):
        expected = latents(pipe, steps=12)
        assert torch.equal(latents(pipe, steps=12), expected)
    with patched(pipe, propagation=reuse):
        assert largest(latents(pipe, steps=12), expected) <= EXACT_FLOAT32
    if options != {"extrapolate": 2}:
        with patched(pipe, propagation=reuse, compile=True) as report:
            assert largest(latents(pipe, steps=12), expected) <= EXACT_FLOAT32
        assert not report.last_run.reasons


@given(st.integers(1, 3), st.lists(st.integers(0, 40), min_size=3, max_size=3, unique=True), st.integers(41, 60))
def test_polynomials_are_extrapolated_exactly(count, orders, target):
    known = sorted(orders, reverse=True)[:count]
    weights = weigh(known, target, torch.device("cpu")).double()
    for degree in range(count):
        value = sum(float(w) * (k / 50) ** degree for w, k in zip(weights, known, strict=True))
        scale = float(weights.abs().sum())
        assert value == pytest.approx((target / 50) ** degree, abs=1e-6 * scale)


def test_new_conditioning_forces_a_key_step(pipe):
    patch(pipe, propagation=FeatureReuse(4))

    def swap(pipe, step, timestep, kwargs):
        return {"prompt_embeds": kwargs["prompt_embeds"] + 1} if step == 5 else {}

    report = patch(pipe, propagation=FeatureReuse(4))
    latents(pipe, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert report.last_run.forced == 1
    assert report.last_run.key == 6


def test_features_do_not_outlive_the_run(pipe):
    report = patch(pipe, propagation=FeatureReuse(3, extrapolate=2))
    latents(pipe)
    assert not any(run._strategy._deep for run in report._controller._runs)


def test_lists_and_spacings():
    assert FeatureReuse(5).plan(50).key_steps == tuple(range(0, 50, 5))
    assert FeatureReuse((0, 3, 4)).plan(6).key_steps == (0, 3, 4)
    assert FeatureReuse(0.08).plan(50).key_steps == tuple(range(0, 50, 4))
    for total, interval in ((50, 5), (20, 3), (30, 2), (8, 8)):
        for center in (0.0, 0.3, 1.0):
            keys = FeatureReuse(interval, schedule="quadratic", center=center).plan(total).key_steps
            assert keys[0] == 0
            assert keys[-1] < total
            assert len(keys) <= -(-total // interval)
    gaps = [b - a for a, b in pairwise(FeatureReuse(5, schedule="quadratic").plan(50).key_steps)]
    assert min(gaps) < 5 < max(gaps)
    even = FeatureReuse(5, schedule="quadratic", power=1.0).plan(50).key_steps
    assert max(abs(a - b) for a, b in zip(even, range(0, 50, 5), strict=True)) <= 1
    assert "outer layers alone (branch 1)" in str(FeatureReuse(2, branch=1).plan(4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"interval": 0}, ValueError, "interval as an interval must be at least 1"),
        ({"interval": (1, 2)}, ValueError, "interval must contain 0"),
        ({"interval": 1.5}, ValueError, "interval as a share of the schedule must lie between 0 and 1"),
        ({"interval": None}, TypeError, "interval must be an int, a float or a sequence"),
        ({"branch": -1}, ValueError, "branch must not be negative, got -1"),
        ({"schedule": "cubic"}, ValueError, 'schedule must be "uniform" or "quadratic"'),
        ({"center": 2}, ValueError, "center must lie between 0 and 1"),
        ({"power": 0.5}, ValueError, "power must be at least 1"),
        ({"extrapolate": 3}, ValueError, "extrapolate must be 0, 1 or 2, got 3"),
    ],
    ids=str,
)
def test_bad_values(options, error, message):
    with pytest.raises(error, match=message):
        FeatureReuse(**options)


def test_what_cannot_be_reused_is_refused(pipe):
    with pytest.raises(ValueError, match=r"branch must lie in 0 \.\. \d+ for this UNet2DConditionModel, got 99"):
        patch(pipe, propagation=FeatureReuse(3, branch=99))
    assert not unpatch(pipe)
    patch(pipe, propagation=FeatureReuse((0, 30)))
    with pytest.raises(ValueError, match="interval contains 30, but the schedule has steps"):
        latents(pipe)


def test_freeu_changes_the_hidden_channels(pipe):
    """It scales them before the resnet that is re-entered: a recorded feature would be scaled twice."""
    pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    expected = latents(copy.deepcopy(pipe))
    patch(pipe, propagation=FeatureReuse(3), fused=False)
    with pytest.warns(UserWarning, match="FreeU"):
        assert torch.equal(latents(pipe), expected)
    pipe.unet.disable_freeu()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents(pipe)
