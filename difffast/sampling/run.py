"""One pass over a schedule: what its UNet calls depend on, and who answers them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.context import AttentionEdit, CallContext, Text, use_context
from ..layers.kind import ProgramCall
from ..layers.text_kv import LatestTexts, TextKV
from ..ops._dispatch import describe_unforced
from ..plan import MIN_STEPS, EncoderPropagation
from ..support import denoiser_of
from ..unet.contents import contents_of
from ..unet.fingerprint import Fingerprint
from .calls import find_pipeline_call
from .cfg_reuse import CfgHalves
from .conditioning import Conditioning, check_rows
from .controlnet import ControlOutputs
from .decode_ahead import DecodeAhead
from .execution import Engine, Execution
from .extension import RunInfo
from .forecasts import Forecasts
from .memory import keep_freed_memory
from .outer_layers import OuterLayers
from .passes import Passes
from .position import count_steps, find_step, is_element
from .rows import Rows
from .schedule import count_denoising_steps
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
        engines: Mapping[str, Engine],
    ) -> None:
        first = settings[0]
        scheduler = first.scheduler()
        timesteps = scheduler.timesteps
        self.settings, self._device = settings, device
        self.state = RunState(first.plan(len(timesteps), device), RunStats(total=len(timesteps)), timesteps)
        self.fused = first.fused
        self.thread = threading.get_ident()
        user = first.find_user_compile()
        self._contents = contents_of(unet)
        self._looks = self._contents.look()
        self._execution = Execution(self.state, first.engine, first.precision, user, engines, unet, device)
        for each in settings:
            each.last_run = self.state.stats
            each.adopt_scheduler()
        unforced = describe_unforced()
        if self.fused and unforced:
            self.state.record(unforced)
        info = RunInfo(len(timesteps), self.fused, self.state.note)
        if first.division is not None:
            self.state.division = first.division.begin(info, self.state.stats.exchanged, self.state.record)
        began = [extension.begin(info) for each in settings for extension in each.extensions]
        self._extensions = [each for each in began if each is not None]
        if device.type == "cpu":
            keep_freed_memory()
        self._last: int | None = None  # step that was answered
        self._seen: int | None = None  # step, answered or run stock
        self._fingerprint: Fingerprint | None = None
        remakes = first.support.remakes
        self._conditioning, self._controlled = Conditioning(remakes), Conditioning(remakes)
        self._text = denoiser_of(type(unet)).text
        self._texts = LatestTexts(self.state.stats.text_kv)
        self._passes = Passes()
        self._edit: AttentionEdit | None = None  # of the call that is being answered
        self._kv: TextKV | None = None  # of the call that is being answered
        self._dropouts = [m for m in self._contents.modules if type(m) is nn.Dropout and m.p > 0]
        self._control = ControlOutputs(self.state.stats.controlnet)
        self._rows = Rows(settings, self._find_pipe)
        self._cfg = CfgHalves(self.state, self._rows.refuse_halves, self._wants_both)
        noise = first.read_schedule(len(timesteps)).noise if self.state.plan.guard is not None else None
        self._forecasts = Forecasts(self.state, self._rows.count_pictures, noise)
        self.finished = False
        self._steps = count_denoising_steps(scheduler, timesteps)
        self._plan_from(0)
        self._strategy = self._choose_strategy()
        self._pipeline_call = find_pipeline_call()
        if self._pipeline_call is not None:
            self._pipeline_call.add(self)

    def _respect_contents(self) -> None:
        """Fit the plan to what is in the UNet: others' code runs as it would in the stock loop."""
        foreign, coupled = self._contents.foreign, self._contents.coupled
        if self.fused and self._contents.replaced is not None:
            self.state.note(f"no layer is fused: {self._contents.replaced}")
        if foreign is not None:
            self._run_every_step(foreign)
        elif coupled is not None and self.state.plan.max_batch != 1:
            # Attention that mixes the samples of a batch would mix time steps as well.
            self.state.plan = self.state.asked = replace(self.state.plan, max_batch=1)
            self.state.note(f"decoding one step at a time: attention processor {coupled} may mix samples")

    def _run_every_step(self, reason: str) -> None:
        """Run every step of the plan in full, on whole batches, from now on."""
        state = self.state
        if state.plan.shares:
            state.plan, state.asked = state.plan.run_in_full(), state.asked.run_in_full()
            state.note(f"every step is a key step: {reason}")

    def _choose_strategy(self) -> Strategy:
        if self.state.plan.reuse is not None:
            return OuterLayers(self.state)
        plan = self.state.plan
        if len(plan.key_steps) + len(plan.forecasts) == plan.total - plan.start:
            return WholeUNet(self.state)
        asked = self.settings[0].propagation
        return DecodeAhead(self.state, asked if isinstance(asked, EncoderPropagation) else EncoderPropagation())

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

    def end(self) -> None:
        """Drop all that the run has kept; a step that still comes is a key step."""
        self.forget()
        self._control.forget()
        self._cfg.forget()
        self._conditioning.forget()
        self._controlled.forget()
        self._kv, self._edit = None, None
        self._passes.begin()
        self._compare_anew()

    def _compare_anew(self) -> None:
        """Trust nothing that was made of weights, which may have been written past PyTorch's count of versions."""
        self._texts.forget()
        self._execution.distrust()

    def forget(self) -> None:
        """Drop the features; ControlNet's outputs stay, which were made for the step that is being answered."""
        self._fingerprint, self._last = None, None
        self._strategy.forget()
        self._forecasts.forget()

    def note_stock(self, reason: str, index: int) -> None:
        """Count a call at a step that runs the unpatched forward, and forget what it may invalidate."""
        self._follow(index)
        if self._passes.follow(index, None, self._contents.merges):
            self._compare_anew()
        self.forget()
        self.state.stats.stock += 1
        self.state.note(f"stock forward: {reason}")

    def edit_call(self, call: Mapping[str, Any], step: int, stock: Callable[..., Any]) -> Mapping[str, Any]:
        """Return the call as the extensions have it."""
        for extension in self._extensions:
            call = extension.edit_call(call, step, self.scheduler(), self._execution.uncompile(stock))
        edits = [edit for each in self._extensions if (edit := each.attention(step)) is not None]
        if len(edits) > 1:
            names = " and ".join(type(edit).__name__ for edit in edits)
            raise RuntimeError(f"one method at a time can edit attention, got {names} at step {step}")
        self._edit = edits[0] if edits else None
        return call

    def show_layers(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``stock``, eager where something is wanted of single layers."""
        return self._execution.uncompile(stock) if self._name_watch() else stock

    def _name_watch(self) -> str:
        """Return what is wanted of single layers, as text, or nothing."""
        if self._edit is not None:
            return "attention is edited"
        return "attention maps are collected" if self._map_sinks() else ""

    def control(self, call: Mapping[str, Any], stock: Callable[[], Any]) -> Any:
        """Return ControlNet's outputs for the UNet call that follows: where it builds on earlier ones, perhaps theirs.

        Args:
            call: arguments of the ControlNet by name.
            stock: runs it.
        """
        step = self.step_of(call["timestep"])
        self._forecasts.heed_guard(step)
        goes_on = not self.state.restart and self._last is not None and step == self._last + 1
        builds = goes_on and not self.state.plan.is_key(step) and self._contents.look() == self._looks
        # Where the output is forecast, nothing takes ControlNet's.
        reuse = self.settings[0].controlnet == "key steps" or self.state.plan.is_forecast(step)
        call = self._controlled.settle(call, key=not builds)
        identity = self._controlled.identify(call)
        output, change = self._control.answer(identity, step, builds=builds, reuse=reuse, stock=stock)
        if change is not None:
            self.state.restart = True
            self.state.record(f"key step at {step}: ControlNet's {change} changed")
        return output

    def refuse_residuals(self, call: Mapping[str, Any], step: int) -> str | None:
        """Return why the residuals of a call cannot belong to the features of another step, or None."""
        return None if self.settings[0].support.exact_only else self._control.refuse(call, step)

    def make_context(self, call: Mapping[str, Any], *, stock: bool, engine: Engine | None = None) -> CallContext | None:
        """Return what a call allows its layers; in a stock call, attention maps alone.

        Args:
            call: the arguments of the UNet call by name.
            stock: whether the UNet's own forward runs.
            engine: what executes the call.
        """
        fused = self.fused and not stock and self._contents.replaced is None
        sinks = self._map_sinks()
        if not (fused or sinks or self._edit is not None):
            return None
        sample = call["sample"]
        if fused and self._text == "given":
            check_rows(call.get("encoder_hidden_states"), sample)
        text = self._read_text(call.get("encoder_hidden_states"), sample, stock=stock)
        if engine is not None:
            text = None  # programs and graphs get text keys and values as inputs
        size = tuple(sample.shape[-2:])
        within = self._passes.current
        return CallContext(fused, self.state.note, self.state.record, text, sinks, size, edit=self._edit, within=within)

    def _read_text(self, text: Any, sample: Tensor, *, stock: bool) -> Text | None:
        if not isinstance(text, Tensor) or self._text == "extended":
            return None
        frames = max(1, text.shape[0] // sample.shape[0])  # the text of a video may have a row for each
        self._kv = self._texts.find(text, frames)
        seen = None if self._text == "repeated" and not stock else text
        kv = None if torch.is_grad_enabled() else self._kv  # remembered ones would cut the graph
        return Text(seen, text, kv, frames=frames)

    def _map_sinks(self) -> tuple[Any, ...]:
        return tuple([sink for each in self.settings for sink in each.map_sinks()])

    def _find_pipe(self) -> Any:
        """Return the patched pipeline whose loop makes this run's calls, or None where that is not known."""
        running = find_pipeline_call()
        if running is None or running is not self._pipeline_call or not running.speaks_of(self):
            return None
        return running.pipe()

    def _wants_both(self) -> str | None:
        return "attention maps of both are collected" if self._map_sinks() else None

    def answer(self, unet: nn.Module, call: Mapping[str, Any], index: int, stock: Callable[..., Any]) -> Tensor:
        """Return the UNet's output at a step, from what earlier steps have left where the plan says so.

        Args:
            stock: the unpatched UNet, called with arguments by name.
        """
        self._follow(index)
        self._forecasts.heed_guard(index)
        given = call = self._conditioning.settle(call, key=self.state.plan.is_key(index))
        self._compare(call, index)
        for extension in self._extensions:
            known = extension.replace_output(index)
            if known is not None:
                return self._finish(index, False, known, given)
        ahead = self._strategy.recall(index)
        if ahead is not None:
            return self._finish(index, ahead[0], self.state.join(ahead[1]), given)
        forecast = self._forecasts.answer(index)
        if forecast is not None:
            return self._end(index, forecast)
        if half := self._cfg.runs_half(index, call):
            call = self._cfg.prepare(call)
        if self.state.division is not None:
            reason = self._rows.refuse_halves(call) or self._name_watch() or None
            self.state.division.compare(given["sample"], index)
            call, changed = self.state.division.take_half(call, reason)
            if changed:
                self._strategy.forget()  # features and outputs of other rows

        def run_stock() -> Tensor:
            return stock(**{**call, "return_dict": False})[0]

        engine = self._execution.find_engine(unet, self._contents.foreign, watched=self._name_watch())
        fused = self.fused and self._contents.replaced is None
        with use_context(self.make_context(call, stock=False, engine=engine)):
            execute, prepared = self._execution.prepare(ProgramCall(unet, call, fused, self._kv), engine)
            follows = self._execution.follows_user
            predict = self.show_layers(self._strategy.predict)
            output = predict(Step(index, unet, prepared, execute, run_stock, half, follows))
        return self._finish(index, half, self.state.join(output), given)

    def _compare(self, call: Mapping[str, Any], index: int) -> None:
        """Forget what belongs to other conditioning, or to a step that is not the one before."""
        fingerprint = Fingerprint(self._conditioning.identify(call))
        change = None if self._fingerprint is None else fingerprint.find_change(self._fingerprint)
        seen = self._contents.look()
        if self._passes.follow(index, call.get("encoder_hidden_states"), self._contents.merges):
            self._compare_anew()
        if seen != self._looks:
            change, self._looks = change or self._contents.name_change(self._looks), seen
            self._respect_contents()
        follows = self._last is not None and index == self._last + 1
        if change is not None and follows and not self.state.plan.is_key(index):
            self.state.record(f"key step at {index}: {change} changed")
        self._watch_changes(change, index)
        if self.state.restart or not follows or change is not None:
            self.forget()
            self.state.restart = False
            self._cfg.restart(index)
        if self._fingerprint is None:
            self._fingerprint = fingerprint
        self._last = index

    def _watch_changes(self, change: str | None, index: int) -> None:
        """Decode nothing ahead at a step whose conditioning is new: the next one's may be as well."""
        if self._conditioning.remade is not None:
            name = self._conditioning.remade
            self.state.record(f"{name} is made anew at every step with equal values, which are compared")
        if index in self.state.plan.full_steps:
            return  # changed on purpose
        if change is not None and self.state.alone and self.state.plan.shares:
            self.state.note(f"{change} changes at every step, so that steps share nothing; give the same one again")
        self.state.alone = change is not None

    def _follow(self, index: int) -> None:
        """Fit the plan to what the sampling loop is seen to do."""
        state, before = self.state, self._seen
        self._seen = index
        if before is None or index not in (before + 1, self._last):  # the first step, or another loop over the same
            if index != state.plan.start:
                self._plan_from(index)
            executed = getattr(self._find_pipe(), "_num_timesteps", None)
            if before is None and isinstance(executed, int) and 0 < index + executed < state.plan.total:
                state.plan = state.plan.cut(index + executed)  # e.g. denoising_end: nothing is decoded beyond it
        if index >= state.plan.total:
            state.plan = state.asked
        if index == self._last:
            # The views of a panorama, or self-attention guidance: features of one call would meet another's latents.
            self._run_every_step("the UNet is called several times a step")

    def _plan_from(self, index: int) -> None:
        """Take the plan of a run that begins at a step, and say why it shares nothing although it was asked to."""
        state, first = self.state, self.settings[0]
        plan, reason = first.resolve(state.stats.total, self._steps, self._device, index)
        state.plan = state.asked = replace(plan, max_batch=min(plan.max_batch, state.plan.max_batch))
        if reason is not None:
            # Longer schedules are run in full by the preset's own choice.
            loud = self._steps < MIN_STEPS and not first.warned
            first.warned |= loud
            (state.note if loud else state.record)(reason)
        self._respect_contents()

    def _finish(self, index: int, half: bool, output: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Return what the pipeline gets of what the UNet has returned."""
        output = self._cfg.complete(half, output, call)
        return self._end(index, self._forecasts.learn(index, output, call))

    def _end(self, index: int, output: Tensor) -> Tensor:
        """Return the output; at the last step, drop everything."""
        for extension in self._extensions:
            extension.see_output(index, output)
        self.finished = index == self.state.plan.total - 1
        if self.finished:
            self.end()
        return output
