"""The controller behind ``unet.__call__``: it finds the run that a call belongs to and lets it answer.

The stock loop keeps guidance, scheduler, callbacks and progress bar.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.graphs import Graphs
from ..engines.openvino import OpenVino
from ..engines.programs import Programs, ProgramStats
from ..layers.context import use_context
from ..layers.cross_attention import process_text
from ..layers.registry import LAYERS
from ..support import output_of
from ..surgery.calls import bind_arguments
from ..unet.contents import drop_contents
from ..unet.parts import refuse_split
from .components import count_models, time_part
from .execution import Engine
from .fused_layers import FusedLayers
from .position import is_element
from .run import SamplingRun
from .settings import Settings

#: The controllers of patched UNets; no class holds one, so that torch.compile finds all patches of a UNet equal.
_controllers: weakref.WeakKeyDictionary[nn.Module, Controller] = weakref.WeakKeyDictionary()

#: The UNet whose unpatched call runs in this thread.
_UNPATCHED: ContextVar[nn.Module | None] = ContextVar("difffast_unpatched", default=None)


class Controller:
    """Answers the calls of one UNet for every patched pipeline that uses it.

    State belongs to runs, not to the UNet: a run is one ``scheduler.timesteps`` tensor in one thread.

    Args:
        unet: the UNet, of which only a weak reference is kept.
    """

    def __init__(self, unet: nn.Module) -> None:
        #: What has been put into the UNet's layers.
        self.layers = FusedLayers(LAYERS)
        self._engines: dict[str, Engine] = {"inductor": Programs(), "cudagraphs": Graphs(), "openvino": OpenVino()}
        self._unet = weakref.ref(unet)
        #: What the patched pipelines that use the UNet have asked for.
        self.settings: list[Settings] = []
        self._runs: list[SamplingRun] = []
        self._lock = threading.RLock()  # an extension that begins may invalidate its run

    def add(self, settings: Settings) -> None:
        """Answer for one more pipeline."""
        with self._lock:
            self.settings.append(settings)

    def remove(self, settings: Settings) -> bool:
        """Forget a pipeline and its runs; returns whether no other patched pipeline is left."""
        with self._lock:
            self.settings = [s for s in self.settings if s is not settings and s.pipe() is not None]
            self._runs = [run for run in self._runs if settings not in run.settings]
            return not self.settings

    def is_held(self, compiled: Any, but: Settings) -> bool:
        """Return whether any pipeline but one holds what ``torch.compile`` has made of the UNet."""
        pipes = [settings.pipe() for settings in self.settings if settings is not but]
        return any(pipe is not None and pipe.unet is compiled for pipe in pipes)

    def count_programs(self) -> ProgramStats:
        """Return what the UNet's compiled programs and recorded graphs take."""
        unet = self._unet()
        device = torch.device("cpu") if unet is None else unet.device
        pipes = [pipe for pipe in (settings.pipe() for settings in self.settings) if pipe is not None]
        parts = [count for pipe in pipes[:1] for count in count_models(pipe)]
        first, *others = [*(engine.count(device) for engine in self._engines.values()), *parts]
        return sum(others, first)

    def fuse_layers(self, unet: nn.Module, *, again: bool = True) -> None:
        """Put into the UNet's layers what pays for all pipelines that use it.

        Args:
            unet: the UNet.
            again: also where nothing that this depends on has changed since the last time.
        """
        asked = self.settings
        always = any(extension.edits_attention for each in asked for extension in each.extensions)
        device = next(unet.parameters()).device  # engines of CPUs lay weights out as they like it
        lay_out = any(each.fused and not (device.type == "cpu" and each.runs_programs(device)) for each in asked)
        (self.layers.put_in if again else self.layers.follow)(unet, always=always, lay_out=lay_out)

    def invalidate(self, settings: Settings) -> None:
        """Make the next call of every run of a pipeline a key step."""
        with self._lock:
            for run in self._runs:
                if settings in run.settings:
                    run.state.restart = True

    def __call__(
        self, unet: nn.Module, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with time_part("UNet"):
            return self._answer(unet, stock, args, kwargs)

    def _answer(self, unet: nn.Module, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = bind_arguments(unet, args, kwargs)
        run = self.find_run(given["timestep"], given["sample"].device)
        if run is None:
            self._explain_unknown(given["timestep"])
            return stock(*args, **kwargs)
        step = run.step_of(given["timestep"])
        call = run.edit_call(given, step, stock)
        stock = run.show_layers(stock)
        if call is not given:
            args, kwargs = (), dict(call)
        reason = _require_stock(unet, run) or run.refuse_residuals(call, step)
        if reason is not None:
            run.note_stock(reason, step)
            with use_context(run.make_context(call, stock=True)):
                return stock(*args, **kwargs)
        try:
            sample = run.answer(unet, call, step, stock)
        except BaseException:
            run.forget()
            raise
        if self.layers.laid_out:
            sample = self.layers.give_back(sample, call["sample"])
        if call.get("return_dict", True):
            return output_of(type(unet))(sample=sample)
        return (sample,)

    def find_run(self, timestep: Any, device: torch.device) -> SamplingRun | None:
        """Return the run that a timestep belongs to: a live one, a new one of a patched pipeline, or None."""
        if not isinstance(timestep, Tensor):
            return None
        thread = threading.get_ident()
        with self._lock:
            self._runs = [run for run in self._runs if run.state.timesteps() is not None]
            for run in self._runs:
                if run.thread == thread and is_element(timestep, run.state.timesteps()):
                    return run
            asking = [s for s in self.settings if is_element(timestep, s.timesteps())]
            if not asking:
                asking = [s for s in self.settings if s.takes_any_time()][:1]
                for run in self._runs:
                    if run.thread == thread and run.settings == asking and run.state.timesteps() is run.schedule():
                        return run
            if asking:
                self.fuse_layers(self._unet(), again=False)  # it may have been moved or cast
                run = SamplingRun(asking, self._unet(), device, self._engines)
                self._runs.append(run)
                return run
        return None

    def _explain_unknown(self, timestep: Any) -> None:
        """Warn when a patched pipeline is probably meant but its schedule was not recognised."""
        if any(settings.pipe() is not None for settings in self.settings):
            warnings.warn(
                "difffast: this UNet call runs unpatched: its timestep is not an element of scheduler.timesteps of a "
                f"patched pipeline (got {type(timestep).__name__}), so its position in the schedule is unknown",
                stacklevel=4,
            )


@functools.cache
def override_unet(plain: type) -> dict[str, Any]:
    """Return the methods of patched UNets of a class; their calls go to their controllers."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # What the user compiles is the plain UNet; runs have its parts compiled alike.
        if torch.compiler.is_compiling() or _UNPATCHED.get() is self:
            return plain.__call__(self, *args, **kwargs)
        controller = find_controller(self)
        if controller is None:  # torch.compile keeps this very method of a UNet that is not patched any more
            return plain.__call__(self, *args, **kwargs)
        return controller(self, functools.partial(_run_unpatched, self, plain.__call__, self), args, kwargs)

    methods = {"__call__": call}
    if hasattr(plain, "process_encoder_hidden_states"):

        def process(self: nn.Module, encoder_hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            own = plain.process_encoder_hidden_states
            return process_text(self, encoder_hidden_states, lambda text: own(self, text, *args, **kwargs))

        methods["process_encoder_hidden_states"] = process
    return methods


@functools.cache
def override_compiled(plain: type) -> dict[str, Any]:
    """Return the methods of what ``torch.compile`` has made of patched UNets."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        unet = self._orig_mod
        stock = functools.partial(_run_unpatched, unet, plain.__call__, self)
        controller = find_controller(unet)
        return stock(*args, **kwargs) if controller is None else controller(unet, stock, args, kwargs)

    return {"__call__": call}


def _run_unpatched(unet: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return ``call(*args, **kwargs)``, with calls of ``unet`` inside as if it were not patched."""
    token = _UNPATCHED.set(unet)
    try:
        return call(*args, **kwargs)
    finally:
        _UNPATCHED.reset(token)


def find_controller(unet: nn.Module) -> Controller | None:
    """Return the controller of a patched UNet, or None."""
    return _controllers.get(unet)


def give_controller(unet: nn.Module) -> None:
    """Give a UNet a controller of its own."""
    _controllers[unet] = Controller(unet)


def drop_controller(unet: nn.Module) -> None:
    """Undo :func:`give_controller`."""
    _controllers.pop(unet, None)
    drop_contents(unet)


def _require_stock(unet: nn.Module, run: SamplingRun) -> str | None:
    """Return why a call must run the unpatched forward, or None."""
    if torch.is_grad_enabled():
        return "gradients are enabled (cached features would cut the graph); use torch.no_grad()"
    if unet.training and run.drops_values():
        return "the UNet is in training mode and has dropout; call unet.eval()"
    if unet._forward_hooks or unet._forward_pre_hooks:
        return "forward hooks are registered on the UNet itself and must see every call"
    return refuse_split(unet)
