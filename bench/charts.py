"""The charts of the report, as matplotlib figures: bars of latency, speed-up, the roof of the machine, scaling."""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from interleaved import quartiles, ratio
from matplotlib.figure import Figure
from records import where
from registry import COMPILED
from session import against

Record = Mapping[str, Any]

_COLOURS = {"stock": "0.55", "peer": "tab:orange", "difffast": "tab:blue"}
_MISSED = "tab:red"


def figures(records: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of every chart that these records allow."""
    timed = [record for record in records if "kinds" in record and record["seconds"]]
    operators = [record for record in records if "bytes" in record]
    for index, record in enumerate(timed):
        yield f"latency-{index:02d}", latency(record)
    compiled = [record for record in timed if COMPILED in record["seconds"]]
    if compiled:
        yield "compiled", against_compiled(compiled)
    alike: dict[str, list[Record]] = {}
    for record in operators:
        alike.setdefault(where(record), []).append(record)
    for number, each in enumerate(alike.values()):
        yield f"roofline-{number:02d}", roofline(each)
    curves = list(_curves(timed))
    if curves:
        yield "scaling", scaling(curves)


def latency(record: Record) -> Figure:
    """Median seconds of every provider with quartiles; those without seconds say why."""
    names = list(record["kinds"])
    figure = Figure(figsize=(10, 1.3 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    longest = max(statistics.median(values) for values in record["seconds"].values())
    missed = {bar["provider"]: bar for bar in record["bars"] if bar["met"] is False}
    for row, name in enumerate(names):
        if name not in record["seconds"]:
            absent = record["absent"][name]
            colour = _MISSED if absent["status"] == "failed" else "0.4"
            text = f"{absent['status']}: {absent['reason']}"
            axes.text(
                0.01 * longest, row, textwrap.shorten(text, 90), va="center", fontsize=8, color=colour, style="italic"
            )
            continue
        low, middle, high = quartiles(record["seconds"][name])
        axes.barh(row, middle, color=_COLOURS[record["kinds"][name]])
        axes.plot((low, high), (row, row), color="black", linewidth=1.2)
        label = f"{middle:.3g} s"
        if record["baseline"] in record["seconds"]:
            label += f", {against(record, name)[1]:.2f}x the time of {record['baseline']}"
        if name in missed:
            label += f"; bar missed: {missed[name]['ratio']:.2f}, promised {missed[name]['at_most']:.2f}"
        axes.text(
            max(middle, high) + 0.01 * longest,
            row,
            label,
            va="center",
            fontsize=8,
            color=_MISSED if name in missed else "black",
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel=f"{record['timed']}: median, quartiles", xlim=(0, 1.45 * longest), ylim=(len(names) - 0.4, -0.6))
    axes.set_title(f"{record['case']}; {where(record)}", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def against_compiled(found: Sequence[Record]) -> Figure:
    """How many times faster than compiled stock everybody is, in every case where that ran."""
    names = list(dict.fromkeys(name for record in found for name in record["seconds"] if name != COMPILED))
    figure = Figure(figsize=(10, 1.5 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    for number, record in enumerate(found):
        offset = 0.5 * (number / max(1, len(found) - 1) - 0.5) if len(found) > 1 else 0.0
        shown = [(row + offset, name) for row, name in enumerate(names) if name in record["seconds"]]
        spreads = [ratio(record["seconds"], COMPILED, name) for _, name in shown]
        middles = [middle for _, middle, _ in spreads]
        errors = [[m - low for low, m, _ in spreads], [high - m for _, m, high in spreads]]
        label = f"{record['case']}; {where(record)}"
        axes.errorbar(middles, [y for y, _ in shown], xerr=errors, fmt="o", markersize=5, label=label)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=f"times faster than {COMPILED}: median, quartiles over the rounds", xlim=(0, None))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.14))
    return figure


@dataclass(frozen=True)
class Roof:
    """What the machine can do at best.

    A product and a copy measure it; whatever a call then did faster belongs to the roof as well, since the machine can
    do it.  So nothing is above the roof, and the label says what it is made of.

    Attributes:
        bandwidth: bytes a second.
        peak: FLOP a second.
        label: what they were measured by.
    """

    bandwidth: float
    peak: float
    label: str

    @classmethod
    def over(cls, found: Sequence[Record]) -> Roof:
        """Return the roof of records of one device, number of threads and dtype."""
        moved, did = {}, {}
        for record in found:
            moved["a copy"] = max(moved.get("a copy", 0), record["ceilings"]["copy_bytes_per_s"])
            product = record["ceilings"][f"matmul_flop_per_s {record['dtype']}"]
            did["a matrix product"] = max(did.get("a matrix product", 0), product)
            for name, seconds in record["seconds"].items():
                who = f"{record['group']} by {name}"
                moved[who] = max(moved.get(who, 0), record["bytes"] / statistics.median(seconds))
                did[who] = max(did.get(who, 0), record["flops"] / statistics.median(seconds))
        mover, doer = max(moved, key=moved.__getitem__), max(did, key=did.__getitem__)
        label = f"roof: {moved[mover] / 1e9:.1f} GB/s ({mover}), {did[doer] / 1e9:.0f} GFLOP/s ({doer})"
        return cls(moved[mover], did[doer], label)

    def at(self, intensity: float) -> float:
        """Return the most FLOP a second at so many FLOP a byte."""
        return min(self.peak, intensity * self.bandwidth)


def roofline(found: Sequence[Record]) -> Figure:
    """Operators of one device, number of threads and dtype, under the roof of the machine.

    Raises:
        AssertionError: one is above it.
    """
    roof = Roof.over(found)
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    groups = list(dict.fromkeys(record["group"] for record in found))
    markers = dict(zip(groups, itertools.cycle("osD^vPX"), strict=False))
    providers = [name for name in dict.fromkeys(n for r in found for n in r["seconds"]) if "maps" not in name]
    seen = set()
    for record in found:
        intensity = record["flops"] / record["bytes"]
        for name in providers:
            if name not in record["seconds"]:
                continue
            label = f"{record['group']}: {name}"
            rate = record["flops"] / statistics.median(record["seconds"][name])
            assert rate <= roof.at(intensity) * (1 + 1e-9), f"{record['case']}: {name} is above the roof"
            colour = f"C{providers.index(name)}"
            axes.plot(
                intensity,
                rate / 1e9,
                markers[record["group"]],
                color=colour,
                alpha=0.7,
                markersize=5,
                label=label if label not in seen else None,
            )
            seen.add(label)
    edge = roof.peak / roof.bandwidth
    reach = [record["flops"] / record["bytes"] for record in found]
    xs = (0.5 * min(*reach, edge), edge, 2 * max(*reach, edge))
    axes.plot(xs, [roof.at(x) / 1e9 for x in xs], color="black", label=textwrap.fill(roof.label, 46))
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that has to be moved", ylabel="GFLOP/s")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_title(where(found[0]), fontsize=10, loc="left")
    return figure


def scaling(curves: Sequence[tuple[str, str, dict[Any, Record]]]) -> Figure:
    """Seconds over batch, steps, resolution and decoders together, one panel each, else equal."""
    figure = Figure(figsize=(5 * len(curves), 4.8), layout="constrained")
    for axes, (axis, title, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        names = list(dict.fromkeys(name for record in points.values() for name in record["seconds"]))
        for name in names:
            known = [(x, statistics.median(r["seconds"][name])) for x, r in points.items() if name in r["seconds"]]
            if len(known) > 1:
                axes.plot(*zip(*known, strict=True), "o-", markersize=4, label=name)
        axes.set(xlabel=axis, ylabel="seconds", xlim=(0, None), ylim=(0, None))
        axes.set_xticks(list(points))
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    return figure


def _curves(records: Sequence[Record]) -> Iterator[tuple[str, str, dict[Any, Record]]]:
    """(axis, title, {value: record}) for every shape that varies while the others stay."""
    for axis in ("batch", "steps", "latent", "k"):
        families: dict[str, dict[Any, Record]] = {}
        for record in records:
            shapes = record.get("shapes", {})
            if axis in shapes:
                rest = {name: value for name, value in sorted(shapes.items()) if name != axis}
                families.setdefault(repr((record["group"], where(record), rest)), {})[shapes[axis]] = record
        for points in families.values():
            if len(points) > 1:
                first = points[min(points)]
                fixed = ", ".join(f"{n} {v}" for n, v in first["shapes"].items() if n != axis)
                yield axis, f"{first['group']}: {fixed}\n{where(first)}", {x: points[x] for x in sorted(points)}
