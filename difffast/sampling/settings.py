"""What one patched pipeline asked for; the controller of its UNet holds it, and runs read it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from ..engines.engine import choose_engine
from ..engines.programs import BATCHES
from ..engines.user_compiled import UserCompile, find_user_compile
from ..layers.context import MapSink
from ..plan import (
    LEAST_CALLS,
    MIN_STEPS,
    CfgReuse,
    EncoderPropagation,
    FeatureReuse,
    MeasuredPlan,
    Plan,
    Schedule,
    Sharing,
)
from ..support import Support
from ..surgery.subclass import is_swapped, swap_in, swap_out
from .calls import find_pipeline_call
from .division import Division
from .extension import Extension
from .schedule import read_schedule
from .scheduler_step import override_step
from .stats import RunStats


class Settings:
    """What one patched pipeline asked for.

    Args:
        pipe: the pipeline, of which only a weak reference is kept.
        support: what is supported of its kind.
        propagation: how steps share features.
        cfg: at which steps both halves of guidance's batch run; None: at all.
        fused: whether layers are fused.
        engine: what executes the parts of the UNet; None: what suits its device.
        force: whether schedules with fewer than ``MIN_STEPS`` steps may share.
        extensions: methods that take part.
    """

    def __init__(
        self,
        pipe: Any,
        support: Support,
        propagation: Sharing,
        *,
        cfg: CfgReuse | None = None,
        fused: bool = True,
        engine: str | None = None,
        force: bool = False,
        extensions: Sequence[Extension] = (),
    ) -> None:
        self.pipe = weakref.ref(pipe)
        self.support, self.propagation, self.cfg, self.fused = support, propagation, cfg, fused
        self.engine, self.force = engine, force
        #: Other processes that take part, or None.
        self.division: Division | None = None
        #: Of OpenVINO's models; None: the pipeline's own.
        self.precision: str | None = None
        #: Whether the seconds of every part of a call are counted.
        self.profile = False
        #: Whether ControlNet runs at "every step" or at "key steps" alone.
        outer = isinstance(propagation, FeatureReuse) or (isinstance(propagation, Plan) and propagation.reuse)
        self.controlnet = "every step" if outer else "key steps"
        self.extensions = tuple(extensions)
        self.last_run: RunStats | None = None
        #: Whether the user has been warned that schedules with too few steps run in full.
        self.warned = False
        self._schedulers: list[Any] = []
        self._read: tuple[TensorWeakRef, Schedule] | None = None  # of the times that were read last

    @property
    def compiled(self) -> bool:
        """Whether the UNet runs as compiled programs."""
        return self.engine == "inductor"

    def find_user_compile(self) -> UserCompile | None:
        """Return how the user has compiled the pipeline's UNet as of now, or None."""
        return find_user_compile(getattr(self.pipe(), "unet", None))

    def runs_programs(self, device: torch.device) -> bool:
        """Return whether an engine, or the user's own compilation, makes programs of the UNet on a device."""
        return choose_engine(self.engine, device) != "eager" or self.find_user_compile() is not None

    @property
    def asked(self) -> dict[str, Any]:
        """What pipelines must agree on that share a UNet and a scheduler."""
        names = ("propagation", "cfg", "fused", "engine", "precision", "controlnet", "division")
        return {name: getattr(self, name) for name in names}

    @property
    def alone(self) -> bool:
        """Whether the pipeline must have its scheduler to itself."""
        return any(extension.alone for extension in self.extensions)

    def refuse_neighbour(self, unet: nn.Module, theirs: Settings, their_unet: nn.Module) -> None:
        """Refuse another patched pipeline with the same scheduler that wants other things: a run could be of either.

        Raises:
            ValueError: it does.
        """
        if theirs.scheduler() is not self.scheduler():
            return
        if (unet is their_unet and theirs.asked != self.asked) or theirs.alone or self.alone:
            raise ValueError(
                f"another patched {type(theirs.pipe()).__name__} shares this pipeline's scheduler, which needs equal "
                f"settings without prior noise and binding (there: {theirs.asked}; here: {self.asked}); give one of "
                "them its own: pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)"
            )

    def map_sinks(self) -> tuple[MapSink, ...]:
        """Return who wants attention maps as of now."""
        return tuple([sink for extension in self.extensions for sink in extension.map_sinks()])

    def scheduler(self) -> Any:
        """Return the pipeline's scheduler as of now (users replace it), or None once the pipeline is gone."""
        return getattr(self.pipe(), "scheduler", None)

    def timesteps(self) -> Tensor | None:
        """Return the schedule as of now, or None where it is no tensor."""
        found = getattr(self.scheduler(), "timesteps", None)
        return found if isinstance(found, Tensor) else None

    def takes_any_time(self) -> bool:
        """Return whether a call at a time that is not an element of the schedule may be the pipeline's.

        It may where nothing depends on the step, and where the pipeline is running and its scheduler counts.
        """
        if self.timesteps() is None:
            return False
        running = find_pipeline_call()
        mine = running is not None and running.pipe() is self.pipe()
        return bool(self.support.exact_only) or (self.support.counts and mine)

    def adopt_scheduler(self) -> None:
        """Let the pipeline's scheduler as of now step from latents that extensions have edited."""
        scheduler = self.scheduler()
        if is_swapped(scheduler):
            return
        edits = [edit for extension in self.extensions for edit in extension.latent_edits()]
        results = [result for extension in self.extensions for result in extension.step_results()]
        methods: dict[str, Callable[..., Any]] = {}
        for extension in self.extensions:
            methods.update(extension.scheduler_methods(scheduler))
        if edits or results or methods:
            self._schedulers.append(scheduler)  # first: whatever happens next, it is released
            swap_in(scheduler, {"step": override_step(scheduler, edits, results), **methods})

    def release_schedulers(self) -> None:
        """Give all schedulers that were adopted their plain classes back."""
        while self._schedulers:
            swap_out(self._schedulers[-1])
            self._schedulers.pop()

    def read_schedule(self, total: int) -> Schedule:
        """Return what is known of the scheduler's schedule with ``total`` UNet calls; a schedule is read once."""
        times = self.timesteps()
        if times is None or len(times) != total:
            return read_schedule(self.scheduler(), total)
        if self._read is None or self._read[0]() is not times:
            self._read = TensorWeakRef(times), read_schedule(self.scheduler(), total)
        return self._read[1]

    def plan(self, total: int, device: torch.device, start: int = 0) -> Plan:
        """Return the plan of a schedule with ``total`` UNet calls on a device, of which ``start`` is executed first."""
        batches = BATCHES if self.runs_programs(device) else None  # one program for each
        asked = self.propagation
        if isinstance(asked, EncoderPropagation):
            kind = self.support.key_steps
            plan = asked.plan(total, start=start, kind=kind, device=device.type, batches=batches)
        elif isinstance(asked, MeasuredPlan):
            plan = asked.plan(total, start=start, schedule=self.read_schedule(total))
        elif isinstance(asked, Plan):
            plan = replace(asked.check_total(total), batches=batches).begin_at(start)
        else:
            plan = asked.plan(total, start=start)
        if not self.support.parallel:
            plan = replace(plan, max_batch=1)
        full = [step for each in self.extensions for step in each.full_steps(total) if step >= start]
        plan = plan.add_full_steps(full) if full else plan
        return plan if self.cfg is None else self.cfg.apply(plan)

    def resolve(self, total: int, steps: int, device: torch.device, start: int = 0) -> tuple[Plan, str | None]:
        """Return the plan of a run, and why nothing is shared in it although sharing was asked for, or None.

        Args:
            total: UNet calls in the schedule.
            steps: denoising steps in the schedule.
            device: where the UNet is.
            start: the step that is executed first.

        Raises:
            ValueError: key steps outside the schedule.
        """
        plan = self.plan(total, device, start)
        if not self.shares:
            return plan, None
        if steps < MIN_STEPS and not self.force:
            why = f"sharing needs at least {MIN_STEPS} denoising steps, got {steps}: with fewer, neighbouring steps "
            why += "differ too much (difffast.patch(pipe, ..., force=True) shares all the same)"
            return plan.run_in_full(), f"every step runs in full: {why}"
        if plan.shares:
            return plan, None
        return plan, f"every step runs in full: with {total} steps, {self._explain_none_left_out(total, start)}"

    def _explain_none_left_out(self, total: int, start: int) -> str:
        forced = start > 0 or any(each.full_steps(total) for each in self.extensions)
        if not isinstance(self.propagation, MeasuredPlan) or (forced and total >= LEAST_CALLS):
            return "all of them are key steps"
        name, solver = self.propagation.name, self.read_schedule(total).solver
        if total < LEAST_CALLS:
            return f"{name!r} shares nothing below {LEAST_CALLS}"
        return f"{name!r} leaves none of {solver}'s out, as measured (docs/presets.md: what other solvers allow)"

    @property
    def shares(self) -> bool:
        """Whether steps are to share anything."""
        asked = self.propagation
        if isinstance(asked, MeasuredPlan) or self.cfg is not None:
            return True
        return asked.shares if isinstance(asked, Plan) else self.apart != 1

    @property
    def apart(self) -> Any:
        """How far apart key steps are, or which they are, as it was asked for."""
        config = self.propagation
        if isinstance(config, MeasuredPlan):
            return config.name
        return config.interval if isinstance(config, FeatureReuse) else config.key_steps
