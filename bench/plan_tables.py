"""The table of measured plans and guards, as pages show it."""

from __future__ import annotations

import json
from pathlib import Path

from fidelity.tables import show_likeness
from records import ROOT

MEASURED = ROOT / "difffast" / "plan" / "measured.json"


def plans_table(_results: Path | None = None) -> str:
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
                show_likeness(found["psnr_db"], found["psnr_db_p10"]),
                show_likeness(guarded["psnr_db"], guarded["psnr_db_p10"]),
                _show_stock(guarded),
                str(row["images"]) + ("" if "model" in row else "; unguarded of the earlier model's"),
            )
            lines.append(f"| {' | '.join(cells)} |")
    note = (
        "PSNR: against stock's pictures with all steps, median and 10th percentile in dB, of prompts that no plan was "
        "chosen by; fewer steps: of stock with as many UNet calls as the guarded plan has in the mean, or one more."
    )
    return "\n".join([*lines, "", note])


def _show_stock(figures: dict[str, float]) -> str:
    if figures["stock_psnr_db"] <= -120:
        return "all steps"
    return show_likeness(figures["stock_psnr_db"], figures["stock_psnr_db_p10"])
