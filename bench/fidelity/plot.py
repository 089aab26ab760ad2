"""The plot of a cell: seconds against likeness to stock, with stock's own fewer-steps curve."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .curve import LIKENESS, find_dominated, likeness_of, share_of, trace_curve
from .tables import plot_name

#: Nobody sees a difference above so many dB: ways that are the same as stock, but for rounding, stand at the top.
_INVISIBLE = 60.0
_GREY = "0.65"
_COLOURS = {"preset": "C3", "plan": "C0", "peer": "C2"}
_TITLES = {"preset": "presets of difffast", "plan": "forecasts of difffast", "peer": "peers"}


def plot_cell(name: str, record: Mapping[str, Any], folder: Path) -> None:
    """Draw a cell as ``fidelity-CELL.png`` and ``.svg``.

    A way's point is its median PSNR, its whisker reaches down to the 10th percentile.  What stock with fewer steps
    beats in the same time, in either, is grey.
    """
    rows = {name: row for name, row in record["rows"].items() if row["ratios"]}
    shown = [likeness_of(row, of) for row in rows.values() for of in LIKENESS]
    shown = [value for value in shown if value < _INVISIBLE]
    top = max(shown, default=40.0) + 4
    stock = statistics.median(rows["stock"]["seconds"])
    figure = Figure(figsize=(13, 7), layout="constrained")
    axis = figure.subplots()
    shares = np.linspace(0, 0.999, 1000)
    for of, style in zip(LIKENESS, "-:", strict=True):
        reached = np.minimum(trace_curve(rows, of, shares), top)
        known = np.isfinite(reached)
        label = "stock with fewer steps" + (", 10th percentile" if of == "psnr_p10_db" else "")
        axis.plot(stock * shares[known], reached[known], style, color="black", linewidth=1.2, label=label)
        if of == "psnr_db":
            axis.fill_between(stock * shares[known], reached[known], min(shown, default=0), color="0.94", zorder=0)
    _plot_ways(axis, rows, stock, top)
    axis.axvline(stock, color="black", linewidth=0.6, linestyle="--")
    axis.set(xlabel="seconds for one picture (share of stock's in the same round, times stock's median)")
    axis.set(ylabel="median PSNR against stock, dB; whiskers to the 10th percentile", xlim=(0, None))
    axis.set(title=f"{name}: {record['prompts']} prompts, {record['device']}, {record['threads']} threads")
    axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    for kind in ("png", "svg"):
        figure.savefig(folder / f"{plot_name(name)}.{kind}", dpi=110)


def _plot_ways(axis: Axes, rows: Mapping[str, Any], stock: float, top: float) -> None:
    dominated = find_dominated(rows)
    numbered = [name for name, row in rows.items() if row["kind"] not in ("stock", "fewer steps")]
    seen = set()
    for number, name in enumerate(numbered, 1):
        row = rows[name]
        seconds = stock * share_of(row)
        median, low = (min(likeness_of(row, of), top) for of in LIKENESS)
        kind = _GREY if name in dominated else _COLOURS[row["kind"]]
        if name not in dominated and row["kind"] not in seen:
            seen.add(row["kind"])
            axis.plot([], [], "o", color=kind, label=_TITLES[row["kind"]])
        axis.plot([seconds, seconds], [low, median], color=kind, linewidth=0.8, zorder=2)
        axis.plot(seconds, median, "o", color=kind, markersize=11, zorder=3)
        # Names would lie on top of each other.
        axis.annotate(str(number), (seconds, median), ha="center", va="center", fontsize=7, color="white", zorder=4)
    if dominated:
        axis.plot([], [], "o", color=_GREY, label="beaten by fewer steps, in either")
    for number, name in enumerate(numbered, 1):
        axis.plot([], [], linestyle="none", label=f"{number}  {name}")
