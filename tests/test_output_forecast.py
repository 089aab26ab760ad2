"""Output forecasts: the stock loop, with a UNet that at some calls returns what is made of its earlier answers."""

import contextlib
import warnings

import pytest
import torch
import zoo
from diffusers.models import embeddings
from sampling import SCHEDULERS, STEPS, largest, latents, picture, scheduler
from tolerances import LATENTS_FLOAT32, LATENTS_FLOAT64

import difffast
from difffast import CfgReuse, FeatureReuse, OutputForecast, Plan, patched, unpatch
from difffast.plan import OuterReuse


def run(pipe, **options):
    return latents(pipe, **{"steps": STEPS, **options})


@contextlib.contextmanager
def answered_by_hand(pipe, forecasts, extrapolate=0):
    """The stock pipeline's UNet, which makes the answers at some calls of earlier ones itself."""
    forward, known, count = pipe.unet.forward, [], [0]

    def answer(*args, **kwargs):
        index = count[0]
        count[0] += 1
        if index not in forecasts:
            (output,) = forward(*args, **{**kwargs, "return_dict": False})
            known.append((index, output))
            return (output,)
        (b, last), alone = known[-1], not {index - 1, index + 1} & set(forecasts)
        if not (extrapolate and alone):
            return (last,)
        a, before = known[-2]
        return (last + (last - before) * (index - b) / (b - a),)

    pipe.unet.forward = answer
    try:
        yield
    finally:
        del pipe.unet.forward
    assert count[0] > max(forecasts)


@pytest.mark.parametrize(
    ("name", "extrapolate"),
    [
        pytest.param(name, degree, marks=() if (index + degree) % 2 else pytest.mark.slow)
        for index, name in enumerate(SCHEDULERS)
        for degree in (0, 1)
    ],
)
def test_it_is_the_stock_loop_with_answers_made_by_hand(pipe, name, extrapolate):
    pipe.scheduler = scheduler(name)
    stock = latents(pipe, steps=STEPS)
    total = len(pipe.scheduler.timesteps)
    keys = [step for step in range(total) if step < 6 or step in (7, 10, total - 1) or step > 11]
    forecasts = set(range(total)) - set(keys)
    with answered_by_hand(pipe, forecasts, extrapolate):
        expected = latents(pipe, steps=STEPS)
    forecast = OutputForecast(keys, extrapolate=extrapolate)
    with patched(pipe, propagation=forecast, fused=False) as report:
        ours = latents(pipe, steps=STEPS)
        assert largest(ours, expected) <= (LATENTS_FLOAT32 if extrapolate else 0)
        assert torch.equal(latents(pipe, steps=STEPS), ours), "a second run knows nothing of the first"
    assert largest(stock, expected) > 100 * LATENTS_FLOAT32
    run = report.last_run
    assert (run.key, run.forecast, run.forced, run.stock) == (len(keys), len(forecasts), 0, 0)
    assert torch.equal(latents(pipe, steps=STEPS), stock)


def test_full_steps_only_are_stock_bit_for_bit(pipe):
    stock = run(pipe)
    for forecast in (OutputForecast(1), OutputForecast(2, start=1.0), OutputForecast(range(STEPS))):
        with patched(pipe, propagation=forecast, fused=False) as report:
            assert torch.equal(run(pipe), stock)
        assert report.last_run.forecast == 0


@torch.no_grad()
def test_degree_0_on_ddim_is_one_longer_step(pipe):
    """DDIM's formula (arXiv:2010.02502, equation 12) from a key step straight to the next one."""
    pipe = pipe.to(dtype=torch.float64)
    for name in ("alphas_cumprod", "final_alpha_cumprod"):  # a scheduler rounds them to float32 at every step
        setattr(pipe.scheduler, name, getattr(pipe.scheduler, name).double())
    with patched(pipe, propagation=OutputForecast(2, start=0.5), fused=False):
        ours = run(pipe)
    text = torch.cat(pipe.encode_prompt("a red circle", "cpu", 1, True)[::-1])
    times = pipe.scheduler.timesteps.tolist()
    alphas = pipe.scheduler.alphas_cumprod
    # Key steps are 0 to 5, 7, 9 and 11; behind the last one comes the schedule's end.
    keys = [0, 1, 2, 3, 4, 5, 7, 9, 11]
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for here, following in zip(keys, [*keys[1:], None], strict=True):
        negative, positive = pipe.unet(torch.cat([x] * 2), times[here], text).sample.chunk(2)
        noise = negative + 7.5 * (positive - negative)
        now = alphas[times[here]]
        then = alphas[0] if following is None else alphas[times[following]]
        x = then.sqrt() * (x - (1 - now).sqrt() * noise) / now.sqrt() + (1 - then).sqrt() * noise
    assert largest(ours, x) <= 1e-9


def test_two_prompts_are_each_alone(pipe):
    pipe = pipe.to(dtype=torch.float64)
    prompts = ["a red circle", "a blue square"]
    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with patched(pipe, propagation=OutputForecast(2, extrapolate=1)) as report:
        both = run(pipe, prompt=prompts, latents=noise)
        alone = [run(pipe, prompt=prompt, latents=noise[i : i + 1]) for i, prompt in enumerate(prompts)]
    assert report.last_run.forecast > 0
    assert largest(both, torch.cat(alone)) <= LATENTS_FLOAT64


def test_nothing_of_the_unet_runs_at_forecasts(pipe, monkeypatch):
    calls, embed = [], embeddings.get_timestep_embedding

    def count(*args, **kwargs):
        calls.append(1)
        return embed(*args, **kwargs)

    monkeypatch.setattr(embeddings, "get_timestep_embedding", count)  # a hook in the UNet would run at every step
    with patched(pipe, propagation=OutputForecast(3, start=0.25)) as report:
        run(pipe)
    assert len(calls) == report.last_run.key == 3 + 3
    assert report.last_run.forecast == 6


def test_another_prompt_on_the_way_is_a_full_step(pipe):
    other = torch.cat(pipe.encode_prompt("a blue square", "cpu", 1, True)[::-1])
    counts = []

    def change(pipe, index, timestep, held):
        return {"prompt_embeds": other} if index == 5 else {}  # step 6 would be a forecast

    with patched(pipe, propagation=OutputForecast(range(0, STEPS, 2))) as report:
        ours = run(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
        counts.append((report.last_run.forecast, report.last_run.forced))
    forecasts = set(range(1, STEPS, 2))
    with answered_by_hand(pipe, forecasts):
        same = run(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert counts == [(6, 0)], "the prompt changes before step 6, which is a key step"
    assert largest(ours, same) <= LATENTS_FLOAT32
    with patched(pipe, propagation=OutputForecast([0, 1, 2, 3, 4, 5, 7, 9, 11])) as report:
        run(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert (report.last_run.forecast, report.last_run.forced) == (2, 1)
    assert any("key step at 6" in reason for reason in report.last_run.reasons)


def test_an_interrupted_run_leaves_nothing(pipe):
    keys = OutputForecast([0, 1, 3, 5, 7, 9, 11])

    def interrupt(pipe, index, timestep, held):
        pipe._interrupt = index >= 3
        return {}

    with patched(pipe, propagation=keys):
        expected = run(pipe, prompt="a blue square")
    with patched(pipe, propagation=keys):
        run(pipe, callback_on_step_end=interrupt)
        assert largest(run(pipe, prompt="a blue square"), expected) == 0
        with pytest.raises(ZeroDivisionError):
            run(pipe, callback_on_step_end=lambda *_: 1 / 0)
        assert largest(run(pipe, prompt="a blue square"), expected) == 0


def test_key_steps_are_counted_from_the_first_that_is_executed(pipe):
    from diffusers import StableDiffusionImg2ImgPipeline

    img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    for forecast, keys in (
        (OutputForecast([0, 1, 3, 5], longest=6), (6, 7, 9, 11)),
        (OutputForecast(2, start=0.5), (6, 8, 10, 11)),
        (OutputForecast(2, start=0.8), (6, 7, 8, 9, 11)),
    ):
        with patched(img2img, propagation=forecast) as report:
            run(img2img, image=picture(32), strength=0.5)  # steps 6 to 11
            assert report.plan(STEPS, 6).key_steps == keys
        counts = report.last_run
        assert (counts.key, counts.forced, counts.forecast) == (len(keys), 0, 6 - len(keys))
    # A plan keeps its steps; the first one that is executed runs in full.
    plan = Plan(STEPS, (0, 1, 2, 7, 11), max_batch=1, forecasts=(3, 4, 5, 6, 8, 9, 10), extrapolate=1)
    assert plan.begin_at(5).key_steps == (5, 6, 7, 11)
    assert plan.begin_at(5).forecasts == (8, 9, 10)
    # Two forecasts in a row repeat the first step's output: one is enough.
    repeated = Plan(8, (0, 3, 4, 5, 7), max_batch=1, forecasts=(1, 2, 6), extrapolate=1)
    assert repeated.begin_at(0) == repeated
    assert repeated.begin_at(1).forecasts == (6,)
    with patched(img2img, propagation=plan) as report:
        run(img2img, image=picture(32), strength=0.5)
    assert (report.last_run.key, report.last_run.forced, report.last_run.forecast) == (3, 0, 3)


def test_controlnet_does_not_run_at_forecasts():
    pipe, calls = zoo.ROWS["StableDiffusionControlNetPipeline"].build(), []
    pipe.set_progress_bar_config(disable=True)
    pipe.controlnet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    for options in ({}, {"controlnet": "every step"}):
        calls.clear()
        with patched(pipe, propagation=OutputForecast([0, 1, 2, 4, 6, 9, 11]), fused=False, **options) as report:
            ours = run(pipe, image=picture(), height=32, width=32)
        assert len(calls) == report.last_run.key == 7
        with answered_by_hand(pipe, {3, 5, 7, 8, 10}):
            assert largest(ours, run(pipe, image=picture(), height=32, width=32)) == 0


def test_guidance_by_halves(pipe):
    """The halves' difference is that of the last step that ran both; forecasts repeat what the pipeline got."""
    pipe = pipe.to(dtype=torch.float64)
    keys = [0, 1, 2, 3, 4, 6, 8, 11]
    with patched(pipe, propagation=OutputForecast(keys), cfg=CfgReuse(3, start=0.25), fused=False) as report:
        ours, plan = run(pipe), report.plan(STEPS)
    assert plan.halves == (3, 4, 8)
    assert report.last_run.halves == 3
    forward, difference, held = pipe.unet.forward, [], []
    count = iter(range(STEPS))

    def answer(sample, time, encoder_hidden_states, **kwargs):
        index = next(count)
        if index in keys:
            rows = slice(1, None) if index in plan.halves else slice(None)
            output = forward(sample[rows], time, encoder_hidden_states[rows], return_dict=False)[0]
            if index not in plan.halves:
                difference[:] = [output[1:] - output[:1]]
            held[:] = [torch.cat([output - difference[0], output]) if index in plan.halves else output]
        return (held[0],)

    pipe.unet.forward = answer
    expected = run(pipe)
    del pipe.unet.forward
    assert largest(ours, expected) <= LATENTS_FLOAT64


@pytest.mark.parametrize("reuse", [None, OuterReuse(0), OuterReuse(0, 1)])
def test_a_plan_of_several_kinds(pipe, reuse):
    """Forecasts between decoded, or outer, steps: as one at a time, with the forecasts made by hand."""
    pipe = pipe.to(dtype=torch.float64)
    keys, forecasts = (0, 1, 2, 6, 9, 11), (4, 7, 10)
    plan = Plan(STEPS, keys, max_batch=1 if reuse else 3, reuse=reuse, forecasts=forecasts)
    with patched(pipe, propagation=plan, fused=False) as report:
        ours = run(pipe)
    counts = report.last_run
    assert (counts.key, counts.forecast, counts.propagated + counts.reused) == (6, 3, 3)
    assert counts.decode_batches == ([] if reuse else [2, 1, 1, 1])
    # The oracle: the same plan without forecasts, under a UNet whose answers at those steps are replaced.
    plain = Plan(STEPS, keys, max_batch=1, reuse=reuse)
    known = {}
    with patched(pipe, propagation=plain, fused=False):
        call = type(pipe.unet).__call__
        index = iter(range(STEPS))

        def answer(self, *args, **kwargs):
            step = next(index)
            output = call(self, *args, **kwargs)
            known["last"] = known["last"] if step in forecasts else output
            return known["last"]

        type(pipe.unet).__call__ = answer
        expected = run(pipe)
        type(pipe.unet).__call__ = call
    assert largest(ours, expected) <= LATENTS_FLOAT64


def test_decoders_batch_up_to_a_forecast(pipe):
    plan = Plan(STEPS, (0, 1, 2, 8), max_batch=4, forecasts=(6,))
    assert [row.decoded_with for row in plan.steps()][2:8] == [(2, 3, 4, 5)] * 4 + [(6,), (7,)]
    with patched(pipe, propagation=plan) as report:
        run(pipe)
    assert report.last_run.decode_batches == [4, 1, 4]


def test_a_plan_is_for_schedules_of_its_length(pipe):
    plan = OutputForecast(2).plan(STEPS)
    with patched(pipe, propagation=plan), pytest.raises(ValueError, match="for schedules with 12 UNet calls, got one"):
        run(pipe, steps=20)
    assert not unpatch(pipe)


def test_the_report_says_what_runs(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = difffast.patch(pipe, propagation=OutputForecast(2))
        run(pipe)
    assert "none in between: its output is forecast" in str(report)
    assert "3 forecast without the UNet" in str(report.last_run)
    unpatch(pipe)
    with pytest.raises(TypeError, match=r"propagation must be a difffast\.EncoderPropagation, FeatureReuse"):
        difffast.patch(pipe, propagation=3)
    assert isinstance(difffast.patch(pipe, propagation=FeatureReuse(2)).propagation, FeatureReuse)
    unpatch(pipe)
