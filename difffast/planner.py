"""plan_for: which way of sharing features is the fastest for a pipeline within a budget of error, by measuring it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .patch import Sharing, guidance_obstacle, patched
from .plan import EncoderPropagation, FeatureReuse, GuidanceReuse
from .plots import new_figure
from .support import support_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Candidate:
    """A way to share work between steps, as ``difffast.patch`` takes it."""

    propagation: Sharing
    guidance: GuidanceReuse | None = None

    @property
    def options(self) -> dict[str, Any]:
        """For ``difffast.patch(pipe, **options)``."""
        return {"propagation": self.propagation, "guidance": self.guidance}

    def __str__(self) -> str:
        return str(self.propagation) + (f", {self.guidance}" if self.guidance is not None else "")


#: Everything at every step: what is chosen where nothing else is inside the budget.
EXACT = Candidate(EncoderPropagation(key_steps=1))

CANDIDATES: tuple[Candidate, ...] = (
    EXACT,
    *(Candidate(FeatureReuse(interval)) for interval in (2, 3, 4, 5, 7)),
    *(Candidate(FeatureReuse(interval, branch=1)) for interval in (3, 5)),
    *(Candidate(FeatureReuse(interval), GuidanceReuse(both)) for interval, both in ((2, 2), (3, 3), (3, 6), (4, 8))),
    *(Candidate(EncoderPropagation(key_steps=interval)) for interval in (2, 3, 5)),
    Candidate(EncoderPropagation()),
)

PROMPTS = ("a red circle and a blue square", "a photo of a cat on a green field")

#: metric -> whether more of it is better.
METRICS = {"psnr_db": True, "latent_error": False}


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
class Choice:
    """What :func:`plan_for` measured and chose; prints as a table.

    Attributes:
        candidate: the fastest one inside the budget, for ``difffast.patch(pipe, **choice.options)``.
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
                f"{row.median('latent_error'):8.4f}  {mark:6} {row.candidate}"
            )
        direction = "at least" if METRICS[self.metric] else "at most"
        lines.append(f"stock: {stock:.2f} s; budget: {self.metric} {direction} {self.budget:g}; {self.steps} steps")
        return "\n".join(lines)

    def picture(self, path: str | Path) -> None:
        """Draw seconds against error, the front as a line, as PNG or SVG.

        Raises:
            ImportError: matplotlib is missing.
        """
        figure = new_figure(figsize=(9, 5))
        axis = figure.subplots()
        finite = [row for row in self.rows if math.isfinite(row.median(self.metric))]
        front = [row for row in self.front if row in finite]
        axis.plot(
            [row.median("seconds") for row in front], [row.median(self.metric) for row in front], color="C0", zorder=1
        )
        for number, row in enumerate(finite, 1):
            style = {"marker": "o", "linestyle": "none", "color": "C1" if row.candidate == self.candidate else "C0"}
            place = row.median("seconds"), row.median(self.metric)
            axis.plot(*place, **style, markersize=11, label=f"{number}  {row.candidate}")
            axis.annotate(str(number), place, ha="center", va="center", fontsize=7, color="white")
        axis.axhline(self.budget, color="gray", linestyle="dashed", label="budget")
        axis.axvline(statistics.median(self.stock_seconds), color="gray", linestyle="dotted", label="stock")
        axis.set(xlabel="seconds for one call", ylabel=self.metric, xlim=(0, None))
        axis.grid(alpha=0.3)
        figure.legend(loc="outside lower center", fontsize=6)
        figure.savefig(path, dpi=120)


def plan_for(
    pipe: DiffusionPipeline,
    steps: int,
    *,
    budget: float = 30.0,
    metric: str = "psnr_db",
    prompts: Sequence[str] = PROMPTS,
    candidates: Sequence[Candidate | Sharing] | None = None,
    repeats: int = 2,
    cache: str | Path | None = None,
    **call: Any,
) -> Choice:
    """The fastest way for this pipeline to share features between steps, within a budget of error against stock.

    Every candidate makes every prompt's picture, in turn with the others, from the same seeds as stock.

    Args:
        pipe: a pipeline that :func:`difffast.patch` takes; it is left as it was.
        steps: denoising steps.
        budget: what the median over the prompts must keep: at least so many dB, or at most so large a latent error.
        metric: "psnr_db" or "latent_error".
        prompts: what to measure with.
        candidates: what to choose from; the exact one is always among them.  None: those of ``CANDIDATES`` that the
            pipeline can be patched with.
        repeats: how often each is timed on each prompt, in turn with the others; on a noisy machine more are better.
        cache: JSON file of measurements, which an interrupted or a later call goes on from; None: none is kept.
        call: further arguments of the pipeline's call, e.g. ``guidance_scale``, ``height`` and ``width``.

    Raises:
        ValueError: an unknown metric, no prompts, or a pipeline that cannot be patched.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if not prompts:
        raise ValueError("prompts must not be empty")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if candidates is None:
        candidates = [candidate for candidate in CANDIDATES if _fits(pipe, candidate)]
    candidates = [each if isinstance(each, Candidate) else Candidate(each) for each in candidates]
    candidates = list(dict.fromkeys([EXACT, *candidates]))
    store = _Store(cache, _key(pipe, steps, call))
    with _quiet(pipe), tqdm(total=len(prompts) * repeats * (1 + len(candidates)), desc="plan_for") as progress:
        for seed, prompt in enumerate(prompts):
            expected = None
            for repeat in range(repeats):
                missing = [each for each in candidates if store.count(str(each), prompt) <= repeat]
                progress.update(len(candidates) - len(missing))
                if (missing and expected is None) or store.count("stock", prompt) <= repeat:
                    with patched(pipe, **EXACT.options, fused=False):
                        if not seed and not repeat:
                            _run(pipe, prompt, seed, steps, call)  # warms up
                        seconds, expected = _run(pipe, prompt, seed, steps, call)
                    store.add("stock", prompt, seconds)
                progress.update()
                for candidate in missing:
                    with patched(pipe, **candidate.options):
                        seconds, latents = _run(pipe, prompt, seed, steps, call)
                    error = float((latents - expected).float().norm() / expected.float().norm())
                    psnr = _psnr(pipe, latents, expected)
                    store.add(str(candidate), prompt, seconds, psnr_db=psnr, latent_error=error)
                    progress.update()
    rows = [
        Measured(candidate, *(store.column(str(candidate), prompts, name) for name in _COLUMNS))
        for candidate in candidates
    ]
    rows.sort(key=lambda row: row.median("seconds"))
    chosen = next((row.candidate for row in rows if row.inside(metric, budget)), EXACT)
    return Choice(chosen, tuple(rows), store.column("stock", prompts, "seconds"), metric, budget, steps)


def _fits(pipe: Any, candidate: Candidate) -> bool:
    """Whether the pipeline can be patched with a candidate."""
    support = support_of(type(pipe))
    if support is None:
        return True  # patch says why not
    return not (
        (isinstance(candidate.propagation, FeatureReuse) and not support.reuse)
        or (candidate.guidance is not None and guidance_obstacle(pipe, support))
    )


_COLUMNS = ("seconds", "psnr_db", "latent_error")


def _run(pipe: Any, prompt: str, seed: int, steps: int, call: dict[str, Any]) -> tuple[float, Tensor]:
    """-> (seconds, final latents)"""
    generator = torch.Generator("cpu").manual_seed(seed)
    start = time.perf_counter()
    latents = pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent", **call).images
    if latents.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, latents


@torch.no_grad()
def _psnr(pipe: Any, latents: Tensor, expected: Tensor) -> float:
    def picture(x: Tensor) -> Tensor:
        decoded = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    error = float((picture(latents) - picture(expected)).square().mean())
    return -10 * math.log10(error) if error else math.inf


@contextlib.contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """No progress bar for each of the pipeline's calls."""
    earlier = vars(pipe).get("_progress_bar_config")
    pipe.set_progress_bar_config(**{**(earlier or {}), "disable": True})
    try:
        yield
    finally:
        if earlier is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = earlier


def _key(pipe: Any, steps: int, call: dict[str, Any]) -> str:
    """What a measurement holds for: the weights (names, shapes and some numbers of each), scheduler, steps, device."""
    digest = hashlib.sha256()
    for name, weight in pipe.unet.state_dict().items():
        some = weight.flatten()[:: max(1, weight.numel() // 16)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {some.tolist()}".encode())
    scheduler = {name: str(value) for name, value in pipe.scheduler.config.items()}
    device = pipe.device.type
    machine = torch.cuda.get_device_name(pipe.device) if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    facts = [type(pipe.scheduler).__name__, scheduler, steps, machine, {name: str(v) for name, v in call.items()}]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()[:16]


class _Store:
    """Measurements by candidate and prompt, written to a file after each."""

    def __init__(self, path: str | Path | None, key: str) -> None:
        self._path, self._key = Path(path) if path is not None else None, key
        self._all: dict[str, Any] = {}
        if self._path is not None and self._path.is_file():
            self._all = json.loads(self._path.read_text())
        self._mine: dict[str, dict[str, dict[str, Any]]] = self._all.setdefault(key, {})

    def count(self, name: str, prompt: str) -> int:
        """How often it has been timed."""
        return len(self._mine.get(name, {}).get(prompt, {}).get("repeats", ()))

    def add(self, name: str, prompt: str, seconds: float, **errors: float) -> None:
        """One more timing; the errors are the same every time."""
        found = self._mine.setdefault(name, {}).setdefault(prompt, {"repeats": []})
        found["repeats"].append(seconds)
        found.update(errors, seconds=min(found["repeats"]))
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            written = self._path.with_suffix(".part")
            written.write_text(json.dumps(self._all, indent=1))
            written.replace(self._path)  # an interruption leaves the old file or the new one

    def column(self, name: str, prompts: Sequence[str], which: str) -> tuple[float, ...]:
        return tuple(self._mine[name][prompt][which] for prompt in prompts)
