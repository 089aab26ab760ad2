"""README tables from committed results: ``python bench/report.py`` rewrites the text between the markers."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from interleaved import ratio

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def unet_table(results: Path = RESULTS) -> str:
    """Seconds inside the UNet."""
    found = _measured(results, "unet")
    head = "| provider |" + "".join(f" {info['case'].split(' at ')[0]}, seconds | against stock |" for info in found)
    rows = [head, "|" + "---|" * (1 + 2 * len(found))]
    for name in found[0]["unet_seconds"]:
        cells = [name]
        for info in found:
            low, middle, high = statistics.quantiles(info["against_stock"][name], n=4)
            cells += [f"{statistics.median(info['unet_seconds'][name]):.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        rows.append(f"| {' | '.join(cells)} |")
    rounds = " and ".join(str(len(info["unet_seconds"]["stock"])) for info in found)
    case = found[0]["case"].split(" at ")[1]
    return "\n".join([*rows, "", f"At {case}. {_measured_on(found[0])}; {rounds} interleaved rounds, quartiles."])


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


def attention_table(results: Path = RESULTS) -> str:
    """Milliseconds of cross-attention; the C++ kernel against what else there is."""
    rows = [
        "| shape | SDPA | C++ | eager, maps | torch.compile, maps | C++, maps | against eager, maps | against SDPA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = _measured(results, "cross_attention")
    for info in found:
        seconds = info["seconds"]
        columns = ("SDPA", "cpp", "eager, maps", "compiled, maps", "cpp, maps")
        times = (f"{statistics.median(seconds[name]) * 1e3:.2f} ms" for name in columns)
        ratios = (_quartiles(seconds, *pair) for pair in (("eager, maps", "cpp, maps"), ("SDPA", "cpp")))
        rows.append(f"| {info['case'].split(':')[0]} | {' | '.join((*times, *ratios))} |")
    rounds = len(found[0]["seconds"]["cpp"])
    return "\n".join(
        [
            *rows,
            "",
            f"77 keys, batch 2, maps of 12 tokens. {_machine(found[0])}; {rounds} interleaved rounds, quartiles.",
        ]
    )


def entropy_table(results: Path = RESULTS) -> str:
    """Microseconds of the entropy loss with its gradient."""
    rows = ["| maps | eager | torch.compile | C++ | faster than eager |", "|---|---|---|---|---|"]
    found = _measured(results, "attention_entropy")
    for info in found:
        seconds = info["seconds"]
        times = (f"{statistics.median(seconds[name]) * 1e6:.0f} us" for name in ("eager", "compiled", "cpp"))
        rows.append(f"| {info['case']} | {' | '.join(times)} | {_quartiles(seconds, 'eager', 'cpp')} |")
    rounds = len(found[0]["seconds"]["cpp"])
    return "\n".join(
        [*rows, "", f"Forward and backward. {_machine(found[0])}; {rounds} interleaved rounds, quartiles."]
    )


def norm_table(results: Path = RESULTS) -> str:
    """Microseconds of GroupNorm with SiLU; the C++ kernel against eager and compiled PyTorch."""
    rows = ["| x | eager | torch.compile | C++ | faster than eager | than torch.compile |", "|---|---|---|---|---|---|"]
    found = _measured(results, "group_norm_silu")
    for info in found:
        seconds = info["seconds"]
        times = (f"{statistics.median(seconds[name]) * 1e6:.0f} us" for name in ("eager", "compiled", "cpp"))
        ratios = (_quartiles(seconds, slow, "cpp") for slow in ("eager", "compiled"))
        rows.append(f"| {info['case']} | {' | '.join((*times, *ratios))} |")
    rounds = len(found[0]["seconds"]["cpp"])
    return "\n".join([*rows, "", f"{_machine(found[0])}; {rounds} interleaved rounds, quartiles."])


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
            f"points lost and PSNR: against stock with 50 steps; Frechet: to drawn scenes. {_machine(record)}.",
        ]
    )


def guidance_table(results: Path = RESULTS) -> str:
    """What semantic binding costs, from ``guidance_flops.json`` (``bench/bench_guidance.py``)."""
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
    kinds = {"binding": "shape and colour right", "full_binding": "texture and part as well"}
    heads = " | ".join(f"{title} | points gained (95%)" for title in kinds.values())
    lines = [f"| way | {heads} |", "|" + "---|" * 5]
    for name, row in record["rows"].items():
        cells = [name]
        for kind in kinds:
            gained = "{:+.1f} ({:+.1f} to {:+.1f})".format(*row[f"{kind}_points_gained"])
            cells += [f"{100 * row[kind]:.1f}%", gained]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        f"{record['prompts']} prompts x {record['seeds']} seeds, {record['steps']} steps; points: against stock "
        f"on the same prompts and seeds. {_machine(record)}."
    )
    return "\n".join([*lines, "", note])


def _measured(results: Path, group: str) -> list[dict[str, Any]]:
    """What the benchmarks of a group recorded, from ``cpu.json``: what ``make bench`` wrote, pytest-benchmark's."""
    benchmarks = json.loads((results / "cpu.json").read_text())["benchmarks"]
    return [each["extra_info"] for each in benchmarks if each["group"] == group]


def _quartiles(seconds: dict[str, list[float]], slow: str, fast: str) -> str:
    low, middle, high = ratio(seconds, slow, fast)
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def _machine(info: dict[str, Any]) -> str:
    return f"{info['device']}, {info['threads']} threads, {info['dtype']}, torch {info['torch']}"


def _measured_on(info: dict[str, Any]) -> str:
    return f"{_machine(info)}, diffusers {info['diffusers']}, baseline: the stock pipeline, eager, in the same run"


TABLES = {
    "unet": unet_table,
    "demo": demo_table,
    "fidelity": fidelity_table,
    "attention": attention_table,
    "entropy": entropy_table,
    "norms": norm_table,
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
