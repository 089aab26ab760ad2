"""Prove a UNet's shapes, and measure each choice anew against PyTorch's own way: the record of a machine's proofs.

``python bench/prove_choices.py prove`` proves all of SD1.5's shapes in an empty cache folder, as ``difffast prove``
does, and writes how long the whole command took.  ``python bench/prove_choices.py measure`` then times what was chosen
for every key, at its full size, and PyTorch's own way in turn.  What counts is the median over runs of that command,
because where a process finds its memory makes several percent for calls of less than a millisecond.  Both want an idle
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from records import RESULTS

from difffast.files import write_whole
from difffast.ops._keys import Key
from difffast.proofs.candidates import find_candidates
from difffast.proofs.problems import make_problem
from difffast.proofs.timing import count_sets

RECORD = RESULTS / "proofs.json"
#: Most that what was chosen may take, as a multiple of PyTorch's own way; most seconds of a proof of all shapes.
MOST, SECONDS = 1.03, 60.0
#: Rounds of a key in a run: this many, and more as long as they take less than these seconds.
ROUNDS, KEY_SECONDS = 3, 0.25

Record = dict[str, Any]


def prove(model: str) -> Record:
    """Run the command in a process of its own, with nothing known; returns what it has found and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "difffast.tools.cli", "prove", "--model", model, "--device", "cpu"]
        command += ["--seconds", "300", "--report", str(report)]
        start = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "DIFFFAST_CACHE": folder})
        seconds = time.perf_counter() - start
        found = json.loads(report.read_text())
    return {
        "model": model,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "keys": found["proved"],
        "left": found["left"],
        "facts": found["facts"],
        "proofs": found["proofs"],
        "measured": {},
    }


def measure_key(key: Key, choice: str, default: str) -> dict[str, Any]:
    """Time what was chosen and PyTorch's own way in turn; returns the median quotient and both medians in us."""
    problem = make_problem(key, "normal", torch.device("cpu"), seed=1)
    sets = [problem, *(problem.copy() for _ in range(count_sets(problem) - 1))]
    ways = {each.name: each for each in find_candidates(key, torch.device("cpu"))}
    turn = 0

    def call(name: str) -> None:
        chosen = sets[turn % len(sets)]
        with ways[name].around():
            ways[name].call(key, *chosen.tensors)

    seconds: dict[str, list[float]] = {choice: [], default: []}
    begin = time.perf_counter()
    while len(seconds[choice]) < ROUNDS or time.perf_counter() - begin < KEY_SECONDS:
        turn += 1
        for name in (choice, default) if turn % 2 else (default, choice):
            start = time.perf_counter()
            call(name)
            seconds[name].append(time.perf_counter() - start)
    quotients = [a / b for a, b in zip(seconds[choice][1:], seconds[default][1:], strict=True)]
    return {
        "ratio": round(statistics.median(quotients), 3),
        "microseconds": {name: round(1e6 * statistics.median(each[1:]), 1) for name, each in seconds.items()},
        "rounds": len(quotients),
    }


def measure_all(record: Record) -> None:
    """Measure all keys for which something else than PyTorch's own way was chosen, and add a run to each."""
    with torch.no_grad():
        for text, entry in record["proofs"].items():
            if entry["choice"] != entry["default"]:
                key = Key.parse(text.rpartition(" ")[0])
                run = measure_key(key, entry["choice"], entry["default"])
                record["measured"].setdefault(text, []).append(run)


def find_ratio(record: Record, text: str) -> float:
    """Return what the choice of a key takes, as a multiple of PyTorch's own way, which is as fast as itself."""
    runs = record["measured"].get(text)
    return statistics.median(run["ratio"] for run in runs) if runs else 1.0


def main() -> int:
    """Do what the arguments say; returns 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("prove", "measure"))
    parser.add_argument("--model", default="sd15")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    if options.what == "prove":
        record = prove(options.model)
        done = not record["left"] and record["seconds"] <= SECONDS
        print(f"{record['keys']} keys in {record['seconds']} s, {len(record['left'])} left")
    else:
        record = json.loads(options.out.read_text())
        measure_all(record)
        ratio, worst = max((find_ratio(record, text), text) for text in record["proofs"])
        done = ratio <= MOST
        print(f"{len(record['measured'])} measured; the worst takes {ratio:.3f} of PyTorch's own way: {worst}")
    with write_whole(options.out) as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
    return int(not done)


if __name__ == "__main__":
    sys.exit(main())
