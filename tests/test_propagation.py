"""The controller under stock pipelines: what it computes."""

import copy
import math

import pytest
import torch
import unet_oracle
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from propagated import PUBLISHED, STEP_BY_STEP, assert_nothing_kept, controller_of
from sampling import largest, latents, mask, picture, scheduler
from tolerances import LATENTS_FLOAT32, LATENTS_FLOAT64
from torch.utils._python_dispatch import TorchDispatchMode

import difffast
from difffast import CfgReuse, EncoderPropagation, FeatureReuse, patched
from difffast.surgery.subclass import is_swapped


def both_ways(pipe, run):
    """``run(pipe)`` with look-ahead and step by step; asserts that they agree and returns the former's report."""
    with patched(pipe, propagation=STEP_BY_STEP):
        one_at_a_time = run(pipe)
    with patched(pipe, propagation=PUBLISHED) as report:
        ahead = run(pipe)
    assert largest(ahead, one_at_a_time) <= LATENTS_FLOAT64
    return report


@pytest.mark.parametrize("parallel", [True, False])
def test_is_the_published_method(pipe64, parallel):
    keys = (0, 1, 2, 3, 5, 10, 15)
    expected = unet_oracle.sample_ddim(pipe64, "a red circle", keys, steps=20, seed=3)
    with patched(pipe64, propagation=EncoderPropagation(parallel=parallel)):
        assert largest(latents(pipe64, seed=3), expected) <= LATENTS_FLOAT64


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("parallel", [True, False])
def test_extrapolated_features(pipe64, order, parallel):
    """A loop of our own, by hand-written halves: features of a step on the line, or parabola, through key steps'."""
    unet, steps, known = pipe64.unet, pipe64.scheduler, []
    with torch.no_grad():
        text = torch.cat(pipe64.encode_prompt("a red circle", "cpu", 1, True)[::-1])
        steps.set_timesteps(16)
        x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for at, t in enumerate(steps.timesteps):
            if at % 4 == 0:
                skips, mid = unet_oracle.encode(unet, torch.cat([x] * 2), t, text)
                known = [(at, [*skips, mid]), *known[:order]]
            features = []
            for values in zip(*(tensors for _, tensors in known), strict=True):
                points = list(zip((key for key, _ in known), values, strict=True))
                lagrange = (
                    value * math.prod((at - other) / (key - other) for other, _ in points if other != key)
                    for key, value in points
                )
                features.append(sum(lagrange))
            negative, positive = unet_oracle.decode(unet, features[:-1], features[-1], t, text).chunk(2)
            x = steps.step(negative + 7.5 * (positive - negative), t, x).prev_sample
    config = EncoderPropagation(key_steps=4, extrapolate=order, parallel=parallel, max_parallel=3)
    with patched(pipe64, propagation=config) as report:
        assert largest(latents(pipe64, steps=16), x) <= LATENTS_FLOAT64
        assert_nothing_kept(pipe64)
    assert report.last_run.propagated == 12
    with patched(pipe64, propagation=EncoderPropagation(key_steps=4)):
        assert largest(latents(pipe64, steps=16), x) > 1e-3
    with patched(pipe64, propagation=config, cfg=CfgReuse(8)) as report:
        assert latents(pipe64, steps=16).isfinite().all()
    assert report.last_run.halves == 14


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 7.5, "guidance_rescale": 0.7},
        {"prompt": ["a red circle", "two cats"], "num_images_per_prompt": 2},
        {"prompt": ["a red circle", "two cats"], "guidance_scale": 1.0},
        {"height": 40, "width": 24},
        {"negative_prompt": "blurry", "num_images_per_prompt": 3},
        {"eta": 0.5},
    ],
    ids=str,
)
def test_stock_options(pipe64, options):
    report = both_ways(pipe64, lambda pipe: latents(pipe, **options))
    assert report.last_run.key == 7
    assert report.last_run.forced == 0


def test_images_of_all_key_runs_are_stock_bit_for_bit(pipe):
    def image(pipe):
        return pipe("a red circle", num_inference_steps=8, generator=torch.Generator().manual_seed(0)).images[0]

    stock = image(pipe)
    with patched(pipe, propagation=EncoderPropagation(key_steps=1), fused=False):
        assert image(pipe).tobytes() == stock.tobytes()


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.2])
def test_img2img(pipe64, strength):
    pipe = StableDiffusionImg2ImgPipeline(**pipe64.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def run(pipe):
        return latents(pipe, image=picture(), strength=strength)

    report = both_ways(pipe, run)
    first = 20 - int(20 * strength)
    by_hand = [key for key in (0, 1, 2, 3, 5, 10, 15) if first + key < 20]  # the published list, from the first step
    assert report.last_run.key == len(by_hand)
    assert report.last_run.forced == 0
    assert report.last_run.key + report.last_run.propagated == 20 - first
    with patched(pipe, propagation=EncoderPropagation(key_steps=1), fused=False):
        all_key = run(pipe)
    assert torch.equal(all_key, run(pipe))


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("channels", [4, 9])
def test_inpaint(request, channels, strength):
    base = request.getfixturevalue("pipe64" if channels == 4 else "inpaint_pipe64")
    pipe = StableDiffusionInpaintPipeline(**base.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def run(pipe):
        return latents(pipe, image=picture(), mask_image=mask(), height=32, width=32, strength=strength)

    report = both_ways(pipe, run)
    assert report.last_run.propagated > 0
    with patched(pipe, propagation=EncoderPropagation(key_steps=1), fused=False):
        all_key = run(pipe)
    assert torch.equal(all_key, run(pipe))


def test_freeu_and_attention_slicing(pipe64):
    pipe64.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert both_ways(pipe64, latents).last_run.propagated == 13
    pipe64.enable_attention_slicing()
    with pytest.warns(UserWarning, match="attn2 layers run stock: attention processor SlicedAttnProcessor"):
        assert both_ways(pipe64, latents).last_run.propagated == 13


def test_custom_timesteps_and_return_dict(pipe64):
    pipe64.scheduler = scheduler("DPM++ 2M")
    report = both_ways(pipe64, lambda pipe: latents(pipe, timesteps=list(range(901, 0, -100))))
    assert report.last_run.total == 10
    assert report.last_run.propagated > 0
    with patched(pipe64, propagation=PUBLISHED), torch.no_grad():
        sample, text = torch.zeros(2, 4, 8, 8, dtype=torch.float64), torch.zeros(2, 77, 64, dtype=torch.float64)
        pipe64.scheduler.set_timesteps(20)
        by_name = pipe64.unet(sample, pipe64.scheduler.timesteps[0], encoder_hidden_states=text)
        pipe64.scheduler.set_timesteps(20)
        by_position = pipe64.unet(sample, pipe64.scheduler.timesteps[0], text, return_dict=False)
        assert torch.equal(by_name.sample, by_position[0])


def test_inference_mode(pipe):
    with patched(pipe, propagation=PUBLISHED):
        expected = latents(pipe)
        with torch.inference_mode():
            assert torch.equal(latents(pipe), expected)


def test_changed_prompt_and_size_between_calls(pipe):
    runs = [
        {"prompt": "a red circle"},
        {"prompt": "two cats"},
        {"prompt": "two cats", "height": 40, "width": 24},
        {"prompt": ["two cats", "a dog"]},
        {"prompt": "two cats", "guidance_scale": 1.0},
    ]
    fresh = []
    for options in runs:
        with patched(pipe, propagation=PUBLISHED):
            fresh.append(latents(pipe, **options))
    with patched(pipe, propagation=PUBLISHED):
        for options, expected in zip(runs, fresh, strict=True):
            assert torch.equal(latents(pipe, **options), expected)


def test_dtype_change_between_calls(pipe):
    with patched(pipe, propagation=PUBLISHED):
        latents(pipe)
        pipe.to(torch.float64)
        assert latents(pipe).dtype == torch.float64


def test_guidance_switched_off_halfway(pipe64):
    def switch_off(pipe, step, timestep, tensors):
        if step == 7:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    def run(pipe):
        return latents(
            pipe, callback_on_step_end=switch_off, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]
        )

    assert both_ways(pipe64, run).last_run.forced == 1


@pytest.mark.parametrize("in_place", [True, False])
def test_conditioning_edited_halfway(pipe64, in_place):
    def edit(pipe, step, timestep, tensors):
        if step == 6:
            embeds = tensors["prompt_embeds"]
            tensors["prompt_embeds"] = embeds.mul_(2.0) if in_place else embeds * 2.0
        return tensors

    def run(pipe):
        return latents(pipe, callback_on_step_end=edit, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])

    assert both_ways(pipe64, run).last_run.forced == 1


def test_callbacks_see_every_step_and_may_edit_latents(pipe64):
    seen = []

    def edit(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"].shape))
        if step == 8:
            tensors["latents"] = tensors["latents"] + 1.0
        return tensors

    plain = both_ways(pipe64, latents)
    edited = both_ways(pipe64, lambda pipe: latents(pipe, callback_on_step_end=edit))
    assert edited.last_run.key == plain.last_run.key == 7
    assert [step for step, *_ in seen] == 2 * list(range(20))
    assert [t for _, t, _ in seen[:20]] == pipe64.scheduler.timesteps.tolist()


def test_invalidate_makes_the_next_step_a_key(pipe):
    with patched(pipe, propagation=PUBLISHED) as report:
        latents(pipe, callback_on_step_end=lambda p, step, t, x: (step == 11 and report.invalidate(), x)[1])
        assert report.last_run.forced == 1
        assert report.last_run.key == 8
        latents(pipe)
        assert report.last_run.forced == 0


def test_a_custom_loop_that_repeats_a_schedule(pipe):
    """The same timesteps tensor twice, in different latents: the second pass starts with a key step."""
    unet, steps = pipe.unet, pipe.scheduler
    text = torch.randn(2, 77, 64)

    @torch.no_grad()
    def loop(seed):
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for t in steps.timesteps:
            x = steps.step(unet(x, t, encoder_hidden_states=text).sample, t, x).prev_sample
        return x

    steps.set_timesteps(20)
    with patched(pipe, propagation=PUBLISHED):
        first, second = loop(0), loop(1)
        assert torch.equal(loop(0), first)
        assert torch.equal(loop(1), second)
        with torch.no_grad():  # half a pass, then from the start again
            for t in steps.timesteps[:8]:
                unet(torch.randn(2, 4, 8, 8), t, encoder_hidden_states=text)
        assert torch.equal(loop(0), first)
        skipped = [0, 1, 2, 3, 5, 6, 9]
        with torch.no_grad():
            for order in skipped:
                unet(torch.randn(2, 4, 8, 8), steps.timesteps[order], encoder_hidden_states=text)
        assert controller_of(pipe)._runs[0].state.plan.key_steps[:4] == (9, 10, 11, 12), "counted from where it goes on"


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {"propagation": EncoderPropagation(key_steps=4)},
        {"propagation": FeatureReuse(interval=4)},
        {"preset": "exact", "cfg": CfgReuse(2)},
    ],
    ids=["ahead", "reuse", "guidance"],
)
def test_several_calls_a_step_run_in_full(pipe, config):
    """As for the views of a panorama: features of one call never meet another's latents."""
    unet, steps, text = pipe.unet, pipe.scheduler, torch.randn(2, 77, 64)

    def loop():
        steps.set_timesteps(12)
        views = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        for t in steps.timesteps:
            views = [steps.step(unet(x, t, encoder_hidden_states=text).sample, t, x).prev_sample for x in views]
        return torch.stack(views)

    stock = loop()
    with (
        patched(pipe, **config, fused=False) as report,
        pytest.warns(UserWarning, match="the UNet is called several times a step"),
    ):
        assert largest(loop(), stock) <= LATENTS_FLOAT32
    assert report.last_run.propagated + report.last_run.reused + report.last_run.halves == 0


class _CountSyncs(TorchDispatchMode):
    """Counts operators that read a value from the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.is_nonzero,
        )
        return function(*args, **(kwargs or {}))


def test_no_device_synchronisation_is_added(pipe):
    pipe.scheduler = scheduler("PNDM")
    with _CountSyncs() as stock:
        latents(pipe)
    with patched(pipe, propagation=EncoderPropagation(prior_noise=0.003)), _CountSyncs() as ours:
        latents(pipe)
    assert ours.count <= stock.count


def test_scheduler_replaced_after_patching(pipe64):
    with patched(pipe64, propagation=PUBLISHED) as report:
        latents(pipe64)
        pipe64.scheduler = scheduler("Euler")
        latents(pipe64)
        assert report.last_run.propagated == 13


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_run_decodes_ahead_as_it_does_step_by_step(pipe64, data):
    name = data.draw(st.sampled_from(["DDIM", "PNDM", "Euler", "Euler-A", "Heun", "DPM++ 2M", "DPM++ SDE", "DDPM"]))
    pipe64.scheduler = scheduler(name)
    steps = data.draw(st.integers(8, 25))
    keys = data.draw(st.one_of(st.none(), st.integers(1, 9), st.sets(st.integers(0, steps - 1)).map(lambda s: s | {0})))
    cap = data.draw(st.integers(1, 9))
    options = {
        "prompt": ["a red circle", "two cats"][: data.draw(st.integers(1, 2))],
        "num_images_per_prompt": data.draw(st.integers(1, 2)),
        "guidance_scale": data.draw(st.sampled_from([1.0, 7.5])),
        "height": 8 * data.draw(st.integers(2, 5)),
        "width": 8 * data.draw(st.integers(2, 5)),
        "seed": data.draw(st.integers(0, 9)),
    }
    stop = data.draw(st.one_of(st.none(), st.integers(0, steps - 1)))

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = stop is not None and step >= stop
        return tensors

    ahead = EncoderPropagation(key_steps=keys, max_parallel=cap)
    with patched(pipe64, propagation=ahead):
        latents(pipe64, steps=steps, callback_on_step_end=interrupt, **options)  # may leave a run half done
        a = latents(pipe64, steps=steps, **options)
    with patched(pipe64, propagation=EncoderPropagation(key_steps=keys, parallel=False)):
        b = latents(pipe64, steps=steps, **options)
    assert largest(a, b) <= LATENTS_FLOAT64


def test_a_copy_of_a_patched_pipeline_is_stock(pipe):
    stock = latents(pipe)
    with patched(pipe, propagation=PUBLISHED):
        twin = copy.deepcopy(pipe)
        assert not is_swapped(twin.unet)
        assert torch.equal(latents(twin), stock)
        difffast.patch(twin, propagation=PUBLISHED)
        assert torch.equal(latents(twin), latents(pipe))
