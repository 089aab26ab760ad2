"""The tables of README.md and docs/, from the committed results.

python bench/tables.py      makes them anew
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from editing_tables import edited_attention_table, edits_table, negative_table, suppression_table
from engine_tables import (
    convolution_table,
    engines_table,
    engines_unets_table,
    full_size_table,
    name_record,
    openvino_table,
    recorded_table,
)
from erasure_tables import erasure_cost_table, erasure_table
from fidelity.tables import cells_table, ways_of_cells_table
from gpu_tables import gpu_images_table, gpu_kernels_table, gpu_remedies_table
from interleaved import ratio
from picture_tables import (
    binding_table,
    demo_table,
    memory_table,
    pipelines_table,
    presets_table,
    ways_table,
)
from plan_tables import plans_table
from records import RESULTS, ROOT, Record, describe_bars, load, machine, measured, measured_on

__all__ = ["RESULTS", "TABLES", "Record", "find_pages", "load", "machine", "render"]

#: Unit -> how many of it make a second, and digits after the point.
_UNITS = {"ms": (1e3, 2), "us": (1e6, 0)}


def unet_table(results: Path = RESULTS, group: str = "unet") -> str:
    """Seconds inside the UNet."""
    found = measured(results, group)
    head = "| provider |" + "".join(f" {info['case'].split(' at ')[0]}, seconds | against stock |" for info in found)
    rows = [head, "|" + "---|" * (1 + 2 * len(found))]
    for name in dict.fromkeys(name for info in found for name in (*info["seconds"], *info.get("absent", {}))):
        cells = [name]
        for info in found:
            if name not in info["seconds"]:
                cells += [info["absent"].get(name, {"status": ""})["status"], ""]
                continue
            low, middle, high = ratio(info["seconds"], name, info["baseline"])
            cells += [f"{statistics.median(info['seconds'][name]):.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        rows.append(f"| {' | '.join(cells)} |")
    rounds = " and ".join(str(len(info["seconds"]["stock"])) for info in found)
    settings = " and ".join(dict.fromkeys(info["case"].split(" at ")[1] for info in found))
    note = f"At {settings}. {measured_on(found[0])}; {rounds} interleaved rounds, quartiles."
    return "\n".join([*rows, "", note, *describe_bars(found)])


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
    found = [record for group in groups for record in measured(results, group)]
    for info in found:
        seconds = info["seconds"]
        times = (f"{statistics.median(seconds[name]) * factor:.{digits}f} {unit}" for name in columns.values())
        faster = (_quartiles(seconds, *pair) for pair in ratios.values())
        rows.append(f"| {' | '.join((name_record(info, found), *times, *faster))} |")
    rounds = sorted({len(seconds) for info in found for seconds in info["seconds"].values()})
    setting = f"{machine(found[0])}; {' and '.join(map(str, rounds))} interleaved rounds, quartiles."
    return "\n".join([*rows, "", f"{note} {setting}".lstrip()])


def flops_table(results: Path = RESULTS) -> str:
    """What the presets leave to do at full size, from ``flops.json`` (``bench/bench_flops.py``)."""
    record = json.loads((results / "flops.json").read_text())
    presets = next(iter(record["unets"].values()))["images"]
    reuse = [part for part in next(iter(record["unets"].values()))["parts"] if part.startswith("reuse step")]
    heads = ["UNet", "one step", *(f"a {part}" for part in reuse), *presets]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, each in record["unets"].items():
        whole = each["parts"]["whole"]
        shares = [each["parts"][part] / whole for part in reuse]
        shares += [flops / (record["steps"] * whole) for flops in each["images"].values()]
        lines.append(f"| {name} | {whole / 1e12:.2f} TFLOP | {' | '.join(f'{share:.2f}' for share in shares)} |")
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


def distributed_table(results: Path = RESULTS) -> str:
    """What two processes gain, from ``distributed.json`` (``bench/bench_distributed.py``)."""
    record = json.loads((results / "distributed.json").read_text())
    heads = ["two processes", "against", "steps, pixels", "seconds a picture", "speed-up", "by the processors' seconds"]
    heads += ["the model", "divided", "the slower one's share", "calls a step", "bytes a step"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for run in record["runs"]:
        for row in run["rows"]:
            promised = "" if row["bar"] is None else f" (promised: {row['bar']}x)"
            cells = [
                row["way"],
                row["against"],
                f"{run['steps']}, {run['pixels']} x {run['pixels']}",
                f"{row['one_s']:.2f} to {row['two_s']:.2f}",
                f"{row['speedup']:.2f}x{promised}",
                f"{row['cpu_speedup']:.2f}x",
                f"{row['predicted']:.2f}x",
                f"{row['divided']:.0%}",
                f"{row['share']:.0%}",
                f"{row['calls'] / run['steps']:.2f}",
                f"{row['bytes'] / run['steps']:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    rounds = " and ".join(str(run["rounds"]) for run in record["runs"])
    loads = " and ".join(f"{run['load']:.1f}" for run in record["runs"])
    note = (
        f"{record['model'].capitalize()}, {record['device']}, a thread a process, float32, torch "
        f"{record['versions']['torch']}; {rounds} rounds, a run's ways in turn; load of the machine before: {loads}."
    )
    return "\n".join([*lines, "", note])


def _quartiles(seconds: dict[str, list[float]], slow: str, fast: str) -> str:
    low, middle, high = ratio(seconds, slow, fast)
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def support_table() -> str:
    """Which pipelines are supported; from the code, which the tests prove row by row."""
    from difffast.support import COLUMNS, table

    rows = [COLUMNS, ("---",) * len(COLUMNS), *table()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def exact_table() -> str:
    """Which pipelines of Diffusers share nothing between steps, and why."""
    from difffast.support import table_of_exact

    rows = [("why steps share nothing", "pipelines"), ("---", "---"), *table_of_exact()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


TABLES: dict[str, Callable[[], str]] = {
    "presets": presets_table,
    "pipelines": pipelines_table,
    "memory": memory_table,
    "maps": partial(
        pipelines_table, group="guidance", ways={"exact": "difffast exact", "with all maps": "difffast exact, maps"}
    ),
    "ways": ways_table,
    "support": support_table,
    "exact": exact_table,
    "unet": unet_table,
    "engines": engines_table,
    "engines_unets": engines_unets_table,
    "engines_amx": partial(engines_unets_table, file="engines_amx.json"),
    "full_size_pictures": full_size_table,
    "full_size": partial(engines_unets_table, file="full_size_amx.json"),
    "pixels_amx": partial(
        recorded_table,
        "self_attention_amx.json",
        "shape",
        {"SDPA": "SDPA", "SDPA compiled": "SDPA compiled", "C++": "cpp"},
        ours="cpp",
    ),
    "openvino": openvino_table,
    "savings": partial(unet_table, group="savings"),
    "demo": demo_table,
    "cells": cells_table,
    "plans": plans_table,
    "fidelity": ways_of_cells_table,
    "branches": partial(ways_of_cells_table, name="branches"),
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
    "distributed": distributed_table,
    "flops": flops_table,
    "guidance": guidance_table,
    "binding": binding_table,
    "erasure_cost": erasure_cost_table,
    "erasure": erasure_table,
    "convolution": convolution_table,
    "patch_products": partial(
        recorded_table,
        "patch_products.json",
        "layer",
        {"PyTorch": "PyTorch", "packed weights": "packed", "product of patches": "patches"},
        ours="patches",
    ),
    "geglu": partial(
        recorded_table,
        "geglu.json",
        "gate",
        {"PyTorch": "eager", "torch.compile": "compiled", "C++": "cpp"},
        ours="cpp",
    ),
    "edited_attention": edited_attention_table,
    "edits": edits_table,
    "suppression": suppression_table,
    "negative": negative_table,
    "gpu_images": gpu_images_table,
    "gpu_kernels": gpu_kernels_table,
    "gpu_remedies": gpu_remedies_table,
}


def find_pages() -> list[Path]:
    """Return the files that may hold tables: README.md and docs/*.md."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """Return ``text`` with every ``<!-- table NAME -->`` ... ``<!-- end -->`` block made anew."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", block, text, flags=re.S)


if __name__ == "__main__":
    for page in find_pages():
        page.write_text(render(page.read_text()))
        sys.stdout.write(f"written: {page}\n")
