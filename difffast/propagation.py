"""The controller behind ``unet.__call__``: steps that share features under a stock sampling loop.

The stock loop keeps guidance, scheduler, callbacks and progress bar.  Encoder propagation: at a key step the encoder
runs, and the whole segment up to the next key step is decoded and queued; the following calls are served from the
queue.  Feature reuse: at a key step the whole UNet runs, at the others its outer layers.
Sources: Faster Diffusion (arXiv 2312.09608), section 3.2; DeepCache (arXiv 2312.00858), section 3.2.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import fusion
from . import unet as split
from .attention_maps import AttentionMaps
from .plan import MIN_STEPS, EncoderPropagation, FeatureReuse, GuidanceReuse, Plan
from .prior_noise import PriorNoise
from .programs import BATCHES, Programs, ProgramStats
from .run import Run, RunStats
from .stepping import Edit, step_override
from .support import Support, output_of
from .swap import is_swapped, swap_in, swap_out

if TYPE_CHECKING:
    from .guidance.binder import Binder


class Settings:
    """What one patched pipeline asked for; the controller of its UNet holds it."""

    def __init__(
        self,
        pipe: Any,
        propagation: EncoderPropagation | FeatureReuse,
        fused: bool,
        compiled: bool,
        support: Support,
        force: bool,
        binding: Binder | None = None,
        guidance: GuidanceReuse | None = None,
    ) -> None:
        self.pipe = weakref.ref(pipe)
        self.propagation, self.fused, self.compiled = propagation, fused, compiled
        self.support, self.force, self.binding = support, force, binding
        self.guidance = guidance
        self.prior_noise = propagation.prior_noise if isinstance(propagation, EncoderPropagation) else None
        self.collectors: tuple[AttentionMaps, ...] = ()
        self.last_run: RunStats | None = None
        self._schedulers: list[Any] = []

    @property
    def asked(self) -> dict[str, Any]:
        """What pipelines must agree on that share a UNet and a scheduler."""
        return {
            "propagation": self.propagation,
            "guidance": self.guidance,
            "fused": self.fused,
            "compile": self.compiled,
        }

    def adopt_scheduler(self) -> None:
        """Let the pipeline's scheduler as of now step from latents that binding and prior noise have edited."""
        scheduler = self.scheduler()
        if is_swapped(scheduler):
            return
        edits: list[Edit] = []
        methods: dict[str, Callable[..., Any]] = {}
        if self.binding is not None:
            edits.append(self.binding.displace)
        if self.prior_noise:
            noise = PriorNoise(self.prior_noise)
            edits.append(noise.inject)
            methods = noise.methods(scheduler)
        if edits:
            swap_in(scheduler, {"step": step_override(scheduler, edits), **methods})
            self._schedulers.append(scheduler)

    def release_schedulers(self) -> None:
        """Give all schedulers that were adopted their plain classes back."""
        while self._schedulers:
            swap_out(self._schedulers.pop())

    def scheduler(self) -> Any:
        """The pipeline's scheduler as of now (users replace it), or None once the pipeline is gone."""
        return getattr(self.pipe(), "scheduler", None)

    def plan(self, total: int, device: str) -> Plan:
        """The plan of a schedule with ``total`` UNet calls on a type of device."""
        if isinstance(self.propagation, FeatureReuse):
            plan = self.propagation.plan(total)
        else:
            batches = BATCHES if self.compiled else None
            plan = self.propagation.plan(total, kind=self.support.key_steps, device=device, batches=batches)
        if not self.support.parallel:
            plan = replace(plan, max_batch=1)
        if self.binding is not None:
            plan = plan.with_optimised(self.binding.config.optimised(total))
        return plan if self.guidance is None else self.guidance.applied(plan)

    def resolve(self, total: int, steps: int, device: torch.device) -> Plan:
        """The plan of a schedule with ``total`` UNet calls for ``steps`` denoising steps, run on ``device``.

        Raises:
            ValueError: too few steps and not forced, or key steps outside the schedule.
        """
        plan = self.plan(total, device.type)
        if steps < MIN_STEPS and not self.force and (len(plan.keys) < plan.total or plan.halves):
            raise ValueError(
                f"sharing features between steps needs at least {MIN_STEPS} denoising steps, got {steps}: with fewer, "
                "neighbouring steps differ too much and images degrade. "
                "Use difffast.unpatch(pipe), more steps, or difffast.patch(pipe, force=True)"
            )
        return plan


class Controller:
    """Answers the calls of one UNet for every patched pipeline that uses it.

    State belongs to runs, not to the UNet: a run is one ``scheduler.timesteps`` tensor in one thread.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._programs = Programs()
        self._unet = weakref.ref(unet)
        self._settings: list[Settings] = []
        self._runs: list[Run] = []
        self._lock = threading.Lock()

    def add(self, settings: Settings) -> None:
        with self._lock:
            self._settings.append(settings)

    def remove(self, settings: Settings) -> bool:
        """Forget a pipeline and its runs; True if no other patched pipeline is left."""
        with self._lock:
            self._settings = [s for s in self._settings if s is not settings and s.pipe() is not None]
            self._runs = [run for run in self._runs if settings not in run.settings]
            return not self._settings

    def program_stats(self) -> ProgramStats:
        unet = self._unet()
        return self._programs.stats(torch.device("cpu") if unet is None else unet.device)

    def invalidate(self, settings: Settings) -> None:
        """Make the next call of every run of this pipeline a key step."""
        with self._lock:
            for run in self._runs:
                if settings in run.settings:
                    run.restart = True

    def __call__(
        self, unet: nn.Module, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = split.bind(unet, args, kwargs)
        timestep = call["timestep"]
        run = self.run_of(timestep, call["sample"].device)
        if run is None:
            self._explain_unknown(timestep)
            return stock(*args, **kwargs)
        order = run.order(timestep)
        if run.binding is not None:
            call = run.binding.apply(call, order, run.scheduler(), stock)
            args, kwargs = (), dict(call)
        reason = _needs_stock(unet, run) or run.foreign_residuals(call, order)
        text = call.get("encoder_hidden_states")
        if isinstance(text, Tensor):
            text = run.labelled(text, call["sample"], stock=reason is not None)
            args, kwargs = split.with_argument(unet, args, kwargs, "encoder_hidden_states", text)
        if reason is not None:
            run.note_stock(reason)
            return stock(*args, **kwargs)
        try:
            with fusion.fused(run.record if run.fused else None):
                sample = run.answer(unet, call, text, order, lambda: stock(*args, **kwargs)[0])
        except BaseException:
            run.clear()
            raise
        if call.get("return_dict", True):
            return output_of(type(unet))(sample=sample)
        return (sample,)

    def run_of(self, timestep: Any, device: torch.device) -> Run | None:
        """The run that a timestep belongs to: a live one, a new one of a patched pipeline, or None.

        The loops iterate over ``scheduler.timesteps``, whose elements are views of it; shared storage identifies
        the run, and the storage offset the position, without reading anything from the device.
        """
        if not isinstance(timestep, Tensor):
            return None
        thread = threading.get_ident()
        with self._lock:
            self._runs = [run for run in self._runs if run.timesteps() is not None]
            for run in self._runs:
                if run.thread == thread and _is_element(timestep, run.timesteps()):
                    return run
            asking = [s for s in self._settings if _is_element(timestep, getattr(s.scheduler(), "timesteps", None))]
            if asking:
                run = Run(asking, self._unet(), device, self._programs)
                self._runs.append(run)
                return run
        return None

    def _explain_unknown(self, timestep: Any) -> None:
        """Warn when a patched pipeline is probably meant but its schedule was not recognised."""
        if any(settings.pipe() is not None for settings in self._settings):
            warnings.warn(
                "difffast: this UNet call runs unpatched: its timestep is not an element of scheduler.timesteps of a "
                f"patched pipeline (got {type(timestep).__name__}), so its position in the schedule is unknown",
                stacklevel=4,
            )


def _is_element(timestep: Tensor, timesteps: Tensor | None) -> bool:
    """Whether ``timestep`` is a view of one element of ``timesteps`` (perhaps expanded over the batch)."""
    return (
        isinstance(timesteps, Tensor)
        and timestep.device == timesteps.device
        and timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
        and (timestep.numel() == 1 or not any(timestep.stride()))
    )


def _needs_stock(unet: nn.Module, run: Run) -> str | None:
    """Why a call must run the unpatched forward, or None."""
    if torch.is_grad_enabled():
        return "gradients are enabled (cached features would cut the graph); use torch.no_grad()"
    if unet.training and run.drops_values():
        return "the UNet is in training mode and has dropout; call unet.eval()"
    if unet._forward_hooks or unet._forward_pre_hooks:
        return "forward hooks are registered on the UNet itself and must see every call"
    return split.obstacle(unet)
