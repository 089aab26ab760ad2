"""Tables of docs/erasure.md, from what ``bench_erasure.py`` wrote."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from records import RESULTS, machine, tell_model

#: What was asked for: way -> times, in seconds.
BARS = {"esd, pool of 10": 3.0, "meta step": 1.3}


def erasure_cost_table(results: Path = RESULTS) -> str:
    """What a step of training costs, from ``erasure_cost.json``."""
    record = json.loads((results / "erasure_cost.json").read_text())
    lines = [
        "| step | SD 1.5, TFLOP | times less | small pipeline | seconds | times faster |",
        "|---|---|---|---|---|---|",
    ]
    bars = []
    for run in record["runs"]:
        small = f"1/{run['part']} of the channels, {run['pixels']} x {run['pixels']}"
        for name, row in run["rows"].items():
            cells = [f"{row['tflop']['sd15']:.1f}", f"{row['times_flop']['sd15']:.2f}x", small]
            cells += [f"{statistics.mean(row['seconds']):.2f}", f"{row['times']:.2f}x"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
            if name in BARS:
                verdict = "met" if row["times"] >= BARS[name] else "missed"
                bars.append(f"{name}, {small}: {row['times']:.2f}x against the {BARS[name]:.1f}x asked for, {verdict}")
    rounds = " and ".join(str(run["rounds"]) for run in record["runs"])
    note = (
        f"All weights trained; meta steps without their trajectory. Small pipelines have SD 1.5's proportions. "
        f"Seconds: the processor's, {rounds} interleaved rounds, {machine(record)}. TFLOP: the calls made in these "
        f"rounds, each counted on the meta device at 512 x 512, not timed. {'; '.join(bars)}."
    )
    return "\n".join([*lines, "", note])


def erasure_table(results: Path = RESULTS) -> str:
    """What is drawn before and after erasing, and after an attack, from ``erasure.json``."""
    record = json.loads((results / "erasure.json").read_text())
    reports = record["reports"]
    attacks = list(dict.fromkeys((each["attack"], each["steps"]) for r in reports.values() for each in r["relearned"]))
    heads = [
        "red, asked for",
        "other colours",
        "binding",
        "bars",
        *(f"red after {n}, {attack}" for attack, n in attacks),
    ]
    lines = [f"| weights | {' | '.join(heads)} |", "|" + "---|" * (1 + len(heads))]
    groups = ("target", "neighbours", "binding")
    for name, report in reports.items():
        cells = [f"{_percent(report, group, 'before')} to {_percent(report, group, 'after')}" for group in groups]
        found = {(each["attack"], each["steps"]): each["shown"] for each in report["relearned"]}
        cells += [_decide(report), *(f"{100 * found[attack]:.0f}%" if attack in found else "" for attack in attacks)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sizes = "; ".join(f"{name}: {_counts(report, groups)}" for name, report in reports.items())
    denoise, rate, steps = (
        " or ".join(sorted({f"{r['settings'][name]:g}" for r in reports.values() if name in r["settings"]}))
        for name in ("denoise", "attack_rate", "steps")
    )
    model = tell_model(record)
    note = (
        f"{model[0].upper()}{model[1:]}, red erased; stock weights to edited ones; in brackets: standard error. "
        f"Pictures of the three groups: {sizes}, {denoise} steps each. Bars: red in at most 5%, other colours in at "
        f"least 95% of what stock draws of them, binding at most 3 points below stock. ESD: {steps or 'no'} steps. "
        f"Attack: one picture a step, learning rate {rate}, ten times that for a LoRA of rank 8. {machine(record)}."
    )
    return "\n".join([*lines, "", note])


def _share(report: Mapping[str, Any], group: str, when: str) -> float:
    values = [row[when] for row in report["rows"] if row["group"] == group]
    return sum(values) / len(values)


def _decide(report: Mapping[str, Any]) -> str:
    """Which of the bars an erasure meets, by the shares as they are."""
    red, (others, stock_others), (binding, stock_binding) = (
        _share(report, "target", "after"),
        *([_share(report, group, when) for when in ("after", "before")] for group in ("neighbours", "binding")),
    )
    held = {
        "red": red <= 0.05,
        "other colours": others >= 0.95 * stock_others,
        "binding": stock_binding - binding <= 0.03,
    }
    missed = [name for name, met in held.items() if not met]
    return f"missed: {', '.join(missed)}" if missed else "met"


def _counts(report: Mapping[str, Any], groups: Sequence[str]) -> str:
    counts = [report["pictures"] * sum(row["group"] == group for row in report["rows"]) for group in groups]
    return " + ".join(map(str, counts))


def _percent(report: Mapping[str, Any], group: str, when: str) -> str:
    """A share with its standard error over pictures of a yes-or-no verdict."""
    share = _share(report, group, when)
    count = report["pictures"] * sum(row["group"] == group for row in report["rows"])
    error = math.sqrt(share * (1 - share) / count)
    return f"{100 * share:.1f}%" + (f" ({100 * error:.1f})" if error else "")
