"""One pass over a schedule: how each of its UNet calls is answered, and what is kept in between.

Encoder propagation: at a key step the encoder runs, and the segment up to the next key step is decoded and queued; the
following calls are served from the queue.  Feature reuse: at a key step the whole UNet runs, at the others its outer
layers.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from . import attention, decoder
from . import unet as split
from .conditioning import RESIDUALS, Conditioning, Switches
from .programs import Inputs, Programs, scaled
from .support import denoiser_of

if TYPE_CHECKING:
    from .propagation import Settings


@dataclass
class RunStats:
    """What happened to the UNet calls of one run.

    Attributes:
        total: UNet calls in the schedule.
        key: calls that ran the encoder.
        propagated: calls answered from cached encoder features.
        reused: calls that ran the outer layers alone.
        halves: calls, of any of these kinds, that ran guidance's conditional half alone.
        stock: calls that ran the unpatched forward on purpose, with the reasons in ``reasons``.
        forced: key steps that the plan did not ask for (run entered late, conditioning or shape changed).
        decode_batches: sizes of the decoder batches, in order.
        unshared: up-resnets whose skip parts were computed at every step, with the reason.
        text_keys: how often a cross-attention layer's text keys and values were "computed" and "reused".
        controlnet: how often ControlNet's outputs were "computed" and "reused".
        reasons: what fell back, or was forced, and why.
    """

    total: int
    key: int = 0
    propagated: int = 0
    reused: int = 0
    halves: int = 0
    stock: int = 0
    forced: int = 0
    decode_batches: list[int] = field(default_factory=list)
    unshared: dict[str, str] = field(default_factory=dict)
    text_keys: Counter[str] = field(default_factory=Counter)
    controlnet: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = (
            f"{self.key} key steps ({self.forced} forced), {self.propagated} propagated, {self.reused} reused, "
            f"{self.stock} stock of {self.total}; decoder batches {self.decode_batches}; text keys and values computed "
            f"{self.text_keys['computed']} times, reused {self.text_keys['reused']} times"
        )
        if self.controlnet:
            counts = self.controlnet
            text += f"; ControlNet computed {counts['computed']} times, reused {counts['reused']} times"
        if self.halves:
            text += f"; guidance's conditional half alone {self.halves} times"
        unshared = (f"{name} does not share its skip: {reason}" for name, reason in self.unshared.items())
        return "\n  ".join([text, *self.reasons, *unshared])


@dataclass
class _Control:
    """What ControlNet returned at the last key step, and the latest step that it was returned for."""

    conditioning: Conditioning
    order: int
    output: Any


class Run:
    """One pass over a schedule: cached features, decoded outputs waiting, and the conditioning they belong to."""

    def __init__(self, settings: Sequence[Settings], unet: nn.Module, device: torch.device, programs: Programs) -> None:
        """``settings``: of the patched pipelines whose scheduler it is; if several, they want the same."""
        scheduler = settings[0].scheduler()
        timesteps = scheduler.timesteps
        self.settings = settings
        self.plan = settings[0].resolve(len(timesteps), _denoising_steps(scheduler, timesteps), device)
        self._resolved = self.plan
        self.fused = settings[0].fused
        self.text = denoiser_of(type(unet)).text
        self._programs = programs if settings[0].compiled else None
        self.stats = RunStats(total=len(timesteps))
        for each in settings:
            each.last_run = self.stats
            each.adopt_scheduler()
            for maps in each.collectors:
                maps.reset()
        binder = settings[0].binding
        self.binding = binder.start(len(timesteps), self.fused, self.note) if binder is not None else None
        if device.type == "cpu":
            _keep_freed_memory()
        self._timesteps = TensorWeakRef(timesteps)
        self.thread = threading.get_ident()
        self.restart = False
        self._begin: int | None = None
        self._last: int | None = None
        self._features: split.Features | None = None
        self._queue: dict[int, tuple[bool, Tensor]] = {}  # order -> (is it the conditional half alone, output)
        self._deep: list[tuple[int, Tensor, int]] = []  # (order, deep feature, batch) of key steps, latest first
        self._known: list[tuple[int, split.Features]] = []  # (order, features) of key steps, to extrapolate over
        self._conditioning: Conditioning | None = None
        self._switches = Switches(unet)
        self._control: _Control | None = None
        self._text_keys: list[attention.TextKeys] = []  # of the texts seen last: the whole, and its half
        self._keys: attention.TextKeys | None = None  # of the call that is being answered
        self._half_text: tuple[Tensor, Tensor] | None = None
        self._difference: Tensor | None = None  # of guidance's halves, at the last step that ran both
        self._both_until = 0  # before this step both run, whatever the plan says: it begins with a forced key step
        self._inputs: Inputs | None = None
        self._dropouts = [m for m in unet.modules() if type(m) is nn.Dropout and m.p > 0]
        coupled = _coupled_processor(unet)
        if coupled is not None and self.plan.max_batch != 1:
            # Attention that mixes samples of a batch would mix time steps as well.
            self.plan = self._resolved = replace(self.plan, max_batch=1)
            self.note(f"decoding one step at a time: attention processor {coupled} is not one of Diffusers' own")

    def timesteps(self) -> Tensor | None:
        """The schedule while anything but this run still holds it: a new schedule ends the run and frees it."""
        return self._timesteps()

    def order(self, timestep: Tensor) -> int:
        """Position of a view of the schedule, from its storage offset."""
        timesteps = self.timesteps()
        return (timestep.storage_offset() - timesteps.storage_offset()) // max(timesteps.stride(0), 1)

    def scheduler(self) -> Any:
        """The scheduler whose schedule it is."""
        return self.settings[0].scheduler()

    def drops_values(self) -> bool:
        """Whether any dropout is active: training mode alone changes nothing, and AnimateDiff's UNets are in it."""
        return any(dropout.training for dropout in self._dropouts)

    def clear(self) -> None:
        """Forget the features; ControlNet's outputs stay, which were made for the step that is being answered."""
        self._features, self._conditioning, self._last = None, None, None
        self._queue.clear()
        self._deep.clear()
        self._known.clear()

    def control(self, call: Mapping[str, Any], stock: Callable[[], Any]) -> Any:
        """ControlNet's outputs for the UNet call that follows: made anew where that is a key step.

        Args:
            call: arguments of the ControlNet by name.
            stock: runs it.
        """
        order = self.order(call["timestep"])
        conditioning = Conditioning(call)
        held = self._control
        goes_on = not self.restart and self._last is not None and order == self._last + 1
        if held is not None and goes_on and not self.plan.is_key(order):
            change = conditioning.change(held.conditioning)
            if change is None:
                held.order = order
                self.stats.controlnet["reused"] += 1
                return held.output
            self.restart = True
            self.record(f"key step at {order}: ControlNet's {change} changed")
        output = stock()
        self._control = _Control(conditioning, order, output)
        self.stats.controlnet["computed"] += 1
        return output

    def foreign_residuals(self, call: Mapping[str, Any], order: int) -> str | None:
        """Why the residuals of a call cannot belong to the features of another step, or None."""
        down, mid, _ = (call.get(name) for name in RESIDUALS)
        if down is None and mid is None:
            return None
        if self._control is None or self._control.order != order:
            return "residuals are given that are not of the patched pipeline's own ControlNet"
        if down is None or mid is None:
            return "residuals are given for the skips or the middle only"
        return None

    def labelled(self, text: Tensor, sample: Tensor, *, stock: bool) -> Tensor:
        """The text tensor as the call's cross-attention layers shall see it; in a stock call, only maps are collected.

        Programs do not see labels: they get text keys and values as inputs.
        """
        fused = self.fused and not stock
        collectors = tuple(maps for each in self.settings for maps in each.collectors)
        if self.text == "extended" or not (fused or collectors):
            return text
        frames = max(1, text.shape[0] // sample.shape[0])  # the text of a video may have a row for each
        found = self._keys = self._keys_of(text, frames)
        if self._programs is not None and not collectors:
            return text
        keys = None if torch.is_grad_enabled() else found  # remembered ones would cut the graph
        height, width = sample.shape[-2:]
        label = attention.Label(fused, text, 1, keys, collectors, (height, width), self.note, frames=frames)
        return attention.labelled(text, label)

    def _keys_of(self, text: Tensor, frames: int) -> attention.TextKeys:
        for keys in self._text_keys:
            if keys.belong_to(text):
                return keys
        self._text_keys = [attention.TextKeys(text, self.stats.text_keys, frames), *self._text_keys[:1]]
        return self._text_keys[0]

    def _half_of(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The call on guidance's conditional half; the text's half is the same tensor at every step."""
        half = split.conditional_half(dict(call), call["sample"].shape[0])
        text = call.get("encoder_hidden_states")
        if isinstance(text, Tensor):
            if self._half_text is None or self._half_text[0] is not text:
                self._half_text = (text, half["encoder_hidden_states"])
            half["encoder_hidden_states"] = self._half_text[1]
        return half

    def _runs_half(self, order: int) -> bool:
        """Whether this step runs guidance's conditional half alone."""
        if not self.plan.is_half(order) or order < self._both_until:
            return False
        reason = None
        if not self._guided():
            reason = "guidance is off"
        elif any(each.collectors for each in self.settings):
            reason = "attention maps of both are collected"
        if reason is not None:
            self.record(f"guidance's halves run together: {reason}")
        return reason is None and self._difference is not None

    def _guided(self) -> bool:
        """Whether the UNet's batch is [unconditional, conditional] at this step."""
        return getattr(self.settings[0].pipe(), "do_classifier_free_guidance", False)

    def answer(
        self, unet: nn.Module, call: Mapping[str, Any], text: Any, order: int, stock: Callable[[], Tensor]
    ) -> Tensor:
        """The UNet's output at this order: from the queue, or by decoding, after encoding where needed.

        ``text`` replaces the call's, which identifies the conditioning.
        """
        conditioning = Conditioning(call, self._switches.state())
        self._follow(order)
        change = conditioning.change(self._conditioning) if self._conditioning is not None else None
        if change is not None and order == self._last + 1 and not self.plan.is_key(order):
            self.record(f"key step at {order}: {change} changed")
        if self.restart or self._last is None or order != self._last + 1 or change is not None:
            self.clear()
            self.restart = False
            if self.plan.is_half(order):
                self._both_until = self.plan.segment_end(order)
        self._last = order
        if order in self._queue:
            self.stats.propagated += 1
            return self._finish(order, *self._queue.pop(order))
        half = self._runs_half(order)
        if half:
            call = self._half_of(call)
            if isinstance(text, Tensor):
                text = self.labelled(call["encoder_hidden_states"], call["sample"], stock=False)
        if text is not None:
            call = {**call, "encoder_hidden_states": text}
        if half:
            stock = functools.partial(split.run_whole, unet, call)
        with attention.over_copies(text if self.text == "repeated" else None):
            return self._finish(order, half, self._output(unet, call, conditioning, order, half, stock))

    def _output(
        self,
        unet: nn.Module,
        call: Mapping[str, Any],
        conditioning: Conditioning,
        order: int,
        half: bool,
        stock: Callable[[], Tensor],
    ) -> Tensor:
        """What the UNet gives for this call; steps that are decoded with it are queued."""
        self._conditioning = conditioning
        run, prepared = self._runner(unet, call)
        if self.plan.reuse is not None:
            return self._whole_or_reuse(unet, prepared, order, run, stock)
        if self._features is None or self.plan.is_key(order):
            self._features = None
            self.stats.key += 1
            self.stats.forced += not self.plan.is_key(order)
            if self.plan.segment_end(order) == order + 1:
                return stock() if run is split.directly else run(split.run_whole, unet, prepared)
            config = self.settings[0].propagation
            share = config.share_skips and not config.order
            self._features = split.encode(unet, prepared, share=share, run=run)
            self._remember(order, config.order)
            self.stats.unshared.update(self._features.unshared)
        else:
            self.stats.propagated += 1
        output, *others = self._decode(unet, prepared, order, run)
        self._queue.update((order + 1 + i, (half, other)) for i, other in enumerate(others))
        return output

    def _follow(self, order: int) -> None:
        """Fit the plan to what the sampling loop is seen to do."""
        if self._begin is None:
            self._begin = order
            executed = getattr(self.settings[0].pipe(), "_num_timesteps", None)
            if len(self.settings) == 1 and isinstance(executed, int) and 0 < order + executed < self.plan.total:
                self.plan = self.plan.until(order + executed)  # e.g. denoising_end: nothing is decoded beyond it
        if order >= self.plan.total:
            self.plan = self._resolved
        if order == self._last and (len(self.plan.keys) < self.plan.total or self.plan.halves):
            # The views of a panorama, or self-attention guidance: features of one call would meet another's latents.
            self.plan = replace(self.plan, keys=tuple(range(self.plan.total)), optimised=(), halves=())
            self.note("every step is a key step: the UNet is called several times a step")

    def _whole_or_reuse(
        self,
        unet: nn.Module,
        call: Mapping[str, Any],
        order: int,
        run: split.Run,
        stock: Callable[[], Tensor],
    ) -> Tensor:
        reason = decoder.freeu_reason(unet)
        if reason is not None:
            self.note_stock(f"features cannot be reused: {reason}")
            return stock()
        reuse, rows = self.plan.reuse, call["sample"].shape[0]
        if self._deep and not self.plan.is_key(order):
            self.stats.reused += 1
            deep = [x if batch == rows else split.conditional_half(x, batch) for _, x, batch in self._deep]
            weights = _extrapolation([held for held, *_ in self._deep], order, deep[0].device)
            return run(split.run_reuse, unet, call, deep, weights, reuse.branch)
        self.stats.key += 1
        self.stats.forced += not self.plan.is_key(order)
        if len(self.plan.keys) == self.plan.total:
            return stock() if run is split.directly else run(split.run_whole, unet, call)
        output, feature = run(split.run_recording, unet, call, reuse.branch)
        earlier = [each for each in self._deep[: reuse.order] if each[-1] >= rows]  # half of one is of no use to both
        self._deep = [(order, feature, rows), *earlier]
        return output

    def _runner(self, unet: nn.Module, call: Mapping[str, Any]) -> tuple[split.Run, Mapping[str, Any]]:
        """What runs the functions of this call, and the call as they take it.

        Python runs them where nothing is compiled, and where attention maps are wanted, which programs do not give.
        """
        if self._programs is None:
            return split.directly, call
        if any(each.collectors for each in self.settings):
            self.note("programs are not used while attention maps are collected")
            return split.directly, call
        self._inputs = self._inputs or Inputs(unet)
        with scaled(unet, call) as call:
            inputs = self._inputs.of(unet, call, self._keys, self.fused)
        return functools.partial(self._programs.run, inputs, self.note), call

    def _remember(self, order: int, count: int) -> None:
        """Keep the features, and those of ``count`` key steps before, for extrapolation."""
        if count:
            batch = self._features.batch
            earlier = [each for each in self._known[:count] if each[1].batch >= batch]  # both from half is impossible
            self._known = [(order, self._features), *earlier]

    def _decode(self, unet: nn.Module, call: Mapping[str, Any], order: int, run: split.Run) -> Sequence[Tensor]:
        """The UNet's outputs for this step, and for those of the plan's batch that follow it."""
        outputs, batch = None, call["sample"].shape[0]
        known = self._known or [(order, self._features)]
        features, *earlier = (each if each.batch == batch else each.half() for _, each in known)
        while outputs is None:
            together = self.plan.batch(order)
            times = self.timesteps()[together.start : together.stop]
            try:
                weights = None
                if earlier:
                    orders = [at for at, _ in known]
                    weights = torch.stack([_extrapolation(orders, each, times.device) for each in together])
                outputs = split.decode(unet, features, call, times, earlier=earlier, weights=weights, run=run)
            except torch.OutOfMemoryError:
                if len(together) == 1:
                    raise
                self.plan = replace(self.plan, max_batch=len(together) // 2)
                self.note(f"out of memory decoding {len(together)} steps at once: {self.plan.max_batch} from now on")
        self.stats.decode_batches.append(len(together))
        if together.stop == self.plan.segment_end(order):
            self._features = None  # the whole segment is decoded
        return outputs

    def _finish(self, order: int, half: bool, output: Tensor) -> Tensor:
        """What the pipeline gets: both halves, where one was run the other from their last difference."""
        if half:
            self.stats.halves += 1
            output = torch.cat([output - self._difference, output])
        elif self.plan.halves and self._guided():
            unconditional, conditional = output.chunk(2)
            self._difference = conditional - unconditional
        if order == self.plan.total - 1:
            self.clear()
            self._control = None
            self._text_keys, self._keys, self._half_text, self._difference = [], None, None, None
        return output

    def note_stock(self, reason: str) -> None:
        self.clear()
        self.stats.stock += 1
        self.note(f"stock forward: {reason}")

    def note(self, reason: str) -> None:
        if self.record(reason):
            warnings.warn(f"difffast: {reason}", stacklevel=6)

    def record(self, reason: str) -> bool:
        """Put a reason into the report; True if it is new."""
        new = reason not in self.stats.reasons
        if new:
            self.stats.reasons.append(reason)
        return new


def _extrapolation(known: Sequence[int], order: int, device: torch.device) -> Tensor:
    """Lagrange's weights [n] with which values at ``known`` orders make the value at ``order``."""
    weights = torch.empty(len(known), device=device)
    for weight, a in zip(weights, known, strict=True):
        # Filled, not copied: a copy to a GPU would make the sampling loop wait for it.
        weight.fill_(math.prod((order - b) / (a - b) for b in known if b != a))
    return weights


def _denoising_steps(scheduler: Any, timesteps: Tensor) -> int:
    """Denoising steps of the schedule; second-order schedulers call the UNet about twice for each."""
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


def _coupled_processor(unet: nn.Module) -> str | None:
    """The name of an attention processor that is not Diffusers' own and may therefore mix samples, or None."""
    for processor in getattr(unet, "attn_processors", {}).values():
        if type(processor).__module__ != "diffusers.models.attention_processor":
            return type(processor).__qualname__
    return None
