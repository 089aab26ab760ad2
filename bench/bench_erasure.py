"""Concept erasure: what a training step costs, what is erased, and how soon it is relearned.

    python bench/bench_erasure.py cost --out bench/results
    python bench/bench_erasure.py cost --out bench/results --part 4 --ways meta
    python bench/bench_erasure.py experiment --out bench/results

"cost" writes erasure_cost.json: FLOPs of a step from the calls that were really made, and the processor's seconds of
the same steps in turn; runs of other sizes stay in the file.  FLOPs of one call are counted by FlopCounterMode, on the
small pipeline that is timed, and on SD 1.5 at full size (meta device).

"experiment", on the embedded model, writes erasure.json and erasure.png: red is erased in closed form, then trained
further without and with a trap, and each is attacked.  A run that is interrupted goes on: training from its last
checkpoint, and kinds whose report is there with the same settings are done.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from drawn.vocabulary import SHIPPED
from erasure_costs import WAYS, Small, measure_costs
from erasure_questions import OTHERS, PRESERVED, TARGET, Questions, pairs, phrase, scenes
from records import name_model

import difffast
from difffast.erase.closed_form import Uce
from difffast.erase.meta import BALANCED, PUBLISHED
from difffast.erase.report import EraseReport, Relearned, Shown, mark_steps
from difffast.files import write_whole
from difffast.models import embedded_pipeline
from difffast.plots import new_figure, save_figure
from difffast.tools.demo import device_name

#: Of the attack, and of the trap's own.
ATTACK_RATE = 3e-5


@dataclass(frozen=True)
class Kind:
    """One way to erase red.

    Attributes:
        orange: whether orange is put in its place, and pairs of things are preserved; else nothing, and single things.
        trained: whether steps of ESD follow on the closed form.
        gammas: of a trap against relearning; None: there is none.
    """

    orange: bool
    trained: bool = False
    gammas: tuple[float, ...] | None = None


KINDS = {
    "UCE": Kind(orange=False),
    "UCE, orange instead": Kind(orange=True),
    "orange, ESD": Kind(orange=True, trained=True),
    "orange, ESD, trap": Kind(orange=True, trained=True, gammas=BALANCED),
    "UCE, ESD": Kind(orange=False, trained=True),
    "UCE, ESD, published trap": Kind(orange=False, trained=True, gammas=PUBLISHED),
}


def machine_now() -> dict[str, Any]:
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
    }


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


def attacks(steps: tuple[int, ...], rate: float) -> dict[str, difffast.Relearning]:
    examples = pairs(scenes(30, 30, 1, red=True))
    full = difffast.Relearning(examples, steps, rate)
    return {"full": full, "LoRA": replace(full, lora_rank=8, learning_rate=10 * rate)}


def erase_red(pipe: Any, *, orange: bool) -> difffast.Erasure:
    """Erase red by nothing in its place, with single things preserved; or by orange, with pairs of things as well.

    The second one's numbers were chosen out of 17 by how far keys and values of prompts move.
    """
    others = [phrase(colour, shape) for colour in OTHERS for shape in SHIPPED.shapes]
    if not orange:
        return difffast.erase(pipe, TARGET, preserve=others)
    guide = [phrase("orange", shape) for shape in SHIPPED.shapes]
    return difffast.erase(pipe, TARGET, guide=guide, preserve=[*others, *PRESERVED], method=Uce(erase_scale=10.0))


def prepare(kind: Kind, steps: int, rate: float, folder: Path) -> tuple[Any, Any]:
    """-> a pipeline and what was done to it: in closed form; and with ESD steps after it, checkpoints in a folder."""
    pipe = quiet()
    edit = erase_red(pipe, orange=kind.orange)
    if not kind.trained:
        return pipe, edit
    options = {"pool": 10, "learning_rate": rate, "weight_decay": 1e-4, "clip": 1.0, "seed": 1}
    trainer = difffast.EraseTrainer(pipe, TARGET, params="full", folder=folder, save_every=5, keep=1, **options)
    if kind.gammas is not None:
        sets = (scenes(4, 40, 1, red=True), scenes(2, 41, 1, red=False), scenes(2, 42, 2, red=False))
        trainer.attach(
            difffast.MetaTrap(*map(pairs, sets), gammas=kind.gammas, batch_size=2, learning_rate=ATTACK_RATE)
        )
    trainer.train(steps, resume="latest", progress=False)
    return pipe, Both(edit, trainer)


def settle(kind: Kind, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a report depends on; those of trained weights judge half as many pictures beside the target's."""
    share = 2 if kind.trained else 1
    settings = {name: getattr(arguments, name) for name in ("pictures", "denoise", "attack")}
    settings |= {"neighbours": arguments.neighbours // share, "binding": arguments.binding // share}
    trained = {"steps": arguments.steps, "rate": arguments.rate, "gammas": kind.gammas and list(kind.gammas)}
    return {"attack_rate": ATTACK_RATE, **settings, **(trained if kind.trained else {})}


def experiment(arguments: argparse.Namespace) -> None:
    path = arguments.out / "erasure.json"
    record = {"model": name_model(), "erased": TARGET, **machine_now(), "reports": {}}
    if path.is_file():
        record["reports"] = json.loads(path.read_text())["reports"]
    for name in arguments.kinds:
        kind = KINDS[name]
        settings = settle(kind, arguments)
        if record["reports"].get(name, {}).get("settings") == settings:
            print(f"{name}: there", flush=True)
            continue
        used = time.process_time()
        folder = arguments.checkpoints / name.replace(", ", "-").replace(" ", "-")
        pipe, edit = prepare(kind, arguments.steps, arguments.rate, folder)
        trained = time.process_time() - used
        questions = Questions(settings["neighbours"], settings["binding"])
        report = difffast.erase_report(
            pipe,
            edit,
            questions.judge,
            questions.prompts,
            attacks=attacks(tuple(settings["attack"]), ATTACK_RATE),
            pictures=settings["pictures"],
            steps=settings["denoise"],
        )
        record["reports"][name] = {"settings": settings, **asdict(report)}
        print(
            f"{name}: {trained:.0f} s of the processor, {time.process_time() - used:.0f} in all\n{report}", flush=True
        )
        record["reports"] = {each: record["reports"][each] for each in KINDS if each in record["reports"]}
        with write_whole(path) as whole:
            whole.write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        draw(record, arguments.out / "erasure.png")


def cost(arguments: argparse.Namespace) -> None:
    path = arguments.out / "erasure_cost.json"
    names = [name for name in WAYS if name.startswith(tuple(arguments.ways))]
    run = measure_costs(Small(arguments.part, arguments.pixels), arguments.rounds, names)
    runs = json.loads(path.read_text())["runs"] if path.is_file() else []
    others = [each for each in runs if (each["part"], each["pixels"]) != (run["part"], run["pixels"])]
    record = {**machine_now(), "runs": sorted([*others, run], key=lambda each: (each["pixels"], -each["part"]))}
    with write_whole(path) as whole:
        whole.write_text(json.dumps(record, indent=1) + "\n")
    for name, row in run["rows"].items():
        print(f"{name:24s} {statistics.mean(row['seconds']):.2f} s, {row['times']:.2f}x; FLOPs {row['times_flop']}")


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
    stock = max(reports.values(), key=lambda report: report.pictures * len(report.rows))
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
        mark_steps(axes, sorted({0, *(each.steps for report in reports.values() for each in report.relearned)}))
        axes.set(title=f"relearning, {attack} finetuning", ylabel="red shown, %", ylim=(-3, 105))
    save_figure(figure, path)


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "experiment", "draw"))
    parser.add_argument("--out", type=Path, default=Path("out/erasure"))
    parser.add_argument("--rounds", type=int, default=3, help="of the costs")
    parser.add_argument("--part", type=int, default=8, help="one over the share of SD 1.5's channels, of the costs")
    parser.add_argument("--pixels", type=int, default=128, help="of a side, of the costs")
    parser.add_argument("--ways", nargs="+", choices=("esd", "meta"), default=("esd", "meta"), help="of the costs")
    parser.add_argument("--steps", type=int, default=40, help="of training, after the closed form")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--checkpoints", type=Path, default=Path("out/erasure"), help="folder of unfinished training")
    parser.add_argument("--rate", type=float, default=3e-5, help="of training")
    parser.add_argument("--attack", type=int, nargs="+", default=[10, 30, 100, 300])
    parser.add_argument("--pictures", type=int, default=4, help="of each prompt")
    parser.add_argument("--neighbours", type=int, default=2, help="prompts of each other colour")
    parser.add_argument("--binding", type=int, default=20, help="prompts of two things")
    parser.add_argument("--denoise", type=int, default=10, help="steps of a picture")
    return parser.parse_args(given)


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.what == "experiment":
        experiment(arguments)
    elif arguments.what == "draw":
        draw(json.loads((arguments.out / "erasure.json").read_text()), arguments.out / "erasure.png")
    else:
        cost(arguments)


if __name__ == "__main__":
    main()
