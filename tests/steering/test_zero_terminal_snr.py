"""Inversions and edits where the first level is noise alone: there a velocity says the picture, and noise nothing."""

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from sampling import largest, picture, scheduler
from tolerances import EXACT_FLOAT64

import difffast
from difffast import Inversion, invert, patched
from difffast.steering import generate_edict
from difffast.steering.inversion.edict import follow_edict, invert_edict
from difffast.steering.inversion.moves import Moves

PROMPT, TARGET = "a ox in fog", "a elk in fog"
STEPS, SIZE = 4, (32, 32)
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(params=["DDIM", "LCM"])
def either64(pipe64, request):
    given = scheduler(request.param)
    pipe64.scheduler = type(given).from_config(given.config, **ZERO, prediction_type="v_prediction")
    return pipe64


@pytest.fixture
def zero64(pipe64):
    pipe64.scheduler = DDIMScheduler.from_config(scheduler("DDIM").config, **ZERO, prediction_type="v_prediction")
    pipe64.scheduler.set_timesteps(STEPS)
    assert pipe64.scheduler.alphas_cumprod[pipe64.scheduler.timesteps[0]] == 0
    return pipe64


def replay(pipe, inversion):
    with patched(pipe, "exact", steering=inversion):
        return pipe(inversion.prompt, output_type="latent", **inversion.arguments).images


@torch.no_grad()
def step_by_scheduler(pipe, z, step, text, null, guidance):
    """The latents after a stock step; the scheduler's own formula divides by nothing."""
    t = pipe.scheduler.timesteps[step]
    v0, v = (pipe.unet(z, t, each).sample for each in (null, text))
    return pipe.scheduler.step(v0 + guidance * (v - v0), t, z).prev_sample


def test_null_texts_are_optimised_for_the_schedulers_own_steps(zero64):
    found = invert(zero64, picture(32), PROMPT, "null", steps=STEPS, guidance=3.0)
    assert torch.tensor(found.losses).isfinite().all()
    assert replay(zero64, found).isfinite().all()
    text, empty = (zero64.encode_prompt(each, "cpu", 1, False)[0] for each in (PROMPT, ""))
    zero64.scheduler.set_timesteps(STEPS)
    errors = []
    for null in (found.null[:1], empty):
        after = step_by_scheduler(zero64, found.trajectory[:1], 0, text, null, 3.0)
        errors.append(float((after - found.trajectory[1]).square().mean()))
    assert abs(errors[0] - found.losses[0]) <= 1e-5 * found.losses[0]  # their roots are in float32
    assert errors[0] < errors[1]


@pytest.mark.slow
def test_values_of_a_picture_bring_it_nearer(zero64):
    found = invert(zero64, picture(32), PROMPT, "style", steps=STEPS, guidance=3.0)
    assert torch.tensor(found.losses).isfinite().all()
    without = Inversion("ddim", PROMPT, 3.0, SIZE, found.trajectory, STEPS)
    errors = [largest(replay(zero64, each), found.trajectory[-1:]) for each in (found, without)]
    assert errors[0] < errors[1]


def test_the_way_back_is_undone_by_the_same_velocity(zero64):
    """z_T = (z + sqrt(b) v) / sqrt(1 - b), so that the scheduler's step with this v leads to z."""
    found = invert(zero64, picture(32), PROMPT, "ddim", steps=STEPS)
    t = zero64.scheduler.timesteps[0]
    with torch.no_grad():
        v = zero64.unet(found.trajectory[1:2], t, zero64.encode_prompt(PROMPT, "cpu", 1, False)[0]).sample
    after = zero64.scheduler.step(v, t, found.trajectory[:1]).prev_sample
    assert largest(after, found.trajectory[1:2]) <= 1e-6  # their roots are in float32


def test_edict_goes_both_ways_exactly(zero64):
    moves = Moves(zero64, zero64.unet, PROMPT, STEPS, SIZE)
    start = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        noises = invert_edict(zero64, moves, start, 3.0)
        back = follow_edict(zero64, moves, noises, 3.0)
    assert largest(back, start.repeat(2, 1, 1, 1)) <= 1e-10 * max(1, noises.abs().max())
    found = invert(zero64, picture(32), PROMPT, "edict", steps=STEPS, guidance=3.0)
    assert found.trajectory.isfinite().all()
    assert generate_edict(zero64, found, TARGET).getextrema() != ((0, 0),) * 3


@torch.no_grad()
def ddcm_by_hand(pipe, z0, start, guidance):
    """InfEdit's picture with both noises written by velocities: z_0 + x_0(y) - x_0(z)."""
    source, target, null = (pipe.encode_prompt(each, "cpu", 1, False)[0] for each in (PROMPT, TARGET, ""))
    levels, noise = pipe.scheduler.alphas_cumprod, torch.Generator().manual_seed(7)
    times = pipe.scheduler.timesteps.tolist()

    def find_picture(x, t, text):
        v, a = pipe.unet(x, t, text).sample, levels[t]
        if guidance > 1:
            nothing = pipe.unet(x, t, null).sample
            v = nothing + guidance * (v - nothing)
        return a**0.5 * x - (1 - a) ** 0.5 * v

    z = y = start
    for step, t in enumerate(times):
        y0 = z0 + find_picture(y, t, target) - find_picture(z, t, source)
        b = levels[times[step + 1]] if step + 1 < len(times) else torch.tensor(1.0)
        if type(pipe.scheduler).__name__ == "LCMScheduler" and b < 1:
            torch.randn(2, 4, 8, 8, generator=noise, dtype=torch.float64)  # its own, which goes nowhere
        fresh = torch.randn(1, 4, 8, 8, generator=noise, dtype=torch.float64)
        z, y = (b**0.5 * x + (1 - b) ** 0.5 * fresh for x in (z0, y0))
    return torch.cat([z, y])


def test_without_inversion_latents_are_those_of_the_formula(either64):
    guidance = 1.0 if type(either64.scheduler).__name__ == "LCMScheduler" else 3.0
    found = invert(either64, picture(32), PROMPT, "ddcm", steps=STEPS, guidance=guidance)
    start = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    given = {"latents": start, "output_type": "latent", **found.arguments}
    with difffast.edit(either64, PROMPT, TARGET, cross=0.0, self_=0.0, inversion=found) as edited:
        got = either64(edited.prompts, generator=torch.Generator().manual_seed(7), **given).images
    expected = ddcm_by_hand(either64, found.trajectory, start, guidance)
    assert either64.scheduler.alphas_cumprod[either64.scheduler.timesteps[0]] == 0
    assert largest(got, expected) <= EXACT_FLOAT64 * expected.abs().max()
    assert largest(got[:1], got[1:]) > 1e-3


@pytest.mark.parametrize(("name", "kind"), [("DDIM", DDIMScheduler), ("LCM", LCMScheduler)])
def test_predictions_of_noise_alone_are_refused(pipe64, name, kind):
    method = "ddim" if name == "DDIM" else "ddcm"
    pipe64.scheduler = scheduler(name)
    found = invert(pipe64, picture(32), PROMPT, method, steps=STEPS)
    pipe64.scheduler = kind.from_config(pipe64.scheduler.config, **ZERO)
    before = dict(vars(pipe64.scheduler))
    error = r"needs signal at every step, got alphas_cumprod\[999\] = 0 with 4 steps"
    with pytest.raises(ValueError, match=error):
        invert(pipe64, picture(32), PROMPT, method, steps=STEPS)
    with pytest.raises(ValueError, match=error):
        difffast.patch(pipe64, "exact", steering=found)
    assert vars(pipe64.scheduler) == before
    if name == "DDIM":  # whose leading times do not begin with the last one
        pipe64.scheduler = kind.from_config(pipe64.scheduler.config, timestep_spacing="leading")
        assert invert(pipe64, picture(32), PROMPT, "null", steps=2).null.isfinite().all()


def test_one_step_from_noise_alone_is_refused(zero64):
    zero64.scheduler = DDIMScheduler.from_config(zero64.scheduler.config, set_alpha_to_one=True)
    with pytest.raises(ValueError, match="at least 2 steps, got 1"):
        invert(zero64, picture(32), PROMPT, "ddim", steps=1)
