"""The README's tables, from the committed results.

python bench/tables.py      makes them anew
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from interleaved import ratio
from session import against

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

Record = Mapping[str, Any]

#: Unit -> how many of it make a second, and digits after the point.
_UNITS = {"ms": (1e3, 2), "us": (1e6, 0)}


def load(path: Path) -> list[Record]:
    """Every case of a pytest-benchmark JSON, with its group."""
    benchmarks = json.loads(path.read_text())["benchmarks"]
    return [{"group": each["group"], **each["extra_info"]} for each in benchmarks]


def unet_table(results: Path = RESULTS, group: str = "unet") -> str:
    """Seconds inside the UNet."""
    found = _measured(results, group)
    head = "| provider |" + "".join(f" {info['case'].split(' at ')[0]}, seconds | against stock |" for info in found)
    rows = [head, "|" + "---|" * (1 + 2 * len(found))]
    for name in dict.fromkeys(name for info in found for name in (*info["seconds"], *info.get("absent", {}))):
        cells = [name]
        for info in found:
            if name not in info["seconds"]:
                cells += [info["absent"].get(name, {"status": ""})["status"], ""]
                continue
            low, middle, high = against(info, name)
            cells += [f"{statistics.median(info['seconds'][name]):.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        rows.append(f"| {' | '.join(cells)} |")
    rounds = " and ".join(str(len(info["seconds"]["stock"])) for info in found)
    settings = " and ".join(dict.fromkeys(info["case"].split(" at ")[1] for info in found))
    note = f"At {settings}. {_measured_on(found[0])}; {rounds} interleaved rounds, quartiles."
    return "\n".join([*rows, "", note, *_bars(found)])


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
            f"{record['model']}, {record['steps']} DDIM steps, {len(rows)} images. {_measured_on(info)}.",
        ]
    )


def operator_table(
    groups: Sequence[str],
    first: str,
    columns: Mapping[str, str],
    ratios: Mapping[str, tuple[str, str]],
    *,
    unit: str = "ms",
    note: str = "",
    results: Path = RESULTS,
) -> str:
    """Medians of an operator's providers, and how many times faster ours is, a row for each case.

    Args:
        groups: of the benchmarks.
        first: title of the column of cases.
        columns: title of a column -> provider.
        ratios: title of a column -> (slow, fast).
        unit: "ms" or "us".
        note: put before what it was measured on.
    """
    factor, digits = _UNITS[unit]
    heads = [first, *columns, *ratios]
    rows = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    found = [record for group in groups for record in _measured(results, group)]
    for info in found:
        seconds = info["seconds"]
        times = (f"{statistics.median(seconds[name]) * factor:.{digits}f} {unit}" for name in columns.values())
        faster = (_quartiles(seconds, *pair) for pair in ratios.values())
        rows.append(f"| {' | '.join((info['case'].split(':')[0], *times, *faster))} |")
    rounds = sorted({len(seconds) for info in found for seconds in info["seconds"].values()})
    measured = f"{machine(found[0])}; {' and '.join(map(str, rounds))} interleaved rounds, quartiles."
    return "\n".join([*rows, "", f"{note} {measured}".lstrip()])


def fidelity_table(results: Path = RESULTS) -> str:
    """What every way to be faster costs in pictures, from ``fidelity.json`` (``bench/bench_fidelity.py``)."""
    record = json.loads((results / "fidelity.json").read_text())
    columns = "| way | seconds a picture | one thing right | two things | three | points lost (95%) | PSNR | Frechet |"
    lines = [columns, "|" + "---|" * 8]
    for name, row in record["rows"].items():
        right = " | ".join(f"{100 * row[f'{count} things']['binding']:.1f}%" for count in (1, 2, 3))
        lost, low, high = row["binding_points_lost"]
        psnr = "same" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
        seconds = statistics.median(row["seconds"])
        spread = f"{lost:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(f"| {name} | {seconds:.2f} | {right} | {spread} | {psnr} | {row['frechet']:.3f} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{record['prompts']} prompts, the same seeds in every row; right: found in its own shape and colour; "
            f"points lost and PSNR: against stock with 50 steps; Frechet: to drawn scenes. {machine(record)}.",
        ]
    )


def _bars(found: Sequence[Record]) -> list[str]:
    """A line for every bar that was measured, met or missed."""
    lines = []
    for info in found:
        for bar in info.get("bars", ()):
            if bar["met"] is not None:
                case, verdict = info["case"].split(" at ")[0], "met" if bar["met"] else "**missed**"
                lines.append(
                    f"- {case}: {bar['provider']} takes {bar['ratio']:.2f} of {bar['against']}, "
                    f"promised at most {bar['at_most']:.2f}: {verdict}"
                )
    return ["", *lines] if lines else []


def flops_table(results: Path = RESULTS) -> str:
    """What the presets leave to do at full size, from ``flops.json`` (``bench/bench_flops.py``)."""
    record = json.loads((results / "flops.json").read_text())
    presets = next(iter(record["unets"].values()))["images"]
    lines = [f"| UNet | one step | a reuse step | {' | '.join(presets)} |", "|" + "---|" * (3 + len(presets))]
    for name, each in record["unets"].items():
        whole = each["parts"]["whole"]
        shares = " | ".join(f"{flops / (record['steps'] * whole):.2f}" for flops in each["images"].values())
        lines.append(f"| {name} | {whole / 1e12:.2f} TFLOP | {each['parts']['reuse step'] / whole:.2f} | {shares} |")
    note = f"Share of stock's; {record['steps']} steps, guidance on; counted on the meta device, not timed."
    return "\n".join([*lines, "", note])


def guidance_table(results: Path = RESULTS) -> str:
    """What semantic binding costs, from ``guidance_flops.json`` (``bench/bench_guidance_flops.py``)."""
    record = json.loads((results / "guidance_flops.json").read_text())
    names = [name for name, value in record.items() if isinstance(value, dict)]
    presets = list(record[names[0]]["images"])
    heads = [*(f"{preset} preset" for preset in presets), "entropy iteration", "binding iteration"]
    lines = [f"| UNet | {' | '.join(heads)} |", "|" + "---|" * (1 + len(heads))]
    for name in names:
        cells = [f"{record[name]['images'][preset]:.2f}x" for preset in presets]
        for kind in ("entropy iteration", "binding iteration"):
            each = record[name]["passes"][kind]
            cells.append(
                f"{each['forward'] / 1e12:.2f} + {each['backward'] / 1e12:.2f} TFLOP, {each['saved'] / 2**30:.2f} GiB"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = "Forward + backward, and saved activations, of one image or thing; counted on the meta device, not timed."
    return "\n".join([*lines, "", note])


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


def _measured(results: Path, group: str) -> list[dict[str, Any]]:
    """What the benchmarks of a group recorded, from ``cpu.json``: what ``make bench`` wrote, pytest-benchmark's."""
    return [record for record in load(results / "cpu.json") if record["group"] == group]


def _quartiles(seconds: dict[str, list[float]], slow: str, fast: str) -> str:
    low, middle, high = ratio(seconds, slow, fast)
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def machine(info: Mapping[str, Any]) -> str:
    """What something was measured on."""
    return f"{info['device']}, {info['threads']} threads, {info['dtype']}, torch {info['torch']}"


def _measured_on(info: dict[str, Any]) -> str:
    return f"{machine(info)}, diffusers {info['diffusers']}, baseline: the stock pipeline, eager, in the same run"


def support_table() -> str:
    """Which pipelines are supported; from the code, which the tests prove row by row."""
    from difffast.support import COLUMNS, table

    rows = [COLUMNS, ("---",) * len(COLUMNS), *table()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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


TABLES: dict[str, Callable[[], str]] = {
    "ways": ways_table,
    "support": support_table,
    "unet": unet_table,
    "savings": partial(unet_table, group="savings"),
    "demo": demo_table,
    "fidelity": fidelity_table,
    "attention": partial(
        operator_table,
        ["cross_attention"],
        "shape",
        {
            "SDPA": "SDPA",
            "C++": "cpp",
            "eager, maps": "eager, maps",
            "torch.compile, maps": "compiled, maps",
            "C++, maps": "cpp, maps",
        },
        {"against eager, maps": ("eager, maps", "cpp, maps"), "against SDPA": ("SDPA", "cpp")},
        note="77 keys, batch 2, maps of 12 tokens.",
    ),
    "pixels": partial(
        operator_table,
        ["self_attention", "joint_attention"],
        "shape",
        {"SDPA": "SDPA", "SDPA compiled": "SDPA compiled", "C++": "cpp"},
        {"faster than SDPA": ("SDPA", "cpp"), "than compiled": ("SDPA compiled", "cpp")},
        note="IF: `joint_attention` with 77 text keys; SDPA with joining the keys.",
    ),
    "linear": partial(
        operator_table,
        ["linear"],
        "layer",
        {"F.linear": "eager", "torch.compile": "compiled", "oneDNN": "onednn"},
        {"faster than F.linear": ("eager", "onednn"), "than torch.compile": ("compiled", "onednn")},
    ),
    "entropy": partial(
        operator_table,
        ["attention_entropy"],
        "maps",
        {"eager": "eager", "torch.compile": "compiled", "C++": "cpp"},
        {"faster than eager": ("eager", "cpp")},
        unit="us",
        note="Forward and backward.",
    ),
    "norms": partial(
        operator_table,
        ["group_norm_silu"],
        "x",
        {"eager": "eager", "torch.compile": "compiled", "C++": "cpp"},
        {"faster than eager": ("eager", "cpp"), "than torch.compile": ("compiled", "cpp")},
        unit="us",
    ),
    "flops": flops_table,
    "guidance": guidance_table,
    "binding": binding_table,
}


def render(text: str) -> str:
    """``text`` with every ``<!-- table NAME -->`` ... ``<!-- end -->`` block made anew."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", block, text, flags=re.S)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
    sys.stdout.write(f"written: {readme}\n")
