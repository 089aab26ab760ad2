"""``difffast.erase_report``: what an erasure took, what it left, and how soon it is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..plots import new_figure, save_figure
from .ranges import check_whole
from .relearning import Relearning, prepare_attack, relearn

#: Whether, or how far (0 to 1), a picture shows what its prompt says.
Judge = Callable[[Any, str], float]

_BATCH = 8  # pictures at once


class Switchable(Protocol):
    """An erasure that can be taken out of its pipeline and put back, such as ``Erasure`` and ``EraseTrainer``."""

    def enable(self) -> None: ...

    def disable(self) -> None: ...


@dataclass(frozen=True)
class Shown:
    """How far pictures show what their prompt says, on average: with the stock weights, and with the edited ones."""

    group: str
    prompt: str
    before: float
    after: float


@dataclass(frozen=True)
class Relearned:
    """How far the target is shown after some steps of an attack, on average over its prompts."""

    attack: str
    steps: int
    shown: float


@dataclass(frozen=True)
class EraseReport:
    """What an erasure did.  It prints as a table.

    Attributes:
        rows: one for each prompt.
        relearned: one for each attack and number of steps.
        pictures: how many were judged for each prompt and set of weights.
    """

    rows: tuple[Shown, ...]
    relearned: tuple[Relearned, ...]
    pictures: int

    def share(self, group: str) -> tuple[float, float]:
        """Return the mean of a group before and after.

        Raises:
            ValueError: there is no such group.
        """
        rows = [row for row in self.rows if row.group == group]
        if not rows:
            known = dict.fromkeys(row.group for row in self.rows)
            raise ValueError(f"group must be one of {', '.join(known)}, got {group!r}")
        return sum(row.before for row in rows) / len(rows), sum(row.after for row in rows) / len(rows)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        groups = list(dict.fromkeys(row.group for row in self.rows))
        lines = [f"{'shown, %':24s} {'before':>7s} {'after':>7s}"]
        for group in groups:
            before, after = self.share(group)
            lines.append(f"{group:24s} {100 * before:7.1f} {100 * after:7.1f}")
        for attack in dict.fromkeys(each.attack for each in self.relearned):
            curve = ", ".join(
                f"{each.steps}: {100 * each.shown:.1f}" for each in self.relearned if each.attack == attack
            )
            lines.append(f"target again after steps of {attack}, %: {curve}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw what is shown before and after, and how the target comes back.

        Raises:
            ImportError: matplotlib is missing.
            OSError: the file cannot be written.
        """
        figure = new_figure(figsize=(11, 4))
        bars, curves = figure.subplots(1, 2)
        groups = list(dict.fromkeys(row.group for row in self.rows))
        for offset, name in ((-0.2, "before"), (0.2, "after")):
            shares = [100 * self.share(group)[name == "after"] for group in groups]
            drawn = bars.bar([i + offset for i in range(len(groups))], shares, 0.38, label=name)
            bars.bar_label(drawn, fmt="%.0f", padding=2)
        bars.set_xticks(range(len(groups)), groups)
        bars.set(ylabel="shown, %", ylim=(0, 115), title="what is drawn when it is asked for")
        bars.legend(loc="upper right", ncols=2)
        _draw_curves(curves, self)
        save_figure(figure, path)


def _draw_curves(axes: Any, report: EraseReport) -> None:
    """Draw how the target comes back, one line for each attack."""
    start = report.share("target")[1]
    for attack in dict.fromkeys(each.attack for each in report.relearned):
        points = [(0, start), *((each.steps, each.shown) for each in report.relearned if each.attack == attack)]
        steps, shown = zip(*points, strict=True)
        axes.plot(steps, [100 * value for value in shown], marker="o", label=attack)
    mark_steps(axes, sorted({0, *(each.steps for each in report.relearned)}))
    axes.set(ylabel="target shown, %", ylim=(-3, 105), title="relearning")
    if axes.lines:
        axes.legend()


def mark_steps(axes: Any, steps: Sequence[int]) -> None:
    """Put steps of finetuning on the horizontal axis, 0 among them, the further the wider."""
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()
    axes.set(xlabel="steps of finetuning on the concept")


def erase_report(
    pipe: Any,
    edit: Switchable,
    judge: Judge,
    prompts: Mapping[str, Sequence[str]],
    *,
    attacks: Mapping[str, Relearning] | None = None,
    pictures: int = 4,
    steps: int = 25,
) -> EraseReport:
    """Find out what an erasure took, what it left, and how soon finetuning undoes it.

    Every set of weights draws the same prompts from the same noise.  At the end, and after an error or an
    interruption, the edit is enabled, and the weights are as they were.

    Args:
        pipe: the pipeline, without a progress bar if none is wanted.
        edit: what :func:`difffast.erase` returned, or a trainer.
        judge: called with a picture and its prompt; returns how far, 0 to 1, the picture shows what the prompt says.
            For "binding", how many of its things have their own attributes, is the question to ask.
        prompts: by group.  "target" are those of the erased concept; others, such as "neighbours" and "binding", are to
            stay as they are.
        attacks: by name; each starts from the edited weights.
        pictures: how many for each prompt.
        steps: of denoising.

    Raises:
        ValueError: no group "target", a group without prompts, numbers below 1, or an attack that this pipeline cannot
            be given, such as one on float16 weights; nothing was changed then.
        TypeError: examples of an attack that are no pairs.
    """
    if "target" not in prompts:
        raise ValueError(f"prompts must have a group 'target', got {', '.join(prompts) or 'none'}")
    for group, texts in prompts.items():
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"the prompts of {group!r} must be a list of at least one, got {texts!r}")
    check_whole("pictures", pictures)
    check_whole("steps", steps)

    ready = {name: prepare_attack(pipe, attack) for name, attack in (attacks or {}).items()}

    def look(groups: Mapping[str, Sequence[str]]) -> list[float]:
        return list(_judge_all(pipe, judge, groups, pictures, steps))

    try:
        edit.disable()
        before = look(prompts)
    finally:
        edit.enable()
    after = look(prompts)
    names = ((group, prompt) for group, texts in prompts.items() for prompt in texts)
    rows = tuple(Shown(*name, *shown) for name, *shown in zip(names, before, after, strict=True))
    relearned = []
    for name, attack in ready.items():
        with closing(relearn(pipe, attack)) as reached:
            for step in reached:
                shown = look({"target": prompts["target"]})
                relearned.append(Relearned(name, step, sum(shown) / len(shown)))
    return EraseReport(rows, tuple(relearned), pictures)


def _judge_all(
    pipe: Any, judge: Judge, groups: Mapping[str, Sequence[str]], pictures: int, steps: int
) -> Iterator[float]:
    """Yield the mean verdict of each prompt; the noise of a prompt depends on nothing but its place in its group."""
    wanted = [
        (prompt, 1000 * place + i)
        for texts in groups.values()
        for place, prompt in enumerate(texts)
        for i in range(pictures)
    ]
    verdicts: list[float] = []
    for start in range(0, len(wanted), _BATCH):
        prompts, seeds = zip(*wanted[start : start + _BATCH], strict=True)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipe(list(prompts), num_inference_steps=steps, generator=generators).images
        verdicts += [float(judge(image, prompt)) for image, prompt in zip(images, prompts, strict=True)]
    for start in range(0, len(verdicts), pictures):
        yield sum(verdicts[start : start + pictures]) / pictures
