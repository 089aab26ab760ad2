"""tune: which way of sharing features is the fastest for a pipeline within a budget of error, by measuring it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from .patch import patched
from .plan import Sharing
from .presets import PRESETS
from .target import Target
from .tuning.cache import Measurements, identify
from .tuning.costs import Profiles
from .tuning.results import EXACT, METRICS, Candidate, Measured, Tuning
from .tuning.runs import check_call, compare, hide_progress, run_once
from .tuning.search import PlanSearch

if TYPE_CHECKING:
    from .support import Pipeline


PROMPTS = (
    "a red circle and a blue square",
    "a photo of a cat on a green field",
    "a portrait of an old man with a hat, oil painting",
    "a street in the rain at night, neon lights",
)
#: What plans are searched with where fewer prompts than ``_ENOUGH`` are given: they are chosen by others.
SEARCH_PROMPTS = (
    "a green triangle and a yellow ring",
    "a photo of a dog in front of a house",
    "a bowl of fruit on a table",
)
#: Shares of the steps that are tried as fewer steps.
FEWER = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_ENOUGH = 6
#: Most plans of a search that are tried on other prompts.
_TRIED = 8


def tune(
    pipe: Pipeline,
    steps: int,
    *,
    budget: float | Sequence[float] = 30.0,
    metric: str = "psnr_db",
    prompts: Sequence[str] = PROMPTS,
    candidates: Sequence[Candidate | Sharing] | None = None,
    repeats: int = 2,
    cache: str | Path | None = None,
    **call: Any,
) -> Tuning:
    """Find the fastest way for this pipeline to make pictures within a budget of error against stock.

    First, a profile: what it costs, and what it does to the latents, to run each step in another way: not at all (its
    output is forecast), for one half of guidance's batch, in its outer layers, or in its decoder.  Dynamic programming
    finds the plans that should be best.  Then these plans, the presets, and exact runs of fewer steps make a picture of
    every other prompt, beside stock, from the same seeds and in turn.

    Args:
        pipe: a pipeline that :func:`difffast.patch` takes; it is left as it was.
        steps: denoising steps.
        budget: the worst error that is accepted, as the median over the prompts: the least PSNR in dB, or the largest
            latent error.  Of two numbers the second is for the tail: the 10th percentile of PSNR, the 90th of errors.
        metric: which error it is, "psnr_db" or "latent_error".
        prompts: the prompts by which candidates are measured and chosen.  Of six and more, every second one is what
            plans are searched with; for fewer, ``SEARCH_PROMPTS`` are.
        candidates: the ways to choose from, in place of a search; running every step in full is always one of them.
        repeats: how often each candidate is timed on each prompt; take more on a noisy machine.
        cache: a JSON file that keeps the measurements, so that an interrupted or a later call goes on from them.
            Several processes may share it.  None keeps nothing.
        call: further arguments of the pipeline's call, such as ``guidance_scale``, ``height`` and ``width``.

    Raises:
        TypeError: ``pipe`` is no pipeline, its call has no such argument, or it lacks one that it needs.
        ValueError: an unknown metric, no prompts, a budget of more than two numbers, a pipeline that cannot be patched,
            or a cache that holds something else.
        OSError: the cache cannot be written.
    """
    _check(metric, prompts, repeats)
    middle, tail = _read_budget(budget)
    target = Target.of(pipe)
    check_call(pipe, call)
    key = identify(pipe, steps, call)
    kept = Measurements(cache, key)
    with hide_progress(pipe), tqdm(desc="tune") as progress:
        if candidates is None:
            searched = prompts[1::2] if len(prompts) >= _ENOUGH else [p for p in SEARCH_PROMPTS if p not in prompts]
            prompts = prompts[::2] if len(prompts) >= _ENOUGH else prompts
            search = PlanSearch(pipe, steps, searched, call, Profiles(cache, key))
            candidates = _choose_candidates(target, search, steps, call, progress)
        candidates = [each if isinstance(each, Candidate) else Candidate(each) for each in candidates]
        candidates = list(dict.fromkeys([EXACT, *candidates]))
        _measure(pipe, steps, candidates, _Measuring(prompts, repeats, kept, progress), call)
    rows = [
        Measured(candidate, *(kept.column(str(candidate), prompts, name) for name in _COLUMNS))
        for candidate in candidates
    ]
    rows.sort(key=lambda row: row.median("seconds"))
    chosen = next((row.candidate for row in rows if row.inside(metric, middle, tail)), EXACT)
    return Tuning(chosen, tuple(rows), kept.column("stock", prompts, "seconds"), metric, middle, steps, tail)


@dataclass(frozen=True)
class _Measuring:
    """On what candidates are measured, how often, and where that is written down."""

    prompts: Sequence[str]
    repeats: int
    kept: Measurements
    progress: tqdm


def _measure(
    pipe: Pipeline, steps: int, candidates: Sequence[Candidate], measuring: _Measuring, call: Mapping[str, Any]
) -> None:
    """Measure stock and candidates, in turn, as far as that is not known."""
    prompts, kept, progress = measuring.prompts, measuring.kept, measuring.progress
    progress.reset(total=len(prompts) * measuring.repeats * (1 + len(candidates)))
    for seed, prompt in enumerate(prompts):
        expected = None
        for repeat in range(measuring.repeats):
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
                    seconds, latents = run_once(pipe, prompt, seed, candidate.steps or steps, call)
                kept.add(str(candidate), prompt, seconds, **compare(pipe, latents, expected))
                progress.update()


def _choose_candidates(
    target: Target, search: PlanSearch, steps: int, call: Mapping[str, Any], progress: tqdm
) -> list[Candidate]:
    """Return what is measured where nothing is given: presets, plans that are searched for, and fewer steps."""
    found: list[Candidate] = []
    if not target.support.exact_only:
        shared = {name: preset for name, preset in PRESETS.items() if name not in ("exact", "faster-diffusion")}
        found += [Candidate(preset.propagation, preset.cfg, name=name) for name, preset in shared.items()]

        def show(left: int) -> None:
            progress.total = max(progress.total or 0, left)
            progress.n = progress.total - left
            progress.refresh()

        plans = search.find(show)[:-1]  # but the last, which is exact
        picked = {round(n * (len(plans) - 1) / max(_TRIED - 1, 1)) for n in range(_TRIED)} if plans else ()
        found += [Candidate(plans[n].plan) for n in sorted(picked)]
    if not {"timesteps", "sigmas"} & call.keys():
        counts = sorted({round(share * steps) for share in FEWER} - {0, steps})
        found += [Candidate(EXACT.propagation, steps=n, name=f"exact, {n} steps") for n in counts]
    return found


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


def _read_budget(budget: float | Sequence[float]) -> tuple[float, float | None]:
    """Return the budget of the median, and that of the tail or None."""
    given = tuple(budget) if isinstance(budget, Sequence) else (budget,)
    if not 1 <= len(given) <= 2 or not all(isinstance(each, (int, float)) for each in given):
        raise ValueError(f"budget must be a number, or two for the median and the tail, got {budget!r}")
    return given[0], given[1] if len(given) == 2 else None
