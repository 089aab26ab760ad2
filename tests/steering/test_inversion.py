"""Inversions against DDIM's, null-text's and EDICT's formulas, saved, loaded, continued, replayed and edited."""

import dataclasses
import warnings

import pytest
import torch
import zoo
from diffusers import DDIMScheduler
from sampling import largest, picture, scheduler

import difffast
from difffast import Inversion, invert, patched
from difffast.steering import generate_edict
from difffast.steering.inversion import null_text as module
from difffast.steering.inversion.edict import follow_edict, invert_edict
from difffast.steering.inversion.moves import Moves

PROMPT, TARGET = "a ox in fog", "a elk in fog"
STEPS, SIZE = 6, (32, 32)
V = {"prediction_type": "v_prediction"}


@pytest.fixture(params=["noise", "velocity"])
def ready(pipe64, request):
    pipe64.scheduler = scheduler("DDIM")
    if request.param == "velocity":
        pipe64.scheduler = DDIMScheduler.from_config(pipe64.scheduler.config, **V)
    return pipe64


@pytest.fixture
def plain64(pipe64):
    pipe64.scheduler = scheduler("DDIM")
    return pipe64


def replay(pipe, inversion, prompt=None):
    with patched(pipe, "exact", steering=inversion):
        return pipe(prompt or inversion.prompt, output_type="latent", **inversion.arguments).images


@torch.no_grad()
def predict(pipe, z, t, text):
    out, a = pipe.unet(z, t, text).sample, pipe.scheduler.alphas_cumprod[t].double()
    return out if pipe.scheduler.config.prediction_type == "epsilon" else a.sqrt() * out + (1 - a).sqrt() * z


@torch.no_grad()
def backwards_by_hand(pipe, image):
    pixels = pipe.image_processor.preprocess(image, *SIZE).double()
    z = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    pipe.scheduler.set_timesteps(STEPS)
    way = [z]
    for t in reversed(pipe.scheduler.timesteps.tolist()):
        before = t - 1000 // STEPS
        a = (pipe.scheduler.alphas_cumprod[before] if before >= 0 else pipe.scheduler.final_alpha_cumprod).double()
        b = pipe.scheduler.alphas_cumprod[t].double()
        e = predict(pipe, z, t, text)
        z = b.sqrt() * (z - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
        way.append(z)
    return torch.cat(way[::-1])


def test_the_way_back_is_ddims(ready):
    found = invert(ready, picture(32), PROMPT, "ddim", steps=STEPS)
    assert largest(found.trajectory, backwards_by_hand(ready, picture(32))) <= 1e-5  # their roots are in float32
    assert found.trajectory.shape == (STEPS + 1, 4, 8, 8)
    assert found.size == SIZE


def test_direct_inversion_reconstructs_exactly(ready):
    found = invert(ready, picture(32), PROMPT, "direct", steps=STEPS)
    assert torch.equal(replay(ready, found), found.trajectory[-1:])
    without = dataclasses.replace(found, method="ddim")
    assert largest(replay(ready, without), found.trajectory[-1:]) > 1e-3


def test_negative_prompt_inversion_has_the_prompt_twice(plain64):
    found = invert(plain64, picture(32), PROMPT, "npi", steps=STEPS)
    text = plain64.encode_prompt(PROMPT, "cpu", 1, False)[0].detach()
    expected = plain64(prompt_embeds=text, negative_prompt_embeds=text, output_type="latent", **found.arguments).images
    assert largest(replay(plain64, found), expected) <= 1e-9


def test_the_null_text_descends_as_adam_does(plain64, monkeypatch):
    monkeypatch.setattr(module, "ENOUGH", 0.0)
    steps = 3
    found = invert(plain64, picture(32), PROMPT, "null", steps=steps, guidance=3.0)
    way = found.trajectory
    text, null = (plain64.encode_prompt(each, "cpu", 1, False)[0].detach() for each in (PROMPT, ""))
    moves = Moves(plain64, plain64.unet, PROMPT, steps, SIZE)
    z, known = way[:1], plain64.scheduler.alphas_cumprod
    for step, t in enumerate(moves.times[:2]):
        a, b = known[t], known[t - 1000 // steps]
        leaf = null.clone().requires_grad_()
        first = second = torch.zeros_like(null)
        tried = []
        for k in range(1, 11):
            e0 = plain64.unet(z, t, leaf).sample
            e = e0 + 3.0 * (plain64.unet(z, t, text).sample.detach() - e0)
            moved = b**0.5 * (z - (1 - a) ** 0.5 * e) / a**0.5 + (1 - b) ** 0.5 * e
            loss = ((moved - way[step + 1]) ** 2).mean()
            tried.append((loss.item(), leaf.detach()))
            (grad,) = torch.autograd.grad(loss, leaf)
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            update = first / (1 - 0.9**k) / ((second / (1 - 0.999**k)).sqrt() + 1e-8)
            leaf = (leaf.detach() - 0.01 * (1 - step / 100) * update).requires_grad_()
        least, null = min(tried, key=lambda pair: pair[0])
        assert abs(found.losses[step] - least) <= 1e-12
        assert largest(found.null[step : step + 1], null) <= 1e-9
        with torch.no_grad():
            e0 = plain64.unet(z, t, null).sample
            e = e0 + 3.0 * (plain64.unet(z, t, text).sample - e0)
            z = b**0.5 * (z - (1 - a) ** 0.5 * e) / a**0.5 + (1 - b) ** 0.5 * e
    npi = dataclasses.replace(found, method="ddim", null=None)
    errors = [float((replay(plain64, each) - way[-1:]).norm()) for each in (found, npi)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, None),
        ({"guidance_scale": 1.0}, None),  # without guidance there is no null text
        ({"guidance_scale": 5.0}, "this call has 5.0 and 0.0"),
        ({"guidance_rescale": 0.7}, "this call has 3.0 and 0.7"),
    ],
    ids=str,
)
def test_another_guidance_than_the_null_texts_is_told(plain64, given, told):
    found = invert(plain64, picture(32), PROMPT, "null", steps=2, guidance=3.0)
    with patched(plain64, "exact", steering=found) as report, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        plain64(PROMPT, output_type="latent", **{**found.arguments, **given})
    reasons = [reason for reason in report.last_run.reasons if "was optimised for guidance_scale 3.0" in reason]
    assert [told in reason for reason in reasons] == [True] * (told is not None)
    assert len(seen) == len(reasons)


def test_edict_goes_both_ways_exactly(ready):
    moves = Moves(ready, ready.unet, PROMPT, STEPS, SIZE)
    start = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        noises = invert_edict(ready, moves, start, 3.0)
        back = follow_edict(ready, moves, noises, 3.0)
    assert largest(back, start.repeat(2, 1, 1, 1)) <= 1e-10 * max(1, noises.abs().max())
    assert largest(noises[:1], noises[1:]) > 1e-6
    found = invert(ready, picture(32), PROMPT, "edict", steps=3, guidance=3.0)
    assert generate_edict(ready, found).size == (32, 32)
    with pytest.raises(ValueError, match="EDICT has a loop of its own"):
        difffast.patch(ready, "exact", steering=found)


def test_one_step_of_edict_is_its_four_lines(plain64):
    moves = Moves(plain64, plain64.unet, PROMPT, 1, SIZE)
    x, y = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    (t,) = moves.times
    a, b = plain64.scheduler.alphas_cumprod[t], plain64.scheduler.final_alpha_cumprod
    first = (b / a).double() ** 0.5
    second = (1 - b).double() ** 0.5 - (b * (1 - a) / a).double() ** 0.5
    with torch.no_grad():
        x1 = first * x + second * moves.guide(y, 0, 3.0)
        y1 = first * y + second * moves.guide(x1, 0, 3.0)
        x2 = 0.93 * x1 + 0.07 * y1
        y2 = 0.93 * y1 + 0.07 * x2
        found = follow_edict(plain64, moves, torch.cat([x, y]), 3.0)
    assert largest(found, torch.cat([x2, y2])) <= 1e-4 * found.abs().max()


def test_files_are_the_same_again_or_refused(plain64, tmp_path):
    found = invert(plain64, picture(32), PROMPT, "null", steps=2, checkpoint=tmp_path / "half")
    found.save(tmp_path / "one")
    again = Inversion.load(tmp_path / "one")
    assert torch.equal(again.trajectory, found.trajectory)
    assert torch.equal(again.null, found.null)
    assert (again.losses, again.size, again.prompt) == (found.losses, found.size, PROMPT)
    assert largest(replay(plain64, again), replay(plain64, found)) <= 1e-9
    data = (tmp_path / "one").read_bytes()
    (tmp_path / "one").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        Inversion.load(tmp_path / "one")
    with pytest.raises(FileNotFoundError, match="there is no inversion"):
        Inversion.load(tmp_path / "two")


def test_an_interrupted_inversion_goes_on(plain64, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_UPDATES", 2)
    whole = invert(plain64, picture(32), PROMPT, "null", steps=4)
    plain, calls = module.optimise_null_text, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(module, "optimise_null_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        invert(plain64, picture(32), PROMPT, "null", steps=4, checkpoint=tmp_path / "file")
    half = Inversion.load(tmp_path / "file")
    assert len(half.null) == 2
    with pytest.raises(ValueError, match="2 of 4 steps are done"):
        difffast.patch(plain64, "exact", steering=half)
    resumed = invert(plain64, picture(32), PROMPT, "null", steps=4, checkpoint=tmp_path / "file")
    assert len(calls) == 5
    assert largest(resumed.null, whole.null) <= 1e-12
    with pytest.raises(ValueError, match="is of another inversion: prompt is"):
        invert(plain64, picture(32), TARGET, "null", steps=4, checkpoint=tmp_path / "file")
    with pytest.raises(ValueError, match="is of another picture"):
        invert(plain64, picture(32, seed=3), PROMPT, "null", steps=4, checkpoint=tmp_path / "file")


def test_edits_of_a_real_picture_leave_it_as_it_was(plain64):
    found = invert(plain64, picture(32), PROMPT, "direct", steps=STEPS)
    with difffast.edit(plain64, PROMPT, TARGET, inversion=found) as edited:
        before, after = plain64(edited.prompts, output_type="latent", **found.arguments).images
    assert torch.equal(before, found.trajectory[-1])
    assert largest(before, after) > 1e-3
    with (
        pytest.raises(ValueError, match="the inversion is of 'a ox in fog'"),
        difffast.edit(plain64, TARGET, PROMPT, inversion=found),
    ):
        pass


def test_a_picture_of_another_size_and_two_text_encoders():
    pipe = zoo.xl("StableDiffusionXLPipeline")()
    pipe.scheduler = scheduler("DDIM")
    pipe.set_progress_bar_config(disable=True)
    found = invert(pipe, picture((40, 24)), PROMPT, "direct", steps=3)
    assert found.trajectory.shape[-2:] == (10, 6)
    assert torch.equal(replay(pipe, found), found.trajectory[-1:])


def test_a_loss_that_is_not_finite_keeps_the_last_good_text(plain64, monkeypatch):
    moves = Moves(plain64, plain64.unet, PROMPT, STEPS, SIZE)
    null, latents = moves.null[0], torch.randn(1, 4, 8, 8, dtype=torch.float64)
    monkeypatch.setattr(moves, "predict_null", lambda z, step, text=None: z * float("nan"))
    with pytest.warns(UserWarning, match="the null text of step 0 diverged"):
        found, _ = module.optimise_null_text(moves, latents, latents[0], null, 0, 7.5)
    assert torch.equal(found, null)


def test_what_cannot_be_inverted_is_said(plain64):
    for options, error in (
        ({"method": "ddpm"}, "method must be one of ddim, direct, npi, null, edict, style, ddcm, got 'ddpm'"),
        ({"image": picture((30, 32))}, "sides must be multiples of 4, got 32 x 30"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"guidance": 0.5}, "guidance must be finite and at least 1"),
    ):
        with pytest.raises(ValueError, match=error):
            invert(plain64, **{"image": picture(32), "prompt": PROMPT, **options})
    found = invert(plain64, picture(32), PROMPT, "ddim", steps=3)
    with patched(plain64, "exact", steering=found), pytest.raises(ValueError, match="needs as many, got 4"):
        plain64(PROMPT, num_inference_steps=4, output_type="latent")
    plain64.scheduler = scheduler("Euler")
    with pytest.raises(ValueError, match="needs a DDIMScheduler, got EulerDiscreteScheduler"):
        invert(plain64, picture(32), PROMPT)
    plain64.scheduler = DDIMScheduler(clip_sample=True)
    with pytest.raises(ValueError, match="does not clip"):
        invert(plain64, picture(32), PROMPT)


def test_a_patched_pipeline_inverts_as_a_stock_one(plain64):
    stock = invert(plain64, picture(32), PROMPT, "ddim", steps=3)
    with patched(plain64, "balanced"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(invert(plain64, picture(32), PROMPT, "ddim", steps=3).trajectory, stock.trajectory)
