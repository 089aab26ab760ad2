"""Tables of docs/erasure.md, from what ``bench_erasure.py`` wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from records import RESULTS, machine

#: What was asked for: way -> times, in seconds.
BARS = {"esd, pool of 10": 3.0, "meta step": 1.3}


def erasure_cost_table(results: Path = RESULTS) -> str:
    """What a step of training costs, from ``erasure_cost.json``."""
    record = json.loads((results / "erasure_cost.json").read_text())
    lines = ["| step | SD 1.5, TFLOP | times less | small, seconds | times faster |", "|---|---|---|---|---|"]
    for name, row in record["rows"].items():
        cells = [f"{row['tflop']['sd15']:.1f}", f"{row['times_flop']['sd15']:.2f}x"]
        cells += [f"{row['seconds']:.2f}", f"{row['times']:.2f}x"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    bars = [
        f"{name}: {record['rows'][name]['times']:.2f}x against the {bar:.1f}x asked for"
        + (", met" if record["rows"][name]["times"] >= bar else ", missed")
        for name, bar in BARS.items()
    ]
    note = (
        f"All weights trained; meta steps without their trajectory. Small: SD 1.5's proportions with an eighth of the "
        f"channels, 128 x 128 pixels. Seconds: {record['rounds']} interleaved rounds, {machine(record)}. TFLOP: the "
        f"calls made in these rounds, each counted on the meta device at 512 x 512, not timed. {'; '.join(bars)}."
    )
    return "\n".join([*lines, "", note])


def erasure_table(results: Path = RESULTS) -> str:
    """What is drawn before and after erasing, and after an attack, from ``erasure.json``."""
    record = json.loads((results / "erasure.json").read_text())
    attacks = list(dict.fromkeys((each["attack"], each["steps"]) for each in _first(record)["relearned"]))
    heads = ["red, asked for", "other colours", "binding", *(f"red after {n}, {attack}" for attack, n in attacks)]
    lines = [f"| weights | {' | '.join(heads)} |", "|" + "---|" * (1 + len(heads))]
    groups = ("target", "neighbours", "binding")
    stock = [_percent(_first(record), group, "before") for group in groups]
    lines.append(f"| stock | {' | '.join([*stock, *[''] * len(attacks)])} |")
    for name, report in record["reports"].items():
        cells = [_percent(report, group, "after") for group in groups]
        found = {(each["attack"], each["steps"]): each["shown"] for each in report["relearned"]}
        cells += [f"{100 * found[attack]:.0f}%" if attack in found else "" for attack in attacks]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sizes = "; ".join(f"{name}: {_counts(report, groups)}" for name, report in record["reports"].items())
    note = (
        f"The embedded model, red erased; pictures of the three groups: {sizes}, {record['denoise']} steps each; in "
        f"brackets: standard error. Attack: one picture a step, learning rate {record['attack_rate']:g}, ten times "
        f"that for a LoRA of rank 8. {machine(record)}."
    )
    return "\n".join([*lines, "", note])


def _first(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(record["reports"].values()))


def _counts(report: Mapping[str, Any], groups: Sequence[str]) -> str:
    counts = [report["pictures"] * sum(row["group"] == group for row in report["rows"]) for group in groups]
    return " + ".join(map(str, counts))


def _percent(report: Mapping[str, Any], group: str, when: str) -> str:
    """A share with its standard error over pictures of a yes-or-no verdict."""
    values = [row[when] for row in report["rows"] if row["group"] == group]
    share = sum(values) / len(values)
    error = math.sqrt(share * (1 - share) / (len(values) * report["pictures"]))
    return f"{100 * share:.1f}%" + (f" ({100 * error:.1f})" if error else "")
