"""CUDA graphs: the functions of a UNet's calls, recorded once for every shape that they meet, and replayed.

A UNet call is about a thousand launches, and Python takes several times longer to make them than a large GPU to run
them.  Nothing is traced or generated here, unlike in compiled programs (:mod:`.programs`): what is recorded is what
would run eagerly, the operators of fused layers among it, so the numbers are the same, and the first image waits for
nothing but one eager call.

A graph reads from buffers of its own: inputs are copied there before a replay, text keys and values only when the
prompt has changed.  Outputs are copied out, but for what a step leaves for others: they read it where its graph has
written it (:mod:`.handed_out`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from ..ops import _dispatch, _local
from ..surgery.unchanged import read_version
from ..unet.outer_layers import run_recording
from ..unet.split import run_encoder
from .handed_out import HandedOut, find_owner
from .inputs import LayerInputs, ProgramInputs, put_inputs
from .programs import MAX_PROGRAMS, ProgramStats, count_graph_bytes
from .recorders import CudaRecorder, Recorder
from .watch import Watch, refuse_recording

#: Functions whose outputs other functions read, time step after time step.
_LEFT_FOR_OTHERS = (run_encoder, run_recording)
#: How many steps' outputs may be out at once before copies are.  A step's are held until the next step's are there.
_PLACES = 2


@dataclass
class _Buffer:
    """Memory that a graph reads from, and whose values it holds now.

    Attributes:
        memory: where the graph reads.
        source: the tensor that was copied last.
        version: how often it had been written to.
        given: whether it is memory of another graph, into which nothing is copied.
    """

    memory: Tensor
    source: TensorWeakRef | None = None
    version: int | None = None
    given: bool = False

    def fill(self, value: Tensor) -> None:
        """Copy a tensor into the buffer, unless that very tensor, unchanged, was copied last."""
        if self.given:
            return
        version = read_version(value)
        if version is not None and self.source is not None and self.source() is value and self.version == version:
            return
        self.memory.copy_(value, non_blocking=True)
        self.source, self.version = TensorWeakRef(value), version


@dataclass
class _Recording:
    """One function that was met: as yet only warmed up, recorded, or refused.

    Attributes:
        buffers: what the graph reads, one for each tensor that it is given.
        outputs: what the graph writes.
        replay: runs it; None before it is recorded.
        refused: why it runs eagerly for good, or nothing.
        handed_out: which of its outputs are out; None: copies are.
    """

    buffers: list[_Buffer] = field(default_factory=list)
    outputs: Any = None
    replay: Callable[[], object] | None = None
    refused: str = ""
    handed_out: HandedOut | None = None

    def read_outputs(self) -> Any:
        """Return what the latest replay has written."""
        if self.handed_out is None:
            return copy_once(self.outputs)
        distinct: dict[int, Tensor] = {}
        _map(lambda tensor: distinct.setdefault(id(tensor), tensor), self.outputs)
        out = dict(zip(distinct, self.handed_out.hand_out(list(distinct.values())), strict=True))
        return _map(lambda tensor: out[id(tensor)], self.outputs)


@dataclass(frozen=True)
class _Call:
    """A function with its arguments, taken apart."""

    function: Callable[..., Any]
    unet: nn.Module
    inputs: LayerInputs
    arguments: tuple[Any, ...]

    def run(self) -> Any:
        """Run it as it is."""
        return self.function(put_inputs(self.unet, self.inputs), *self.arguments)

    def on(self, memories: list[Tensor]) -> _Call:
        """Return the same call with other tensors, in the order of :func:`_describe`."""
        tensors: Tensors = {}
        both = (self.inputs, self.arguments)
        _describe(both, tensors)
        put = dict(zip(tensors, memories, strict=True))
        inputs, arguments = _map(lambda tensor: put[id(tensor)], both)
        return _Call(self.function, self.unet, inputs, arguments)


class Graphs:
    """The recorded functions of one UNet; threads may share them.

    Args:
        recorder: records and replays; CUDA graphs unless a test gives another.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = recorder or CudaRecorder()
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()
        #: What has been warmed up.
        self._met: OrderedDict[Any, None] = OrderedDict()
        #: Buffers of layers' state, such as text keys and values, that all graphs of one place read.
        self._shared: WeakValueDictionary[Any, _Buffer] = WeakValueDictionary()
        #: The latest inputs of layers, what they are chosen by, and their tensors.
        self._described: tuple[ProgramInputs, Hashable, Tensors] | None = None
        self._watch: Watch | None = None
        self._refusal: str | None = None
        self._device = torch.device("cpu")
        #: How often the UNet has been found changed.
        self.changes = 0
        self._lock = threading.RLock()

    def refuse(self, unet: nn.Module) -> str | None:
        """Return why the UNet's calls cannot be recorded as it is now, or None; drop graphs of what it was before.

        To be asked before every :meth:`run`.
        """
        with self._lock:
            if self._watch is None or not self._watch.still_holds():
                self.forget()
                # Diffusers walks over all modules to tell the device: too slow for every call.
                self._device = unet.device
                self._refusal = self._recorder.refuse(self._device) or refuse_recording(unet)
                self._watch = Watch(unet)
                self.changes += 1
            return self._refusal

    def count(self, device: torch.device) -> ProgramStats:
        """Return what the graphs take; ``device`` is the UNet's."""
        kept = sum(recording.replay is not None for recording in self._recordings.values())
        return ProgramStats(kept, MAX_PROGRAMS, count_graph_bytes(device) if kept else 0)

    def run(
        self,
        inputs: ProgramInputs,
        note: Callable[[str], Any],
        function: Callable[..., Any],
        unet: nn.Module,
        *arguments: Any,
    ) -> Any:
        """Return ``function(unet, *arguments)``: eagerly when it is met first, recorded when it is met again.

        Args:
            inputs: what layers take from the graph's inputs.
            note: told if it cannot be recorded; it runs eagerly then.
            function: of :mod:`difffast.unet`.
        """
        call = _Call(function, unet, inputs.values, arguments)
        with self._lock, self._recorder.on(self._device):
            try:
                if self._described is None or self._described[0] is not inputs:
                    found: Tensors = {}
                    self._described = (inputs, _describe(inputs.values, found, (0,)), found)
                _, shapes, found = self._described
                tensors = dict(found)
                shape = (shapes, _describe(arguments, tensors, (1,)))
            except _Unrecordable as reason:
                note(f"no CUDA graphs: {reason}")
                return call.run()
            values = [value for _, _, value in tensors.values()]
            met = (function, shape, self._recorder.place(), _read_surroundings())
            if met not in self._met:
                self._keep(met)
                with _local.use_mode("graph"):  # what is recorded later
                    return self._recorder.warm_up(call.run)
            owner = find_owner([each.handed_out for each in self._recordings.values() if each.handed_out], values)
            recording = self._choose(met, values, owner)
            if recording.replay is None and not recording.refused:
                self._record(recording, call, tensors, owner)
            if recording.refused:
                note(f"{function.__name__} runs without CUDA graphs: {recording.refused}")
                return call.run()
            for buffer, value in zip(recording.buffers, values, strict=True):
                buffer.fill(value)
            recording.replay()
            return recording.read_outputs()

    def _choose(self, met: Any, values: Sequence[Tensor], owner: HandedOut | None) -> _Recording:
        """Return the recording that reads what ``owner`` has handed out, and whose outputs nobody holds any more."""
        key = met if owner is None else (met, *[value.data_ptr() if owner.owns(value) else None for value in values])
        for number in range(_PLACES if met[0] in _LEFT_FOR_OTHERS else 0):
            recording = self._recordings.setdefault((key, number), _Recording(handed_out=HandedOut()))
            if not recording.handed_out.is_held():
                return self._use((key, number))
        self._recordings.setdefault((key, None), _Recording())
        return self._use((key, None))

    def _use(self, key: Any) -> _Recording:
        """Return a recording, which is the last to be dropped."""
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        while len(self._recordings) > MAX_PROGRAMS:
            self._recordings.popitem(last=False)
        return recording

    def forget(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            self._recordings.clear()
            self._met.clear()
            self._described = self._watch = None

    def _keep(self, met: Any) -> None:
        """Remember what has been met, of the latest calls."""
        self._met[met] = None
        while len(self._met) > 4 * MAX_PROGRAMS:
            self._met.popitem(last=False)

    def _record(
        self,
        recording: _Recording,
        call: _Call,
        tensors: Tensors,
        owner: HandedOut | None,
    ) -> None:
        """Record a call on buffers in place of its tensors, or where their owner has written them."""
        buffers = []
        for _, path, value in tensors.values():
            place = None if owner is None else owner.locate(value)
            buffers.append(self._make_buffer(path, value) if place is None else _Buffer(place, given=True))
        for buffer, (_, _, value) in zip(buffers, tensors.values(), strict=True):
            buffer.fill(value)
        static = call.on([buffer.memory for buffer in buffers])
        try:
            with _local.use_mode("graph"):
                recording.outputs, recording.replay = self._recorder.record(
                    static.run, alone=recording.handed_out is not None
                )
            recording.buffers = buffers
        except torch.OutOfMemoryError:
            raise  # the strategy may ask for less at once
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            recording.refused = f"{type(error).__name__}: {reason}"

    def _make_buffer(self, path: tuple[Any, ...], value: Tensor) -> _Buffer:
        """Return a buffer for a tensor; what layers take is the same for all graphs of a place, and shared."""
        buffer = _Buffer(torch.empty_like(value, device=self._device))
        if path[0]:  # an argument
            return buffer
        return self._shared.setdefault((path, value.shape, value.dtype, self._recorder.place()), buffer)


def _read_surroundings() -> Hashable:
    """Return what the eager run depends on besides the UNet and its arguments."""
    return (
        _dispatch.forced_backends,
        _local.state.version,
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )


#: Arguments that are compared by value.
_PLAIN = (str, int, float, bytes, type(None), torch.dtype, torch.device)


class _Unrecordable(Exception):  # noqa: N818 - no error: the call runs eagerly
    """An argument cannot be compared."""


#: Distinct tensors by their id: (position, path to the first place where it occurs, tensor).
Tensors = dict[int, tuple[int, tuple[Any, ...], Tensor]]


def _describe(value: Any, tensors: Tensors, path: tuple[Any, ...] = ()) -> Hashable:
    """Return what a recording is chosen by, and append every distinct tensor with the path to it.

    Raises:
        _Unrecordable: something else than tensors, plain values and nests of them.
    """
    if isinstance(value, Tensor):
        place = tensors.setdefault(id(value), (len(tensors), path, value))[0]
        return (place, value.shape, value.dtype, value.stride(), value.device.type)
    if isinstance(value, Mapping):
        return tuple([(key, _describe(item, tensors, (*path, key))) for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value), *[_describe(item, tensors, (*path, i)) for i, item in enumerate(value)])
    if isinstance(value, _PLAIN):
        return (type(value), value)
    raise _Unrecordable(f"an argument is a {type(value).__name__}")


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor in nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_map(function, item) for item in value])
    return value


def copy_once(value: Any) -> Any:
    """Copy every tensor in a nest; one that occurs twice is copied once."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.clone()
        return copies[id(tensor)]

    return _map(copy, value)
