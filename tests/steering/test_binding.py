"""Semantic binding in stock pipelines, against the method written out (binding_by_hand.py)."""

import copy
import dataclasses

import pytest
import torch
import zoo
from binding_by_hand import SAMPLE
from bound import LAYERS, PROMPT, STEPS, THINGS, binding, numbers, run
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from sampling import SCHEDULERS, largest, latents, mask, picture, scheduler
from tolerances import LATENTS_FLOAT64

from difffast import EncoderPropagation, SemanticBinding, patched
from difffast.models.tokenizer import clip_tokenizer, learn_merges
from difffast.steering.binding.run import BindingRun
from difffast.steering.losses import LOSSES

#: Of what binding changes in the latents.
MOTION = 1e-10
ALL_KEY = EncoderPropagation(key_steps=1)


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_a_run_is_the_method_written_out(pipe64, mode):
    pipe64.scheduler = scheduler("DDIM")
    ours, report = run(pipe64, binding(mode=mode))
    expected, focus, bind = SAMPLE[mode](pipe64, THINGS, numbers(), LAYERS)
    plain = latents(pipe64, THINGS.text, steps=STEPS)
    assert largest(ours, expected) <= MOTION * largest(expected, plain)
    assert largest(expected, plain) > 1e-3
    steps = report.trace.steps
    assert {step.outcome for step in steps} == {"iterations"}
    for kind, losses in (("focus", focus), ("bind", bind)):
        found = [step.losses for step in steps if step.kind == kind]
        assert largest(torch.tensor(found), torch.tensor(losses)) <= 1e-10
    assert focus[0][0] > focus[0][1]
    assert bind[0][0] > bind[0][1]


@pytest.mark.parametrize("name", ["Euler", "DPM++ 2M", "v-prediction"])
def test_schedulers_step_from_the_moved_latents(pipe64, name):
    if name == "v-prediction":
        zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        pipe64.scheduler = DDIMScheduler.from_config(scheduler("DDIM").config, **zero_snr)
    else:
        pipe64.scheduler = scheduler(name)
    expected, _, _ = SAMPLE["paper"](pipe64, THINGS, numbers(bind=1, focus=2, replace=0), LAYERS)
    ours, _ = run(pipe64, binding(bind_steps=1, focus_steps=2, replace_step=0))
    plain = latents(pipe64, THINGS.text, steps=STEPS)
    assert largest(ours, expected) <= MOTION * largest(expected, plain)


SAME_INPUT = ("DDIM", "Euler", "Euler-A", "Heun", "KDPM2", "DPM++ 2M")


def first_losses(pipe, name, config):
    """Losses of the first step, whose input is the same whatever the scheduler."""
    pipe.scheduler = SCHEDULERS[name][0](beta_schedule="scaled_linear", timestep_spacing="linspace")
    seen = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latents = seen
    if name in ("Euler", "Euler-A", "Heun", "KDPM2"):
        # Their input is latents / sqrt(sigma^2 + 1), sigma^2 + 1 = 1 / (product of 1 - beta) after 1000 steps.
        latents = seen / pipe.scheduler.alphas_cumprod[-1].sqrt()

    def stop(pipe, _step, t, tensors):
        assert t == 999
        pipe._interrupt = True
        return tensors

    pipe.scheduler.set_timesteps(STEPS)
    with patched(pipe, "exact", binding=config) as report:
        given = latents / pipe.scheduler.init_noise_sigma  # the pipeline multiplies by it
        pipe(PROMPT, num_inference_steps=STEPS, latents=given, output_type="latent", callback_on_step_end=stop)
    assert {step.step for step in report.trace.steps} == {0}
    return {step.kind: torch.tensor(step.losses) for step in report.trace.steps}


@pytest.mark.parametrize("what", ["paper", "reference", "all losses"])
def test_the_same_input_is_moved_alike_under_every_scheduler(pipe64, what):
    """Step sizes are for the UNet's input, which some schedulers make by scaling their latents."""
    config = (
        binding(losses=dict.fromkeys(LOSSES, 1.0), merge=False, bind_steps=0, iterations=4)
        if what == "all losses"
        else binding(mode=what, iterations=4)
    )
    expected = first_losses(pipe64, SAME_INPUT[0], config)
    assert len(expected["focus"]) == 4
    assert largest(expected["focus"][:-1], expected["focus"][1:]) > 1e-3
    for name in SAME_INPUT[1:]:
        for kind, losses in first_losses(pipe64, name, config).items():
            assert largest(losses, expected[kind]) <= 1e-6


def test_under_euler_a_run_is_ddims(pipe64):
    """Both solve one equation by the same steps: Euler's latents are DDIM's times sqrt(sigma^2 + 1)."""
    spacing = {"beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
    results = []
    for name, options in (("DDIM", {"clip_sample": False, "set_alpha_to_one": True}), ("Euler", {})):
        pipe64.scheduler = SCHEDULERS[name][0](**spacing, **options)
        pipe64.scheduler.set_timesteps(STEPS)
        start = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        if name == "Euler":
            scaled = start / pipe64.scheduler.alphas_cumprod[pipe64.scheduler.timesteps[0].long()].sqrt()
            start = scaled / pipe64.scheduler.init_noise_sigma
        results.append(run(pipe64, binding(), latents=start))
    (ddim, ddims), (euler, eulers) = results
    assert largest(ddim, euler) <= 1e-5  # Euler steps in float32
    for ours, theirs in zip(ddims.trace.steps, eulers.trace.steps, strict=True):
        assert largest(torch.tensor(ours.losses), torch.tensor(theirs.losses)) <= 1e-5
    merged_only, _ = run(pipe64, binding(bind_steps=0, focus_steps=0), latents=start)
    assert largest(euler, merged_only) > 1e-2


XL_LAYERS = tuple(
    f"{block}.attentions.{i}.transformer_blocks.{j}.attn2"
    for block, count in (("down_blocks.1", 2), ("up_blocks.0", 3))
    for i in range(count)
    for j in (0, 1)
)


@pytest.fixture
def xl_pipe64():
    pipe = zoo.ROWS["StableDiffusionXLPipeline"].build().to(dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("mode", "name"), [("paper", "Euler"), ("reference", "Euler"), ("reference", "DDIM")])
def test_sdxl(xl_pipe64, mode, name):
    """Both text encoders' rows are merged side by side; the pooled text is not, and binding goes without it.

    As released, a step with a threshold above every loss has one update, and steps with one below have all.
    """
    pipe, small, seed = xl_pipe64, {"step_size": 0.05}, 2
    pipe.scheduler = scheduler(name)
    released = (
        {"thresholds": (1e3, 2.0, 2.0), "layout": True, "rescale": 0.3}
        if mode == "reference"
        else {"thresholds": (), "layout": False, "rescale": 0.0}
    )
    options = {"guidance_scale": 7.5, "guidance_rescale": released["rescale"], "negative_prompt": "a bug", "seed": seed}
    unlike_bugs = dataclasses.replace(THINGS, unwanted="a bug")
    losses = {"entropy": 1, "layout": 1} if released["layout"] else {"entropy": 1}
    plain = latents(pipe, THINGS.text, steps=STEPS, **options)
    expected, focus, bind = SAMPLE[mode](pipe, unlike_bugs, numbers(**released, **small), XL_LAYERS, seed)
    config = binding(mode=mode, losses=losses, thresholds=released["thresholds"], **small)
    ours, report = run(pipe, config, **options)
    assert largest(ours, expected) <= MOTION * largest(expected, plain)
    assert report.trace.subjects == {0: ("a red ox", "a elk in fog")}
    for kind, by_hand in (("focus", focus), ("bind", bind)):
        found = [step.losses for step in report.trace.steps if step.kind == kind]
        assert [len(each) for each in found] == [len(each) for each in by_hand]
        assert largest(*(torch.cat([torch.tensor(losses) for losses in each]) for each in (found, by_hand))) <= 1e-10
    assert [len(each) for each in focus] == ([1, 2, 2] if mode == "reference" else [2, 2, 2])
    if mode == "paper":
        assert torch.equal(latents(pipe, THINGS.text, steps=STEPS, **options), plain)


def test_sdxl_with_propagated_steps(xl_pipe64):
    ahead, report = run(xl_pipe64, binding(step_size=0.05), preset="faster-diffusion", num_images_per_prompt=2)
    assert ahead.shape[0] == 2
    assert report.last_run.propagated > 0


def test_sdxl_with_two_prompts_or_tokenizers_is_refused(xl_pipe64):
    with patched(xl_pipe64, "exact", binding=binding()):
        with pytest.raises(ValueError, match="needs one prompt for both text encoders"):
            latents(xl_pipe64, PROMPT, prompt_2="something else", steps=STEPS)
        xl_pipe64.tokenizer_2 = clip_tokenizer(merges=learn_merges(["red", "ox"]))
        with pytest.raises(ValueError, match="tokenizers"):
            latents(xl_pipe64, PROMPT, steps=STEPS)


# Prompts and images


def test_images_of_a_batch_do_not_mix(pipe64):
    """Three prompts, one without marks, two images each: every image is what it is alone."""
    prompts = [PROMPT, "a cat", "[tin can]"]
    config = binding(bind_steps=1, focus_steps=1)
    seeds = range(6)
    with patched(pipe64, "exact", binding=config) as report:
        together = pipe64(
            prompts,
            num_inference_steps=STEPS,
            num_images_per_prompt=2,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
        assert {step.image for step in report.trace.steps} == {0, 1, 4, 5}
        assert report.trace.subjects == {
            image: ("a red ox", "a elk in fog") if image < 2 else ("tin can",) for image in (0, 1, 4, 5)
        }
        assert report.trace.maps[0].shape == (2, 8, 8)
        for seed in (1, 4):
            alone = latents(pipe64, prompts[seed // 2], steps=STEPS, seed=seed)
            assert largest(together[seed : seed + 1], alone) <= LATENTS_FLOAT64
    plain = latents(pipe64, "a cat", steps=STEPS, seed=3)
    assert largest(together[3:4], plain) <= LATENTS_FLOAT64


def test_a_prompt_without_marks_is_stock(pipe):
    stock = latents(pipe, "a cat", steps=STEPS)
    stays_stock = patched(pipe, binding=SemanticBinding(), fused=False, propagation=ALL_KEY)
    with stays_stock, pytest.warns(UserWarning, match="nothing is marked"):
        ours = latents(pipe, "a cat", steps=STEPS)
    assert torch.equal(ours, stock)


def test_sizes_other_than_the_models(pipe64):
    ours, report = run(pipe64, binding(), height=64, width=48)
    assert ours.shape == (1, 4, 16, 12)
    assert report.trace.maps[0].shape == (2, 16, 12)
    assert all(step.losses[-1] < step.losses[0] for step in report.trace.steps if step.kind == "focus")


def test_without_guidance(pipe64):
    pipe64.scheduler = scheduler("DDIM")
    ours, _ = run(pipe64, binding(), guidance_scale=1.0)
    expected, _, _ = SAMPLE["paper"](pipe64, THINGS, numbers(guidance=1.0), LAYERS)
    assert largest(ours, expected) <= LATENTS_FLOAT64
    with pytest.raises(ValueError, match="guidance"):
        run(pipe64, binding(mode="reference"), guidance_scale=1.0)


def test_guidance_switched_off_on_the_way(pipe64):
    """Diffusers' documented callback: the conditional half stays, and so do its composites."""

    def switch_off(pipe, step, _t, values):
        if step == 4:
            pipe._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    options = {"callback_on_step_end": switch_off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    ours, report = run(pipe64, binding(), **options)
    merged_only, _ = run(pipe64, binding(bind_steps=0, focus_steps=0), **options)
    assert largest(ours, merged_only) > 1e-3
    assert not report.last_run.reasons


def test_subjects_by_position_are_marks(pipe64):
    subjects = THINGS.subjects
    marked, _ = run(pipe64, binding(bind_steps=0, replace_step=None))
    by_position, _ = run(pipe64, binding(bind_steps=0, replace_step=None, subjects=subjects), THINGS.text)
    assert torch.equal(marked, by_position)
    with patched(pipe64, binding=binding(subjects=subjects)), pytest.raises(ValueError, match="one prompt, got 2"):
        pipe64([THINGS.text] * 2, num_inference_steps=STEPS)


# What is optimised


@pytest.mark.parametrize("optimise", ["latents", "text"])
def test_one_of_the_two_can_be_optimised(pipe64, optimise):
    config = binding(optimise=optimise, bind_steps=0)
    ours, report = run(pipe64, config)
    both, _ = run(pipe64, dataclasses.replace(config, optimise="both"))
    assert largest(ours, both) > 1e-6
    assert all(step.losses[-1] < step.losses[0] for step in report.trace.steps)


def test_rows_of_zeros_are_left_out_where_they_stay_zero(pipe64, monkeypatch):
    """The released code's way of merging, latents alone: keys and values without the absorbed rows."""
    config = binding(mode="reference", optimise="latents", bind_steps=1)
    ours, report = run(pipe64, config)
    monkeypatch.setattr(BindingRun, "_zero_rows", lambda *_: ())
    with_rows, whole = run(pipe64, config)
    assert largest(ours, with_rows) <= LATENTS_FLOAT64
    losses = [torch.tensor([s.losses for s in r.trace.steps if s.kind == "focus"]) for r in (report, whole)]
    assert largest(*losses) <= 1e-10


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_can_be_minimised(pipe64, loss):
    options = {"merge": False, "bind_steps": 0, "step_size": 0.1, "losses": {loss: 1.0}}
    _, report = run(pipe64, binding(**options, optimise="latents"))
    steps = [step for step in report.trace.steps if step.step or loss != "retention"]
    assert steps
    for step in steps:
        assert step.outcome == "iterations"
        assert step.losses[-1] < step.losses[0]


def test_a_focused_map_is_left_alone(pipe64):
    """Thresholds above every loss: nothing moves, and the run is that of the composite tokens."""
    ours, report = run(pipe64, binding(bind_steps=0, thresholds=(1e3,)))
    merged_only, _ = run(pipe64, binding(bind_steps=0, focus_steps=0))
    assert largest(ours, merged_only) <= LATENTS_FLOAT64
    assert {step.outcome for step in report.trace.steps} == {"done"}
    assert {len(step.losses) for step in report.trace.steps} == {1}


@pytest.mark.parametrize("size", [1e6, 1e300])
@pytest.mark.parametrize("kind", ["focus", "bind"])
def test_divergence_keeps_the_last_good_embedding(pipe64, kind, size):
    options = (
        {"focus_steps": 2, "bind_steps": 0, "step_size": size}
        if kind == "focus"
        else {"focus_steps": 0, "bind_steps": 2, "bind_step_size": size}
    )
    with pytest.warns(UserWarning, match="diverged"):
        ours, report = run(pipe64, binding(**options))
    steps = report.trace.steps
    assert {step.outcome for step in steps} == {"diverged"}
    assert all(len(step.losses) <= 2 for step in steps)
    merged_only, _ = run(pipe64, binding(bind_steps=0, focus_steps=0))
    assert largest(ours, merged_only) <= LATENTS_FLOAT64


@pytest.mark.parametrize(("dtype", "iterations", "share"), [(torch.float16, 2, 0.01), (torch.bfloat16, 1, 0.015)])
def test_half_precision(pipe, dtype, iterations, share):
    """What is optimised stays in float32; the network's rounding is all that differs.

    bfloat16 rounds the loss by as much as one update lowers it here: only later steps show what the first did.
    """
    config = binding(losses={"segregation": 1}, step_size=20.0, bind_steps=0, iterations=iterations)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    losses = []
    for each in (torch.float32, dtype):
        _, report = run(copy.deepcopy(pipe).to(dtype=each), config, latents=start.to(each))
        losses.append(torch.tensor([step.losses for step in report.trace.steps]))
    assert largest(*losses) <= share * float(losses[0].max())
    assert (losses[1][:, -1] <= losses[1][:, 0]).all()


def test_image_to_image_and_inpainting(pipe64, inpaint_pipe64):
    cases = (
        (StableDiffusionImg2ImgPipeline, pipe64, {"image": picture(), "strength": 0.9}),
        (StableDiffusionInpaintPipeline, pipe64, {"image": picture(), "mask_image": mask()}),
        (StableDiffusionInpaintPipeline, inpaint_pipe64, {"image": picture(), "mask_image": mask()}),
    )
    for cls, parts, options in cases:
        pipe = cls(**parts.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        if "mask_image" in options:
            options |= {"height": 32, "width": 32}
        config = binding(merge=False, bind_steps=0, losses={"segregation": 1})
        ours, report = run(pipe, config, **options)
        text_alone, _ = run(pipe, dataclasses.replace(config, optimise="text"), **options)
        assert largest(ours, text_alone) > 1e-4  # the latents did move
        assert all(step.losses[-1] < step.losses[0] for step in report.trace.steps)


def test_phrases_have_latents_of_their_own_in_an_inpainting_unet(inpaint_pipe64):
    """As released: its other channels, the mask and the picture, are the image's."""
    pipe = StableDiffusionInpaintPipeline(**inpaint_pipe64.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    options = {"image": picture(), "mask_image": mask(), "height": 32, "width": 32}
    _, report = run(pipe, binding(mode="reference", focus_steps=0), **options)
    losses = [step.losses for step in report.trace.steps]
    assert len(losses) == 2
    assert all(each[-1] < each[0] for each in losses)


def test_gradient_checkpointing_changes_nothing(pipe64):
    """A forward pass that is made again in the backward pass would not find the context of its call."""
    expected, _ = run(pipe64, binding())
    pipe64.unet.enable_gradient_checkpointing()
    ours, _ = run(pipe64, binding())
    assert torch.equal(ours, expected)
    assert pipe64.unet.is_gradient_checkpointing, "it is on again"
