"""Concept erasure: what a training step costs, what is erased, and how soon it is relearned.

    python bench/bench_erasure.py cost --out bench/results
    python bench/bench_erasure.py experiment --out bench/results

"cost" writes erasure_cost.json: FLOPs of a step from the calls that were really made, and seconds of the same steps in
turn.  FLOPs of one call are counted by FlopCounterMode, on the small pipeline that is timed, and on SD 1.5 at full size
(meta device).  "experiment", on the embedded model, writes erasure.json and erasure.png: red is erased in closed form,
then trained further without and with a trap, and each is attacked.  Every report is written when it is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawn.judge import detect, judge
from drawn.shapes import COLOURS, SHAPES, Scene, draw_scene, render
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import difffast
from difffast.erase.closed_form import Uce
from difffast.erase.denoise import Denoiser
from difffast.erase.examples import Examples, encode_examples
from difffast.erase.meta import BALANCED, PUBLISHED
from difffast.erase.params import Weights, select_parameters
from difffast.erase.report import EraseReport, Relearned, Shown, mark_steps
from difffast.models import embedded_pipeline, unet
from difffast.plots import new_figure, save_figure
from difffast.tools.demo import device_name

RED = "red"
SEED = 3
OTHERS = tuple(colour for colour in COLOURS if colour != RED)
TARGET = tuple(f"a {RED} {shape}" for shape in SHAPES)


def phrase(colour: str, shape: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def scenes(count: int, seed: int, things: int, *, red: bool) -> list[Scene]:
    """Scenes with a red thing, or without one."""
    found, number = [], 0
    while len(found) < count:
        scene = draw_scene(np.random.default_rng([seed, number]), things=things)
        number += 1
        if any(thing.colour == RED for thing in scene.things) == red:
            found.append(scene)
    return found


def pairs(chosen: Sequence[Scene]) -> list[tuple[Any, str]]:
    return [(render(scene), scene.caption) for scene in chosen]


# Costs


class Uncached(Examples):
    """Examples whose pictures and prompts are encoded anew each time."""

    def __init__(self, pipe: Any, given: Sequence[tuple[Any, str]]) -> None:
        super().__init__(**vars(encode_examples(pipe, given)))
        object.__setattr__(self, "again", lambda rows: encode_examples(pipe, [given[row] for row in rows]))

    def take(self, rows: torch.Tensor) -> Examples:
        return self.again(rows.tolist())


def machine_now() -> dict[str, Any]:
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
    }


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def flops_of_calls(model: nn.Module, side: int, text: int, params: str) -> dict[str, int]:
    """FLOPs of a row of the UNet without gradients, and with those of a set of parameters (both passes)."""
    device = next(model.parameters()).device
    inputs = torch.empty(1, 4, side, side, device=device), torch.zeros(1, device=device)
    embeds = torch.empty(1, 77, text, device=device)
    with torch.no_grad():
        forward = flops(lambda: model(*inputs, embeds).sample)
    weights = Weights(select_parameters(model, params))
    with weights.training(model):
        both = flops(lambda: model(*inputs, embeds).sample.sum().backward())
    return {"forward": forward, "both": both}


def sd15_flops() -> dict[str, int]:
    """FLOPs of calls of Stable Diffusion 1.5 at 512 x 512, on the meta device."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **blocks)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, intermediate_size=3072))
        picture, ids = torch.empty(1, 3, 512, 512), torch.zeros(1, 77, dtype=torch.long)
        with torch.no_grad():
            extra = {
                "picture": flops(lambda: vae.encode(picture).latent_dist.parameters),
                "prompt": flops(lambda: text(ids)[0]),
            }
        return flops_of_calls(unet("sd15", dtype=torch.float32), 64, 768, "full") | extra


def small_sd15() -> Any:
    """A pipeline of Stable Diffusion 1.5's proportions with an eighth of its channels, for pictures of 128 x 128.

    The embedded model's autoencoder is far smaller beside its UNet than those of published models.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    layout = {"block_out_channels": (16, 32, 64, 64), "layers_per_block": 2, "norm_num_groups": 8, "latent_channels": 4}
    pipe = difffast.models.tiny_pipeline(channels=(32,), sample_size=16, text=(96, 12))
    pipe.register_modules(
        vae=AutoencoderKL(**layout, **blocks, sample_size=128).eval(),
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(40, 80, 160, 160),
            norm_num_groups=8,
            cross_attention_dim=96,
            attention_head_dim=8,
        ).eval(),
    )
    pipe.vae_scale_factor = 8
    pipe.image_processor.register_to_config(vae_scale_factor=8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_flops() -> dict[str, int]:
    pipe, ids = small_sd15(), torch.zeros(1, 77, dtype=torch.long)
    with torch.no_grad():
        extra = {
            "picture": flops(lambda: pipe.vae.encode(torch.zeros(1, 3, 128, 128)).latent_dist.parameters),
            "prompt": flops(lambda: pipe.text_encoder(ids)[0]),
        }
    return flops_of_calls(pipe.unet, 16, 96, "full") | extra


class Counted:
    """A trainer whose calls are counted: rows of the UNet in one pass and in two, pictures and prompts encoded.

    Moves are not drawn but taken evenly, so that their mean is that of the draws, however few steps are made.
    """

    def __init__(self, pipe: Any, *, pool: int | None = None, cached: bool | None = None) -> None:
        self.calls: Counter[str] = Counter()
        self._trainer = difffast.EraseTrainer(pipe, TARGET, params="full", pool=pool, learning_rate=1e-8, seed=SEED)
        even = itertools.cycle(range(2, 50, 5))
        moves = (lambda _: [next(even)]) if pool is None else (lambda _: list(range(2, 50, 5)))
        self._trainer._state.points.choose_moves = moves if cached is None else lambda _: [0]
        if cached is not None:
            kind = encode_examples if cached else Uncached
            sets = (scenes(4, 10, 1, red=True), scenes(2, 11, 1, red=False), scenes(2, 12, 2, red=False))
            sets = [kind(pipe, pairs(each)) for each in sets]
            self._trainer.attach(difffast.MetaTrap(*sets, learning_rate=1e-8, compat="published"))
            self._count(pipe.vae, "encode", lambda pixels: {"picture": len(pixels)})
            self._count(pipe, "encode_prompt", lambda **given: {"prompt": len(given["prompt"])})
        denoiser: Denoiser = self._trainer._denoiser
        self._count(denoiser, "predict", lambda z, *_: {"both" if torch.is_grad_enabled() else "forward": len(z)})

    def _count(self, owner: Any, name: str, what: Callable[..., dict[str, int]]) -> None:
        method = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.calls.update(what(*args, **kwargs))
            return method(*args, **kwargs)

        setattr(owner, name, counting)

    def run(self, steps: int) -> float:
        """Make so many steps; returns the seconds of one."""
        start = time.perf_counter()
        self._trainer.train(self._trainer.step + steps, progress=False)
        return (time.perf_counter() - start) / steps

    def per_step(self, each: dict[str, int]) -> float:
        return sum(count * each[name] for name, count in self.calls.items()) / self._trainer.step


def measure_costs(rounds: int) -> dict[str, Any]:
    """Steps of every way in turn.  Each has a pipeline of its own.

    The released loop of meta-unlearning encodes pictures and prompts whenever they are drawn.  Its erasing step is
    measured by itself, and is without a trajectory here.
    """
    # As many steps a round as make whole pools; a pool's first step is dearer than the others.
    esd = {"esd": (Counted(small_sd15()), 10), "esd, pool of 10": (Counted(small_sd15(), pool=10), 10)}
    meta = {
        "meta step, nothing cached": (Counted(small_sd15(), cached=False), 2),
        "meta step": (Counted(small_sd15(), cached=True), 2),
    }
    ways = esd | meta
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (trainer, steps) in ways.items():
            seconds[name].append(trainer.run(steps))
    models = {"small": small_flops(), "sd15": sd15_flops()}
    rows = {}
    for name, (trainer, _) in ways.items():
        control = next(iter(esd if name in esd else meta))
        rows[name] = {
            "control": control,
            "calls": {kind: count / trainer._trainer.step for kind, count in trainer.calls.items()},
            "steps": trainer._trainer.step,
            "tflop": {model: trainer.per_step(each) / 1e12 for model, each in models.items()},
            "seconds": statistics.mean(seconds[name]),
            "times": statistics.mean(seconds[control]) / statistics.mean(seconds[name]),
            "times_flop": {m: ways[control][0].per_step(e) / trainer.per_step(e) for m, e in models.items()},
        }
    return {"rounds": rounds, "flop_of_a_call": models, "rows": rows}


# The experiment


def quiet() -> Any:
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Both:
    """An edit in closed form with training on top."""

    def __init__(self, edit: difffast.Erasure, trainer: difffast.EraseTrainer) -> None:
        self._edit, self._trainer = edit, trainer

    def enable(self) -> None:
        self._edit.enable()
        self._trainer.enable()

    def disable(self) -> None:
        self._trainer.disable()
        self._edit.disable()


class Questions:
    """Prompts by group, and the judge of their pictures."""

    def __init__(self, neighbours: int, binding: int) -> None:
        two = [replace(scene, relation=None) for scene in scenes(binding, 20, 2, red=False)]
        self._scenes = {scene.caption: scene for scene in two}
        places = [(colour, SHAPES[(i + j) % len(SHAPES)]) for i, colour in enumerate(OTHERS) for j in range(neighbours)]
        self._colours = {phrase(*each): each[0] for each in places} | dict.fromkeys(TARGET, RED)
        self.prompts = {
            "target": TARGET,
            "neighbours": tuple(phrase(*each) for each in places),
            "binding": tuple(self._scenes),
        }

    def judge(self, image: Any, prompt: str) -> float:
        """A thing in the colour of the prompt is there; of two things, how many are there in their own."""
        if prompt in self._scenes:
            return judge(image, self._scenes[prompt]).binding
        return float(any(found.colour == self._colours[prompt] for found in detect(image)))


def attacks(steps: tuple[int, ...], rate: float) -> dict[str, difffast.Relearning]:
    examples = pairs(scenes(30, 30, 1, red=True))
    full = difffast.Relearning(examples, steps, rate)
    return {"full": full, "LoRA": replace(full, lora_rank=8, learning_rate=10 * rate)}


def erase_red(pipe: Any, *, orange: bool) -> difffast.Erasure:
    """Erase red by nothing in its place, with single things preserved; or by orange, with pairs of things as well.

    The second one's numbers were chosen out of 17 by how far keys and values of prompts move; binding is judged by some
    of these prompts.
    """
    others = [phrase(colour, shape) for colour in OTHERS for shape in SHAPES]
    if not orange:
        return difffast.erase(pipe, TARGET, preserve=others)
    two = [scene.caption for scene in scenes(60, 91, 2, red=False)]
    guide = [phrase("orange", shape) for shape in SHAPES]
    return difffast.erase(pipe, TARGET, guide=guide, preserve=[*others, *two], method=Uce(erase_scale=10.0))


def prepare(kind: str, steps: int, rate: float) -> tuple[Any, Any]:
    """-> a pipeline and what was done to it: in closed form; and with ESD steps after it."""
    pipe = quiet()
    edit = erase_red(pipe, orange=kind == KINDS[1])
    if kind in KINDS[:2]:
        return pipe, edit
    trainer = difffast.EraseTrainer(
        pipe, TARGET, params="full", pool=10, learning_rate=rate, weight_decay=1e-4, clip=1.0, seed=1
    )
    if kind.endswith("trap"):
        sets = (scenes(4, 40, 1, red=True), scenes(2, 41, 1, red=False), scenes(2, 42, 2, red=False))
        gammas = PUBLISHED if "published" in kind else BALANCED
        trap = difffast.MetaTrap(*map(pairs, sets), gammas=gammas, batch_size=2, learning_rate=ATTACK_RATE)
        trainer.attach(trap)
    trainer.train(steps)
    return pipe, Both(edit, trainer)


KINDS = ("UCE", "UCE, orange instead", "UCE, ESD", "UCE, ESD, published trap", "UCE, ESD, balanced trap")
ATTACK_RATE = 3e-5


def experiment(arguments: argparse.Namespace) -> None:
    path = arguments.out / "erasure.json"
    record = {
        "model": "the embedded model",
        "erased": TARGET,
        **machine_now(),
        **{name: value for name, value in vars(arguments).items() if name not in ("out", "what", "rounds", "kinds")},
        "gammas": {"published": PUBLISHED, "balanced": BALANCED},
        "attack_rate": ATTACK_RATE,
        "reports": {},
    }
    if path.is_file():
        record["reports"] = json.loads(path.read_text())["reports"]
    for kind in arguments.kinds:
        if kind in record["reports"]:
            continue
        start = time.perf_counter()
        pipe, edit = prepare(kind, arguments.steps, arguments.rate)
        trained = time.perf_counter() - start
        share = 1 if kind in KINDS[:2] else 2  # of what the erasure itself is judged by, the others see half
        questions = Questions(arguments.neighbours // share, arguments.binding // share)
        report = difffast.erase_report(
            pipe,
            edit,
            questions.judge,
            questions.prompts,
            attacks=attacks(tuple(arguments.attack), ATTACK_RATE),
            pictures=arguments.pictures,
            steps=arguments.denoise,
        )
        record["reports"][kind] = {"seconds": trained, **asdict(report)}
        print(f"{kind}, {trained:.0f} s, {time.perf_counter() - start:.0f} s in all\n{report}", flush=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    if len(record["reports"]) == len(KINDS):
        draw(record, arguments.out / "erasure.png")


def draw(record: dict[str, Any], path: Path) -> None:
    """What is drawn when it is asked for, and how red comes back, of every kind."""
    reports = {
        kind: EraseReport(
            tuple(Shown(**row) for row in each["rows"]),
            tuple(Relearned(**row) for row in each["relearned"]),
            each["pictures"],
        )
        for kind, each in record["reports"].items()
    }
    figure = new_figure(figsize=(15, 4.4))
    bars, *curves = figure.subplots(1, 3)
    groups = ("target", "neighbours", "binding")
    stock = next(iter(reports.values()))
    ways = {"stock": [stock.share(group)[0] for group in groups]}
    ways |= {kind: [report.share(group)[1] for group in groups] for kind, report in reports.items()}
    for number, (name, shares) in enumerate(ways.items()):
        width = 0.85 / len(ways)
        places = [i + width * (number - (len(ways) - 1) / 2) for i in range(len(groups))]
        drawn = bars.bar(places, [100 * share for share in shares], 0.95 * width, label=name)
        bars.bar_label(drawn, fmt="%.0f", padding=2, fontsize=8)
    bars.set_xticks(range(len(groups)), ("red (erased)", "other colours", "binding"))
    bars.set(ylabel="shown, %", ylim=(0, 140), title="what is drawn when it is asked for")
    bars.legend(loc="upper right", ncols=2, fontsize=8)
    for axes, attack in zip(curves, ("full", "LoRA"), strict=True):
        for number, (kind, report) in enumerate(reports.items(), 1):
            found = [(0, report.share("target")[1])]
            found += [(each.steps, each.shown) for each in report.relearned if each.attack == attack]
            steps, shown = zip(*found, strict=True)
            axes.plot(steps, [100 * value for value in shown], marker="o", color=f"C{number}", label=kind)
        mark_steps(axes, (0, *record["attack"]))
        axes.set(title=f"relearning, {attack} finetuning", ylabel="red shown, %", ylim=(-3, 105))
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "experiment", "draw"))
    parser.add_argument("--out", type=Path, default=Path("out/erasure"))
    parser.add_argument("--rounds", type=int, default=3, help="of the costs")
    parser.add_argument("--steps", type=int, default=40, help="of training, after the closed form")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rate", type=float, default=3e-5, help="of training")
    parser.add_argument("--attack", type=int, nargs="+", default=[10, 30, 100, 300])
    parser.add_argument("--pictures", type=int, default=2, help="of each prompt")
    parser.add_argument("--neighbours", type=int, default=2, help="prompts of each other colour")
    parser.add_argument("--binding", type=int, default=20, help="prompts of two things")
    parser.add_argument("--denoise", type=int, default=10, help="steps of a picture")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.what == "experiment":
        experiment(arguments)
    elif arguments.what == "draw":
        draw(json.loads((arguments.out / "erasure.json").read_text()), arguments.out / "erasure.png")
    else:
        record = {**machine_now(), **measure_costs(arguments.rounds)}
        (arguments.out / "erasure_cost.json").write_text(json.dumps(record, indent=1) + "\n")
        for name, row in record["rows"].items():
            print(f"{name:24s} {row['seconds']:.2f} s, {row['times']:.2f}x; FLOPs {row['times_flop']}")


if __name__ == "__main__":
    main()
