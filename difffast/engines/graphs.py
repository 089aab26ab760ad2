"""CUDA graphs: the functions of a UNet's calls, recorded once for every shape that they meet, and replayed.

A UNet call is about a thousand launches, and Python takes several times longer to make them than a large GPU to run
them.  Nothing is traced or generated here, unlike in compiled programs (:mod:`.programs`): what is recorded is what
would run eagerly, the operators of fused layers among it, so the numbers are the same, and the first image waits for
nothing but one eager call.

A graph reads from buffers of its own: inputs are copied there before a replay, text keys and values only when the
prompt has changed.  Outputs are copied out.
"""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from ..ops import _dispatch, _local
from ..surgery.unchanged import read_version
from .inputs import LayerInputs, ProgramInputs, put_inputs
from .programs import MAX_PROGRAMS, ProgramStats, count_graph_bytes
from .watch import Watch, refuse_recording


class Recorder(Protocol):
    """What records calls so that they can be replayed."""

    def refuse(self, device: torch.device) -> str | None:
        """Return why nothing can be recorded on a device, or None."""
        ...

    def on(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a block in which calls run on a device."""
        ...

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Run a function that is recorded later, so that nothing is initialised or compiled while it is."""
        ...

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        """Record a function; returns its outputs, into which every call of the second value writes anew."""
        ...

    def place(self) -> Hashable:
        """Return where calls run now: calls at one place run one after another."""
        ...


class CudaRecorder:
    """Records into CUDA graphs that share one pool of memory for each stream on which they are replayed."""

    def __init__(self) -> None:
        self._pools: dict[Hashable, Any] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def refuse(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"the UNet is on {device.type!r}"

    def on(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.cuda.device(device)  # the current one need not be the UNet's

    def place(self) -> Hashable:
        stream = torch.cuda.current_stream()
        return stream.device, stream.cuda_stream

    def _side_stream(self) -> torch.cuda.Stream:
        """Return the stream of this device on which graphs are recorded; recording is refused on the default one."""
        device = torch.cuda.current_stream().device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def warm_up(self, function: Callable[[], Any]) -> Any:
        # On the stream of the recording: cuBLAS has a workspace for each, which must not be the graph's.
        current, side = torch.cuda.current_stream(), self._side_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = function()
        current.wait_stream(side)
        return result

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        pool = self._pools.setdefault(self.place(), torch.cuda.graph_pool_handle())
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # a graph that is collected while another is recorded would spoil the recording
        try:
            # Other threads may go on to allocate meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=self._side_stream(), capture_error_mode="thread_local"):
                outputs = function()
        finally:
            if collects:
                gc.enable()
        return outputs, graph.replay


@dataclass
class _Buffer:
    """Memory that a graph reads from, and whose values it holds now."""

    memory: Tensor
    source: TensorWeakRef | None = None
    version: int | None = None

    def fill(self, value: Tensor) -> None:
        """Copy a tensor into the buffer, unless that very tensor, unchanged, was copied last."""
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
        refused: whether it runs eagerly for good.
    """

    buffers: list[_Buffer] = field(default_factory=list)
    outputs: Any = None
    replay: Callable[[], object] | None = None
    refused: bool = False


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
            key = (function, shape, self._recorder.place(), _read_surroundings())
            recording = self._recordings.get(key)
            if recording is None:
                self._keep(key, _Recording())
                with _local.use_mode("graph"):  # what is recorded later
                    return self._recorder.warm_up(call.run)
            self._recordings.move_to_end(key)
            if recording.replay is None and not recording.refused:
                self._record(recording, call, tensors, note)
            if recording.refused:
                return call.run()
            for buffer, (_, _, value) in zip(recording.buffers, tensors.values(), strict=True):
                buffer.fill(value)
            recording.replay()
            return copy_once(recording.outputs)

    def forget(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            self._recordings.clear()
            self._described = self._watch = None

    def _keep(self, key: Any, recording: _Recording) -> None:
        self._recordings[key] = recording
        while len(self._recordings) > MAX_PROGRAMS:
            self._recordings.popitem(last=False)

    def _record(self, recording: _Recording, call: _Call, tensors: Tensors, note: Callable[[str], Any]) -> None:
        """Record a call on buffers in place of its tensors."""
        buffers = [self._make_buffer(path, value) for _, path, value in tensors.values()]
        for buffer, (_, _, value) in zip(buffers, tensors.values(), strict=True):
            buffer.fill(value)
        static = call.on([buffer.memory for buffer in buffers])
        try:
            with _local.use_mode("graph"):
                recording.outputs, recording.replay = self._recorder.record(static.run)
            recording.buffers = buffers
        except torch.OutOfMemoryError:
            raise  # the strategy may ask for less at once
        except RuntimeError as error:
            recording.refused = True
            reason = str(error).strip().partition("\n")[0]
            note(f"{call.function.__name__} runs without CUDA graphs: {type(error).__name__}: {reason}")

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
