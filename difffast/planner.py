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

from .patch import Sharing, patched
from .plan import EncoderPropagation, FeatureReuse

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

#: Everything at every step: what is chosen where nothing else is inside the budget.
EXACT = EncoderPropagation(key_steps=1)

CANDIDATES: tuple[Sharing, ...] = (
    EXACT,
    *(FeatureReuse(interval) for interval in (2, 3, 4, 5, 7)),
    *(FeatureReuse(interval, branch=1) for interval in (3, 5)),
    *(EncoderPropagation(key_steps=interval) for interval in (2, 3, 5)),
    EncoderPropagation(),
)

PROMPTS = ("a red circle and a blue square", "a photo of a cat on a green field")

#: metric -> whether more of it is better.
METRICS = {"psnr_db": True, "latent_error": False}


@dataclass(frozen=True)
class Measured:
    """One candidate, measured against stock with the same seeds.

    Attributes:
        sharing: the candidate, as ``difffast.patch(pipe, propagation=...)`` takes it.
        seconds: of a whole call, per prompt.
        psnr_db: of the pictures, per prompt; infinite where they are the same.
        latent_error: norm of the final latents' difference over the norm of stock's, per prompt.
    """

    sharing: Sharing
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
        propagation: the fastest candidate inside the budget, for ``difffast.patch(pipe, propagation=...)``.
        rows: every candidate, fastest first.
        stock_seconds: of the unpatched pipeline, per prompt.
    """

    propagation: Sharing
    rows: tuple[Measured, ...]
    stock_seconds: tuple[float, ...]
    metric: str
    budget: float
    steps: int = field(default=0)

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
            mark = "chosen" if row.sharing == self.propagation else "*" if row in self.front else ""
            lines.append(
                f"{row.median('seconds'):8.2f} {row.median('seconds') / stock:8.2f} {row.median('psnr_db'):9.1f} "
                f"{row.median('latent_error'):8.4f}  {mark:6} {row.sharing}"
            )
        direction = "at least" if METRICS[self.metric] else "at most"
        lines.append(f"stock: {stock:.2f} s; budget: {self.metric} {direction} {self.budget:g}; {self.steps} steps")
        return "\n".join(lines)

    def picture(self, path: str | Path) -> None:
        """Draw seconds against error, the front as a line, as PNG or SVG.

        Raises:
            ImportError: matplotlib is missing.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5), layout="constrained")
        axis = figure.subplots()
        finite = [row for row in self.rows if math.isfinite(row.median(self.metric))]
        front = [row for row in self.front if row in finite]
        axis.plot(
            [row.median("seconds") for row in front], [row.median(self.metric) for row in front], color="C0", zorder=1
        )
        for number, row in enumerate(finite, 1):
            style = {"marker": "o", "linestyle": "none", "color": "C1" if row.sharing == self.propagation else "C0"}
            place = row.median("seconds"), row.median(self.metric)
            axis.plot(*place, **style, markersize=11, label=f"{number}  {row.sharing}")
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
    candidates: Sequence[Sharing] = CANDIDATES,
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
        candidates: what to choose from; the exact one is always among them.
        cache: JSON file of measurements, which an interrupted or a later call goes on from; None: none is kept.
        call: further arguments of the pipeline's call, e.g. ``guidance_scale``, ``height`` and ``width``.

    Raises:
        ValueError: an unknown metric, no prompts, or a pipeline that cannot be patched.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if not prompts:
        raise ValueError("prompts must not be empty")
    candidates = list(dict.fromkeys([EXACT, *candidates]))
    store = _Store(cache, _key(pipe, steps, call))
    with _quiet(pipe), tqdm(total=len(prompts) * (1 + len(candidates)), desc="plan_for") as progress:
        for seed, prompt in enumerate(prompts):
            missing = [candidate for candidate in candidates if not store.has(str(candidate), prompt)]
            progress.update(len(candidates) - len(missing))
            if missing or not store.has("stock", prompt):
                with patched(pipe, propagation=EXACT, fused=False):
                    if not seed:
                        _run(pipe, prompt, seed, steps, call)  # warms up
                    seconds, expected = _run(pipe, prompt, seed, steps, call)
                store.add("stock", prompt, {"seconds": seconds})
            progress.update()
            for candidate in missing:
                with patched(pipe, propagation=candidate):
                    seconds, latents = _run(pipe, prompt, seed, steps, call)
                error = float((latents - expected).float().norm() / expected.float().norm())
                found = {"seconds": seconds, "psnr_db": _psnr(pipe, latents, expected), "latent_error": error}
                store.add(str(candidate), prompt, found)
                progress.update()
    rows = [
        Measured(candidate, *(store.column(str(candidate), prompts, name) for name in _COLUMNS))
        for candidate in candidates
    ]
    rows.sort(key=lambda row: row.median("seconds"))
    chosen = next((row.sharing for row in rows if row.inside(metric, budget)), EXACT)
    return Choice(chosen, tuple(rows), store.column("stock", prompts, "seconds"), metric, budget, steps)


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
        self._mine: dict[str, dict[str, dict[str, float]]] = self._all.setdefault(key, {})

    def has(self, name: str, prompt: str) -> bool:
        return prompt in self._mine.get(name, {})

    def add(self, name: str, prompt: str, found: dict[str, float]) -> None:
        self._mine.setdefault(name, {})[prompt] = found
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            written = self._path.with_suffix(".part")
            written.write_text(json.dumps(self._all, indent=1))
            written.replace(self._path)  # an interruption leaves the old file or the new one

    def column(self, name: str, prompts: Sequence[str], which: str) -> tuple[float, ...]:
        return tuple(self._mine[name][prompt][which] for prompt in prompts)
