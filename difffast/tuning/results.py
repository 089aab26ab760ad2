"""What tune measured and chose: candidates, their times and errors, as a table and as a plot."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..plan import CfgReuse, EncoderPropagation, Plan, Sharing
from ..plots import new_figure, save_figure
from ..presets import PRESETS
from ..renamed import warn_renamed


@dataclass(frozen=True)
class Candidate:
    """A way to be faster: how work is shared between steps, as ``difffast.patch`` takes it, or fewer of them.

    Attributes:
        propagation, cfg: as of :func:`difffast.patch`.
        steps: denoising steps in place of those that were asked for; None: as many.
        name: short, for tables; empty: made of the others.
    """

    propagation: Sharing
    cfg: CfgReuse | None = None
    steps: int | None = None
    name: str = field(default="", compare=False)

    @property
    def options(self) -> dict[str, Any]:
        """For ``difffast.patch(pipe, **options)``."""
        return {"propagation": self.propagation, "cfg": self.cfg}

    @property
    def label(self) -> str:
        """The same as text, without most of what is at its default."""
        if self.name:
            return self.name
        return ", ".join(_name_choices(config) for config in (self.propagation, self.cfg) if config is not None)

    def __str__(self) -> str:
        text = str(self.propagation) if not isinstance(self.propagation, Plan) else self.propagation.to_json()
        text += f", {self.cfg}" if self.cfg is not None else ""
        return text + (f", {self.steps} steps" if self.steps is not None else "")


def _name_choices(config: Sharing | CfgReuse) -> str:
    """Return a configuration as text: its first field, the branch, and what is not at its default."""
    if isinstance(config, Plan):
        return _describe_plan(config)
    first, *others = fields(config)
    chosen = [first, *(each for each in others if each.name == "branch" or getattr(config, each.name) != each.default)]
    return f"{type(config).__name__}({', '.join(f'{each.name}={getattr(config, each.name)!r}' for each in chosen)})"


def _describe_plan(plan: Plan) -> str:
    """Return how many steps of a plan run what, as in "a plan: 18 full, 2 half, 5 forecast"."""
    counts = Counter(
        "forecast"
        if row.forecast
        else "half"
        if row.half
        else "full"
        if row.key
        else "outer"
        if row.reuse
        else "decoder"
        for row in plan.steps()
    )
    kinds = ("full", "half", "outer", "decoder", "forecast")
    return "a plan: " + ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind])


#: Everything at every step: what is chosen where nothing else is inside the budget.
EXACT = Candidate(EncoderPropagation(key_steps=1), name="exact")

#: metric -> whether more of it is better.
METRICS = {"psnr_db": True, "latent_error": False}

#: PSNR from which pictures are the same: the error is below a tenth of one of 255 levels.
_SAME_DB = 70.0


@dataclass(frozen=True)
class Measured:
    """One candidate, measured against stock with the same seeds.

    Attributes:
        candidate: which.
        seconds: of a whole call, per prompt the least of its repeats.
        psnr_db: of the pictures, per prompt; infinite where they are the same.
        latent_error: norm of the final latents' difference over the norm of stock's, per prompt.
    """

    candidate: Candidate
    seconds: tuple[float, ...]
    psnr_db: tuple[float, ...]
    latent_error: tuple[float, ...]

    def median(self, name: str) -> float:
        """Median over the prompts of "seconds", "psnr_db" or "latent_error"."""
        return statistics.median(getattr(self, name))

    def worst(self, name: str) -> float:
        """10th percentile over the prompts of "psnr_db", or 90th of "latent_error"."""
        values = sorted(getattr(self, name), reverse=not METRICS[name])
        return _interpolate(values, 0.1 * (len(values) - 1))

    def inside(self, metric: str, budget: float, worst: float | None = None) -> bool:
        """Return whether the median error is no worse than the budget, and the tail's no worse than its own."""
        more = METRICS[metric]
        found = [(self.median(metric), budget), *([(self.worst(metric), worst)] if worst is not None else [])]
        return all(value >= allowed if more else value <= allowed for value, allowed in found)


def _interpolate(values: Sequence[float], at: float) -> float:
    """Return a value between two neighbours of a sorted sequence, infinite ones included."""
    low, high = values[math.floor(at)], values[math.ceil(at)]
    return low if low == high else low + (at - math.floor(at)) * (high - low)


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune` measured and chose; prints as a table.

    Attributes:
        candidate: the fastest one inside the budget, for ``difffast.patch(pipe, **tuning.options)``.
        rows: every candidate, fastest first.
        stock_seconds: of the unpatched pipeline, per prompt.
        metric, budget, steps: as they were asked for.
        worst: the budget of the tail; None: it has none.
    """

    candidate: Candidate
    rows: tuple[Measured, ...]
    stock_seconds: tuple[float, ...]
    metric: str
    budget: float
    steps: int = field(default=0)
    worst: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """For ``difffast.patch(pipe, **options)``."""
        return self.candidate.options

    @property
    def front(self) -> tuple[Measured, ...]:
        """Candidates that no other beats in both time and error."""
        best, found = -math.inf, []
        for row in self.rows:
            value = row.median(self.metric) if METRICS[self.metric] else -row.median(self.metric)
            if value > best:
                best = value
                found.append(row)
        return tuple(found)

    def __str__(self) -> str:
        stock = statistics.median(self.stock_seconds)
        lines = [f"{'seconds':>8} {'of stock':>8} {'PSNR, dB':>9} {'10th pc.':>9} {'latents':>8}  front  candidate"]
        for row in self.rows:
            mark = "chosen" if row.candidate == self.candidate else "*" if row in self.front else ""
            lines.append(
                f"{row.median('seconds'):8.2f} {row.median('seconds') / stock:8.2f} {row.median('psnr_db'):9.1f} "
                f"{row.worst('psnr_db'):9.1f} {row.median('latent_error'):8.4f}  {mark:6} {row.candidate.label}"
            )
        direction = "at least" if METRICS[self.metric] else "at most"
        tail = f", tail {direction} {self.worst:g}" if self.worst is not None else ""
        lines.append(
            f"stock: {stock:.2f} s; budget: {self.metric} {direction} {self.budget:g}{tail}; {self.steps} steps"
        )
        return "\n".join([*lines, *self.advice()])

    def advice(self) -> Iterator[str]:
        """Yield what a user should know before taking the candidate."""
        if self.candidate.steps is not None:
            yield f"fewer steps are better here: call with num_inference_steps={self.candidate.steps}"
        if self.candidate == EXACT:
            yield "nothing that approximates is inside the budget"
        best = {row.candidate.name: row for row in self.rows}
        chosen = next((row for row in self.rows if row.candidate == self.candidate), None)
        for name in PRESETS if chosen is not None and isinstance(self.candidate.propagation, Plan) else ():
            shipped = best.get(name)
            good = shipped is not None and shipped.inside(self.metric, self.budget, self.worst)
            if name != "exact" and good and shipped in self.front:
                yield f"the preset {name!r} is as good a choice: no plan that was found beats it in both time and error"

    def picture(self, path: str | Path) -> None:
        """Do what :meth:`plot` does, under its old name."""
        warn_renamed("Choice.picture", "Tuning.plot")
        self.plot(path)

    def plot(self, path: str | Path) -> None:
        """Draw seconds against error, the front as a line, as PNG or SVG.

        Candidates whose pictures are the same as stock's stand at the upper edge: their PSNR, 100 dB or more, is that
        of rounding, and would leave the others no room.

        Raises:
            ImportError: matplotlib is missing.
        """
        figure = new_figure(figsize=(9, 6))
        axis = figure.subplots()
        errors = [row.median(self.metric) for row in self.rows]
        shown = [each for each in (*errors, self.budget) if self.metric != "psnr_db" or each < _SAME_DB] or [_SAME_DB]
        room = 0.08 * (max(shown) - min(shown)) or 1.0
        top = max(shown) + 2 * room
        places = [(row.median("seconds"), min(error, top)) for row, error in zip(self.rows, errors, strict=True)]
        axis.plot(*zip(*(places[self.rows.index(row)] for row in self.front), strict=True), color="C0", zorder=1)
        fewer = [place for row, place in zip(self.rows, places, strict=True) if row.candidate.steps is not None]
        if fewer:
            axis.plot(*zip(*fewer, strict=True), color="gray", zorder=1, label="exact, fewer steps")
        for number, (row, error, place) in enumerate(zip(self.rows, errors, places, strict=True), 1):
            colour = "C1" if row.candidate == self.candidate else "C0"
            style = {"marker": "^" if error > top else "o", "linestyle": "none", "color": colour, "markersize": 11}
            axis.plot(*place, **style, clip_on=False, label=f"{number}  {row.candidate.label}")
            if error > top:
                said = f"{number}: {error:.0f} dB" if math.isfinite(error) else f"{number}: same"
                axis.annotate(said, place, xytext=(0, -16), textcoords="offset points", ha="center", fontsize=8)
            else:
                axis.annotate(str(number), place, ha="center", va="center", fontsize=7, color="white")
        axis.axhline(self.budget, color="gray", linestyle="dashed", label=f"budget: {self.budget:g}")
        axis.axvline(statistics.median(self.stock_seconds), color="gray", linestyle="dotted", label="stock")
        axis.set(xlabel="seconds for one call", ylabel=self.metric, xlim=(0, None), ylim=(min(shown) - room, top))
        axis.grid(alpha=0.3)
        figure.legend(loc="outside lower center", fontsize=8, ncols=2)
        save_figure(figure, path)
