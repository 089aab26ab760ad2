"""Do things get their own attributes?  The embedded model on prompts of two things, stock and with binding, judged.

    python bench/bench_binding.py --prompts 100 --out bench/results

Every way has the same prompts and seeds.  Writes binding.json, in which ways that were measured before stay, as long as
model, prompts and numbers are the same.  An interrupted run goes on (--cache).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_fidelity import SEED
from drawn.judge import judge, summary
from drawn.shapes import Scene, draw_scene
from drawn.vocabulary import SHIPPED, Vocabulary
from records import name_model, version_of
from tqdm import tqdm

from difffast import SemanticBinding, patched
from difffast.models import embedded_pipeline
from difffast.steering.binding.config import PRESETS
from difffast.tools.binding_demo import EMBEDDED
from difffast.tools.demo import device_name

BATCH = 10
#: Of the losses on the latents alone; from looks at a few prompts, which for syngen are none of these; no search.
STEP_SIZES = {
    "entropy": 0.3,
    "attend-and-excite": 2.0,
    "segregation": 2.0,
    "retention": 2.0,
    "syngen": 4.0,
    "divide-and-bind": 2.0,
}
CONTROL = "stock"
#: Of a verdict, what is compared.
KINDS = ("binding", "full_binding", "leakage")


def ways() -> dict[str, SemanticBinding | None]:
    """Presets and what they are made of one by one, with ToMe's numbers and with the model's, and the other losses.

    The other losses are on latents alone.
    """
    none = {"bind_steps": 0, "focus_steps": 0}
    own = EMBEDDED["weights"]
    return {
        CONTROL: None,
        # ToMe's step size for binding makes its loss grow at once, and every such step is taken back.
        **{preset: SemanticBinding(preset, bind_step_size=EMBEDDED["bind_step_size"]) for preset in PRESETS},
        "composite tokens alone": SemanticBinding("attribute", **none),
        **{f"{preset}, the model's numbers": SemanticBinding(preset, **EMBEDDED) for preset in PRESETS},
        "composite tokens alone, the model's": SemanticBinding("attribute", weights=own, **none),
        "these, end tokens replaced": SemanticBinding("object", weights=own, **none),
        "these, bound, no other loss": SemanticBinding("attribute", **{**EMBEDDED, "focus_steps": 0}),
        **{
            f"{loss} alone, not merged": SemanticBinding(
                "attribute", merge=False, bind_steps=0, optimise="latents", losses={loss: 1}, step_size=step_size
            )
            for loss, step_size in STEP_SIZES.items()
        },
    }


def scenes(count: int, vocabulary: Vocabulary = SHIPPED) -> list[Scene]:
    """Of two things that each have at least two words said of them (colour apart, texture, size or part)."""
    found, number = [], 0
    while len(found) < count:
        scene = draw_scene(np.random.default_rng([SEED, 2, number]), vocabulary=vocabulary, things=2, relation=False)
        number += 1
        if all(thing.texture != "plain" or thing.part for thing in scene.things):
            found.append(scene)
    return found


def marked(scene: Scene) -> str:
    """The caption with its things in square brackets."""
    text = scene.caption
    for thing in scene.things:
        phrase = next(p for p in (thing.phrase(), thing.phrase(size=False)) if p in text)
        article, _, rest = phrase.partition(" ")
        text = text.replace(phrase, f"{article} [{rest}]", 1)
    return text


@dataclass(frozen=True)
class Made:
    """Pictures [n, H, W, 3] of one way, their seconds, and how its optimised steps ended."""

    pictures: np.ndarray
    seconds: list[float]
    outcomes: dict[str, int]


def make(
    pipe: Any, name: str, binding: SemanticBinding | None, prompts: Sequence[str], seed: int, steps: int, cache: Path
) -> Made:
    about = [version_of(), name, str(binding), list(prompts), seed, steps]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    pictures, seconds, outcomes = [], [], Counter()
    for start in tqdm(range(0, len(prompts), BATCH), desc=f"{name}, seed {seed}"):
        file = cache / f"{key}-{start}.npz"
        if not file.is_file():
            begun = time.perf_counter()
            ended: Counter[str] = Counter()
            some = list(prompts[start : start + BATCH])
            options = {
                "num_inference_steps": steps,
                "output_type": "np",
                "generator": [torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(some))],
            }
            if binding is None:
                made = pipe([text.replace("[", "").replace("]", "") for text in some], **options).images
            else:
                with patched(pipe, "exact", binding=binding) as report:
                    made = pipe(some, **options).images
                ended.update(f"{step.kind} {step.outcome}" for step in report.trace.steps)
            np.savez(
                file,
                pictures=(made * 255).round().astype(np.uint8),
                seconds=time.perf_counter() - begun,
                ended=json.dumps(ended),
            )
        stored = np.load(file)
        pictures.append(stored["pictures"])
        seconds.append(float(stored["seconds"]))
        outcomes.update(json.loads(str(stored["ended"])))
    return Made(np.concatenate(pictures), seconds, dict(outcomes))


def gain(control: Sequence[float | None], ours: Sequence[float | None]) -> tuple[float, float, float]:
    """Percentage points gained on the same pictures, where both are known: (value, 95% bootstrap low, high)."""
    difference = np.array([b - a for a, b in zip(control, ours, strict=True) if a is not None and b is not None])
    draws = np.random.default_rng(0).integers(0, len(difference), (2000, len(difference)))
    return 100 * difference.mean(), *(100 * np.quantile(difference[draws].mean(1), (0.025, 0.975)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ways", nargs="*", choices=list(ways()), default=list(ways()))
    parser.add_argument("--out", type=Path, default=Path("out/binding"))
    parser.add_argument("--cache", type=Path, default=Path("out/binding"))
    arguments = parser.parse_args()

    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for folder in (arguments.cache, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    wanted = scenes(arguments.prompts)
    prompts = [marked(scene) for scene in wanted]
    rows: dict[str, Any] = {}
    for name in dict.fromkeys((CONTROL, *arguments.ways)):
        verdicts, seconds, outcomes = [], [], Counter()
        for seed in range(arguments.seeds):
            made = make(pipe, name, ways()[name], prompts, seed, arguments.steps, arguments.cache)
            verdicts += [judge(picture, scene) for picture, scene in zip(made.pictures, wanted, strict=True)]
            seconds += made.seconds
            outcomes.update(made.outcomes)
        row = {**summary(verdicts), "seconds_a_batch": statistics.median(seconds), "outcomes": dict(outcomes)}
        row["each"] = {kind: [getattr(v, kind) for v in verdicts] for kind in KINDS}
        rows[name] = row
        for kind, values in row["each"].items():
            row[f"{kind}_points_gained"] = gain(rows[CONTROL]["each"][kind], values)
        full = "{:+.1f} ({:+.1f} to {:+.1f})".format(*row["full_binding_points_gained"])
        print(
            f"{name:40s} binding {row['binding']:.3f}  with texture and part {row['full_binding']:.3f}, {full} points"
        )
        write(rows, arguments)  # after every way: the later ones take long


def keep_rows(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of two records, the later one's first choice; none of an earlier one that measured others."""
    alike = all(before.get(key) == now[key] for key in ("model", "prompts", "seeds", "steps", "batch", "numbers"))
    rows = {**(before["rows"] if alike else {}), **now["rows"]}
    return {name: rows[name] for name in ways() if name in rows}


def write(rows: dict[str, Any], arguments: argparse.Namespace) -> None:
    record = {
        "model": name_model(),
        "prompts": arguments.prompts,
        "seeds": arguments.seeds,
        "steps": arguments.steps,
        "batch": BATCH,
        "numbers": EMBEDDED,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
        "rows": {name: {key: value for key, value in row.items() if key != "each"} for name, row in rows.items()},
    }
    file = arguments.out / "binding.json"
    if file.is_file():
        record["rows"] = keep_rows(json.loads(file.read_text()), record)
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
