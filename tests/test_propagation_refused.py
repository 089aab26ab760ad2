"""Where steps cannot share, they run stock, and the run says why."""

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from propagated import PUBLISHED, STEP_BY_STEP
from sampling import largest, latents, picture, scheduler

from difffast import CfgReuse, EncoderPropagation, FeatureReuse, patch, patched

# What cannot be propagated runs stock, and says so.


def assert_stock(pipe, run, reason):
    stock = run()
    with patched(pipe, propagation=PUBLISHED) as report, pytest.warns(UserWarning, match=reason):
        assert torch.equal(run(), stock)
    return report


def test_training_mode_and_gradients_run_stock(pipe):
    pipe.unet.train()
    pipe.unet.mid_block.resnets[0].dropout.p = 0.5

    def seeded():
        torch.manual_seed(0)
        return latents(pipe)

    report = assert_stock(pipe, seeded, "training mode")
    assert report.last_run.stock == 20
    pipe.unet.eval()
    pipe.scheduler.set_timesteps(20)
    text = torch.randn(2, 77, 64)

    def with_gradients():
        sample = torch.ones(2, 4, 8, 8, requires_grad=True)
        pipe.unet(sample, pipe.scheduler.timesteps[0], encoder_hidden_states=text).sample.sum().backward()
        return sample.grad

    assert_stock(pipe, with_gradients, "gradients are enabled")


def test_hooks_on_the_unet_run_stock(pipe):
    seen = []
    handle = pipe.unet.register_forward_hook(lambda module, args, output: seen.append(output))
    assert_stock(pipe, lambda: latents(pipe), "forward hooks")
    assert len(seen) == 40
    handle.remove()
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert_stock(pipe, lambda: latents(pipe), "replaced on the instance")
    del pipe.unet.forward
    with patched(pipe, propagation=PUBLISHED) as report:
        latents(pipe)
    assert report.last_run.stock == 0


def test_residuals_of_an_unpatched_controlnet_run_stock(pipe):
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 64)).eval()
    control_pipe = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=controlnet, requires_safety_checker=False
    )
    control_pipe.set_progress_bar_config(disable=True)

    # The UNet and the scheduler are shared with a patched pipeline: still stock, never stale.
    def run():
        return latents(control_pipe, image=picture(), height=32, width=32)

    stock = run()
    with patched(pipe, propagation=PUBLISHED), pytest.warns(UserWarning, match="residuals are given that are not"):
        assert torch.equal(run(), stock)


class _Foreign(AttnProcessor2_0):
    """A processor from outside Diffusers; for all we know it mixes samples."""


def test_foreign_attention_processors_run_every_step(pipe):
    pipe.unet.set_attn_processor(_Foreign())
    expected = latents(pipe)
    with (
        patched(pipe, propagation=PUBLISHED, fused=False) as report,
        pytest.warns(UserWarning, match="every step is a key step: .* has the attention processor _Foreign"),
    ):
        stock = latents(pipe)
    assert report.last_run.key == 20
    with patched(pipe, propagation=STEP_BY_STEP, fused=False), pytest.warns(UserWarning, match="_Foreign"):
        assert torch.equal(latents(pipe), expected)
    assert largest(stock, expected) < 0.1, "prior noise alone"


def test_unknown_timesteps_run_stock(pipe):
    call = {"sample": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 77, 64)}
    pipe.scheduler.set_timesteps(20)
    for timestep in (500, torch.tensor(500), pipe.scheduler.timesteps[3:5]):
        with torch.no_grad():
            stock = pipe.unet(timestep=timestep, **call).sample
            with (
                patched(pipe, propagation=PUBLISHED),
                pytest.warns(UserWarning, match="position in the schedule is unknown"),
            ):
                assert torch.equal(pipe.unet(timestep=timestep, **call).sample, stock)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "balanced"},
        {"preset": "turbo"},
        {"preset": "faster-diffusion"},
        {"propagation": EncoderPropagation(key_steps=3)},
        {"propagation": FeatureReuse(3)},
        {"preset": "exact", "cfg": CfgReuse(2)},
    ],
    ids=str,
)
def test_few_steps_share_nothing_and_the_run_says_so_once(pipe, options):
    """One behaviour, whatever asks for sharing: every step in full, a warning a pipeline, a line in every report."""
    said = "every step runs in full: sharing needs at least 8 denoising steps, got 4"
    stock = latents(pipe, steps=4)
    with patched(pipe, **{**options, "fused": False}) as report:
        with pytest.warns(UserWarning, match=said):
            first = latents(pipe, steps=4)
        assert largest(latents(pipe, steps=4), first) == 0  # and warns no more: warnings are errors here
        assert sum(said in reason for reason in report.last_run.reasons) == 1
        assert (report.last_run.key, report.last_run.halves) == (4, 0)
        if options.get("preset") != "faster-diffusion":  # it injects prior noise all the same
            assert torch.equal(first, stock)


def test_few_steps_are_shared_by_force(pipe):
    sparse = EncoderPropagation(key_steps=3)
    with patched(pipe, propagation=sparse, force=True) as report:
        assert latents(pipe, steps=4).isfinite().all()
    assert (report.last_run.total, report.last_run.propagated) == (4, 2)
    pipe.scheduler = scheduler("Heun")  # 7 UNet calls but only 4 steps
    with patched(pipe, propagation=sparse) as report, pytest.warns(UserWarning, match="got 4"):
        latents(pipe, steps=4)
    assert report.last_run.key == 7


@pytest.mark.parametrize(
    ("options", "steps", "more", "why"),
    [
        ({"preset": "balanced"}, 11, 25, "'balanced' shares nothing below 12"),
        ({"preset": "turbo"}, 11, 25, "'turbo' shares nothing below 12"),
        ({"propagation": FeatureReuse(0.08)}, 24, 25, "all of them are key steps"),
    ],
)
def test_a_run_in_which_nothing_is_shared_says_so(pipe, options, steps, more, why):
    report = patch(pipe, **options)
    note = f"steps share work in schedules of at least {steps + 1} steps; in shorter ones every step runs in full"
    assert note in report.notes
    latents(pipe, steps=steps)
    line = f"every step runs in full: with {steps} steps, {why}"
    assert report.last_run.reasons == [line]
    assert line in str(report.last_run)
    latents(pipe, steps=more)
    assert not any("in full" in reason for reason in report.last_run.reasons)
    assert report.last_run.key < more
    assert not any("share" in note for note in patch(pipe, "exact").notes)


def test_key_steps_beyond_the_schedule(pipe):
    with patched(pipe, propagation=EncoderPropagation(key_steps=[0, 30])):
        with pytest.raises(ValueError, match="key_steps contains 30"):
            latents(pipe, steps=20)
        assert latents(pipe, steps=40).isfinite().all()
