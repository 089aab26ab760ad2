"""Every scheduler with fixed timesteps: all-key is stock bit for bit, look-ahead is step by step."""

import pytest
import torch
from sampling import EVERY_SCHEDULER, STEPS, largest, latents, scheduler
from tolerances import LATENTS_FLOAT32, LATENTS_FLOAT64

from difffast import EncoderPropagation, patched

STEP_BY_STEP = EncoderPropagation(parallel=False)


@pytest.mark.parametrize("name", EVERY_SCHEDULER)
def test_all_key_is_stock_bit_for_bit(pipe, name):
    pipe.scheduler = scheduler(name)
    stock = latents(pipe, steps=STEPS)
    every_step = EncoderPropagation(key_steps=1)
    with patched(pipe, propagation=every_step, fused=False) as report:
        assert torch.equal(latents(pipe, steps=STEPS), stock)
    assert report.last_run.key == report.last_run.total


@pytest.mark.parametrize("name", EVERY_SCHEDULER)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param(torch.float32, LATENTS_FLOAT32, marks=pytest.mark.slow), (torch.float64, LATENTS_FLOAT64)],
    ids=str,
)
def test_look_ahead_is_step_by_step(pipe, name, dtype, tolerance):
    pipe = pipe.to(dtype=dtype)
    pipe.scheduler = scheduler(name)
    stock = latents(pipe, steps=STEPS)
    with patched(pipe, propagation=STEP_BY_STEP):
        one_at_a_time = latents(pipe, steps=STEPS)
    with patched(pipe, propagation=EncoderPropagation()) as report:
        ahead = latents(pipe, steps=STEPS)
        again = latents(pipe, steps=STEPS)
    run = report.last_run
    assert run.propagated > 0
    assert run.key + run.propagated == run.total
    assert max(run.decode_batches) > 1
    assert (run.stock, run.forced) == (0, 0)
    assert torch.equal(ahead, again), "repeat runs must be identical"
    assert largest(ahead, one_at_a_time) <= tolerance
    assert largest(ahead, stock) > 100 * tolerance, "propagation must have taken place"


@pytest.mark.parametrize("name", EVERY_SCHEDULER)
def test_latents_do_not_enter_at_propagated_steps(pipe, name, monkeypatch):
    pipe.scheduler = scheduler(name)
    with patched(pipe, propagation=EncoderPropagation()) as report:
        clean = latents(pipe, steps=STEPS)
        plan = report.plan(report.last_run.total)
        scale = pipe.scheduler.scale_model_input
        spoiled = []

        def spoil(sample, timestep):
            sample = scale(sample, timestep)
            if plan.is_key(timestep.storage_offset()):
                return sample
            spoiled.append(timestep)
            return torch.full_like(sample, float("nan"))

        monkeypatch.setattr(pipe.scheduler, "scale_model_input", spoil)
        assert torch.equal(latents(pipe, steps=STEPS), clean)
    assert len(spoiled) == plan.total - len(plan.key_steps)
