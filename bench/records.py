"""The committed results, and what they say about the machine that they were measured on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from difffast.models.embedded import CHECKSUMS, FOLDER

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

Record = Mapping[str, Any]

#: Files of the embedded model that no picture depends on.
_TEXTS = ("README.md", "training.json")


def version_of(model: Path = FOLDER) -> str:
    """Return what an embedded model's pictures depend on, in 12 characters: a hash of its files but for its card."""
    sums = json.loads((model / CHECKSUMS).read_text())
    drawn = {name: value for name, value in sums.items() if name not in _TEXTS}
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:12]


def name_model(model: Path = FOLDER) -> str:
    """Return what records call an embedded model."""
    return f"the embedded model ({version_of(model)})"


def tell_model(record: Record) -> str:
    """Return what tables call a record's model: one that says nothing of it is an earlier one's."""
    return "the embedded model" if record.get("model") == name_model() else "an earlier embedded model"


def load(path: Path) -> list[Record]:
    """Every case of a pytest-benchmark JSON, with its group."""
    benchmarks = json.loads(path.read_text())["benchmarks"]
    return [{"group": each["group"], **each["extra_info"]} for each in benchmarks]


def measured(results: Path, group: str) -> list[dict[str, Any]]:
    """What the benchmarks of a group recorded, from ``cpu.json``: what ``make bench`` wrote, pytest-benchmark's.

    Cases for which its time did not suffice are left out; its report names them.
    """
    found = [record for record in load(results / "cpu.json") if record["group"] == group]
    return [record for record in found if is_measured(record)]


def is_measured(record: Record) -> bool:
    """Return whether a run's time sufficed for a case: for its baseline, with which everybody is compared."""
    return "baseline" not in record or any(record["baseline"] in record.get(k, ()) for k in ("seconds", "peak_bytes"))


def where(info: Mapping[str, Any]) -> str:
    """What something was measured on, as far as figures must not be mixed: device, threads, and dtype if it has one."""
    threads = f"{info['threads']} thread{'s' if info['threads'] != 1 else ''}"
    return ", ".join([info["device"], threads, *([info["dtype"]] if info.get("dtype") else [])])


def machine(info: Mapping[str, Any]) -> str:
    """What something was measured on."""
    return f"{info['device']}, {info['threads']} threads, {info['dtype']}, torch {info['torch']}"


def measured_on(info: Mapping[str, Any]) -> str:
    """What images were measured on, and what their baseline is."""
    return f"{machine(info)}, diffusers {info['diffusers']}, baseline: the stock pipeline, eager, in the same run"


def describe_bars(found: Sequence[Record]) -> list[str]:
    """A line for every bar that was measured, met or missed, after an empty one."""
    lines = []
    for info in found:
        case = str(info["case"]).removeprefix("engines, ").split(" at ")[0]
        for bar in info.get("bars", ()):
            if bar["met"] is not None:
                verdict = "met" if bar["met"] else "**missed**"
                lines.append(
                    f"- {case}: {bar['provider']} takes {bar['ratio']:.2f} of {bar['against']}, "
                    f"promised at most {bar['at_most']:.2f}: {verdict}"
                )
    return ["", *lines] if lines else []
