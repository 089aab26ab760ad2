"""Guidance reuse knows whose batch it has: a half runs alone only where the pipeline that runs says it is guided."""

import copy
import warnings

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPAGPipeline
from sampling import largest, latents, picture, scheduler
from slowly import mostly_slow

from difffast import CfgReuse, EncoderPropagation, patch, patched

STEPS = 12
HALVES = {"propagation": EncoderPropagation(key_steps=1), "cfg": CfgReuse(2), "fused": False}


def run(pipe, **options):
    return latents(pipe, **{"steps": STEPS, **options})


@pytest.fixture(autouse=True)
def _recorded_only():
    """Nothing here is worth a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def loop(pipe, rows, seed=0):
    """A loop of one's own without guidance, on a schedule and a UNet that a patched pipeline has."""
    generator = torch.Generator().manual_seed(seed)
    x, text = torch.randn(rows, 4, 8, 8, generator=generator), torch.randn(rows, 77, 64, generator=generator)
    pipe.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.unet(x, t, encoder_hidden_states=text).sample, t, x).prev_sample
    return x


@pytest.mark.parametrize("rows", mostly_slow([1, 2, 3, 4], 1, 2))
def test_a_loop_without_guidance_after_a_guided_run(pipe, rows):
    stock = loop(pipe, rows)
    with patched(pipe, **HALVES) as report:
        run(pipe)
        assert report.last_run.halves == STEPS // 2
        assert torch.equal(loop(pipe, rows), stock)
        assert report.last_run.halves == 0
    assert any("the loop that calls the UNet is not a patched pipeline's own" in r for r in report.last_run.reasons)


@pytest.mark.parametrize("scale", mostly_slow([1.0, 5.0], 1.0))
def test_another_pipeline_with_the_same_scheduler(pipe, scale):
    """It is not patched, so that nobody knows whether it is guided: it runs both halves."""
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    call = {"image": picture(), "strength": 1.0, "guidance_scale": scale, "num_images_per_prompt": 2}
    stock = run(other, **call)
    with patched(pipe, **HALVES) as report:
        run(pipe)
        assert torch.equal(run(other, **call), stock)
        assert report.last_run.halves == 0


@pytest.mark.parametrize("guided", mostly_slow(["the one", "the other"], "the one"))
def test_two_patched_pipelines_with_one_scheduler(pipe, guided):
    """Each run is as the pipeline says that runs it, whichever was patched first."""
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    call = {"image": picture(), "strength": 1.0, "num_images_per_prompt": 2}
    stock, of_other = run(pipe, guidance_scale=1.0), run(other, guidance_scale=1.0, **call)
    reports = patch([pipe, other], **HALVES)
    if guided == "the one":
        run(pipe)
        assert reports[0].last_run.halves == STEPS // 2
        assert torch.equal(run(other, guidance_scale=1.0, **call), of_other)
        assert reports[1].last_run.halves == 0
    else:
        run(other, **call)
        assert reports[1].last_run.halves == STEPS // 2
        assert torch.equal(run(pipe, guidance_scale=1.0), stock)
        assert reports[0].last_run.halves == 0


def test_perturbed_attention_from_a_patched_pipeline(pipe):
    plain = copy.deepcopy(pipe)
    call = {"guidance_scale": 5.0, "pag_scale": 3.0}
    other = StableDiffusionPAGPipeline.from_pipe(plain, pag_applied_layers=["mid"])
    other.set_progress_bar_config(disable=True)
    stock = run(other, **call)
    with patched(pipe, **HALVES) as report:
        run(pipe)
        other = StableDiffusionPAGPipeline.from_pipe(pipe, pag_applied_layers=["mid"])
        other.set_progress_bar_config(disable=True)
        assert torch.equal(run(other, **call), stock)
        assert report.last_run.halves == 0


def test_a_loop_inside_a_guided_run(pipe):
    """Neither takes the other's halves."""
    inner = loop(pipe, 2)
    with patched(pipe, **HALVES) as report:
        outer = run(pipe)
        seen, reports = [], []

        def nest(pipe, step, timestep, tensors):
            if step == 5:
                outside = report.last_run
                seen.append(loop(pipe, 2))
                reports.append((outside, report.last_run))
            return tensors

        again = run(pipe, callback_on_step_end=nest)
        assert torch.equal(again, outer)
        assert torch.equal(seen[0], inner)
    assert [(a.halves, b.halves) for a, b in reports] == [(STEPS // 2, 0)]


@pytest.mark.slow
def test_halves_one_after_the_other(pipe):
    """A pipeline whose UNet is called once for each half, where memory is short, runs in full."""
    unet = pipe.unet

    class OneByOne:
        def __call__(self, sample, timestep, encoder_hidden_states, **options):
            outs = [
                unet(x, timestep, encoder_hidden_states=text, **options)[0]
                for x, text in zip(sample.chunk(2), encoder_hidden_states.chunk(2), strict=True)
            ]
            return (torch.cat(outs),)

        def __getattr__(self, name):
            return getattr(unet, name)

    def one_by_one(images):
        vars(pipe)["unet"] = OneByOne()
        try:
            return run(pipe, num_images_per_prompt=images)
        finally:
            vars(pipe)["unet"] = unet

    for images in (1, 2):
        stock = one_by_one(images)
        with patched(pipe, **HALVES), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "difffast: every step is a key step: the UNet is called several times")
            assert largest(one_by_one(images), stock) == 0


def test_a_shared_scheduler_does_not_cut_a_plan(pipe):
    """How many steps are executed is known of the pipeline that is running alone."""
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    pipe.scheduler = other.scheduler = scheduler("DDIM")
    with patched(pipe, propagation=EncoderPropagation(key_steps=5, max_parallel=5)) as report:
        latents(pipe, steps=8)
        latents(other, image=picture(), strength=0.5, steps=40)
        assert report.last_run.decode_batches == [5, 5, 5, 5]
