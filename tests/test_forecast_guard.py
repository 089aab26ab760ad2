"""The guard of forecasts: a step runs where what was measured at the steps before makes its forecast doubtful."""

from types import SimpleNamespace

import pytest
import torch
from sampling import latents

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


def test_each_picture_of_a_batch_can_keep_the_others_from_forecasts(pipe):
    """Of two pictures the one that changes more decides."""
    changed = []
    for prompts in (["a cat"], ["two dogs"], ["a cat", "two dogs"]):
        with patched(pipe, propagation=OutputForecast([0, 1, 2, 3, *range(5, STEPS)], guard=1e6)) as report:
            generators = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
            pipe(prompts, num_inference_steps=STEPS, height=16, width=16, generator=generators, output_type="latent")
        changed.append(report.last_run.forecast_errors[3])
    assert changed[2] == pytest.approx(max(changed[:2]), rel=1e-4)


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
    forecasts = Forecasts(state)
    forecasts.learn(2, torch.ones(1, 4))
    for step in (2, 3):  # as _measure leaves them on a GPU
        event = SimpleNamespace(synchronize=lambda step=step: waited.append(step))
        forecasts._measured.append(_Measured(step, 1, torch.tensor(0.1 * step), event))
    forecasts.heed_guard(4)
    assert waited == ([2, 3] if shared else [2])
    assert list(state.stats.forecast_errors) == waited
    forecasts.heed_guard(5)
    assert waited == [2, 3]
    assert state.stats.guarded == 0
