"""Edits without inversion against InfEdit's formulas, and that the picture comes out as it went in."""

import dataclasses

import pytest
import torch
import zoo
from diffusers import DDIMScheduler
from sampling import largest, latents, picture, scheduler
from tolerances import EXACT_FLOAT64

import difffast
from difffast import Inversion, invert, patched

PROMPT, TARGET = "a ox in fog", "a elk in fog"
STEPS = 5


@pytest.fixture(params=["DDIM", "LCM", "velocity"])
def ready(pipe64, request):
    pipe64.scheduler = scheduler("DDIM" if request.param == "velocity" else request.param)
    if request.param == "velocity":
        pipe64.scheduler = DDIMScheduler.from_config(pipe64.scheduler.config, prediction_type="v_prediction")
        # The formulas for noise and velocity are one where a + (1 - a) is 1; roots of float32 say so to 1e-7 only.
        pipe64.scheduler.alphas_cumprod = pipe64.scheduler.alphas_cumprod.double()
    return pipe64


def encode(pipe, image):
    pixels = pipe.image_processor.preprocess(image, 32, 32).double()
    return (pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor).detach()


@torch.no_grad()
def by_hand(pipe, z0, start, guidance, rescale):
    """Both latents at the end; start [1, C, h, w] is the first noise."""
    source, target, null = (pipe.encode_prompt(each, "cpu", 1, False)[0] for each in (PROMPT, TARGET, ""))
    levels, noise = pipe.scheduler.alphas_cumprod, torch.Generator().manual_seed(7)
    times = pipe.scheduler.timesteps.tolist()

    def predict(x, t, text, a):
        e = pipe.unet(x, t, text).sample
        if guidance > 1:
            nothing = pipe.unet(x, t, null).sample
            guided = nothing + guidance * (e - nothing)
            same_deviation = guided * e.std() / guided.std()
            e = rescale * same_deviation + (1 - rescale) * guided
        return e if pipe.scheduler.config.prediction_type == "epsilon" else a**0.5 * e + (1 - a) ** 0.5 * x

    e_own, a = start, levels[times[0]]
    z = y = a**0.5 * z0 + (1 - a) ** 0.5 * e_own
    for step, t in enumerate(times):
        a = levels[t]
        e_own = (z - a**0.5 * z0) / (1 - a) ** 0.5
        consistent = predict(y, t, target, a) - predict(z, t, source, a) + e_own
        y0 = (y - (1 - a) ** 0.5 * consistent) / a**0.5
        b = levels[times[step + 1]] if step + 1 < len(times) else torch.tensor(1.0)
        if type(pipe.scheduler).__name__ == "LCMScheduler" and b < 1:
            torch.randn(2, 4, 8, 8, generator=noise, dtype=torch.float64)  # its own, which goes nowhere
        fresh = torch.randn(1, 4, 8, 8, generator=noise, dtype=torch.float64)
        z, y = (b**0.5 * x + (1 - b) ** 0.5 * fresh for x in (z0, y0))
    return torch.cat([z, y])


@pytest.mark.parametrize("rescale", [0.0, 0.6])
def test_latents_are_those_of_the_formula(ready, rescale):
    guidance = 1.0 if type(ready.scheduler).__name__ == "LCMScheduler" else 3.0
    found = invert(ready, picture(32), PROMPT, "ddcm", steps=STEPS, guidance=guidance)
    start = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    given = {"latents": start, "output_type": "latent", "guidance_rescale": rescale, **found.arguments}
    with difffast.edit(ready, PROMPT, TARGET, cross=0.0, self_=0.0, inversion=found) as edited:
        got = ready(edited.prompts, generator=torch.Generator().manual_seed(7), **given).images
    assert torch.equal(got[:1], encode(ready, picture(32)))
    expected = by_hand(ready, encode(ready, picture(32)), start, guidance, rescale)
    assert largest(got, expected) <= EXACT_FLOAT64 * expected.abs().max()
    assert largest(got[:1], got[1:]) > 1e-3


def test_the_picture_stays_whatever_is_edited(pipe64, tmp_path):
    pipe64.scheduler = scheduler("DDIM")
    invert(pipe64, picture(32), PROMPT, "ddcm", steps=STEPS).save(tmp_path / "file")
    found = Inversion.load(tmp_path / "file")
    z0 = encode(pipe64, picture(32))
    with patched(pipe64, "exact", steering=found):
        assert torch.equal(pipe64(PROMPT, output_type="latent", **found.arguments).images, z0)
        same = pipe64([PROMPT] * 2, output_type="latent", latents=torch.randn(2, 4, 8, 8).double(), **found.arguments)
        assert largest(same.images, z0) > 1e-3  # noises of their own
    with difffast.edit(pipe64, PROMPT, TARGET, inversion=found, cross=1.0, self_=1.0) as edited:
        noises = [torch.Generator().manual_seed(i) for i in (1, 2)]
        given = {**found.arguments, "num_images_per_prompt": 2, "output_type": "latent"}
        got = pipe64(edited.prompts, generator=noises[0], **given).images
    assert torch.equal(got[:2], z0.repeat(2, 1, 1, 1))
    assert largest(got[2], got[3]) > 1e-6
    again = pipe64(
        PROMPT, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0)
    ).images
    assert torch.equal(again, latents(pipe64, PROMPT, steps=2))


def test_equal_prompts_change_nothing(pipe64):
    pipe64.scheduler = scheduler("LCM")
    found = invert(pipe64, picture(32), PROMPT, "ddcm", steps=STEPS)
    with difffast.edit(pipe64, PROMPT, PROMPT, inversion=found) as edited:
        got = pipe64(edited.prompts, output_type="latent", **found.arguments).images
    assert largest(*got) <= EXACT_FLOAT64


def test_two_text_encoders_and_another_size():
    pipe = zoo.xl("StableDiffusionXLPipeline")()
    pipe.scheduler = scheduler("LCM")
    pipe.set_progress_bar_config(disable=True)
    found = invert(pipe, picture((40, 24)), PROMPT, "ddcm", steps=3)
    with difffast.edit(pipe, PROMPT, TARGET, inversion=found) as edited:
        got = pipe(edited.prompts, output_type="latent", **found.arguments).images
    assert torch.equal(got[:1], found.trajectory)
    assert largest(got[:1], got[1:]) > 1e-4


def test_what_does_not_fit_is_said(pipe64):
    pipe64.scheduler = scheduler("DDIM")
    found = invert(pipe64, picture(32), PROMPT, "ddcm", steps=STEPS)
    with patched(pipe64, "exact", steering=found), pytest.raises(ValueError, match="needs as many, got 4"):
        pipe64(PROMPT, num_inference_steps=4, output_type="latent")
    with pytest.raises(ValueError, match="latents must have 4 channels, got 3"):
        difffast.patch(pipe64, "exact", steering=dataclasses.replace(found, trajectory=found.trajectory[:, :3]))
    pipe64.scheduler = scheduler("Euler")
    with pytest.raises(ValueError, match="needs a DDIMScheduler, got EulerDiscreteScheduler"):
        invert(pipe64, picture(32), PROMPT, "ddcm")
