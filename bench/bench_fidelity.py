"""What approximations cost in pictures, at the schedulers and step counts that people use: the embedded model, judged.

    python bench/bench_fidelity.py --out bench/results                     # everything that lacks, then the table
    python bench/bench_fidelity.py --cells "Euler, 20 steps" --pictures-only    # needs no quiet machine
    python bench/bench_fidelity.py --cells "Euler, 20 steps" --times-only       # does

Writes fidelity.json, whose other cells stay, and a plot for each cell.  Stock with fewer steps is the honest control:
an approximation has to be better than that in the same time.  An interrupted run goes on (--cache).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawn.judge import judge, summary
from drawn.likeness import distance, features, frechet
from drawn.rendering import render
from drawn.shapes import Scene, draw_scene
from fidelity.cells import CELLS, STOCK, Cell, Way, choose_ways, describe, list_ways
from fidelity.curve import LIKENESS, find_dominated
from fidelity.plot import plot_cell
from fidelity.store import BATCH, Store
from PIL import Image
from records import name_model, version_of

from difffast.files import write_whole
from difffast.models import embedded_pipeline
from difffast.models.embedded import FOLDER
from difffast.tools.demo import device_name, psnr

#: Scenes of this seed are in no training set.
SEED = 7
#: Prompts of the ways that presets are held against, and of the others.
PROMPTS, OTHERS = 100, 24
ROUNDS = 5


def scenes(count: int) -> list[Scene]:
    """Two fifths of one thing, two fifths of two, a fifth of three."""
    numbers = (1, 2, 1, 2, 3)
    return [draw_scene(np.random.default_rng([SEED, i]), things=numbers[i % 5]) for i in range(count)]


def judged(made: np.ndarray, control: np.ndarray, wanted: Sequence[Scene], truth: np.ndarray) -> dict[str, Any]:
    """Fidelity of one way's pictures; ``control`` are stock's, ``truth`` features [n, d] of drawn scenes."""
    verdicts = [judge(image, scene) for image, scene in zip(made, wanted, strict=True)]
    pairs = list(zip(made, control, strict=True))
    by_things = {count: [v for v in verdicts if v.things == count] for count in (1, 2, 3)}
    alike = [psnr(Image.fromarray(a), Image.fromarray(b)) for a, b in pairs]
    return {
        "all": summary(verdicts),
        **{f"{count} things": summary(some) for count, some in by_things.items()},
        "psnr_db": statistics.median(alike),
        # Of the pictures themselves: between one that is the same and one that is not lies nothing.
        "psnr_p10_db": float(np.quantile(alike, 0.1, method="lower")),
        "distance": statistics.mean(distance(a, b) for a, b in pairs),
        "frechet": frechet(np.stack([features(image) for image in made]), truth),
        "bound": [v.binding * v.things for v in verdicts],
        "things": [v.things for v in verdicts],
    }


def lost(rows: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """Points of binding accuracy lost against stock on the same prompts: (value, 95% bootstrap low, high)."""
    things = np.array(rows[name]["things"])
    difference = np.array(rows[STOCK]["bound"])[: len(things)] - np.array(rows[name]["bound"])
    draws = np.random.default_rng(0).integers(0, len(things), (2000, len(things)))
    spread = 100 * difference[draws].sum(1) / things[draws].sum(1)
    return 100 * difference.sum() / things.sum(), *np.quantile(spread, (0.025, 0.975)).tolist()


def judge_cell(store: Store, ways: Mapping[Way, int], truth: np.ndarray) -> dict[str, Any]:
    """Return the rows of a cell whose pictures are all there.

    Args:
        store: of its pictures.
        ways: with their numbers of prompts; the first is stock, which has the most.
        truth: features [n, d] of drawn scenes.
    """
    (stock, most), *_ = ways.items()
    control, wanted = store.pictures(stock, most), scenes(most)
    rows: dict[str, Any] = {}
    for way, count in ways.items():
        seconds, ratios = store.times(way)
        row = judged(store.pictures(way, count), control[:count], wanted[:count], truth)
        about = {"kind": way.kind, "steps": way.steps, "prompts": count}
        rows[way.name] = {**about, "seconds": seconds, "ratios": ratios, **row}
    for name, row in rows.items():
        row["binding_points_lost"] = lost(rows, name)
    for row in rows.values():
        del row["bound"], row["things"]
        for of in LIKENESS:
            row[of] = row[of] if np.isfinite(row[of]) else None
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {str(cell): cell for cell in CELLS}
    parser.add_argument("--cells", nargs="+", metavar="CELL", default=list(names), help=f"of: {'; '.join(names)}")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of stock, presets, fewer steps and DeepCache")
    parser.add_argument("--others", type=int, default=OTHERS, help="prompts of the other ways, if these are fewer")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timing; 0 for none")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="these beside stock, by name or kind; default: all")
    parser.add_argument("--pictures-only", action="store_true", help="fill the cache with pictures, and end")
    parser.add_argument("--times-only", action="store_true", help="fill the cache with seconds, and end")
    parser.add_argument("--model", type=Path, default=FOLDER, help="another export of bench/train_shapes.py")
    parser.add_argument("--out", type=Path, default=Path("out/fidelity"))
    parser.add_argument("--cache", type=Path, default=Path("out/fidelity"))
    arguments = parser.parse_args()
    unknown = set(arguments.cells) - set(names)
    if unknown:
        parser.error(f"--cells must name cells of the table, got {'; '.join(sorted(unknown))}")
    for name in ("prompts", "others"):
        if getattr(arguments, name) < 5:
            least = "at least 5, the first with one, two and three things"
            parser.error(f"--{name} must be {least}, got {getattr(arguments, name)}")
    if arguments.pictures_only and arguments.times_only:
        parser.error("--pictures-only and --times-only exclude each other")
    arguments.cells = [names[name] for name in arguments.cells]
    return arguments


def fill(
    pipe: Any, cell: Cell, arguments: argparse.Namespace, version: str, machine: str
) -> tuple[Store, dict[Way, int]]:
    """Make what lacks of a cell, as far as the arguments ask for it; returns its ways with their numbers of prompts."""
    config = pipe.scheduler.config
    pipe.scheduler = cell.make_scheduler(config)
    ways = list_ways(cell, config)
    if arguments.only:
        ways = choose_ways(ways, arguments.only)
    store = Store(arguments.cache / version / str(cell), {way.name: describe(way, pipe) for way in ways}, machine)
    most, few = arguments.prompts, min(arguments.prompts, arguments.others)
    counts = {way: most if way.is_promised else few for way in ways}
    wanted = scenes(most)
    if not arguments.times_only:
        for way, count in counts.items():
            store.make_pictures(pipe, way, wanted[:count])
    if not arguments.pictures_only:
        store.make_times(pipe, ways, [scene.caption for scene in wanted], arguments.rounds)
    return store, counts


def main() -> None:
    arguments = parse_arguments()
    pipe = embedded_pipeline(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    version = version_of(arguments.model)
    setting = {
        "model": name_model(arguments.model),
        "prompts": arguments.prompts,
        "batch": BATCH,  # of presets and plans one
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
    }
    machine = f"{setting['device']}, {setting['threads']} threads, torch {setting['torch']}"
    drawn = (draw_scene(np.random.default_rng([SEED, 1, i])) for i in range(1000))
    judging = not (arguments.pictures_only or arguments.times_only)
    truth = np.stack([features(render(scene)) for scene in drawn]) if judging else None
    for cell in arguments.cells:
        pipe.scheduler = own
        store, ways = fill(pipe, cell, arguments, version, machine)
        if judging:
            record = {**setting, "rows": judge_cell(store, ways, truth)}
            write(str(cell), record, arguments.out)


def write(cell: str, record: Mapping[str, Any], out: Path) -> None:
    """Put a cell into fidelity.json, draw it, and print it."""
    file = out / "fidelity.json"
    cells = json.loads(file.read_text())["cells"] if file.is_file() else {}
    cells[cell] = record
    cells = {each: cells.pop(each) for each in map(str, CELLS) if each in cells} | cells
    with write_whole(file) as part:
        part.write_text(json.dumps({"cells": cells}, indent=1) + "\n")
    dominated = find_dominated(record["rows"])
    print(cell)
    for name, row in record["rows"].items():
        share = f"{statistics.median(row['ratios']):.2f}" if row["ratios"] else "not timed"
        verdict = "  beaten by fewer steps" if name in dominated else ""
        alike = ", ".join("same" if row[of] is None else f"{row[of]:.1f}" for of in LIKENESS)
        print(f"{name:28s} {share:>9s}  {alike:>12s} dB  binding {row['all']['binding']:.3f}{verdict}")
    if any(row["ratios"] for row in record["rows"].values()):
        plot_cell(cell, record, out)


if __name__ == "__main__":
    main()
