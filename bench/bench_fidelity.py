"""What approximations cost in pictures: the embedded model, stock and with every way to be faster, judged.

    python bench/bench_fidelity.py --prompts 200 --out bench/results
    python bench/bench_fidelity.py --prompts 48 --out out/some --rounds 0 --only "DeepCache 3, branch 1"

Writes fidelity.json, fidelity.png and fidelity.svg.  Fewer stock steps are the honest control: an approximation has to
be better than simply taking fewer steps.  An interrupted run goes on (--cache).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from drawn.judge import judge, summary
from drawn.likeness import distance, features, frechet
from drawn.shapes import Scene, draw_scene, render
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from difffast import CfgReuse, EncoderPropagation, FeatureReuse, patched
from difffast.models import embedded_pipeline
from difffast.models.embedded import CHECKSUMS, FOLDER
from difffast.presets import PRESETS
from difffast.tools.demo import device_name, psnr

#: Scenes of this seed are in no training set.
SEED = 7
STEPS = 50
CONTROL = "stock, 50 steps"
BATCH = 12
ROUNDS = 5


@dataclass(frozen=True)
class Way:
    """A way to make pictures: steps, and what is done to the pipeline."""

    name: str
    kind: str
    steps: int = STEPS
    context: Callable[[Any], Any] = contextlib.nullcontext


def ways() -> list[Way]:
    def every(interval: int) -> Way:
        propagation = EncoderPropagation(key_steps=interval)
        name = f"difffast, a key step every {interval}"
        return Way(name, "difffast, uniform", context=lambda pipe: patched(pipe, propagation=propagation))

    def reuse(interval: int, branch: int = 0, extrapolate: int = 0) -> Way:
        propagation = FeatureReuse(interval, branch, extrapolate=extrapolate)
        name = f"difffast, reuse {interval}, branch {branch}" + ", extrapolated" * bool(extrapolate)
        return Way(name, "difffast, reuse", context=lambda pipe: patched(pipe, propagation=propagation))

    def with_guidance(name: str, **options: Any) -> Way:
        return Way(f"difffast, {name}", "difffast, guidance", context=lambda pipe: patched(pipe, **options))

    def deepcache(interval: int, branch: int) -> Way:
        name = f"DeepCache {interval}, branch {branch}"
        return Way(name, "DeepCache", context=lambda pipe: peers.deepcache(pipe, interval, branch))

    exact = EncoderPropagation(key_steps=1)
    return [
        *(Way(f"stock, {steps} steps", "stock", steps) for steps in (50, 30, 20, 15, 10)),
        *(
            Way(f"difffast {preset}", "difffast", context=lambda pipe, preset=preset: patched(pipe, preset))
            for preset in PRESETS
        ),
        *map(every, (2, 3, 5)),
        *(reuse(3), reuse(5), reuse(3, extrapolate=1), reuse(3, branch=1), reuse(5, branch=1)),
        with_guidance("guidance every 3", propagation=exact, cfg=CfgReuse(3)),
        with_guidance("reuse and guidance, every 3, branch 0", propagation=FeatureReuse(3), cfg=CfgReuse(1)),
        *(deepcache(interval, branch) for branch in (0, 1) for interval in (2, 3, 5)),
        *(
            Way(f"tomesd {r:.0%}", "tomesd", context=lambda pipe, r=r: peers.token_merging(pipe, r))
            for r in (0.25, 0.5)
        ),
    ]


def scenes(count: int) -> list[Scene]:
    """Two fifths of one thing, two fifths of two, a fifth of three."""
    numbers = (1, 2, 1, 2, 3)
    return [draw_scene(np.random.default_rng([SEED, i]), things=numbers[i % 5]) for i in range(count)]


def generate(pipe: Any, way: Way, prompts: Sequence[str], first_seed: int) -> list[Image.Image]:
    with way.context(pipe):
        return pipe(
            list(prompts),
            num_inference_steps=way.steps,
            generator=[torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))],
        ).images


def pictures(pipe: Any, way: Way, wanted: Sequence[Scene], cache: Path) -> np.ndarray:
    """uint8 [scenes, H, W, 3]; prompt i has seed i in every way."""
    file = cache / f"{hashlib.sha256(way.name.encode()).hexdigest()[:16]}-{len(wanted)}.npy"
    if not file.is_file():
        made: list[Image.Image] = []
        for start in tqdm(range(0, len(wanted), BATCH), desc=way.name):
            prompts = [scene.caption for scene in wanted[start : start + BATCH]]
            made += generate(pipe, way, prompts, start)
        np.save(file, np.stack([np.asarray(image) for image in made]))
    return np.load(file)


def latencies(pipe: Any, everyone: Sequence[Way], prompt: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a whole call for one picture, all ways in turn; none without rounds."""
    seconds: dict[str, list[float]] = {way.name: [] for way in everyone}
    for turn in tqdm(range(rounds + 1) if rounds else (), desc="seconds"):
        for way in everyone:
            start = time.perf_counter()
            generate(pipe, way, [prompt], 0)
            if turn:  # the first warms up
                seconds[way.name].append(time.perf_counter() - start)
    return seconds


def judged(made: np.ndarray, control: np.ndarray, wanted: Sequence[Scene], truth: np.ndarray) -> dict[str, Any]:
    """Fidelity of one way's pictures; ``control`` are stock's, ``truth`` features [n, d] of drawn scenes."""
    verdicts = [judge(image, scene) for image, scene in zip(made, wanted, strict=True)]
    pairs = list(zip(made, control, strict=True))
    by_things = {count: [v for v in verdicts if v.things == count] for count in (1, 2, 3)}
    return {
        "all": summary(verdicts),
        **{f"{count} things": summary(some) for count, some in by_things.items()},
        "psnr_db": statistics.median(psnr(Image.fromarray(a), Image.fromarray(b)) for a, b in pairs),
        "distance": statistics.mean(distance(a, b) for a, b in pairs),
        "frechet": frechet(np.stack([features(image) for image in made]), truth),
        "bound": [v.binding * v.things for v in verdicts],
        "things": [v.things for v in verdicts],
    }


def lost(rows: dict[str, Any], name: str) -> tuple[float, float, float]:
    """Points of binding accuracy lost against the control on the same prompts: (value, 95% bootstrap low, high)."""
    things = np.array(rows[CONTROL]["things"])
    difference = np.array(rows[CONTROL]["bound"]) - np.array(rows[name]["bound"])
    draws = np.random.default_rng(0).integers(0, len(things), (2000, len(things)))
    spread = 100 * difference[draws].sum(1) / things[draws].sum(1)
    return 100 * difference.sum() / things.sum(), *np.quantile(spread, (0.025, 0.975))


def draw(record: dict[str, Any], out: Path) -> None:
    """Seconds against binding accuracy and against likeness to stock, one point a way."""
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    axes = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(row["kind"] for row in record["rows"].values()))
    for number, (name, row) in enumerate(record["rows"].items(), 1):
        seconds = statistics.median(row["seconds"])
        style = {"color": f"C{kinds.index(row['kind'])}", "marker": "o", "linestyle": "none"}
        for axis, value in zip(axes, (100 * row["all"]["binding"], row["psnr_db"]), strict=True):
            axis.plot([], [], **style, label=f"{number}  {name}")
            if value is not None:
                axis.plot(seconds, value, **style, markersize=11)
                # Names would lie on top of each other.
                axis.annotate(str(number), (seconds, value), ha="center", va="center", fontsize=7, color="white")
    axes[0].set(ylabel="things in their own colour, %")
    axes[1].set(ylabel=f"median PSNR against {CONTROL}, dB")
    for axis in axes:
        axis.set(xlabel="seconds for one picture", xlim=(0, None))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{record['model']}, {record['prompts']} prompts, {record['device']}")
    for kind in ("png", "svg"):
        figure.savefig(out / f"fidelity.{kind}", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--model", type=Path, default=FOLDER, help="another export of bench/train_shapes.py")
    parser.add_argument("--out", type=Path, default=Path("out/fidelity"))
    parser.add_argument("--cache", type=Path, default=Path("out/fidelity"))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timing; 0 where others use the machine")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="these beside stock, by name; default: all")
    arguments = parser.parse_args()

    pipe = embedded_pipeline(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    version = hashlib.sha256((arguments.model / CHECKSUMS).read_bytes()).hexdigest()[:12]
    cache = arguments.cache / version
    for folder in (cache, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    wanted, everyone = scenes(arguments.prompts), ways()
    if arguments.only:
        unknown = set(arguments.only) - {way.name for way in everyone}
        if unknown:
            parser.error(f"--only must name ways of ways(), got {', '.join(sorted(unknown))}")
        everyone = [way for way in everyone if way.name in (CONTROL, *arguments.only)]
    seconds = latencies(pipe, everyone, wanted[0].caption, arguments.rounds)
    drawn = (draw_scene(np.random.default_rng([SEED, 1, i])) for i in range(1000))
    truth = np.stack([features(render(scene)) for scene in drawn])

    made = {way.name: pictures(pipe, way, wanted, cache) for way in everyone}
    rows = {
        way.name: {
            "kind": way.kind,
            "seconds": seconds[way.name],
            **judged(made[way.name], made[CONTROL], wanted, truth),
        }
        for way in everyone
    }
    for name, row in rows.items():
        row["binding_points_lost"] = lost(rows, name)
    for row in rows.values():
        del row["bound"], row["things"]
        row["psnr_db"] = row["psnr_db"] if np.isfinite(row["psnr_db"]) else None
    record = {
        "model": f"the embedded model ({version})",
        "prompts": len(wanted),
        "batch": BATCH,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
        "rows": rows,
    }
    (arguments.out / "fidelity.json").write_text(json.dumps(record, indent=1) + "\n")
    if arguments.rounds:
        draw(record, arguments.out)
    for name, row in rows.items():
        middle = statistics.median(row["seconds"] or [float("nan")])
        print(f"{name:32s} {middle:6.2f} s  binding {row['all']['binding']:.3f}  PSNR {row['psnr_db']}")


if __name__ == "__main__":
    main()
