"""Tables of whole pictures: what they take, and what they look like."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from fidelity.curve import LIKENESS, likeness_of, share_of, trace_curve
from fidelity.tables import load_cells, show_likeness, show_lost
from interleaved import ratio
from records import RESULTS, Record, machine, measured, measured_on, tell_model

#: The schedules of the front page, of those in ``fidelity.json``, and its presets.
_FRONT = ("Euler, 20 steps", "DPM++ 2M Karras, 25 steps", "DDIM, 50 steps")
_SHOWN = ("exact", "balanced", "turbo")


def presets_table(results: Path = RESULTS) -> str:
    """How much faster the presets are, what they cost, and what fewer steps cost, from ``fidelity.json``."""
    heads = ["schedule", "preset", "times as fast", "PSNR (10th percentile)", "fewer steps, as fast", "things lost"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    cells = {name: record for name, record in load_cells(results).items() if name in _FRONT}
    for name, record in cells.items():
        rows = record["rows"]
        for preset in _SHOWN:
            row = rows[preset]
            fewer = [trace_curve(rows, of, [share_of(row)])[0] for of in LIKENESS]
            alike = [show_likeness(*each) for each in ([likeness_of(row, of) for of in LIKENESS], fewer)]
            lines.append(f"| {name} | `{preset}` | {1 / share_of(row):.2f}x | {' | '.join(alike)} | {show_lost(row)} |")
    record = next(iter(cells.values()))
    note = f"{record['prompts']} prompts, {tell_model(record)}, whole images; the baseline is stock in the same round."
    return "\n".join([*lines, "", f"{note} {machine(record)}."])


#: Title of a column -> provider.
_WAYS = {
    "exact": "difffast exact",
    "balanced": "difffast balanced",
    "turbo": "difffast turbo",
    "faster-diffusion": "difffast faster-diffusion",
    "DeepCache 3, branch 0": "DeepCache 3, branch 0",
    "DeepCache 3, branch 1": "DeepCache 3, branch 1",
    "tomesd 50%": "tomesd 50%",
}


def pipelines_table(results: Path = RESULTS, group: str = "pipelines", ways: Mapping[str, str] = _WAYS) -> str:
    """Seconds of whole images against stock, from ``cpu.json``; those by engine have a table of their own."""
    found = [info for info in measured(results, group) if not info["case"].startswith("engines, ")]
    lines = [f"| images | stock | {' | '.join(ways)} |", "|" + "---|" * (2 + len(ways))]
    for info in found:
        stock = statistics.median(info["seconds"][info["baseline"]])
        cells = [info["case"], f"{stock:.2f} s", *(_share(info, name) for name in ways.values())]
        lines.append(f"| {' | '.join(cells)} |")
    rounds = sorted({len(info["seconds"][info["baseline"]]) for info in found})
    note = f"Share of stock's seconds for whole images, random weights. {measured_on(found[0])}; "
    return "\n".join([*lines, "", f"{note}{' to '.join(map(str, rounds))} interleaved rounds."])


def _share(info: Record, name: str) -> str:
    if name not in info["seconds"]:
        return info["absent"].get(name, {"status": "not for it"})["status"]
    low, middle, high = ratio(info["seconds"], name, info["baseline"])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def memory_table(results: Path = RESULTS) -> str:
    """Peak memory of one image, from ``cpu.json``."""
    (info,) = measured(results, "memory")
    stock = info["peak_bytes"][info["baseline"]]
    lines = ["| way | peak of tensors | against stock |", "|---|---|---|"]
    lines += [f"| {name} | {peak / 2**20:.1f} MiB | {peak / stock:.2f} |" for name, peak in info["peak_bytes"].items()]
    lines += [f"| {name} | {each['status']} | |" for name, each in info.get("absent", {}).items()]
    return "\n".join([*lines, "", f"{info['case']}: the weights, and the most held above them. {measured_on(info)}."])


def demo_table(results: Path = RESULTS) -> str:
    """Medians of the demo, from ``demo.json``."""
    record = json.loads((results / "demo.json").read_text())
    rows = record["rows"]
    stock, fast = (statistics.median(row[key] for row in rows) for key in ("stock_s", "patched_s"))
    speedups = [row["stock_s"] / row["patched_s"] for row in rows]
    psnr = statistics.median(row["psnr_db"] if row["psnr_db"] is not None else math.inf for row in rows)
    info = {**record["versions"], "device": record["device"], "threads": record["threads"], "dtype": record["dtype"]}
    return "\n".join(
        [
            "| | stock | difffast | speed-up | same-seed PSNR |",
            "|---|---|---|---|---|",
            f"| whole `pipe(...)` call, median | {stock:.2f} s | {fast:.2f} s | {statistics.median(speedups):.2f}x "
            f"({min(speedups):.2f}x to {max(speedups):.2f}x) | {psnr:.1f} dB |",
            "",
            f"{record['model']}, {record['steps']} DDIM steps, {len(rows)} images. {measured_on(info)}.",
        ]
    )


def binding_table(results: Path = RESULTS) -> str:
    """What semantic binding does to the embedded model's pictures, from ``binding.json`` (bench_binding.py)."""
    record = json.loads((results / "binding.json").read_text())
    kinds = {
        "binding": "shape and colour right",
        "full_binding": "texture and part as well",
        "leakage": "has what is another's",
    }
    heads = " | ".join(f"{title} | points (95%)" for title in kinds.values())
    lines = [f"| way | {heads} |", "|" + "---|" * (1 + 2 * len(kinds))]
    for name, row in record["rows"].items():
        cells = [name]
        for kind in kinds:
            gained = "{:+.1f} ({:+.1f} to {:+.1f})".format(*row[f"{kind}_points_gained"])
            cells += [f"{100 * row[kind]:.1f}%", gained]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        f"{record['prompts']} prompts x {record['seeds']} seeds, {record['steps']} steps; points: against stock "
        f"on the same prompts and seeds; the model's numbers: {record['numbers']}. {machine(record)}."
    )
    return "\n".join([*lines, "", note])


def ways_table(results: Path = RESULTS) -> str:
    """Seconds inside UNet and ControlNet of every supported pipeline, from ``support.json`` (bench_support.py)."""
    record = json.loads((results / "support.json").read_text())
    ways = [way for way in max(record["seconds"].values(), key=len) if way != "stock"]
    rows = [f"| pipeline | {' | '.join(ways)} |", "|" + "---|" * (1 + len(ways))]
    for name, seconds in record["seconds"].items():
        shares = (
            statistics.median(a / b for a, b in zip(seconds[way], seconds["stock"], strict=True))
            if way in seconds
            else None
            for way in ways
        )
        rows.append(f"| {name} | {' | '.join('refused' if each is None else f'{each:.2f}' for each in shares)} |")
    note = (
        "Seconds inside the UNet, and ControlNet, of stock's; small UNets (32, 64) on 32x32 latents, 12 steps. "
        f"{machine(record)}, {record['rounds']} interleaved rounds."
    )
    return "\n".join([*rows, "", note])
