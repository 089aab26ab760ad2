"""Seconds inside the denoiser, against stock, of every row of the support table: small pipelines, random weights.

    python bench/bench_support.py --out bench/results

Prints the table and writes support.json.  The rows are those that tests/test_support.py proves; their models are small:
the ratios say that work is saved everywhere, not how fast a large model is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import adapter_zoo
import if_zoo
import video_zoo
import zoo
from rich.progress import track
from tables import ways_table

import difffast
from difffast.surgery.subclass import is_swapped, swap_in, swap_out
from difffast.tools.demo import device_name

ROUNDS = 2
#: Name -> what runs.
WAYS: dict[str, Any] = {
    "stock": None,
    "every 3rd step a key step": difffast.EncoderPropagation(key_steps=3),
    "features reused, every 4th step a key step": difffast.FeatureReuse(interval=4),
}


@contextlib.contextmanager
def clocked(module: nn.Module) -> Iterator[list[float]]:
    """Seconds of every call of a module, which stays what it is for everybody who asks for its class."""
    with contextlib.ExitStack() as stack:
        if not is_swapped(module):
            swap_in(module, {})
            stack.callback(swap_out, module)
        cls, times = type(module), []
        call = cls.__call__

        def timed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(self, *args, **kwargs)
            finally:
                times.append(time.perf_counter() - start)

        cls.__call__ = timed
        stack.callback(setattr, cls, "__call__", call)
        yield times


def seconds(row: zoo.Row, pipe: Any, way: Any) -> float:
    """Inside the UNet, and ControlNet where there is one, for 12 steps at 16 times the tests' size."""
    inputs = zoo.Inputs(size=tuple(4 * side for side in zoo.Inputs.size), steps=12)
    with contextlib.ExitStack() as stack:
        if way is not None:
            stack.enter_context(difffast.patched(pipe, propagation=way))
        modules = [getattr(pipe, name) for name in ("unet", "controlnet") if hasattr(pipe, name)]
        times = [stack.enter_context(clocked(module)) for module in modules]
        row.run(pipe, inputs)
        return sum(map(sum, times))


def measured(row: zoo.Row) -> dict[str, list[float]]:
    """Per way, the seconds of every round, in turn; refused ways are left out."""
    pipe = row.build()
    pipe.set_progress_bar_config(disable=True)
    ways = {}
    for name, way in WAYS.items():
        with contextlib.suppress(ValueError):
            seconds(row, pipe, way)  # not counted
            ways[name] = way
    rounds = [{name: seconds(row, pipe, way) for name, way in ways.items()} for _ in range(ROUNDS)]
    return {name: [each[name] for each in rounds] for name in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for support.json")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # what falls back is in the tests
    rows = {**zoo.ROWS, **adapter_zoo.ROWS, **if_zoo.ROWS, **video_zoo.ROWS}
    chosen = {name: row for name, row in rows.items() if arguments.only in name}
    found = {name: measured(row) for name, row in track(chosen.items(), "rows", total=len(chosen))}
    machine = {"device": device_name(), "threads": torch.get_num_threads(), "dtype": "float32"}
    record = {**machine, "torch": torch.__version__, "rounds": ROUNDS, "seconds": found}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "support.json").write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.write(ways_table(arguments.out) + "\n")


if __name__ == "__main__":
    main()
