"""Semantic binding together with others: text keys, propagated steps, prior noise, maps, loops, interrupts, threads."""

import copy
import pickle

import pytest
import torch
from bound import LAYERS, PROMPT, STEPS, binding, run
from sampling import largest, latents, scheduler
from threads import in_threads
from tolerances import LATENTS_FLOAT64

from difffast import EncoderPropagation, SemanticBinding, collect_maps, patch, patched, unpatch
from difffast.surgery.subclass import is_swapped


@pytest.mark.parametrize("preset", ["exact", "faster-diffusion"])
def test_text_keys_are_reused_after_the_optimised_steps(pipe, preset):
    _, report = run(pipe, binding(), preset=preset)
    plan = report.plan(STEPS)
    assert plan.full_steps == (0, 1, 2)
    assert set(plan.full_steps) <= set(plan.key_steps)
    assert str(plan).count("optimised") == 3
    layers = len(report._settings.extensions[0].layers) + 1  # the middle block's besides
    assert report.last_run.text_kv["computed"] == 3 * layers
    assert report.last_run.key == len(plan.key_steps)
    assert report.last_run.forced == 0


def test_parallel_decoding_is_step_by_step(pipe64):
    results = []
    for parallel in (True, False):
        propagation = EncoderPropagation(key_steps=3, parallel=parallel, max_parallel=4)
        with patched(pipe64, propagation=propagation, binding=binding()) as report:
            results.append(latents(pipe64, PROMPT, steps=STEPS))
    assert max(report.last_run.decode_batches) == 1
    assert largest(*results) <= LATENTS_FLOAT64


def test_prior_noise_and_binding_both_edit_the_latents(pipe64):
    noisy = EncoderPropagation(key_steps=1, prior_noise=0.1)
    with patched(pipe64, propagation=noisy, binding=binding()):
        both = latents(pipe64, PROMPT, steps=STEPS)
    bound, _ = run(pipe64, binding())
    with patched(pipe64, propagation=noisy, binding=binding(optimise="text")):
        text_alone = latents(pipe64, PROMPT, steps=STEPS)
    assert largest(both, bound) > 1e-3
    assert largest(both, text_alone) > 1e-3


def test_maps_can_be_collected_besides(pipe):
    with patched(pipe, "exact", binding=binding()) as report, collect_maps(pipe, layers=LAYERS[0]) as maps:
        latents(pipe, PROMPT, steps=STEPS)
    assert maps.steps == {LAYERS[0]: STEPS}  # those of the optimisation are not counted
    assert report.trace.maps


def test_a_custom_loop_may_start_the_schedule_again(pipe64):
    pipe64.scheduler = scheduler("DDIM")
    with patched(pipe64, "exact", binding=binding()), torch.no_grad():
        results = []
        text = torch.cat(pipe64.encode_prompt(PROMPT, "cpu", 1, True)[::-1])
        pipe64.scheduler.set_timesteps(STEPS)
        for _ in range(2):
            z = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            for t in pipe64.scheduler.timesteps:
                null, cond = pipe64.unet(torch.cat([z] * 2), t, encoder_hidden_states=text).sample.chunk(2)
                z = pipe64.scheduler.step(null + 7.5 * (cond - null), t, z).prev_sample
            results.append(z)
        assert torch.equal(*results)
        assert largest(results[0], latents(pipe64, PROMPT, steps=STEPS)) <= LATENTS_FLOAT64


# Nothing is left behind


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["loss", "callback"])
def test_interrupts_leave_no_trace(pipe, monkeypatch, error, where):
    config = binding()
    expected, _ = run(pipe, config)

    def stop(*_args, **_kwargs):
        raise error("stop")

    flags = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    options = {"callback_on_step_end": stop} if where == "callback" else {}
    with patched(pipe, "exact", binding=config):
        if where == "loss":
            monkeypatch.setattr(SemanticBinding, "threshold_at", stop)
        with pytest.raises(error, match="stop"):
            latents(pipe, PROMPT, steps=STEPS, **options)
        monkeypatch.undo()
        assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == flags
        assert torch.equal(latents(pipe, PROMPT, steps=STEPS), expected)
    assert all(flags)


def test_unpatch_is_exact(pipe):
    before = latents(pipe, "a cat", steps=STEPS)
    classes = type(pipe), type(pipe.scheduler), type(pipe.unet)
    attributes = set(vars(pipe))
    patch(pipe, binding=binding())
    latents(pipe, PROMPT, steps=STEPS)
    assert is_swapped(pipe)
    assert type(pickle.loads(pickle.dumps(pipe.scheduler))) is classes[1]
    assert type(copy.copy(pipe)) is classes[0]
    unpatch(pipe)
    assert (type(pipe), type(pipe.scheduler), type(pipe.unet)) == classes
    assert set(vars(pipe)) == attributes
    assert "encode_prompt" not in vars(type(pipe)) or type(pipe).encode_prompt is classes[0].encode_prompt
    assert torch.equal(latents(pipe, "a cat", steps=STEPS), before)


def test_two_threads_share_a_unet(pipe):
    pipes = []
    for _ in range(2):
        # A tokenizer keeps its padding and truncation as state: threads need one each, stock pipelines as well.
        own = {name: copy.deepcopy(pipe.components[name]) for name in ("scheduler", "tokenizer")}
        other = type(pipe)(**{**pipe.components, **own}, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        pipes.append(other)
    prompts = [PROMPT, "a [tin can] and a [cat]"]
    expected = [run(each, binding(), prompt)[0] for each, prompt in zip(pipes, prompts, strict=True)]
    results = [None, None]
    for each in pipes:
        patch(each, "exact", binding=binding())

    def work(i):
        results[i] = latents(pipes[i], prompts[i], steps=STEPS)

    in_threads(work, 2)
    for each in pipes:
        unpatch(each)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())


def test_inference_mode(pipe):
    expected, _ = run(pipe, binding())
    with torch.inference_mode():
        ours, _ = run(pipe, binding())
    assert torch.equal(ours, expected)
