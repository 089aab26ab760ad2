"""Count the Python calls that one step of a small pipeline makes into difffast, and the CPU seconds of its import.

``python bench/count_calls.py`` prints both; ``--check`` exits with 1 where a bar is missed.

A call is a "call" event of ``sys.setprofile`` for a function or a lambda of a module of the package; comprehensions and
generator expressions belong to the function that they are in.  A change of file is a call whose module is another one
than that of the call before it.  A call *decides* if it is a function of the dispatch modules, which do nothing but
find out which backend runs.  A call *asks* if it decides, or if it is a function of an operator or a layer that only
helps to: those that :data:`ASKING` names.  Calls do not depend on the machine, but on what is installed: without the
C++ extension fewer backends are asked.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import difffast
from difffast import EncoderPropagation

#: Most calls of a key step, most of them that decide, and most CPU seconds of ``import difffast`` as a multiple of
#: those of ``import torch``.  Of the calls, 700 were asked for; the others are for 36 convolutions, three for each.
MOST_CALLS, MOST_DECIDING, MOST_IMPORT = 700 + 3 * 36, 100, 1.15

#: Last parts of the names of modules that do nothing but decide.
_MODULES = ("_dispatch", "_proofs", "_installed")
#: Functions of operators and layers that do nothing but help to decide.
ASKING = frozenset(
    (
        "choose",
        "_choose",
        "choose_for",
        "_decide",
        "find_obstacle",
        "_find_obstacle",
        "_loses",
        "_pays",
        "_find_setting",
        "pays",
    )
)

#: Frames that belong to the function that they are in.
_PARTS = frozenset(("<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>"))

STEPS = 9


@dataclass(frozen=True)
class Calls:
    """The calls into difffast during one step.

    Attributes:
        total: all of them.
        changes: those that are in another file than the call before.
        deciding: those of the dispatch modules.
        asking: those, and whatever else only helps to decide.
    """

    total: int
    changes: int
    deciding: int
    asking: int


def calls_of(made: list[tuple[str, str]]) -> Calls:
    """Sum up the (module, function) pairs of one step."""
    changes = sum(a[0] != b[0] for a, b in itertools.pairwise(made))
    decide = [module.rpartition(".")[2] in _MODULES for module, _ in made]
    ask = [module.startswith(("difffast.ops.", "difffast.layers.")) and name in ASKING for module, name in made]
    return Calls(len(made), changes, sum(decide), sum(a or b for a, b in zip(decide, ask, strict=True)))


def calls_by_step(pipe: Any, preset: str, **options: Any) -> list[list[tuple[str, str]]]:
    """Run a patched pipeline and list the calls into difffast of every step, as pairs (module, function).

    Args:
        pipe: a text-to-image pipeline; it is patched, and left as it was.
        preset, options: as for :func:`difffast.patch`.
    """
    steps: list[list[tuple[str, str]]] = [[]]

    def note(frame: Any, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_name not in _PARTS:
            module = frame.f_globals.get("__name__", "")
            if module.startswith("difffast."):
                steps[-1].append((module, frame.f_code.co_name))

    def next_step(_pipe: Any, _step: int, _time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        steps.append([])
        return kwargs

    earlier = sys.getprofile()
    with difffast.patched(pipe, preset, **options):
        sys.setprofile(note)
        try:
            pipe("a cat", num_inference_steps=STEPS, callback_on_step_end=next_step, output_type="latent")
        finally:
            sys.setprofile(earlier)
    return steps[:STEPS]


_ONE = {"propagation": EncoderPropagation(key_steps=3, parallel=False)}
_TWO = {"propagation": EncoderPropagation(key_steps=3)}
#: What is counted: name -> (preset, options, the step).  Steady ones: what is made once a run has been made.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "key step": ("balanced", _ONE, 6),
    "key step, two decoders at once": ("balanced", _TWO, 6),
    "key step of exact": ("exact", {}, 6),
    "in between, a decoder": ("balanced", _ONE, 7),
    "in between, from the queue": ("balanced", _TWO, 7),
}
#: Cases that the bars hold for.
KEY_STEPS = ("key step", "key step of exact")


def count(pipe: Any) -> dict[str, Calls]:
    """The calls of every case of :data:`CASES`."""
    runs: dict[tuple[str, int], list[list[tuple[str, str]]]] = {}
    found = {}
    for name, (preset, options, step) in CASES.items():
        run = (preset, id(options))
        if run not in runs:
            runs[run] = calls_by_step(pipe, preset, **options)
        found[name] = calls_of(runs[run][step])
    return found


def import_seconds(rounds: int) -> dict[str, float]:
    """CPU seconds of ``import torch`` and of ``import difffast``, each in fresh processes: medians, in turn.

    The first process of each is not counted: it compiles to bytecode what no earlier one has.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    code = "import {}, resource; u = resource.getrusage(resource.RUSAGE_SELF); print(u.ru_utime + u.ru_stime)"
    seconds: dict[str, list[float]] = {"torch": [], "difffast": []}
    for _ in range(1 + rounds):
        for module, found in seconds.items():
            command = [sys.executable, "-c", code.format(module)]
            found.append(float(subprocess.check_output(command, env=environment)))
    return {module: statistics.median(found[1:]) for module, found in seconds.items()}


def complaints(calls: dict[str, Calls], seconds: dict[str, float]) -> list[str]:
    """The bars that are missed."""
    missed = []
    for name in KEY_STEPS:
        if calls[name].total >= MOST_CALLS:
            missed.append(f"{name}: {calls[name].total} calls, the bar is below {MOST_CALLS}")
        if calls[name].deciding >= MOST_DECIDING:
            missed.append(f"{name}: {calls[name].deciding} calls decide, the bar is below {MOST_DECIDING}")
    times = seconds["difffast"] / seconds["torch"]
    if times > MOST_IMPORT:
        missed.append(f"import difffast takes {times:.2f} times import torch, the bar is {MOST_IMPORT}")
    return missed


def main(print_line: Callable[[str], None] = print) -> int:
    """Print everything; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--rounds", type=int, default=7, help="processes for each import (default: %(default)s)")
    arguments = parser.parse_args()
    seconds = import_seconds(arguments.rounds)
    torch.set_num_threads(1)
    pipe = difffast.models.tiny_pipeline("sd", channels=(32, 64), sample_size=8)
    pipe.set_progress_bar_config(disable=True)
    calls = count(pipe)
    print_line(f"{'calls into difffast in a step':<32}{'all':>8}{'changes of file':>18}{'deciding':>10}{'asking':>8}")
    for name, found in calls.items():
        print_line(f"{name:<32}{found.total:>8}{found.changes:>18}{found.deciding:>10}{found.asking:>8}")
    times = seconds["difffast"] / seconds["torch"]
    print_line(f"import torch {seconds['torch']:.2f} s, import difffast {seconds['difffast']:.2f} s CPU: {times:.2f}x")
    missed = complaints(calls, seconds)
    for line in missed:
        print_line(f"MISSED: {line}")
    return int(arguments.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
