"""The guard of forecasts: a step runs where what was measured at the steps before makes its forecast doubtful."""

from types import SimpleNamespace

import if_zoo
import pytest
import torch
import zoo
from sampling import largest, latents, picture

from difffast import OutputForecast, Plan, patched
from difffast.sampling.forecasts import Forecasts, _Measured
from difffast.sampling.stats import RunStats

STEPS = 12


def run(pipe):
    return latents(pipe, steps=STEPS)


def watch(pipe, found, look=lambda output: output[0]):
    """Add what every UNet call returns to a list, until the returned function is called."""
    call = type(pipe.unet).__call__

    def watched(self, *args, **kwargs):
        output = call(self, *args, **kwargs)
        found.append(look(output))
        return output

    type(pipe.unet).__call__ = watched
    return lambda: setattr(type(pipe.unet), "__call__", call)


def changes(pipe, outputs, steps):
    """What repeating each output would be off by: of the row that changes most, times the share of noise."""
    noise = (1 - pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]).sqrt()
    found = {}
    for step, before in steps.items():
        parts = [
            float((outputs[before][row] - outputs[step][row]).norm() / outputs[step][row].norm())
            for row in range(len(outputs[step]))
        ]
        found[step] = float(noise[step]) * max(parts)
    return found


def test_the_guard_runs_steps_whose_output_changes_too_much(pipe):
    """By what was measured at the step before: of 4, 6, 8, 10 the first is forecast if 3 was near enough to 2."""
    keys, outputs = [0, 1, 2, 3, 5, 7, 9, 11], []
    with patched(pipe, propagation=OutputForecast(1), fused=False):
        stop = watch(pipe, outputs)
        run(pipe)
        stop()
    known = changes(pipe, outputs, {2: 1, 3: 2})  # up to the first forecast both runs are the same
    for factor, first in ((0.99, "run"), (1.01, "forecast")):
        guard = known[3] * factor
        with patched(pipe, propagation=OutputForecast(keys, guard=guard), fused=False) as report:
            run(pipe)
        ran = report.last_run
        assert {step: ran.forecast_errors[step] for step in known} == pytest.approx(known, rel=1e-4)
        assert (4 in ran.forecast_errors) == (first == "run"), "what was forecast is not measured"
        reason = "forecasts became key steps, that of step 4 first: by then the output was expected to have changed "
        reason += f"by {known[3]:.3f}"
        assert any(reason in each for each in ran.reasons) == (first == "run")
        assert ran.forecast + ran.guarded == 4
        assert ran.key == len(keys) + ran.guarded


def test_a_guard_that_trusts_nothing_leaves_every_step_to_the_unet(pipe):
    expected = run(pipe)
    with patched(pipe, propagation=OutputForecast(2, guard=1e-9), fused=False) as report:
        assert torch.equal(run(pipe), expected)
    assert report.last_run.forecast == 0
    assert f"{report.last_run.guarded} kept from it by the guard" in str(report.last_run)


def test_a_guard_that_trusts_all_changes_nothing(pipe):
    keys = [0, 1, 2, 3, 5, 7, 9, 11]
    with patched(pipe, propagation=OutputForecast(keys), fused=False):
        expected = run(pipe)
    with patched(pipe, propagation=OutputForecast(keys, guard=1e6), fused=False) as report:
        assert torch.equal(run(pipe), expected)
    assert (report.last_run.forecast, report.last_run.guarded) == (4, 0)
    assert list(report.last_run.forecast_errors) == [2, 3, 5, 7, 9], "what a forecast one or two steps later asks for"


def test_a_row_of_forecasts_is_expected_to_leave_the_truth_as_it_grows(pipe):
    outputs = []
    with patched(pipe, propagation=OutputForecast(1), fused=False):
        stop = watch(pipe, outputs)
        run(pipe)
        stop()
    change = changes(pipe, outputs, {3: 2})[3]
    with patched(pipe, propagation=OutputForecast([0, 1, 2, 3, 7, 8, 9, 10, 11], guard=2.5 * change)) as report:
        run(pipe)
    assert (report.last_run.forecast, report.last_run.guarded) == (2, 1), "4 and 5; 6 is three steps behind 3"


def test_nothing_is_forecast_before_anything_was_measured(pipe):
    with patched(pipe, propagation=OutputForecast([0, *range(2, STEPS)], guard=1e6)) as report:
        run(pipe)
    assert (report.last_run.forecast, report.last_run.guarded) == (0, 1)


def make(pipe, prompts, guard, seeds=None, keys=(0, 1, 2, 3, *range(5, STEPS, 2)), **options):
    """Latents [n, C, H, W] of prompts, with seeds of their own, and what happened."""
    with patched(pipe, propagation=OutputForecast(keys, extrapolate=1, guard=guard), fused=False) as report:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(prompts))]
        options = {"height": 16, "width": 16, **options}
        made = pipe(prompts, num_inference_steps=STEPS, generator=generators, output_type="latent", **options)
    return made.images, report.last_run


PROMPTS = ["a cat", "two dogs", "red"]


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_pictures_of_a_batch_each_have_a_guard_of_their_own(pipe64, guidance):
    """The UNet runs where any of them asks for it; the others keep their forecasts, and are what they are alone."""
    options = {"guidance_scale": guidance}
    errors = [
        make(pipe64, [prompt], 1e6, [seed], **options)[1].forecast_errors[3] for seed, prompt in enumerate(PROMPTS)
    ]
    low, middle, high = sorted(errors)
    for guard in ((low + middle) / 2, (middle + high) / 2):
        together, ran = make(pipe64, PROMPTS, guard, **options)
        assert ran.forecast_errors[3] == pytest.approx(high, rel=1e-9)
        alone = [make(pipe64, [prompt], guard, [seed], **options) for seed, prompt in enumerate(PROMPTS)]
        guarded = [each.guarded for _, each in alone]
        assert len(set(guarded)) > 1, "one of them asks for more steps than another"
        assert max(guarded) <= ran.guarded <= sum(guarded)
        for row, (latents_alone, _) in enumerate(alone):
            assert largest(together[row], latents_alone[0]) <= 1e-9


def test_the_guard_decides_for_all_rows_where_pictures_are_not_told_apart(pipe64):
    """As in a loop that is not a pipeline's: which rows are a picture's halves is not known."""
    forecast = OutputForecast([0, 1, 2, 3, *range(5, STEPS)], guard=1e6)
    text = torch.randn(3, 77, pipe64.unet.config.cross_attention_dim, dtype=torch.float64)
    changed = []
    for rows in ([0], [1], [2], [0, 1, 2]):
        with patched(pipe64, propagation=forecast, fused=False) as report:
            pipe64.scheduler.set_timesteps(STEPS)
            x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()[rows]
            for t in pipe64.scheduler.timesteps:
                with torch.no_grad():
                    x = pipe64.scheduler.step(pipe64.unet(x, t, text[rows]).sample, t, x).prev_sample
        changed.append(report.last_run.forecast_errors[3])
    assert changed[3] == pytest.approx(max(changed[:3]), rel=1e-9)


@pytest.mark.parametrize("row", ["StableDiffusionPAGPipeline", "StableDiffusionInstructPix2PixPipeline", "IFPipeline"])
def test_batches_of_other_halves_are_one_picture(row):
    """Three halves, and pipelines that do not tell whether they guide."""
    row = {**zoo.ROWS, **if_zoo.ROWS}[row]
    pipe = row.build()
    pipe.set_progress_bar_config(disable=True)
    counted, learn = [], Forecasts.learn

    def count(self, index, output, call):
        learned = learn(self, index, output, call)
        counted.append(len(self._pictures))
        return learned

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(Forecasts, "learn", count)
        with patched(pipe, propagation=OutputForecast(2, guard=1e6), fused=False):
            row.run(pipe, zoo.Inputs(steps=STEPS, images=2))
    assert set(counted) == {1}


def test_controlnet_runs_where_the_guard_makes_a_step_run():
    pipe, calls = zoo.ROWS["StableDiffusionControlNetPipeline"].build(), []
    pipe.set_progress_bar_config(disable=True)
    options = {"image": picture(), "height": 32, "width": 32, "steps": STEPS}
    expected = latents(pipe, **options)
    pipe.controlnet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    with patched(pipe, propagation=OutputForecast(2, guard=1e-9), fused=False) as report:
        assert torch.equal(latents(pipe, **options), expected)
    assert report.last_run.guarded > 0
    assert len(calls) == STEPS


@pytest.mark.parametrize("shared", [False, True])
def test_a_gpus_errors_are_read_two_steps_later_or_at_once_by_processes_that_share_a_run(shared):
    """So that it never waits for the host, and a run is the same each time: whether they have arrived is not asked."""
    waited = []
    state = SimpleNamespace(
        plan=Plan(8, (0, 1, 2, 3, 7), max_batch=1, forecasts=(4, 5, 6), guard=1.0),
        stats=RunStats(8),
        division=object() if shared else None,
        record=lambda reason: None,
    )
    forecasts = Forecasts(state, lambda call: 1)
    forecasts.learn(2, torch.ones(1, 4), {})
    for step in (2, 3):  # as _measure leaves them on a GPU
        event = SimpleNamespace(synchronize=lambda step=step: waited.append(step))
        forecasts._measured.append(_Measured(step, {0: 1}, torch.tensor([0.1 * step]), event))
    forecasts.heed_guard(4)
    assert waited == ([2, 3] if shared else [2])
    assert list(state.stats.forecast_errors) == waited
    forecasts.heed_guard(5)
    assert waited == [2, 3]
    assert state.stats.guarded == 0
