"""The presets' plans: a table that was measured, and what becomes of it in schedules that were not."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import measure_plans
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, PNDMScheduler
from hypothesis import given
from hypothesis import strategies as st
from plan_runs import BATCH, Expected, Figures, PlanRuns
from sampling import latents, scheduler

from difffast import patch, patched
from difffast.models.embedded import FOLDER
from difffast.plan import MeasuredPlan, Plan, Schedule
from difffast.plan import measured as table
from difffast.presets import PRESETS
from difffast.sampling.schedule import name_solver, read_schedule

ROWS = table.read_rows()


def reaches(forecasts, log_snr):
    """(log-SNR of a key step, forecasts behind it, how far the last of them is), of every key step."""
    keys = [step for step in range(len(log_snr)) if step not in forecasts]
    for key, after in zip(keys, [*keys[1:], len(log_snr)], strict=True):
        yield log_snr[key], after - key - 1, log_snr[after - 1] - log_snr[key]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.solver} {row.steps}")
@pytest.mark.parametrize("name", table.NAMES)
def test_a_schedule_that_was_measured_has_its_plan(row, name):
    plan = MeasuredPlan(name).plan(len(row.log_snr), schedule=Schedule(row.solver, row.log_snr))
    assert measure_plans.write_steps(plan) == row.plans[name]
    assert plan.key_steps[0] == 0
    assert plan.guard == row.guards[name]
    assert len(row.plans[name]) == len(row.log_snr)
    assert list(row.log_snr) == sorted(row.log_snr)


def test_the_table_is_of_the_schedules_of_the_embedded_model():
    """A plan is taken as it is only where the noise is the same: Diffusers' schedules must not have changed."""
    config = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text())
    for row in ROWS:
        made = measure_plans.solvers()[row.solver](config)
        made.set_timesteps(row.steps)
        assert name_solver(made) == row.solver
        assert read_schedule(made, len(made.timesteps)).log_snr == pytest.approx(row.log_snr, abs=1e-3)


@given(st.sampled_from(ROWS), st.integers(12, 120), st.sampled_from(table.NAMES), st.floats(-0.3, 0.3))
def test_fitted_plans_reach_no_further_than_measured_ones(row, total, name, bend):
    first, last = row.log_snr[0], row.log_snr[-1]
    even = [i / (total - 1) for i in range(total)]
    log_snr = tuple(first + (last - first) * (x + bend * x * (1 - x)) for x in even)
    plan = MeasuredPlan(name).plan(total, schedule=Schedule(row.solver, log_snr))
    best = min(
        (r for r in ROWS if r.solver == row.solver),
        key=lambda r: (abs(math.log(total / len(r.log_snr))), len(r.log_snr)),
    )
    allowed = list(reaches([i for i, kind in enumerate(best.plans[name]) if kind == "-"], best.log_snr))
    for at, count, far in reaches(plan.forecasts, log_snr):
        # What the last measured key step of no less noise may do, up to what counts as the same noise.
        most, reach = ([(n, d) for value, n, d in allowed if value <= at + 0.05] or [allowed[0][1:]])[-1]
        assert count <= most
        assert far <= reach + 1e-9


def test_the_page_names_what_was_measured():
    by_solver = {}
    for row in ROWS:
        by_solver.setdefault(row.solver, []).append(str(row.steps))
    page = " ".join((measure_plans.OUT.parents[2] / "docs" / "presets.md").read_text().split())
    named = ", ".join(f"{solver} ({', '.join(steps)})" for solver, steps in by_solver.items())
    assert f"{named}. Other numbers" in page


def test_no_preset_is_dominated_by_as_many_steps_of_stock():
    """As it was measured: at the same number of UNet calls, which for stock is the number of steps."""
    rows = json.loads((Path(table.__file__).parent / "measured.json").read_text())["rows"]
    for row in rows:
        for name, found in row["measured"].items():
            where = f"{row['solver']}, {row['steps']} steps, {name}"
            assert found["calls"] == row["plans"][name].count("K"), where
            assert found["psnr_db"] > found["stock_psnr_db"], where
            assert found["psnr_db_p10"] >= found["stock_psnr_db_p10"], where
        assert row["plans"]["turbo"].count("K") <= row["plans"]["balanced"].count("K")
        for name, found in row["guarded"].items():
            where = f"{row['solver']}, {row['steps']} steps, {name} with its guard"
            assert row["plans"][name].count("K") <= found["calls"] <= len(row["plans"][name]), where
            assert found["psnr_db"] > found["stock_psnr_db"], where
            assert found["psnr_db_p10"] >= found["stock_psnr_db_p10"], where


def test_other_noise_schedules_of_a_solver_take_its_plans():
    row = ROWS[0]
    other = Schedule(f"{row.solver} Karras", tuple(value + 0.01 for value in row.log_snr))
    assert not any(each.solver == other.solver for each in ROWS if row.solver == "DDIM")
    plan = MeasuredPlan().plan(len(row.log_snr), schedule=other)
    assert measure_plans.write_steps(plan) == row.plans["balanced"]


def test_without_a_row_the_first_two_fifths_run_and_then_every_other_step():
    plan = MeasuredPlan().plan(21, schedule=Schedule("Unheard", tuple(range(-10, 11))))
    assert plan.forecasts == (9, 11, 13, 15, 17, 19)  # log-SNR -2 is the first behind 40% of -10 .. 10
    assert MeasuredPlan().plan(21) == plan
    assert plan.guard == min(row.guards["balanced"] for row in ROWS if row.guards["balanced"] is not None)
    assert MeasuredPlan("turbo", guard=0.3).plan(21) == replace(plan, guard=0.3)
    assert MeasuredPlan(guard=None).plan(21) == replace(plan, guard=None)
    assert MeasuredPlan().plan(21, start=10) == plan.begin_at(10)


def test_a_solver_of_which_no_step_is_left_out_is_named(pipe):
    """Stable Diffusion 1's own scheduler: whoever patches it is told why nothing is gained."""
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    with patched(pipe, "balanced") as report:
        latents(pipe, steps=50)
    assert report.last_run.forecast == 0
    assert "'balanced' leaves none of PNDM's out, as measured" in str(report.last_run)


@pytest.mark.parametrize("total", [1, 2, 8, 11])
def test_short_schedules_run_in_full(total):
    row = ROWS[0]
    log_snr = tuple(row.log_snr[:total])
    for schedule in (None, Schedule(row.solver, log_snr), Schedule("Unheard", log_snr)):
        assert MeasuredPlan("turbo").plan(total, schedule=schedule).key_steps == tuple(range(total))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeasuredPlan("fast"), "name must be one of balanced, turbo, got 'fast'"),
        (lambda: MeasuredPlan(guard="strict"), "guard must be \"measured\", a number or None, got 'strict'"),
        (lambda: MeasuredPlan(guard=-1.0), "guard must be positive and finite, or None, got -1.0"),
        (lambda: MeasuredPlan().plan(0), "a schedule needs at least one step, got 0"),
        (
            lambda: MeasuredPlan().plan(20, schedule=Schedule("DDIM", (0.0, 1.0))),
            "the schedule has 2 UNet calls, and the plan is to have 20",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_the_table_is_written_as_it_is_read():
    rows = [{"solver": row.solver, "steps": row.steps, "log_snr": row.log_snr, "plans": row.plans} for row in ROWS]
    assert json.loads(measure_plans.to_json(rows, {"a": 1}))["a"] == 1
    again = json.loads(measure_plans.to_json(rows, {"a": 1}))["rows"]
    assert [tuple(row["log_snr"]) for row in again] == [row.log_snr for row in ROWS]


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "Euler", "Euler-A", "Heun", "DPM++ 2M", "UniPC", "DPM++ 3M", "DEIS"])
def test_log_snr_of_diffusers_schedulers(name):
    made = scheduler(name)
    made.set_timesteps(20)
    found = read_schedule(made, len(made.timesteps))
    alphas = made.alphas_cumprod.double()
    by_hand = [float(torch.log(alphas[int(t)] / (1 - alphas[int(t)]))) for t in made.timesteps.double()]
    # Times between two entries of the table of noise lie between their logarithms.
    close = [math.isclose(a, b, abs_tol=0.05) for a, b in zip(found.log_snr, by_hand, strict=True)]
    assert all(close[1:-1])
    if name == "Euler":
        sigma = made.sigmas[:-1].double()
        assert found.log_snr == pytest.approx((-2 * sigma.log()).tolist(), abs=0.02)
        assert read_schedule(made, 30).log_snr == read_schedule(_with_steps(made, 30), 30).log_snr
        assert len(made.timesteps) == 20


def _with_steps(made, steps):
    other = EulerDiscreteScheduler.from_config(made.config)
    other.set_timesteps(steps)
    return other


def test_solvers_by_the_names_that_users_know():
    assert name_solver(scheduler("DPM++ 2M")) == "DPM++ 2M"
    assert name_solver(scheduler("DPM++ 3M")) == "DPM++ 3M"
    assert name_solver(scheduler("DPM++ SDE")) == "DPM++ 2M SDE"
    assert name_solver(EulerDiscreteScheduler(use_karras_sigmas=True)) == "Euler Karras"
    assert name_solver(EDMEulerScheduler()) == "EDMEulerScheduler"
    assert read_schedule(EDMEulerScheduler(), 20) == Schedule("EDMEulerScheduler", None)


@pytest.mark.parametrize("preset", ["balanced", "turbo"])
def test_presets_run_what_the_report_plans(pipe, preset):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    stock = latents(pipe, steps=20)
    report = patch(pipe, preset)
    plan = report.plan(20)
    assert isinstance(plan, Plan)
    assert plan.forecasts
    found, ran = latents(pipe, steps=20), report.last_run
    assert ran.forecast > 0
    assert ran.key == len(plan.key_steps) + ran.guarded
    assert ran.forecast == len(plan.forecasts) - ran.guarded
    assert 0 < float((found - stock).norm() / stock.norm()) < 0.5
    assert report.plan(50).total == 50  # although the scheduler has another schedule now
    with patched(pipe, propagation=plan) as by_hand:
        assert torch.equal(latents(pipe, steps=20), found)
    assert by_hand.last_run.forecast == ran.forecast
    with patched(pipe, propagation=replace(PRESETS[preset].propagation, guard=None)) as unguarded:
        latents(pipe, steps=20)
    assert (unguarded.last_run.forecast, unguarded.last_run.guarded) == (len(plan.forecasts), 0)


def test_a_plan_is_confirmed_on_other_pictures_than_it_was_chosen_by():
    """Also where there are as many of these as of those."""
    cell = object.__new__(measure_plans.Cell)
    cell._tried = {}
    cell._runs = SimpleNamespace(try_plan=lambda plan, pictures: Figures(2.0, *pictures.images))
    plan = Plan(total=3, key_steps=(0, 1), max_batch=1, forecasts=(2,))
    for captions, figures in ((("a", "b"), (40.0, 30.0)), (("c", "d"), (39.0, 29.0))):
        assert cell._try_plan(plan, Expected(captions, figures, ())) == figures


@pytest.mark.parametrize(
    ("tails", "asked", "tried", "taken"),
    [
        ((43.0, 43.9, 44.0), (0, 1, 1), 2, 1),  # reached
        ((35.0,) * 6, (0, 0, 0, 1, 1, 1), 5, 4),  # not even by the strictest
        ((35.0,) * 6, (0, 1, 1, 1, 3), 4, 2),  # 11.5 calls would be more than a tenth more than 10
        ((35.0, 36.0, 29.0, 45.0), (0, 1, 1, 1), 3, 2),  # the second is no better than stock
        ((50.0, 51.0), (0, 1), 1, 0),
        ((35.0, 50.0), (0, 9), 1, None),  # even the laxest costs too much
    ],
)
def test_the_laxest_guard_that_reaches_the_aim_is_taken_or_the_strictest_that_costs_little(
    monkeypatch, tails, asked, tried, taken
):
    cell = object.__new__(measure_plans.Cell)
    cell._confirmed = None
    guards, answers = [], iter(zip(tails, asked, strict=False))

    def try_plan(plan, pictures, guard):
        guards.append(guard)
        low, more = next(answers)
        return Figures(len(plan.key_steps) + more / 2, 50.0, low)

    cell._runs = SimpleNamespace(try_plan=try_plan)
    monkeypatch.setattr(cell, "_try_stock", lambda calls: (40.0, 30.0))
    found = cell.measure_guards({"balanced": "KKKKKKKKKK--"})
    ladder = measure_plans.GUARDS["balanced"]
    assert guards == [None, *ladder[:tried]]
    assert found["guards"] == {"balanced": None if taken is None else ladder[taken]}
    more = 0 if taken is None else asked[taken + 1] / 2
    assert found["guarded"]["balanced"]["calls"] == 10 + more, "10 for the first picture"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.solver} {row.steps}")
def test_plans_are_read_as_they_are_written(row):
    for text in row.plans.values():
        assert measure_plans.write_steps(measure_plans.read_steps(text)) == text


@pytest.mark.parametrize("guard", [None, 1e-3])
@pytest.mark.parametrize("name", ["DDIM", "Euler-A", "Heun"])
def test_runs_that_begin_at_the_first_forecast_are_those_from_the_beginning(pipe, monkeypatch, name, guard):
    """In every batch, with what the guard asks for, and with the noise that a scheduler adds."""
    pipe.scheduler = scheduler(name)
    pipe.scheduler.set_timesteps(12)
    total = len(pipe.scheduler.timesteps)
    forecasts = tuple(range(total // 2, total - 1, 2))
    keys = tuple(step for step in range(total) if step not in forecasts)
    plan = Plan(total=total, key_steps=keys, max_batch=1, forecasts=forecasts)
    captions = [f"a circle number {number}" for number in range(BATCH + 1)]
    made = []
    monkeypatch.setattr(PlanRuns, "_decode", lambda self, latents: made.append(latents) or latents)
    with patched(pipe, "exact") as report:
        runs = PlanRuns(pipe, report, 12, {})
        figures = runs.try_plan(plan, runs.expect(captions), guard)
    with patched(pipe, propagation=replace(plan, guard=guard)) as report:
        asked = 0
        for first, batch in ((0, captions[:-1]), (BATCH, captions[-1:])):
            seeds = [torch.Generator().manual_seed(first + number) for number in range(len(batch))]
            found = pipe(batch, num_inference_steps=12, generator=seeds, output_type="latent").images
            assert torch.equal(made[1][first : first + len(batch)], found)
            asked += sum(report.last_run.guarded_for.values())
    assert figures.calls == pytest.approx(len(keys) + asked / len(captions))
    assert (asked > 0) == (guard is not None)
