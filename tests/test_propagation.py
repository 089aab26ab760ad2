"""The controller under stock pipelines: what it computes, and that no run ever sees another run's features."""

import copy
import math
import threading

import pytest
import torch
import unet_oracle
import zoo
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling import largest, latents, mask, picture, scheduler
from tolerances import LATENTS_FLOAT32, LATENTS_FLOAT64
from torch.utils._python_dispatch import TorchDispatchMode
from watching import watching

import difffast
from difffast import CfgReuse, EncoderPropagation, FeatureReuse, patch, patched, unpatch
from difffast.sampling.controller import find_controller
from difffast.sampling.decode_ahead import DecodeAhead
from difffast.surgery.subclass import is_swapped

PUBLISHED = EncoderPropagation()
STEP_BY_STEP = EncoderPropagation(parallel=False)


def both_ways(pipe, run):
    """``run(pipe)`` with look-ahead and step by step; asserts that they agree and returns the former's report."""
    with patched(pipe, propagation=STEP_BY_STEP):
        one_at_a_time = run(pipe)
    with patched(pipe, propagation=PUBLISHED) as report:
        ahead = run(pipe)
    assert largest(ahead, one_at_a_time) <= LATENTS_FLOAT64
    return report


def in_threads(work, count):
    """``work(0)`` ... ``work(count - 1)``, each in a thread of its own."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def controller_of(pipe):
    return find_controller(pipe.unet)


def assert_nothing_kept(pipe):
    for run in controller_of(pipe)._runs:
        assert run._fingerprint is None
        if isinstance(run._strategy, DecodeAhead):
            assert run._strategy._features is None
            assert not run._strategy._known
            assert not run._strategy._queue


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


# State: whatever happens to a run, the next one is as if it had never been.


class StopRunError(Exception):
    pass


def test_a_run_that_raises_or_is_interrupted_leaves_nothing_behind(pipe):
    with patched(pipe, propagation=PUBLISHED) as report:
        expected = latents(pipe)

        def interrupt(pipe, step, timestep, tensors):
            pipe._interrupt = step >= 6
            return tensors

        def fail(pipe, step, timestep, tensors):
            if step == 6:
                raise StopRunError
            return tensors

        latents(pipe, "something else", callback_on_step_end=interrupt)
        assert report.last_run.key + report.last_run.propagated == 7
        assert torch.equal(latents(pipe), expected)
        with pytest.raises(StopRunError):
            latents(pipe, "something else", callback_on_step_end=fail)
        assert torch.equal(latents(pipe), expected)
        assert_nothing_kept(pipe)


def test_an_error_inside_the_unet_leaves_nothing_behind(pipe):
    with patched(pipe, propagation=PUBLISHED):
        expected = latents(pipe)
        calls = []

        def fail(_module, _output):
            calls.append(1)
            if len(calls) == 5:
                raise StopRunError

        with watching(fail, pipe.unet.conv_out), pytest.raises(StopRunError):
            latents(pipe)
        assert_nothing_kept(pipe)
        assert torch.equal(latents(pipe), expected)


def test_a_nested_run_does_not_disturb_the_outer_one(pipe):
    # The schedulers differ, so that the stock pipelines themselves can be nested.
    inner_pipe = StableDiffusionPipeline(
        **{**pipe.components, "scheduler": scheduler("Euler")}, requires_safety_checker=False
    )
    inner_pipe.set_progress_bar_config(disable=True)
    with patched(pipe, propagation=PUBLISHED), patched(inner_pipe, propagation=PUBLISHED):
        outer, inner = latents(pipe), latents(inner_pipe, "a cat")
        seen = []

        def nest(_pipe, step, timestep, tensors):
            if step in (4, 7):
                seen.append(latents(inner_pipe, "a cat"))
            return tensors

        assert torch.equal(latents(pipe, callback_on_step_end=nest), outer)
        assert all(torch.equal(result, inner) for result in seen)
        assert len(seen) == 2


def test_re_entering_the_same_pipeline(pipe):
    """DDIM keeps no state in the scheduler but its schedule, so that stock survives re-entrance, and so must we."""
    with patched(pipe, propagation=PUBLISHED):
        outer, inner = latents(pipe), latents(pipe, "a cat", steps=20)
        seen = []

        def nest(_pipe, step, timestep, tensors):
            if step == 7:
                seen.append(latents(pipe, "a cat", steps=20))
            return tensors

        assert torch.equal(latents(pipe, callback_on_step_end=nest), outer)
        assert torch.equal(seen[0], inner)


def test_threads_that_share_a_unet(pipe):
    prompts = ["a red circle", "a blue square", "two cats"]
    pipes = []
    for _ in prompts:
        own = StableDiffusionPipeline(
            **{**pipe.components, "scheduler": scheduler("DDIM")}, requires_safety_checker=False
        )
        own.set_progress_bar_config(disable=True)
        patch(own)
        pipes.append(own)
    # Encoded before: stock text encoding is not thread-safe (a stock pipeline's pictures differ now and then).
    encoded = [pipe.encode_prompt(prompt, "cpu", 1, True) for prompt in prompts]
    texts = [{"prompt_embeds": text, "negative_prompt_embeds": negative} for text, negative in encoded]
    expected = [latents(own, None, **text) for own, text in zip(pipes, texts, strict=True)]
    results = {}

    def work(i):
        for repeat in range(2):
            results[i, repeat] = latents(pipes[i], None, **texts[i])

    in_threads(work, len(prompts))
    assert len(results) == 6
    for (i, _), result in results.items():
        assert torch.equal(result, expected[i])
    for own in pipes:
        unpatch(own)
    assert not is_swapped(pipe.unet)


@pytest.mark.filterwarnings("ignore:difffast. this UNet call runs unpatched")
def test_one_pipeline_in_two_threads(pipe):
    """Whoever sets the schedule last is propagated, the other may run stock: nobody gets the other's features."""
    prompts = ["a red circle", "a blue square"]
    stock = [latents(pipe, prompt) for prompt in prompts]
    with patched(pipe, propagation=PUBLISHED):
        fast = [latents(pipe, prompt) for prompt in prompts]
        results = {}

        def work(i):
            for repeat in range(3):
                results[i, repeat] = latents(pipe, prompts[i])

        in_threads(work, len(prompts))
    assert len(results) == 6
    for (i, _), result in results.items():
        assert torch.equal(result, fast[i]) or torch.equal(result, stock[i])


def test_two_pipelines_sharing_a_unet_keep_their_own_settings(pipe):
    other = StableDiffusionPipeline(
        **{**pipe.components, "scheduler": scheduler("Euler")}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    stock_other = latents(other)
    first = patch(pipe, propagation=PUBLISHED)
    with pytest.warns(UserWarning, match="runs unpatched"):
        assert torch.equal(latents(other), stock_other), "an unpatched pipeline stays stock"
    second = patch(other, propagation=EncoderPropagation(key_steps=4))
    latents(pipe)
    latents(other)
    assert (first.last_run.key, second.last_run.key) == (7, 5)
    unpatch(pipe)
    latents(other)
    assert second.last_run.key == 5
    assert is_swapped(other.unet)
    unpatch(other)
    assert not is_swapped(other.unet)


def test_sharing_unet_and_scheduler_needs_equal_settings(pipe):
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with patched(pipe, propagation=PUBLISHED):
        with pytest.raises(ValueError, match="shares this pipeline's scheduler, which needs equal settings"):
            patch(other, propagation=EncoderPropagation(key_steps=4))
        assert latents(pipe).isfinite().all()
        theirs = patch(other, propagation=PUBLISHED)
        other.set_progress_bar_config(disable=True)
        latents(other, image=picture())
        assert theirs.last_run.propagated > 0
    assert is_swapped(pipe.unet)
    unpatch(other)
    assert not is_swapped(pipe.unet)


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


def test_nothing_is_decoded_beyond_the_last_executed_step():
    pipe = zoo.ROWS["StableDiffusionXLPipeline"].build()
    pipe.set_progress_bar_config(disable=True)
    with patched(pipe, propagation=EncoderPropagation(key_steps=4, max_parallel=4)) as report:
        latents(pipe, steps=20, denoising_end=0.7, height=32, width=32)
        assert_nothing_kept(pipe)
    run = report.last_run
    assert (run.total, run.key, run.propagated) == (20, 4, 10)
    assert run.decode_batches == [4, 4, 4, 2]


def test_memory_is_released_at_the_end_of_a_run(pipe):
    with patched(pipe, propagation=PUBLISHED):
        latents(pipe)
        assert_nothing_kept(pipe)
        for steps in (20, 12, 9):
            latents(pipe, steps=steps)
        assert len(controller_of(pipe)._runs) == 1, "a new schedule frees the old one's run"


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
    run = lambda: latents(control_pipe, image=picture(), height=32, width=32)  # noqa: E731
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
    assert report.last_run.reasons == []
    assert report.last_run.key < more
    assert not any("share" in note for note in patch(pipe, "exact").notes)


def test_key_steps_beyond_the_schedule(pipe):
    with patched(pipe, propagation=EncoderPropagation(key_steps=[0, 30])):
        with pytest.raises(ValueError, match="key_steps contains 30"):
            latents(pipe, steps=20)
        assert latents(pipe, steps=40).isfinite().all()


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
