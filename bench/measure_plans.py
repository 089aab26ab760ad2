"""The table behind the presets "balanced" and "turbo": at which steps the UNet must run, by solver and number of steps.

    python bench/measure_plans.py --cells out/plans                    # every cell that is not there yet
    python bench/measure_plans.py --cells out/plans --only "Euler 20"  # some
    python bench/measure_plans.py --cells out/plans --write            # difffast/plan/measured.json of all cells

A cell is profiled on some prompts with the embedded model, searched by dynamic programming, and its plans are tried on
other prompts, beside plans that forecast every second step of the last ones: where errors do not just add up, these can
be better.  Of as many UNet calls the best goes on to a third set of prompts, since the best of several on a few prompts
is better there than elsewhere: 4 to 5 dB at Euler's 20 steps.  A preset takes the plan with the fewest calls that
reaches its PSNR there, in the median and in the 10th percentile, and is ahead of stock with as many calls; these are
the table's figures.  Then it takes the laxest guard with which the plan reaches a higher 10th percentile, for a tenth
more UNet calls at most: the pictures there take shape late, and ask for more steps.  Each cell is a file, so that an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from drawn.shapes import draw_scene
from plan_runs import BATCH, Expected, PlanRuns
from records import name_model
from torch import Tensor
from tqdm import tqdm

from difffast import patched
from difffast.models import embedded_pipeline
from difffast.plan import Plan
from difffast.plan import measured as table
from difffast.plan.search import search_plans
from difffast.sampling.schedule import name_solver, read_schedule
from difffast.tuning.profile import Profile, Trial

STEPS = (15, 20, 25, 28, 30, 40, 50)
#: PSNR [dB] against stock that a preset's plan shall reach, in the median and in the 10th percentile.  With 24 dB in
#: the latter, balanced lost 5.6 of 100 things at DPM++'s 25 steps and 4.4 at Euler's 20; with 38 dB 2.2 and 3.9.
TARGETS = {"balanced": (40.0, 38.0), "turbo": (31.0, 18.0)}
#: Guards, from lax to strict, and the PSNR [dB] in the 10th percentile that a plan shall reach with its own.  Where
#: balanced reaches 44 dB, it loses none of 100 prompts' things at DPM++'s 25 steps and at Euler's 20.
GUARDS = {"balanced": (0.06, 0.045, 0.036, 0.03, 0.024), "turbo": (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05)}
GUARDED = {"balanced": 44.0, "turbo": 22.0}
#: The most UNet calls with a guard, as a share of those without.
MORE_CALLS = 1.1
#: By how much [dB] it must be ahead of stock with as many UNet calls.
AHEAD = (1.0, 0.0)
#: Forecasts in a row that plans are searched with, at most: errors of longer rows do not just add up, and which is
#: better is tried.
LONGEST = (1, 2, 3)
#: Seeds of the scenes: searched with, chosen by, confirmed by; and how many there are of the last two.
SEARCHED, CHOSEN, CONFIRMED = 101, 102, 103
IMAGES, CONFIRMING = 16, 48
OUT = Path(table.__file__).with_name("measured.json")


def solvers() -> dict[str, Callable[[Any], Any]]:
    """Schedulers from a configuration, by the name of the solver."""
    multistep = diffusers.DPMSolverMultistepScheduler.from_config
    made = [
        diffusers.DDIMScheduler.from_config,
        diffusers.EulerDiscreteScheduler.from_config,
        diffusers.EulerAncestralDiscreteScheduler.from_config,
        multistep,
        functools.partial(multistep, use_karras_sigmas=True),
        functools.partial(multistep, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++"),
        diffusers.UniPCMultistepScheduler.from_config,
        functools.partial(diffusers.PNDMScheduler.from_config, skip_prk_steps=True),  # as Stable Diffusion has it
        diffusers.HeunDiscreteScheduler.from_config,
    ]
    return {name_solver(make({})): make for make in made}


class Cell:
    """One solver with one number of steps.

    Args:
        runs: runs of the pipeline with them.
        cell: a name of :func:`solvers`, and denoising steps.
        images: how many a plan is chosen by; half as many are searched with.
        confirming: how many it has to hold for.
    """

    def __init__(self, runs: PlanRuns, scheduler: Any, cell: tuple[str, int], images: int, confirming: int) -> None:
        self._runs, self._scheduler, (self.solver, self.steps) = runs, scheduler, cell
        scheduler.set_timesteps(self.steps)
        self.total = len(scheduler.timesteps)
        self._searched = draw_captions(SEARCHED, max(1, images // 2))
        self._chosen, self._confirmed = (
            runs.expect(draw_captions(seed, count)) for seed, count in ((CHOSEN, images), (CONFIRMED, confirming))
        )
        self._tried: dict[tuple[Plan, tuple[str, ...]], tuple[float, float]] = {}

    def measure(self) -> dict[str, Any]:
        """Return the cell's row of the table."""
        rows, by_calls = self._profile().rows(), defaultdict(dict)
        for longest in LONGEST:
            # Errors fall along the list: of as many calls, the one with the least error stays.
            for each in search_plans(self.total, [row for row in rows if row.length <= longest]):
                by_calls[len(each.plan.key_steps)][longest] = each.plan
        for plan in list_alternating(self.total):
            by_calls[len(plan.key_steps)][plan.forecasts] = plan
        row = {
            "solver": self.solver,
            "steps": self.steps,
            "model": name_model(),
            "images": len(self._confirmed.captions),
            "targets_psnr_db": TARGETS,
            "log_snr": [round(each, 4) for each in read_schedule(self._scheduler, self.total).log_snr],
        }
        chosen = {name: self._choose(by_calls, name) for name in TARGETS}
        plans = {name: write_steps(plan) for name, (plan, _) in chosen.items()}
        return {**row, "plans": plans, "measured": {name: figures for name, (_, figures) in chosen.items()}}

    def measure_guards(self, plans: dict[str, str]) -> dict[str, Any]:
        """Return what the cell's row has of guards: those of the plans, as :func:`write_steps` writes them."""
        chosen = {name: self._choose_guard(read_steps(steps), name) for name, steps in plans.items()}
        guards = {name: guard for name, (guard, _) in chosen.items()}
        return {"guards": guards, "guarded": {name: figures for name, (_, figures) in chosen.items()}}

    def _choose_guard(self, plan: Plan, preset: str) -> tuple[float | None, dict[str, float]]:
        """Return the laxest guard that reaches a preset's aim, or the strictest that costs little; and its figures.

        None where even the laxest costs more, as where a solver adds so much noise that all outputs change.
        """
        guard: float | None = None
        found = self._compare_with_stock(plan, None)
        for stricter in GUARDS[preset]:
            if found["psnr_db_p10"] >= GUARDED[preset] and guard is not None:
                break
            tried = self._compare_with_stock(plan, stricter)
            if tried["calls"] > MORE_CALLS * len(plan.key_steps):
                break
            if _is_ahead(tried):
                guard, found = stricter, tried
        return guard, _round(found)

    def _compare_with_stock(self, plan: Plan, guard: float | None) -> dict[str, float]:
        """Return the figures of a plan with a guard, and those of stock with as many calls, or one more."""
        ours = self._runs.try_plan(plan, self._confirmed, guard)
        return _tabulate(ours.calls, (ours.median, ours.low), self._try_stock(math.ceil(ours.calls)))

    def _profile(self) -> Profile:
        def run(asked: Any, trial: Trial, prompts: Sequence[str]) -> Tensor | None:
            return self._runs.run(asked, trial, prompts, self._searched.index(prompts[0]))

        profile = Profile(run, range(self.total), self.total, ("forecast",))
        for first in range(0, len(self._searched), BATCH):
            for _ in profile.measure(tuple(self._searched[first : first + BATCH])):
                pass
        return profile

    def _choose(self, by_calls: dict[int, dict[Any, Plan]], preset: str) -> tuple[Plan, dict[str, float]]:
        """Return a preset's plan, and its figures; bisects for the median, then goes up where it is confirmed."""
        counts, target = sorted(by_calls), TARGETS[preset]
        low, high = 0, len(counts) - 1
        while low < high:
            middle = (low + high) // 2
            if self._try_plan(self._find_best(by_calls[counts[middle]]), self._chosen)[0] >= target[0]:
                high = middle
            else:
                low = middle + 1
        for count in counts[low:]:
            plan = self._find_best(by_calls[count])
            ours, theirs = self._try_plan(plan, self._confirmed), self._try_stock(count)
            ahead = all(a - b >= more for a, b, more in zip(ours, theirs, AHEAD, strict=True))
            if ahead and all(a >= b for a, b in zip(ours, target, strict=True)):
                break
        return plan, _round(_tabulate(count, ours, theirs))

    def _find_best(self, plans: dict[Any, Plan]) -> Plan:
        """Return the best of plans with as many calls; the tail counts as much as the median."""
        return max(dict.fromkeys(plans.values()), key=lambda plan: sum(self._try_plan(plan, self._chosen)))

    def _try_plan(self, plan: Plan, pictures: Expected) -> tuple[float, float]:
        """Return a plan's figures on some pictures."""
        if not plan.forecasts:
            return math.inf, math.inf
        key = plan, pictures.captions
        if key not in self._tried:
            found = self._runs.try_plan(plan, pictures)
            self._tried[key] = found.median, found.low
        return self._tried[key]

    @functools.cache  # noqa: B019 - a cell lives as long as its cache
    def _try_stock(self, calls: int) -> tuple[float, float]:
        """Return the figures of stock with as many UNet calls, or one more."""
        if calls >= self.total:
            return -math.inf, -math.inf
        for steps in range(1, self.steps):
            self._scheduler.set_timesteps(steps)
            if len(self._scheduler.timesteps) >= calls:
                break
        return self._runs.try_fewer(self.solver, steps, self._confirmed)


def list_alternating(total: int) -> Iterator[Plan]:
    """Yield the plans in which every second of the last steps is a forecast, from the last or the last but one on."""
    for last in (total - 1, total - 2):
        for first in range(last, 0, -2):
            forecasts = tuple(range(first, last + 1, 2))
            keys = tuple(step for step in range(total) if step not in forecasts)
            yield Plan(total=total, key_steps=keys, max_batch=1, forecasts=forecasts)


def draw_captions(seed: int, count: int) -> list[str]:
    """Return captions of scenes: two fifths of one thing, two fifths of two, a fifth of three."""
    numbers = (1, 2, 1, 2, 3)
    found: dict[str, None] = {}
    index = 0
    while len(found) < count:
        found[draw_scene(np.random.default_rng([seed, index]), things=numbers[index % 5]).caption] = None
        index += 1
    return list(found)


def write_steps(plan: Plan) -> str:
    """Return which steps of a plan run and which are forecast, as the table has it."""
    return "".join("-" if plan.is_forecast(step) else "K" for step in range(plan.total))


def read_steps(text: str) -> Plan:
    """Return the plan of which the table has such steps."""
    steps = {kind: tuple(step for step, each in enumerate(text) if each == kind) for kind in "K-"}
    return Plan(total=len(text), key_steps=steps["K"], max_batch=1, forecasts=steps["-"])


def _is_ahead(figures: dict[str, float]) -> bool:
    """Return whether a plan is ahead of stock, in the median and in the 10th percentile."""
    return all(figures[of] >= figures[f"stock_{of}"] for of in ("psnr_db", "psnr_db_p10"))


def _tabulate(calls: float, ours: tuple[float, float], stock: tuple[float, float]) -> dict[str, float]:
    figures = {"calls": calls, "psnr_db": ours[0], "psnr_db_p10": ours[1]}
    return figures | {"stock_psnr_db": stock[0], "stock_psnr_db_p10": stock[1]}


def _round(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(max(-120.0, min(value, 120.0)), 2) for name, value in figures.items()}


def to_json(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the table as it is shipped: a row a line."""
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return json.dumps(about, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'


def write(folder: Path) -> None:
    """Write the table of all cells."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    order = list(solvers())
    rows.sort(key=lambda row: (order.index(row["solver"]), row["steps"]))
    about = {
        "made_by": "bench/measure_plans.py",
        "torch": torch.__version__,
    }
    OUT.write_text(to_json(rows, about))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--only", nargs="+", metavar="CELL", help='as in "DPM++ 2M Karras 25"')
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--confirming", type=int, default=CONFIRMING, help="images of the third set")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    arguments.cells.mkdir(parents=True, exist_ok=True)
    every = {f"{solver} {steps}": (solver, steps) for steps in STEPS for solver in solvers()}
    unknown = set(arguments.only or ()) - set(every)
    if unknown:
        parser.error(f"--only must name cells such as {next(iter(every))!r}, got {', '.join(sorted(unknown))}")
    if arguments.write:
        write(arguments.cells)
        return
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    config = dict(pipe.scheduler.config)
    fewer: dict[tuple[Any, ...], Tensor] = {}
    for name in tqdm(arguments.only or every):
        file = arguments.cells / f"{name}.json"
        row = json.loads(file.read_text()) if file.is_file() else {}
        if "guards" in row:
            continue
        solver, steps = every[name]
        pipe.scheduler = solvers()[solver](config)
        with patched(pipe, "exact") as report:
            runs = PlanRuns(pipe, report, steps, fewer)
            cell = Cell(runs, solvers()[solver](config), every[name], arguments.images, arguments.confirming)
            row = row or cell.measure()
            file.write_text(json.dumps(row))
            row |= cell.measure_guards(row["plans"])
            file.write_text(json.dumps(row))
        print(name, row["plans"], row["guards"], row["guarded"], flush=True)


if __name__ == "__main__":
    main()
