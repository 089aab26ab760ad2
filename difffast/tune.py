"""tune: which way of sharing features is the fastest for a pipeline within a budget of error, by measuring it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from .patch import patched
from .plan import CfgReuse, EncoderPropagation, FeatureReuse, Sharing
from .plots import new_figure, save_figure
from .renamed import warn_renamed
from .target import Target
from .tune_cache import Measurements, identify
from .tune_runs import check_call, compare, hide_progress, run_once
from .unet.parts import count_skips

if TYPE_CHECKING:
    from .support import Pipeline


@dataclass(frozen=True)
class Candidate:
    """A way to share work between steps, as ``difffast.patch`` takes it."""

    propagation: Sharing
    cfg: CfgReuse | None = None

    @property
    def options(self) -> dict[str, Any]:
        """For ``difffast.patch(pipe, **options)``."""
        return {"propagation": self.propagation, "cfg": self.cfg}

    @property
    def label(self) -> str:
        """The same as text, without most of what is at its default."""
        return ", ".join(_name_choices(config) for config in (self.propagation, self.cfg) if config is not None)

    def __str__(self) -> str:
        return str(self.propagation) + (f", {self.cfg}" if self.cfg is not None else "")


def _name_choices(config: Sharing | CfgReuse) -> str:
    """Return a configuration as text: its first field, the branch, and what is not at its default."""
    first, *others = fields(config)
    chosen = [first, *(each for each in others if each.name == "branch" or getattr(config, each.name) != each.default)]
    return f"{type(config).__name__}({', '.join(f'{each.name}={getattr(config, each.name)!r}' for each in chosen)})"


#: Everything at every step: what is chosen where nothing else is inside the budget.
EXACT = Candidate(EncoderPropagation(key_steps=1))

CANDIDATES: tuple[Candidate, ...] = (
    EXACT,
    *(Candidate(FeatureReuse(interval)) for interval in (2, 3, 4, 5, 7)),
    *(Candidate(FeatureReuse(interval, branch=1)) for interval in (2, 3, 5)),
    *(Candidate(FeatureReuse(interval), CfgReuse(both)) for interval, both in ((2, 2), (3, 3), (3, 6), (4, 8))),
    Candidate(FeatureReuse(3, branch=1), CfgReuse(3)),
    *(Candidate(EncoderPropagation(key_steps=interval)) for interval in (2, 3, 5)),
    Candidate(EncoderPropagation()),
)

PROMPTS = ("a red circle and a blue square", "a photo of a cat on a green field")

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

    def inside(self, metric: str, budget: float) -> bool:
        """Whether the median error is no worse than the budget."""
        return self.median(metric) >= budget if METRICS[metric] else self.median(metric) <= budget


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune` measured and chose; prints as a table.

    Attributes:
        candidate: the fastest one inside the budget, for ``difffast.patch(pipe, **tuning.options)``.
        rows: every candidate, fastest first.
        stock_seconds: of the unpatched pipeline, per prompt.
    """

    candidate: Candidate
    rows: tuple[Measured, ...]
    stock_seconds: tuple[float, ...]
    metric: str
    budget: float
    steps: int = field(default=0)

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
        lines = [f"{'seconds':>8} {'of stock':>8} {'PSNR, dB':>9} {'latents':>8}  front  candidate"]
        for row in self.rows:
            mark = "chosen" if row.candidate == self.candidate else "*" if row in self.front else ""
            lines.append(
                f"{row.median('seconds'):8.2f} {row.median('seconds') / stock:8.2f} {row.median('psnr_db'):9.1f} "
                f"{row.median('latent_error'):8.4f}  {mark:6} {row.candidate.label}"
            )
        direction = "at least" if METRICS[self.metric] else "at most"
        lines.append(f"stock: {stock:.2f} s; budget: {self.metric} {direction} {self.budget:g}; {self.steps} steps")
        return "\n".join(lines)

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


def tune(
    pipe: Pipeline,
    steps: int,
    *,
    budget: float = 30.0,
    metric: str = "psnr_db",
    prompts: Sequence[str] = PROMPTS,
    candidates: Sequence[Candidate | Sharing] | None = None,
    repeats: int = 2,
    cache: str | Path | None = None,
    **call: Any,
) -> Tuning:
    """Find the fastest way for this pipeline to share features between steps, within a budget of error against stock.

    Stock and every candidate make a picture of every prompt, from the same seeds and in turn.

    Args:
        pipe: a pipeline that :func:`difffast.patch` takes; it is left as it was.
        steps: denoising steps.
        budget: the worst error that is accepted, as the median over the prompts: the least PSNR in dB, or the largest
            latent error.
        metric: which error it is, "psnr_db" or "latent_error".
        prompts: the prompts to measure with.
        candidates: the ways to choose from; running every step in full is always one of them.  None: those of
            ``CANDIDATES`` with which the pipeline can be patched.
        repeats: how often each candidate is timed on each prompt; take more on a noisy machine.
        cache: a JSON file that keeps the measurements, so that an interrupted or a later call goes on from them.
            Several processes may share it.  None keeps nothing.
        call: further arguments of the pipeline's call, such as ``guidance_scale``, ``height`` and ``width``.

    Raises:
        TypeError: ``pipe`` is no pipeline, its call has no such argument, or it lacks one that it needs.
        ValueError: an unknown metric, no prompts, a pipeline that cannot be patched, or a cache that holds something
            else.
        OSError: the cache cannot be written.
    """
    _check(metric, prompts, repeats)
    target = Target.of(pipe)
    check_call(pipe, call)
    if candidates is None:
        candidates = [candidate for candidate in CANDIDATES if _fits(target, candidate)]
    candidates = [each if isinstance(each, Candidate) else Candidate(each) for each in candidates]
    candidates = list(dict.fromkeys([EXACT, *candidates]))
    kept = Measurements(cache, identify(pipe, steps, call))
    with hide_progress(pipe), tqdm(total=len(prompts) * repeats * (1 + len(candidates)), desc="tune") as progress:
        for seed, prompt in enumerate(prompts):
            expected = None
            for repeat in range(repeats):
                missing = [each for each in candidates if kept.count(str(each), prompt) <= repeat]
                progress.update(len(candidates) - len(missing))
                if (missing and expected is None) or kept.count("stock", prompt) <= repeat:
                    with patched(pipe, **EXACT.options, fused=False):
                        if not seed and not repeat:
                            run_once(pipe, prompt, seed, steps, call)  # warms up
                        seconds, expected = run_once(pipe, prompt, seed, steps, call)
                    kept.add("stock", prompt, seconds)
                progress.update()
                for candidate in missing:
                    with patched(pipe, **candidate.options):
                        seconds, latents = run_once(pipe, prompt, seed, steps, call)
                    kept.add(str(candidate), prompt, seconds, **compare(pipe, latents, expected))
                    progress.update()
    rows = [
        Measured(candidate, *(kept.column(str(candidate), prompts, name) for name in _COLUMNS))
        for candidate in candidates
    ]
    rows.sort(key=lambda row: row.median("seconds"))
    chosen = next((row.candidate for row in rows if row.inside(metric, budget)), EXACT)
    return Tuning(chosen, tuple(rows), kept.column("stock", prompts, "seconds"), metric, budget, steps)


_COLUMNS = ("seconds", "psnr_db", "latent_error")


def _check(metric: str, prompts: Sequence[str], repeats: int) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a sequence of strings, got the string {prompts!r}: [{prompts!r}]?")
    if not prompts:
        raise ValueError("prompts must not be empty")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")


def _fits(target: Target, candidate: Candidate) -> bool:
    """Return whether a target can be patched with a candidate."""
    if target.support.exact_only:
        return False
    reuses = isinstance(candidate.propagation, FeatureReuse)
    if reuses and (not target.support.reuse or candidate.propagation.branch >= count_skips(target.unet)):
        return False
    return candidate.cfg is None or not target.refuse_cfg_reuse()
