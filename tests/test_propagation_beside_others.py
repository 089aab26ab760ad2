"""Runs that end early, are nested, or run beside others: none ever sees another's features, and none keeps any."""

import pytest
import torch
import zoo
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from propagated import PUBLISHED, assert_nothing_kept, controller_of
from sampling import latents, picture, scheduler
from threads import in_threads
from watching import watching

from difffast import EncoderPropagation, patch, patched, unpatch
from difffast.surgery.subclass import is_swapped

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
