"""Cells of the table, which are schedulers with a number of steps, and the ways to be faster that each of them has."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import peers
import torch

from difffast import OutputForecast, patched
from difffast.plan import MeasuredPlan
from difffast.presets import PRESETS

#: Name, as ``difffast.sampling.schedule`` has it -> (class, what differs from the model's own configuration).
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "DDIM": ("DDIMScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "Heun": ("HeunDiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
}

#: Stock with fewer steps is measured at these shares of a cell's steps.
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SPACINGS = ("leading", "trailing")

#: Changes a pipeline for the length of a ``with`` block.
Context = Callable[[Any], contextlib.AbstractContextManager[Any]]

STOCK = "stock"
FEWER = "fewer steps"
PRESET = "preset"
PLAN = "plan"
PEER = "peer"


@dataclass(frozen=True)
class Cell:
    """A scheduler and a number of steps, at which every way is held against stock."""

    scheduler: str
    steps: int

    def __str__(self) -> str:
        return f"{self.scheduler}, {self.steps} steps"

    def make_scheduler(self, config: Any, **options: Any) -> Any:
        """Return the cell's scheduler for a model, by the configuration of the model's own."""
        name, differences = SCHEDULERS[self.scheduler]
        return getattr(diffusers, name).from_config(config, **{**differences, **options})


CELLS = tuple(
    Cell(scheduler, steps)
    for scheduler, counts in {
        "DPM++ 2M Karras": (20, 25, 30),
        "Euler": (20, 30),
        "DDIM": (20, 30, 50),
        "Euler a": (25,),
        "UniPC": (20,),
        "DPM++ 2M SDE Karras": (20,),
        "Heun": (20,),
        "PNDM": (25,),
    }.items()
    for steps in counts
)


@dataclass(frozen=True)
class Way:
    """A way to make pictures: steps, and what is done to the pipeline.

    Attributes:
        name: as it is shown.
        kind: STOCK, FEWER, PRESET, PLAN or PEER.
        steps: that the pipeline is asked for.
        context: a context manager that changes a pipeline; what it gives tells what it is that was changed.
    """

    name: str
    kind: str
    steps: int
    context: Context = contextlib.nullcontext

    @property
    def is_promised(self) -> bool:
        """Whether a promise names it: presets, and what they are held against."""
        return self.kind in (STOCK, FEWER, PRESET) or self.name.startswith("DeepCache")


def list_ways(cell: Cell, config: Any) -> list[Way]:
    """Return every way of a cell: stock, stock with fewer steps, difffast's, and peers'.

    Args:
        cell: where.
        config: of the model's own scheduler.
    """
    presets = (Way(preset, PRESET, cell.steps, _difffast(preset)) for preset in PRESETS)
    plans = {
        "forecast every 2": OutputForecast(2),
        "forecast every 2, lines": OutputForecast(2, extrapolate=1),
        "forecast every 3": OutputForecast(3),
        "forecast every 4": OutputForecast(4),
        # What the guards do: without them every picture has the same steps.
        "balanced, unguarded": MeasuredPlan("balanced", guard=None),
        "turbo, unguarded": MeasuredPlan("turbo", guard=None),
    }
    return [
        Way(STOCK, STOCK, cell.steps),
        *_fewer_steps(cell, config),
        *presets,
        *(Way(name, PLAN, cell.steps, _difffast("exact", propagation=plan)) for name, plan in plans.items()),
        *(Way(name, PEER, cell.steps, context) for name, context in _list_peers().items()),
    ]


def _difffast(preset: str, **options: Any) -> Context:
    return lambda pipe: patched(pipe, preset, **options)


def _list_peers() -> dict[str, partial[contextlib.AbstractContextManager[Any]]]:
    return {
        **{
            f"DeepCache {interval}, branch {branch}": partial(peers.deepcache, interval=interval, branch=branch)
            for branch in (0, 1)
            for interval in (2, 3, 5)
        },
        **{f"tomesd {ratio:.0%}": partial(peers.token_merging, ratio=ratio) for ratio in (0.25, 0.5)},
        "PAB 2, 4": partial(peers.pyramid_attention_broadcast, self_interval=2, cross_interval=4),
        # The paper's gate, and later ones, which keep more of the picture.
        **{f"T-GATE {gate:.0%}": partial(peers.t_gate, gate=gate) for gate in (0.4, 0.6, 0.8)},
        # The published window, and one that does not grow.
        "Spectrum": partial(peers.spectrum),
        "Spectrum, every 2": partial(peers.spectrum, growth=0.0),
        "bfloat16": partial(peers.in_bfloat16),
    }


def _fewer_steps(cell: Cell, config: Any) -> Iterator[Way]:
    """Stock with fewer steps, under both spacings where a scheduler's timesteps differ between them."""
    for steps in dict.fromkeys(max(2, round(share * cell.steps)) for share in SHARES):
        if _same_schedule([cell.make_scheduler(config, timestep_spacing=each) for each in SPACINGS], steps):
            yield Way(f"{STOCK}, {steps} steps", FEWER, steps)
            continue
        for spacing in SPACINGS:
            yield Way(f"{STOCK}, {steps} steps, {spacing}", FEWER, steps, partial(peers.with_spacing, spacing=spacing))


def _same_schedule(schedulers: Sequence[Any], steps: int) -> bool:
    times = []
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
        times.append((scheduler.timesteps, getattr(scheduler, "sigmas", torch.zeros(0))))
    first, second = times
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(first, second, strict=True))


def describe(way: Way, pipe: Any) -> str:
    """Return what tells whether pictures of a way can be taken for those of another run: what it does, by its name.

    Presets and plans keep their names when they change, so what is done at every step belongs to it; and of a peer, the
    file that it is written in.
    """
    if way.kind == PEER:
        source = Path(inspect.unwrap(way.context.func).__code__.co_filename).read_bytes()
        return f"{way.name}: {way.context.keywords} {hashlib.sha256(source).hexdigest()}"
    if way.kind not in (PRESET, PLAN):
        return way.name
    with way.context(pipe) as report:
        pipe.scheduler.set_timesteps(way.steps)
        return f"{way.name}: {report.plan(len(pipe.scheduler.timesteps)).to_json()} {report.propagation} {report.cfg}"


def choose_ways(every: Sequence[Way], wanted: Sequence[str]) -> list[Way]:
    """Return stock and the ways that have one of these names or kinds.

    Raises:
        ValueError: something is neither a name nor a kind.
    """
    unknown = set(wanted) - {way.name for way in every} - {way.kind for way in every}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no way has this name or kind")
    return [way for way in every if way.kind == STOCK or way.name in wanted or way.kind in wanted]
