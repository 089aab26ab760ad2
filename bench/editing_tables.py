"""Tables of docs/editing.md, and of edited attention, from what ``bench_editing.py`` and the operator's bench wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from records import RESULTS, load, machine, tell_model

#: What was asked of suppression: the least fall of the words' object, and what the other keeps.
FALL, KEPT = 0.8, 0.9


def suppression_table(results: Path = RESULTS) -> str:
    """In how many pictures each object is, before and after one is suppressed, from ``editing.json``."""
    record = json.loads((results / "editing.json").read_text())
    heads = ("suppressed, by", "pictures", "it is in, before", "after", "falls by", "the other is in, before", "after")
    lines = [f"| {' | '.join((*heads, 'keeps', 'asked for'))} |", "|" + "---|" * (len(heads) + 2)]
    for part in ("suppression", "optimised suppression"):
        for name, row in record.get(part, {}).items():
            method, place = name.rsplit(", ", 1)
            gone, others = ((row[f"{each} before"], row[f"{each} after"]) for each in ("gone", "others"))
            fall, kept = 1 - gone[1] / gone[0], others[1] / others[0]
            verdict = "met" if fall >= FALL and kept >= KEPT else "missed"
            cells = [f"the {place}, {method}", row["pictures"], *gone, f"{fall:.0%}", *others, f"{kept:.0%}", verdict]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    asked = f"Asked for: falls by at least {FALL:.0%}, the other keeps at least {KEPT:.0%}."
    return "\n".join([*lines, "", f"{asked} {_setting(record)}"])


def edits_table(results: Path = RESULTS) -> str:
    """What edits of a colour word change and keep, of generated and of inverted pictures, from ``editing.json``."""
    record = json.loads((results / "editing.json").read_text())
    heads = ("picture", "pictures", "reconstruction", "has the new colour", "other object as it was", "PSNR outside")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    edits = record["edits"]
    plain = f"{edits['PSNR outside, other prompt alone, dB']:.1f} dB"
    lines.append(_edit("generated, local blend", edits))
    lines.append(f"| generated, the other prompt alone | {edits['pictures']} | | | | {plain} |")
    lines += [_edit(f"{name}, guidance {row['guidance']:g}", row) for name, row in record["inversions"].items()]
    coded = statistics.median(row["autoencoder alone, dB"] for row in record["inversions"].values())
    edict = "EDICT is edited by the other prompt alone. " if "edict" in record["inversions"] else ""
    note = (
        f"PSNR, median: of the reconstruction against the picture (the autoencoder alone: {coded:.1f} dB), and outside "
        f"of 1.5 radii around the edited object. {edict}{_setting(record)}"
    )
    return "\n".join([*lines, "", note])


def negative_table(results: Path = RESULTS) -> str:
    """What negative attention costs beside guidance, from ``editing.json``."""
    record = json.loads((results / "editing.json").read_text())
    lines = ["| a picture | processor time |", "|---|---|"]
    lines += [f"| {name} | {share:.2f} |" for name, share in record["negative attention"].items()]
    return "\n".join([*lines, "", f"Batch 1, of the time without guidance. {_setting(record)}"])


def _edit(name: str, row: Mapping[str, Any]) -> str:
    again = f"{row['reconstruction, dB']:.1f} dB" if "reconstruction, dB" in row else ""
    cells = (name, row["pictures"], again, row["has the new colour"], row["other object as it was"])
    return f"| {' | '.join(map(str, cells))} | {row['PSNR outside, dB']:.1f} dB |"


def _setting(record: Mapping[str, Any]) -> str:
    model = tell_model(record)
    return (
        f"{model[0].upper()}{model[1:]}, {record['steps']} steps, float32, torch {record['torch']}, "
        "by `bench/bench_editing.py`."
    )


def edited_attention_table(results: Path = RESULTS) -> str:
    """What an edited map costs beside two plain attentions, from ``edited_attention.json``."""
    found = load(results / "edited_attention.json")
    ours = found[0]["backend"]
    columns = {"explicit maps": "explicit maps", "two plain attentions": "two plain attentions", "edited": ours}
    columns |= {"values mixed anew": f"{ours}, mixed anew", "nothing of its own": f"{ours}, replaced"}
    heads = ["shape", *columns, f"edited by plain (at most {found[0]['bars'][0]['at_most']:g})"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for info in found:
        times = [f"{statistics.median(info['seconds'][name]) * 1e3:.2f} ms" for name in columns.values()]
        (bar,) = info["bars"]
        verdict = f"{bar['ratio']:.2f}, {'met' if bar['met'] else '**missed**'}"
        lines.append(f"| {' | '.join([info['case'].split(':')[0], *times, verdict])} |")
    rounds = len(next(iter(found[0]["seconds"].values())))
    return "\n".join(
        [*lines, "", f"77 keys of either text; {machine(found[0])}; {rounds} interleaved rounds, medians."]
    )
