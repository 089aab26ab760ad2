"""The tables of docs/gpu.md, from the raw records of the runs on lent cards (bench/results/gpu)."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from records import RESULTS

_MODELS = {"sd15": "SD1.5", "sdxl": "SDXL", "if-i-xl": "IF-I-XL"}


def _load(results: Path, name: str) -> Any:
    return json.loads((results / "gpu" / f"{name}.json").read_text())


def gpu_images_table(results: Path = RESULTS) -> str:
    """Seconds for one image, everybody in one run."""
    record = _load(results, "h200-images")
    rows = {(row["model"], row["steps"], row["provider"]): row for row in record["rows"]}
    cases = list(dict.fromkeys((row["model"], row["steps"]) for row in record["rows"]))
    head = "| provider |" + "".join(f" {_MODELS[model]}, {steps} steps | |" for model, steps in cases)
    lines = [head, "|" + "---|" * (1 + 2 * len(cases))]
    for provider in dict.fromkeys(row["provider"] for row in record["rows"]):
        cells = [provider]
        for case in cases:
            seconds, stock = (rows[(*case, name)]["seconds"][0] for name in (provider, "stock"))
            cells += [f"{seconds:.2f} s", f"{stock / seconds:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    for provider, each in record.get("absent", {}).items():
        lines.append(f"| {provider} | {each['status']} |{' |' * (2 * len(cases) - 1)}")
    facts = record["facts"]
    kept = [row for row in record["rows"] if row["provider"] == "difffast exact"]
    error = max(row["error"] for row in kept)
    note = (
        f"{facts['card']}, torch {facts['torch']}; float16, batch 1 with guidance, random weights, latents only; "
        f"median of one to three images. The latents of `exact` differ from stock's by {error:.1e} of their norm."
    )
    return "\n".join([*lines, "", note])


def gpu_remedies_table(results: Path = RESULTS) -> str:
    """Milliseconds of one UNet call in a CUDA graph, remedy upon remedy."""
    first, record = _load(results, "h100-first"), _load(results, "h100-remedies")
    names = ("nhwc stock", "+ norms", "+ silu, time embedding", "+ geglu")
    said = ("and channels_last", "and norms by `group_norm_silu`", "and SiLU, time embedding", "and `geglu`")
    lines = ["| one call, batch 2 | SD1.5 | SDXL |", "|---|---|---|"]
    rows = [
        ("stock, eager", [first[model]["nchw eager ms"] for model in ("sd15", "sdxl")]),
        ("the same in a CUDA graph", [first[model]["nchw graph ms"] for model in ("sd15", "sdxl")]),
        *(
            (text, [record[model][name][0] for model in ("sd15", "sdxl")])
            for name, text in zip(names, said, strict=True)
        ),
    ]
    stock = rows[0][1]
    for text, found in rows:
        cells = [f"{ms:.1f} ms ({a / ms:.2f}x)" for ms, a in zip(found, stock, strict=True)]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    note = (
        f"{record['card']}, torch {record['torch']}, float16; copies run at {first['copy_TBs']:.1f} TB/s, products at "
    )
    return "\n".join([*lines, "", f"{note}{first['matmul_TFLOPs']:.0f} TFLOP/s."])


def gpu_kernels_table(results: Path = RESULTS) -> str:
    """How many times faster than PyTorch's way kernels were, by operator and mode."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    chosen: dict[tuple[str, str], list[str]] = {}
    proofs = {**_load(results, "h200-prove-sd15")["proofs"], **_load(results, "h200-prove-sdxl")["proofs"]}
    for key, entry in proofs.items():
        where = (key.split()[0], key.split()[-1])
        plain = entry["microseconds"][entry["default"]][1]
        chosen.setdefault(where, []).append(entry["choice"])
        for name, quartiles in entry["microseconds"].items():
            if name in ("triton", "cuda", "cudnn", "flash", "efficient"):
                found.setdefault(where, {}).setdefault(name, []).append(plain / quartiles[1])
    lines = ["| operator | called | keys | against PyTorch's way, median (range) | chosen |", "|---|---|---|---|---|"]
    for (operator, mode), by_name in sorted(found.items()):
        against = "; ".join(
            f"{name} {statistics.median(each):.2f}x ({min(each):.2f} to {max(each):.2f})"
            for name, each in by_name.items()
        )
        choices = chosen[operator, mode]
        counts = ", ".join(f"{name} {choices.count(name)}" for name in dict.fromkeys(choices))
        how = "in a graph" if mode == "graph" else "by Python"
        lines.append(f"| `{operator}` | {how} | {len(choices)} | {against} | {counts} |")
    return "\n".join(lines)
