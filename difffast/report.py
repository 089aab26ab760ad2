"""What a patch did, as text and as a table."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import ops
from .engines.conversion import PRECISIONS
from .engines.engine import choose_engine
from .engines.programs import BATCHES, ProgramStats
from .engines.user_compiled import has_compiled_parts
from .layers.registry import LAYERS
from .layers.transformed import count_bytes
from .ops._local import describe_choices, list_struck, table_of
from .options import Options
from .plan import LEAST_CALLS, CfgReuse, FeatureReuse, MeasuredPlan, OutputForecast, Plan, Sharing
from .sampling.components import find_components
from .sampling.controller import Controller, find_controller
from .sampling.settings import Settings
from .sampling.stats import RunStats
from .target import Target


@dataclass(frozen=True)
class PatchReport:
    """What :func:`difffast.patch` did.  It prints as text, and shows as a table in a notebook.

    Attributes:
        pipeline, unet: the names of their classes.
        preset: the name of the preset, or "custom" if ``propagation``, ``cfg`` or ``fused`` was given.
        propagation, cfg: the configurations that are in force.
        fused: whether layers are computed by operators.
        replaced: pairs of what was replaced and by what.
        notes: what was left alone or changed besides, and why.
    """

    pipeline: str
    unet: str
    preset: str
    propagation: Sharing
    cfg: CfgReuse | None
    fused: bool
    replaced: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    _settings: Settings = field(repr=False)
    _controller: Controller = field(repr=False)

    @property
    def last_run(self) -> RunStats | None:
        """What the UNet calls of the latest run did, and why any of them fell back; None before the first run."""
        return self._settings.last_run

    def plan(self, total: int, start: int = 0) -> Plan:
        """Return the plan of a schedule with ``total`` UNet calls, on the device where the pipeline is now.

        Args:
            total: UNet calls in the schedule, ``len(scheduler.timesteps)``.
            start: the first step that is executed; later than 0 in img2img, for instance.
        """
        pipe = self._settings.pipe()
        return self._settings.plan(total, pipe.device if pipe is not None else torch.device("cpu"), start)

    @property
    def trace(self) -> Any:
        """What a method recorded in the latest run, such as losses and maps of semantic binding; None without one."""
        return next((each.trace for each in self._settings.extensions if each.trace is not None), None)

    @property
    def programs(self) -> ProgramStats:
        """How many compiled programs or recorded graphs the UNet has, and the GPU memory of graphs."""
        return self._controller.count_programs()

    def invalidate(self) -> None:
        """Make the next step a key step, for instance from a callback that has changed the latents a lot."""
        self._controller.invalidate(self._settings)

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _rows(self) -> list[tuple[str, str]]:
        head = [("pipeline", self.pipeline), ("unet", self.unet), ("preset", self.preset)]
        kept = count_bytes(each for each in _parts_of(self._settings.pipe()) if isinstance(each, nn.Module))
        memory = [("memory", f"{kept / 2**20:.0f} MiB, convolutions' transformed weights")] if kept else []
        struck = [("failed", f"{operator} ({backend}): {reason}") for operator, backend, reason in list_struck()]
        return [*head, *self.replaced, *memory, *struck, *(("note", note) for note in self.notes)]

    def _repr_html_(self) -> str:
        cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self._rows())
        return f"<table>{''.join(cells)}</table>"


def _parts_of(pipe: Any) -> Iterator[Any]:
    """Yield the parts of a pipeline, or of none."""
    yield from getattr(pipe, "components", {}).values()


def describe_patch(unet: nn.Module, settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield (what, by what) for everything that a patch replaces."""
    config = settings.propagation
    if settings.cfg is not None:
        yield "guidance", "the conditional half alone between some key steps"
    if isinstance(config, FeatureReuse):
        yield "unet calls", f"whole UNet at key steps, outer layers (branch {config.branch}) in between"
    elif isinstance(config, Plan):
        yield "unet calls", f"a plan for schedules of {config.total} UNet calls: print it"
    elif isinstance(config, (OutputForecast, MeasuredPlan)):
        yield "unet calls", "whole UNet at key steps, none in between: its output is forecast"
    elif config.key_steps == 1:
        yield "unet calls", "whole UNet at every step"
    else:
        how = "decoders in parallel" if config.parallel else "decoders one at a time"
        yield "unet calls", f"encoder propagation, {how}"
        yield "repeat_batch", "C++ on the CPU" if ops.missing("cpp") is None else "PyTorch reference"
    if settings.apart != 1 and getattr(settings.pipe(), "controlnet", None) is not None:
        yield "controlnet", f"runs at {settings.controlnet}"
    if settings.compiled:
        sizes = ", ".join(map(str, BATCHES))
        yield "programs", f"torch.compile, one per shape, decoder batches of {sizes} steps at most"
    weight = next(unet.parameters())
    if choose_engine(settings.engine, weight.device) == "cudagraphs":
        yield "engine", "CUDA graphs, one per shape, recorded when a shape is met again"
    if settings.engine == "openvino":
        precision = settings.precision or f"the weights' precision, {str(weight.dtype).removeprefix('torch.')}"
        others = ", ".join(name for name, _ in find_components(settings.pipe()))
        compares = settings.fused and settings.precision in (None, PRECISIONS.get(weight.dtype))
        rival = "; Python runs what is found to be faster there" if compares else ""
        yield "engine", f"OpenVINO in {precision}, one model per shape; it also runs {others or 'nothing else'}{rival}"
    for kind in LAYERS if settings.fused and settings.engine != "openvino" else ():
        yield from kind.describe(kind.find(unet), weight, compiled=settings.compiled)
    if settings.division is not None:
        yield from settings.division.describe()
    for extension in settings.extensions:
        yield from extension.describe()


def _find_least_steps(settings: Settings) -> int | None:
    """Return the fewest steps with which anything is shared, where no number of steps says how far apart they are."""
    if isinstance(settings.propagation, MeasuredPlan):
        return LEAST_CALLS
    return math.ceil((2 - 1e-9) / settings.apart) if isinstance(settings.apart, float) else None


def note_exceptions(target: Target, settings: Settings, options: Options) -> Iterator[str]:
    """Yield what a patch leaves alone or changes on the way, and why; of a target that is not patched yet."""
    if settings.find_user_compile() is not None:
        yield (
            "the UNet stays compiled: whole calls run your own program of it, and its parts are compiled with the "
            "settings that you gave to torch.compile"
        )
    elif has_compiled_parts(target.unet.modules()):
        yield "the UNet's compiled blocks stay compiled, and run stock inside; what is around them is fused"
    if not settings.support.parallel:
        yield f"steps are decoded one at a time: {settings.support.note}"
    if settings.support.exact_only:
        yield f"steps share nothing: {settings.support.exact_only}"
    obstacle = target.refuse_cfg_reuse()
    if obstacle and options.wanted_cfg is not None:
        yield f"guidance's halves run together: {obstacle}"
    shared_from = _find_least_steps(settings)
    if shared_from is not None:
        yield f"steps share work in schedules of at least {shared_from} steps; in shorter ones every step runs in full"
    weight = next(target.unet.parameters())
    device, choices = weight.device, describe_choices(weight.device, weight.dtype)
    if choices and settings.fused:
        yield f"chosen by proofs on this device: {choices}"
    if device.type == "cuda" and not table_of(device).proofs and os.environ.get("DIFFFAST_PROVE") != "0":
        yield (
            "no kernel has been proved on this GPU, so that PyTorch's operators run: difffast.prove(pipe), or "
            "`difffast prove`, finds out which are faster here (DIFFFAST_PROVE=0 silences this)"
        )
    reason = ops.missing("cpp")
    if reason is not None:
        yield f"operators run on the PyTorch reference: {reason}"


def make_report(pipeline: str, unet: nn.Module, preset: str, settings: Settings, notes: tuple[str, ...]) -> PatchReport:
    """Return the report of a pipeline that is patched with these settings."""
    return PatchReport(
        pipeline=pipeline,
        unet=type(unet).__name__,
        preset=preset,
        propagation=settings.propagation,
        cfg=settings.cfg,
        fused=settings.fused,
        replaced=tuple(describe_patch(unet, settings)),
        notes=notes,
        _settings=settings,
        _controller=find_controller(unet),
    )
