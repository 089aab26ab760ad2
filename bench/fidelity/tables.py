"""The tables of the fidelity benchmark: every cell in a line or two, and every way of every cell."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from records import RESULTS, machine

from .curve import LIKENESS, Row, find_dominated, likeness_of, share_of, trace_curve

#: The presets that promise to be worth it everywhere; "faster-diffusion" is the paper's.
PROMISED = ("exact", "balanced", "turbo")


def load_cells(results: Path = RESULTS, name: str = "fidelity") -> dict[str, Any]:
    """Return cell -> record of ``fidelity.json``, or of another that ``bench_fidelity.py`` wrote."""
    return json.loads((results / f"{name}.json").read_text())["cells"]


def cells_table(results: Path = RESULTS) -> str:
    """Presets against stock with fewer steps and DeepCache in the same time, a line for each cell and preset."""
    heads = (
        "scheduler",
        "preset",
        "share of stock's time",
        "PSNR (10th percentile)",
        "fewer steps in that time",
        "DeepCache in that time",
        "things lost of 100",
    )
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for cell, record in load_cells(results).items():
        rows = record["rows"]
        dominated = find_dominated(rows)
        for preset in PROMISED:
            row = rows.get(preset)
            if row is None or not row["ratios"]:
                continue
            share = share_of(row)
            fewer = [trace_curve(rows, of, [share])[0] for of in LIKENESS]
            verdict = f" **{preset} is beaten**" if preset in dominated else ""
            cells = (
                cell,
                f"`{preset}`",
                f"{share:.2f}",
                show_likeness(*(likeness_of(row, of) for of in LIKENESS)),
                show_likeness(*fewer) + verdict,
                _show_deepcache(rows, share),
                show_lost(row),
            )
            lines.append(f"| {' | '.join(cells)} |")
    note = (
        "PSNR: against stock's pictures with all steps, median and 10th percentile in dB; fewer steps: stock's own, "
        "between measured counts interpolated, of both spacings of timesteps the better; DeepCache: the best of "
        "intervals 2, 3, 5 and branches 0, 1 that is no slower."
    )
    return "\n".join([*lines, "", note])


def _show_deepcache(rows: Mapping[str, Row], share: float) -> str:
    found = {
        name: row
        for name, row in rows.items()
        if name.startswith("DeepCache") and row["ratios"] and share_of(row) <= share
    }
    if not found:
        return "none as fast"
    best = max(found, key=lambda name: likeness_of(found[name], LIKENESS[0]))
    alike = show_likeness(*(likeness_of(found[best], of) for of in LIKENESS))
    return f"{alike}: {best.removeprefix('DeepCache ')}"


def ways_of_cells_table(results: Path = RESULTS, name: str = "fidelity") -> str:
    """Every way of every cell, each cell folded up."""
    return "\n\n".join(_show_cell(cell, record) for cell, record in load_cells(results, name).items())


def _show_cell(cell: str, record: Mapping[str, Any]) -> str:
    heads = "| way | seconds | share | PSNR (10th percentile) | things right | of one, two, three | lost of 100 (95%) |"
    lines = [heads, "|" + "---|" * 7]
    dominated = find_dominated(record["rows"])
    most = record["prompts"]
    for name, row in record["rows"].items():
        seconds, share = "not timed", ""
        if row["ratios"]:
            seconds, share = f"{statistics.median(row['seconds']):.2f}", f"{share_of(row):.2f}"
        right = ", ".join(f"{100 * row[f'{count} things']['binding']:.0f}" for count in (1, 2, 3))
        cells = (
            name
            + (f", {row['prompts']} prompts" if row.get("prompts", most) < most else "")
            + (" (beaten by fewer steps)" if name in dominated else ""),
            seconds,
            share,
            show_likeness(*(likeness_of(row, of) for of in LIKENESS)),
            f"{100 * row['all']['binding']:.1f}%",
            right,
            show_lost(row),
        )
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        f"{record['prompts']} prompts, the same seeds in every row; right: found in its own shape and colour; "
        f"PSNR and lost: against stock with all steps. {machine(record)}."
    )
    summary = f"<details>\n<summary>{cell}: {len(record['rows'])} ways</summary>"
    drawn = [f"![Seconds against likeness](../bench/results/{plot_name(cell)}.png)", ""]
    timed = any(row["ratios"] for row in record["rows"].values())
    return "\n".join([summary, "", *(drawn if timed else ()), *lines, "", note, "", "</details>"])


def plot_name(cell: str) -> str:
    """Return the stem of a cell's plot."""
    return "fidelity-" + re.sub(r"[^a-z0-9]+", "-", cell.lower().replace("+", "p")).strip("-")


def show_lost(row: Row) -> str:
    """Return how many of 100 things stock binds and this way does not, with its 95% interval."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*row["binding_points_lost"])


def show_likeness(median: float, low: float) -> str:
    """Return a median and a 10th percentile of PSNR as they are shown; a percentile that was not recorded is not."""
    if median == -math.inf:
        return "none as fast"
    if math.isnan(low):
        return _show_decibels(median)
    return f"{_show_decibels(median)} ({_show_decibels(low)})"


def _show_decibels(value: float) -> str:
    return "same" if value == math.inf else f"{value:.1f}"
