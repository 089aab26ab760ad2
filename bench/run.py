"""Measure everybody in turn and write tables, charts and a page: what ``make bench`` and ``difffast bench`` run.

python bench/run.py --only unet --budget-minutes 45

pytest measures, in a process of its own, and writes results.json; bench/report.py makes the report of it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
#: The suites; the last one, an hour by itself, runs by name only.
BENCHMARKS = ("ops", "unet", "pipelines", "guidance", "memory", "full-size")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks and write their report; returns the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.budget_minutes <= 0:
        parser.error(f"--budget-minutes must be positive, got {arguments.budget_minutes}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.json"
    results.unlink(missing_ok=True)  # an interrupted run must not be reported with an earlier one's figures
    size = arguments.size or _default_size()
    measuring = [sys.executable, "-m", "pytest", *_chosen(arguments), "-W", "default", "-s", "--benchmark-enable"]
    measuring += [f"--benchmark-json={results}", f"--size={size}", f"--budget-minutes={arguments.budget_minutes}"]
    measuring += [f"--records={out / 'cases'}", *([f"--bench-model={arguments.model}"] if arguments.model else [])]
    status = subprocess.run(measuring, cwd=FOLDER.parent).returncode
    if not results.is_file() or not results.stat().st_size:
        return status or 1
    reporting = [sys.executable, str(FOLDER / "report.py"), str(results), "--out", str(out), "--size", size]
    return subprocess.run(reporting).returncode or status


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="difffast bench", description="Everybody in turn: tables, charts, a page.")
    parser.add_argument("--size", choices=("cpu", "gpu"), help="which selection; default: gpu where there is one")
    parser.add_argument("--budget-minutes", type=float, default=14.0, help="wall clock; a later run goes on")
    parser.add_argument("--only", choices=BENCHMARKS, help="one suite")
    parser.add_argument("--model", help="measure your own pipeline instead: a folder in Diffusers format")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for results.json and the report")
    return parser


def _chosen(arguments: argparse.Namespace) -> list[str]:
    """What pytest is told to run."""
    suite = "pipelines" if arguments.model else arguments.only
    file = FOLDER / f"bench_{(suite or BENCHMARKS[-1]).replace('-', '_')}.py"
    if suite is None:
        return [str(FOLDER), f"--ignore={file}"]
    return [str(FOLDER / "ops" if suite == "ops" else file)]


def _default_size() -> str:
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
