"""One pass over a schedule: what its UNet calls depend on, and who answers them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.engine import choose_engine
from ..engines.graphs import Graphs
from ..engines.inputs import InputReader, apply_lora_scale
from ..engines.programs import Programs
from ..engines.user_compiled import has_compiled_parts
from ..layers.context import CallContext, Text, use_context
from ..layers.kind import ProgramCall
from ..layers.text_kv import TextKV
from ..support import denoiser_of
from ..unet.fingerprint import Fingerprint, Switches
from ..unet.parts import Execute, execute_eagerly
from .cfg_reuse import CfgHalves
from .controlnet import ControlOutputs
from .decode_ahead import DecodeAhead
from .extension import RunInfo
from .outer_layers import OuterLayers
from .position import count_steps, find_step, is_element
from .settings import Settings
from .state import RunState, Step
from .stats import RunStats
from .strategy import Strategy, WholeUNet


class SamplingRun:
    """One pass over a schedule.

    Args:
        settings: of the patched pipelines whose scheduler it is; if several, they want the same.
        unet: their UNet.
        device: where it runs.
        engines: what executes functions of the UNet, by name.
    """

    def __init__(
        self,
        settings: Sequence[Settings],
        unet: nn.Module,
        device: torch.device,
        engines: Mapping[str, Programs | Graphs],
    ) -> None:
        first = settings[0]
        scheduler = first.scheduler()
        timesteps = scheduler.timesteps
        self.settings = settings
        plan = first.resolve(len(timesteps), _count_denoising_steps(scheduler, timesteps), device)
        self.state = RunState(plan, RunStats(total=len(timesteps)), timesteps)
        self.fused = first.fused
        self.thread = threading.get_ident()
        self._following = first.find_user_compile()
        self._has_compiled_parts = self._following is not None or has_compiled_parts(unet)
        self._engine = self._choose_engine(first.engine, device, engines)
        for each in settings:
            each.last_run = self.state.stats
            each.adopt_scheduler()
        info = RunInfo(len(timesteps), self.fused, self.state.note)
        began = [extension.begin(info) for each in settings for extension in each.extensions]
        self._extensions = [each for each in began if each is not None]
        if device.type == "cpu":
            _keep_freed_memory()
        self._begin: int | None = None
        self._last: int | None = None
        self._fingerprint: Fingerprint | None = None
        self._switches = Switches(unet)
        self._text = denoiser_of(type(unet)).text
        self._texts: list[TextKV] = []  # of the texts seen last: the whole, and its half
        self._kv: TextKV | None = None  # of the call that is being answered
        self._inputs: InputReader | None = None
        self._changes = 0  # of the UNet, as graphs count them, that the inputs' layers were looked for after
        self._dropouts = [m for m in unet.modules() if type(m) is nn.Dropout and m.p > 0]
        self._control = ControlOutputs(self.state.stats.controlnet)
        self._cfg = CfgHalves(self.state, self._is_guided, self._wants_both)
        self._decode_alone(unet)
        self._strategy = self._choose_strategy()

    def _decode_alone(self, unet: nn.Module) -> None:
        """Decode one step at a time where attention mixes the samples of a batch: it would mix time steps as well."""
        coupled = _find_coupled_processor(unet)
        if coupled is not None and self.state.plan.max_batch != 1:
            self.state.plan = self.state.asked = replace(self.state.plan, max_batch=1)
            self.state.note(f"decoding one step at a time: attention processor {coupled} is not one of Diffusers' own")

    def _choose_engine(
        self, asked: str | None, device: torch.device, engines: Mapping[str, Programs | Graphs]
    ) -> Programs | Graphs | None:
        """Return what executes functions of the UNet; None: Python does."""
        #: Who is told that it cannot: whoever has asked for it is warned.
        self._tell = self.state.record if asked is None and self._following is None else self.state.note
        if asked is None and self._has_compiled_parts:
            return engines["inductor"] if self._following is not None else None
        return engines.get(choose_engine(asked, device))

    def _find_engine(self, unet: nn.Module) -> Programs | Graphs | None:
        """Return what executes the functions of a call, or None where Python does.

        It does where attention maps are wanted, which programs and graphs do not give.
        """
        if self._map_sinks() and (self._engine is not None or self._has_compiled_parts):
            self._tell("programs and graphs are not used while attention maps are collected")
            return None
        if self._engine is None:
            return None
        reason = self._engine.refuse(unet) if isinstance(self._engine, Graphs) else None
        if reason is not None:
            self._tell(f"no CUDA graphs: {reason}")
            return None
        return self._engine

    def _choose_strategy(self) -> Strategy:
        if self.state.plan.reuse is not None:
            return OuterLayers(self.state)
        if len(self.state.plan.key_steps) == self.state.plan.total:
            return WholeUNet(self.state)
        return DecodeAhead(self.state, self.settings[0].propagation)

    def step_of(self, timestep: Tensor) -> int:
        """Return the position of a time in the schedule: 0 where it is not known, which only exact plans take."""
        if is_element(timestep, self.state.timesteps()):
            return find_step(timestep, self.state.timesteps())
        return count_steps(self.scheduler()) if self.settings[0].support.counts else 0

    def schedule(self) -> Tensor | None:
        """Return the schedule of its pipeline as of now, which may be another one."""
        return self.settings[0].timesteps()

    def scheduler(self) -> Any:
        """Return the scheduler whose schedule it is."""
        return self.settings[0].scheduler()

    def drops_values(self) -> bool:
        """Return whether any dropout is active: training mode alone, as of AnimateDiff's UNets, changes nothing."""
        return any(dropout.training for dropout in self._dropouts)

    def forget(self) -> None:
        """Drop the features; ControlNet's outputs stay, which were made for the step that is being answered."""
        self._fingerprint, self._last = None, None
        self._strategy.forget()

    def note_stock(self, reason: str) -> None:
        """Count a call that runs the unpatched forward, and forget what it may invalidate."""
        self.forget()
        self.state.stats.stock += 1
        self.state.note(f"stock forward: {reason}")

    def edit_call(self, call: Mapping[str, Any], step: int, stock: Callable[..., Any]) -> Mapping[str, Any]:
        """Return the call as the extensions have it."""
        for extension in self._extensions:
            call = extension.edit_call(call, step, self.scheduler(), self._uncompile(stock))
        return call

    def show_layers(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``stock``, eager where attention maps are wanted."""
        return self._uncompile(stock) if self._map_sinks() else stock

    def _uncompile(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``stock`` without what the user has compiled of the UNet: layers in there hand nothing out."""
        if not self._has_compiled_parts:
            return stock

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return stock(*args, **kwargs)

        return run

    def control(self, call: Mapping[str, Any], stock: Callable[[], Any]) -> Any:
        """Return ControlNet's outputs for the UNet call that follows: made anew where that is a key step.

        Args:
            call: arguments of the ControlNet by name.
            stock: runs it.
        """
        step = self.step_of(call["timestep"])
        goes_on = not self.state.restart and self._last is not None and step == self._last + 1
        output, change = self._control.answer(call, step, goes_on and not self.state.plan.is_key(step), stock)
        if change is not None:
            self.state.restart = True
            self.state.record(f"key step at {step}: ControlNet's {change} changed")
        return output

    def refuse_residuals(self, call: Mapping[str, Any], step: int) -> str | None:
        """Return why the residuals of a call cannot belong to the features of another step, or None."""
        return None if self.settings[0].support.exact_only else self._control.refuse(call, step)

    def make_context(
        self, call: Mapping[str, Any], *, stock: bool, engine: Programs | Graphs | None = None
    ) -> CallContext | None:
        """Return what a call allows its layers; in a stock call, attention maps alone.

        Args:
            call: the arguments of the UNet call by name.
            stock: whether the UNet's own forward runs.
            engine: what executes the call.
        """
        fused = self.fused and not stock
        sinks = self._map_sinks()
        if not (fused or sinks):
            return None
        sample = call["sample"]
        text = self._read_text(call.get("encoder_hidden_states"), sample, stock=stock)
        if engine is not None:
            text = None  # programs and graphs get text keys and values as inputs
        return CallContext(fused, self.state.note, self.state.record, text, sinks, tuple(sample.shape[-2:]))

    def _read_text(self, text: Any, sample: Tensor, *, stock: bool) -> Text | None:
        if not isinstance(text, Tensor) or self._text == "extended":
            return None
        frames = max(1, text.shape[0] // sample.shape[0])  # the text of a video may have a row for each
        self._kv = self._find_kv(text, frames)
        seen = None if self._text == "repeated" and not stock else text
        kv = None if torch.is_grad_enabled() else self._kv  # remembered ones would cut the graph
        return Text(seen, text, kv, frames=frames)

    def _find_kv(self, text: Tensor, frames: int) -> TextKV:
        for kv in self._texts:
            if kv.belongs_to(text):
                return kv
        self._texts = [TextKV(text, self.state.stats.text_kv, frames), *self._texts[:1]]
        return self._texts[0]

    def _map_sinks(self) -> tuple[Any, ...]:
        return tuple([sink for each in self.settings for sink in each.map_sinks()])

    def _is_guided(self) -> bool:
        """Return whether the UNet's batch is [unconditional, conditional] at this step."""
        return getattr(self.settings[0].pipe(), "do_classifier_free_guidance", False)

    def _wants_both(self) -> str | None:
        return "attention maps of both are collected" if self._map_sinks() else None

    def answer(self, unet: nn.Module, call: Mapping[str, Any], index: int, stock: Callable[..., Any]) -> Tensor:
        """Return the UNet's output at a step, from what earlier steps have left where the plan says so.

        Args:
            stock: the unpatched UNet, called with arguments by name.
        """
        self._follow(index)
        self._compare(call, index)
        ahead = self._strategy.recall(index)
        if ahead is not None:
            return self._finish(index, *ahead)
        half = self._cfg.runs_half(index)
        if half:
            call = self._cfg.prepare(call)

        def run_stock() -> Tensor:
            return stock(**{**call, "return_dict": False})[0]

        engine = self._find_engine(unet)
        with use_context(self.make_context(call, stock=False, engine=engine)):
            execute, prepared = self._prepare(unet, call, engine)
            follows = self._following is not None and self.settings[0].engine is None
            predict = self.show_layers(self._strategy.predict)
            output = predict(Step(index, unet, prepared, execute, run_stock, half, follows))
        return self._finish(index, half, output)

    def _compare(self, call: Mapping[str, Any], index: int) -> None:
        """Forget what belongs to other conditioning, or to a step that is not the one before."""
        fingerprint = Fingerprint(call, self._switches.read(), self.settings[0].support.remakes)
        change = fingerprint.find_change(self._fingerprint) if self._fingerprint is not None else None
        follows = self._last is not None and index == self._last + 1
        if change is not None and follows and not self.state.plan.is_key(index):
            self.state.record(f"key step at {index}: {change} changed")
        if self.state.restart or not follows or change is not None:
            self.forget()
            self.state.restart = False
            self._cfg.restart(index)
        if self._fingerprint is None:
            self._fingerprint = fingerprint
        self._last = index

    def _follow(self, index: int) -> None:
        """Fit the plan to what the sampling loop is seen to do."""
        state = self.state
        if self._begin is None:
            self._begin = index
            executed = getattr(self.settings[0].pipe(), "_num_timesteps", None)
            if len(self.settings) == 1 and isinstance(executed, int) and 0 < index + executed < state.plan.total:
                state.plan = state.plan.cut(index + executed)  # e.g. denoising_end: nothing is decoded beyond it
        if index >= state.plan.total:
            state.plan = state.asked
        if index == self._last and (len(state.plan.key_steps) < state.plan.total or state.plan.halves):
            # The views of a panorama, or self-attention guidance: features of one call would meet another's latents.
            state.plan = replace(state.plan, key_steps=tuple(range(state.plan.total)), full_steps=(), halves=())
            state.note("every step is a key step: the UNet is called several times a step")

    def _prepare(
        self, unet: nn.Module, call: Mapping[str, Any], engine: Programs | Graphs | None
    ) -> tuple[Execute, Mapping[str, Any]]:
        """Return what executes the functions of this call, and the call as they take it."""
        if engine is None:
            return execute_eagerly, call
        changes = engine.changes if isinstance(engine, Graphs) else 0
        if self._inputs is None or self._changes != changes:
            self._inputs, self._changes = InputReader(unet), changes
        with apply_lora_scale(unet, call) as call:
            inputs = self._inputs.read(ProgramCall(unet, call, self.fused, self._kv))
        options = {} if isinstance(engine, Graphs) else {"following": self._following}
        return functools.partial(engine.run, inputs, self._tell, **options), call

    def _finish(self, index: int, half: bool, output: Tensor) -> Tensor:
        """Return what the pipeline gets; at the last step, drop everything."""
        output = self._cfg.complete(half, output)
        if index == self.state.plan.total - 1:
            self.forget()
            self._control.forget()
            self._cfg.forget()
            self._texts, self._kv = [], None
        return output


def _count_denoising_steps(scheduler: Any, timesteps: Tensor) -> int:
    """Return the denoising steps of the schedule; second-order schedulers call the UNet about twice for each."""
    steps = getattr(scheduler, "num_inference_steps", None)
    return steps if isinstance(steps, int) else len(timesteps)


@functools.cache
def _keep_freed_memory() -> None:
    """Once per process: let glibc's malloc keep what decoder batches free, instead of handing it back each time.

    Freeing one block just below 32 MiB makes glibc raise its mmap and trim thresholds, as any program with large
    tensors does sooner or later.  Measured on a (64, 128, 192) UNet at 32x32: 270,000 page faults an image become
    none, and time inside the UNet 0.68 of stock becomes 0.61 to 0.64.  Other allocators are not affected.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _find_coupled_processor(unet: nn.Module) -> str | None:
    """Return the name of an attention processor that is not Diffusers' own and may therefore mix samples, or None."""
    for processor in getattr(unet, "attn_processors", {}).values():
        if not type(processor).__module__.startswith("diffusers.models."):
            return type(processor).__qualname__
    return None
