"""What records functions so that they can be replayed: CUDA graphs, unless a test gives something else."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


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

    def record(self, function: Callable[[], Any], alone: bool = False) -> tuple[Any, Callable[[], object]]:
        """Record a function; returns its outputs, into which every call of the second value writes anew.

        Args:
            function: what is recorded.
            alone: whether no other recording may write into the outputs.
        """
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

    def record(self, function: Callable[[], Any], alone: bool = False) -> tuple[Any, Callable[[], object]]:
        own = torch.cuda.graph_pool_handle()
        pool = own if alone else self._pools.setdefault(self.place(), own)
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
