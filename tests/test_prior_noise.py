"""Prior noise injection against the formula, written out in loops of our own."""

import copy
from functools import partial

import diffusers
import if_zoo
import pytest
import torch
import zoo
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from sampling import largest, latents, mask, picture, scheduler
from tolerances import LATENTS_FLOAT64

from difffast import EncoderPropagation, patch, patched
from difffast.sampling.prior_noise import _find_late_steps
from difffast.surgery.subclass import is_swapped

ALPHA = 0.1  # large, to be seen
ALL_KEY = EncoderPropagation(key_steps=1, prior_noise=ALPHA)


@torch.no_grad()
def by_hand(pipe, start, unit_noise, *, first=0, sigma_scaled=False, data=1.0, middle=None, guidance=7.5):
    """Denoise ``start`` from order ``first`` on, adding noise before every late scheduler step.

    Late are the times below 500, or the orders from ``middle`` on; ``data``: the standard deviation of the latents that
    the scheduler takes for clean.
    """
    text, empty = pipe.encode_prompt("a red circle", "cpu", 1, True)
    text = torch.cat([empty, text])
    steps, z = pipe.scheduler, start
    for order, t in enumerate(steps.timesteps):
        if order < first:
            continue
        model_input = steps.scale_model_input(torch.cat([z] * 2), t)
        uncond, cond = pipe.unet(model_input, t, encoder_hidden_states=text).sample.chunk(2)
        if t < 500 if middle is None else order >= middle:
            scale = (data**2 + float(steps.sigmas[order]) ** 2) ** 0.5 if sigma_scaled else 1.0
            z = z + ALPHA * scale * unit_noise
        z = steps.step(uncond + guidance * (cond - uncond), t, z).prev_sample
    return z


def unit_noise(seed=0):
    return torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["DDIM", "DPM++ 2M", "Euler"])
def test_text_to_image(pipe64, name):
    pipe64.scheduler = scheduler(name)
    without = latents(pipe64)
    with patched(pipe64, propagation=ALL_KEY):
        ours = latents(pipe64)
    pipe64.scheduler = scheduler(name)
    pipe64.scheduler.set_timesteps(20)
    noise = unit_noise()
    expected = by_hand(pipe64, noise * pipe64.scheduler.init_noise_sigma, noise, sigma_scaled=name == "Euler")
    assert largest(ours, expected) <= LATENTS_FLOAT64
    assert largest(ours, without) > 1e-2


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (EDMEulerScheduler, 0.5),
        (EDMDPMSolverMultistepScheduler, 0.5),
        (partial(EulerDiscreteScheduler, timestep_type="continuous", prediction_type="v_prediction"), 1.0),
    ],
    ids=["EDM Euler", "EDM DPM++", "continuous Euler"],
)
def test_times_that_are_no_training_steps_have_their_middle_at_half_of_the_steps(pipe64, make, data):
    """There t < 500 at every step: it is a quarter of the logarithm of sigma."""
    pipe64.scheduler = make()
    with patched(pipe64, propagation=ALL_KEY):
        ours = latents(pipe64, steps=7)
    pipe64.scheduler = make()
    pipe64.scheduler.set_timesteps(7)
    assert pipe64.scheduler.timesteps.max() < 2
    noise = unit_noise()
    start = noise * float(pipe64.scheduler.init_noise_sigma)
    expected = by_hand(pipe64, start, noise, sigma_scaled=True, data=data, middle=4)
    assert largest(ours, expected) <= LATENTS_FLOAT64 * float(expected.abs().max())


def test_every_scheduler_injects_in_the_second_half_alone():
    """Whatever its unit of time: neither at the first step nor at the last of the first half, but at the last one."""
    checked = 0
    for name in dir(diffusers):
        if not name.endswith("Scheduler") or "Inverse" in name:  # those run from the image to the noise
            continue
        try:
            made = getattr(diffusers, name)()
            if getattr(made, "init_noise_sigma", None) is None:
                continue  # no pipeline with a UNet can use it
            made.set_timesteps(20)
        except (ImportError, TypeError, ValueError):  # needs a package or arguments, or is for two steps
            continue
        late = _find_late_steps(made)
        assert late.shape == made.timesteps.shape
        assert not late[0], name
        assert late[-1], name
        checked += 1
    assert checked > 15


def test_image_to_image_injects_the_pure_noise(pipe64):
    pipe = StableDiffusionImg2ImgPipeline(**pipe64.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    seen = {}

    with patched(pipe, propagation=ALL_KEY):
        add_noise = pipe.scheduler.add_noise

        def spy(original, noise, timesteps):
            seen["noise"] = noise
            seen["start"] = add_noise(original, noise, timesteps)
            return seen["start"]

        pipe.scheduler.add_noise = spy
        ours = latents(pipe, image=picture(), strength=0.7)
        del pipe.scheduler.add_noise
    assert largest(seen["noise"], seen["start"]) > 0.1
    pipe.scheduler.set_timesteps(20)
    expected = by_hand(pipe, seen["start"], seen["noise"], first=6)
    assert largest(ours, expected) <= LATENTS_FLOAT64


@pytest.mark.parametrize("name", ["DDIM", "Euler", "Euler-A", "Heun", "PNDM", "DPM++ SDE", "LCM"])
def test_look_ahead_is_step_by_step_with_prior_noise(pipe64, name):
    pipe64.scheduler = scheduler(name)
    plain = latents(pipe64)
    results = []
    for parallel in (True, False):
        with patched(pipe64, propagation=EncoderPropagation(parallel=parallel, prior_noise=0.003)):
            results.append(latents(pipe64))
            assert torch.equal(latents(pipe64), results[-1]), "the second run has its own noise"
    assert largest(*results) <= LATENTS_FLOAT64
    assert largest(results[0], plain) > 1e-6


def test_inpainting_and_changing_batches(pipe64):
    pipe = StableDiffusionInpaintPipeline(**pipe64.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with patched(pipe, propagation=EncoderPropagation(prior_noise=0.003)):
        for options in ({"strength": 1.0}, {"strength": 0.5}, {"num_images_per_prompt": 2}):
            result = latents(pipe, image=picture(), mask_image=mask(), height=32, width=32, **options)
            assert result.isfinite().all()
    with patched(pipe64, propagation=EncoderPropagation(prior_noise=0.003)):
        first = latents(pipe64)
        latents(pipe64, "two cats", num_images_per_prompt=2)
        assert torch.equal(latents(pipe64), first)


def test_zero_is_off(pipe):
    stock = latents(pipe)
    with patched(pipe, propagation=EncoderPropagation(key_steps=1, prior_noise=0.0), fused=False) as report:
        assert torch.equal(latents(pipe), stock)
    assert "prior noise" not in str(report)


def test_a_scheduler_put_in_after_patching_gets_it_too(pipe64):
    replacement = scheduler("Euler")
    with patched(pipe64, propagation=ALL_KEY):
        pipe64.scheduler = replacement
        ours = latents(pipe64)
    pipe64.scheduler = scheduler("Euler")
    with patched(pipe64, propagation=ALL_KEY):
        assert torch.equal(latents(pipe64), ours)
    assert type(replacement).step is type(scheduler("Euler")).step


def test_image_to_image_with_a_scheduler_put_in_after_patching(pipe64):
    pipe = StableDiffusionImg2ImgPipeline(**pipe64.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def run():
        return latents(pipe, image=picture(), strength=0.7)

    pipe.scheduler = scheduler("Euler")
    with patched(pipe, propagation=ALL_KEY):
        expected = run()
    with patched(pipe, propagation=ALL_KEY):
        for _ in range(2):
            pipe.scheduler = scheduler("Euler")
            assert torch.equal(run(), expected)
            assert torch.equal(run(), expected)


def test_without_a_known_start_nothing_is_injected_and_it_says_so(pipe):
    zeros = torch.zeros(1, 4, 8, 8)
    pipe.scheduler.set_timesteps(10)
    with patched(pipe, propagation=ALL_KEY):
        with pytest.warns(UserWarning, match=r"not an element of scheduler.timesteps"):
            pipe.scheduler.step(zeros, 100, zeros)
        with pytest.warns(UserWarning, match="initial noise was not seen"):
            pipe.scheduler.step(zeros, pipe.scheduler.timesteps[3], zeros)


def test_a_shared_scheduler_is_refused_before_anything_changes(pipe):
    other = StableDiffusionImg2ImgPipeline(
        **{**pipe.components, "unet": copy.deepcopy(pipe.unet)}, requires_safety_checker=False
    )
    with patched(pipe, propagation=ALL_KEY):
        with pytest.raises(ValueError, match="shares this pipeline's scheduler"):
            patch(other, propagation=ALL_KEY)
        assert not is_swapped(other.unet)
        assert is_swapped(pipe.scheduler)


def test_the_preset_injects_as_the_release_does_where_it_is_meant(pipe64):
    """Its release adds 0.003 of the initial noise with Stable Diffusion and ControlNet, and none with DeepFloyd IF."""
    pipe64.scheduler = scheduler("PNDM")
    with patched(pipe64, "faster-diffusion") as report:
        ours = latents(pipe64, steps=50)
    assert "prior noise injection, alpha = 0.003" in str(report)
    by_hand = EncoderPropagation(key_steps=(0, 1, 2, 3, 5, 10, 15, 25, 35), prior_noise=0.003, parallel=False)
    with patched(pipe64, propagation=by_hand):
        assert largest(latents(pipe64, steps=50), ours) <= LATENTS_FLOAT64
    for name in ("IFPipeline", "StableDiffusionUpscalePipeline"):
        other = {**zoo.ROWS, **if_zoo.ROWS}[name].build()
        assert "prior noise" not in str(patch(other, "faster-diffusion"))
        with pytest.raises(ValueError, match="prior noise is not meant for"):
            patch(other, propagation=ALL_KEY)
