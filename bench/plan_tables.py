"""The table of measured plans and guards, as pages show it."""

from __future__ import annotations

import json
import math

from fidelity.tables import show_likeness
from records import ROOT

MEASURED = ROOT / "difffast" / "plan" / "measured.json"


def plans_table() -> str:
    """Every plan of ``measured.json``, which ``measure_plans.py`` has made, with its guard and what they reach."""
    heads = ("solver", "steps", "preset", "UNet calls", "guard", "PSNR, unguarded", "PSNR", "fewer steps", "pictures")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]:
        of = len(row["log_snr"])
        for preset, found in row["measured"].items():
            guarded = row["guarded"][preset]
            cells = (
                row["solver"],
                str(row["steps"]),
                f"`{preset}`",
                f"{found['calls']} of {of}, guarded {guarded['calls']:.1f}",
                "none" if (guard := row["guards"][preset]) is None else f"{guard:g}",
                *(_show(each["psnr_db"], each["psnr_db_p10"]) for each in (found, guarded)),
                _show(guarded["stock_psnr_db"], guarded["stock_psnr_db_p10"]),
                str(row["images"]) + ("" if "model" in row else "; unguarded of the earlier model's"),
            )
            lines.append(f"| {' | '.join(cells)} |")
    note = (
        "PSNR: against stock's pictures with all steps, median and 10th percentile in dB, of prompts that no plan was "
        "chosen by; fewer steps: of stock with as many UNet calls as the guarded plan has in the mean, or one more."
    )
    return "\n".join([*lines, "", note])


def _show(median: float, low: float) -> str:
    """Show a PSNR; of what runs in full 120 dB were written, and of stock's fewer steps, where all run, -120."""
    if median <= -120:
        return "all steps"
    return show_likeness(*(math.inf if value >= 120 else value for value in (median, low)))
