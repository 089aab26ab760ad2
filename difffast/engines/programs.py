"""Static programs: the functions of a UNet's calls, each compiled once for every shape that it meets.

A program's inputs are tensors: latents, time steps, text or its keys and values, cached features, the scales of LoRA
adapters.  So a new prompt, seed, guidance scale, number of steps or LoRA scale needs no new program.  What else a
program depends on (layers, switches) torch.compile guards: a change compiles it anew, by itself.
"""

from __future__ import annotations

import threading
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..surgery.trees import map_tensors
from ..unet.parts import read_freeu
from .inputs import LayerInputs, ProgramInputs, describe_shapes, put_inputs
from .user_compiled import UserCompile

#: Most programs that one UNet keeps; beyond, the one that has not run for longest is dropped.
MAX_PROGRAMS = 16

#: Id of the allocator's own pool of GPU memory; CUDA graphs have pools apart from it.
_SHARED_POOL = (0, 0)

#: Decoder batches that get a program; segments are decoded in batches of these sizes.
BATCHES = (1, 2, 4, 8)

#: torch.compile's backend; on a GPU always Inductor, with CUDA graphs.
BACKEND = "inductor"


@dataclass(frozen=True)
class ProgramStats:
    """What compiled programs of a UNet take.

    Attributes:
        kept: programs at present.
        limit: the most that are kept.
        graph_bytes: GPU memory that CUDA graphs hold on the UNet's device; 0 on others.  All of the process's graphs:
            Inductor has one pool for a device.
        weight_bytes: memory of the weights that OpenVINO's models hold copies of.
        start_seconds: what it has taken in all until OpenVINO's models were ready.
        loaded: how many of OpenVINO's models came from files.
        precisions: in which OpenVINO's models run, as they say themselves.
        outrun: functions that run in Python because that has been found to be faster than OpenVINO, with the seconds.
    """

    kept: int
    limit: int
    graph_bytes: int
    weight_bytes: int = 0
    start_seconds: float = 0.0
    loaded: int = 0
    precisions: tuple[str, ...] = ()
    outrun: tuple[str, ...] = ()

    def __str__(self) -> str:
        graphs = f"; CUDA graphs hold {self.graph_bytes / 2**20:.0f} MiB" if self.graph_bytes else ""
        models = ""
        if self.precisions:
            models = (
                f"; OpenVINO in {', '.join(self.precisions)}: {self.weight_bytes / 2**20:.0f} MiB of weights copied, "
                f"ready after {self.start_seconds:.1f} s in all, {self.loaded} from files"
            )
        outrun = f"; faster without: {', '.join(self.outrun)}" if self.outrun else ""
        return f"{self.kept} compiled, at most {self.limit}{graphs}{models}{outrun}"

    def __add__(self, other: ProgramStats) -> ProgramStats:
        """Return what both take together; CUDA graphs, which are the process's, count once."""
        return ProgramStats(
            self.kept + other.kept,
            self.limit,
            max(self.graph_bytes, other.graph_bytes),
            self.weight_bytes + other.weight_bytes,
            self.start_seconds + other.start_seconds,
            self.loaded + other.loaded,
            tuple(sorted({*self.precisions, *other.precisions})),
            self.outrun + other.outrun,
        )


def count_graph_bytes(device: torch.device) -> int:
    """Count the GPU memory [bytes] in the pools of CUDA graphs on ``device``; 0 where there is no CUDA."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot(include_traces=False)
        if segment["device"] == index and tuple(segment["segment_pool_id"]) != _SHARED_POOL
    )


class Programs:
    """The compiled programs of one UNet; threads may share them."""

    def __init__(self) -> None:
        self._compiled: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self._refused: dict[Any, str] = {}  # why a program of those is none
        self._lock = threading.Lock()

    def count(self, device: torch.device) -> ProgramStats:
        """Return what the programs take; ``device`` is the UNet's."""
        return ProgramStats(len(self._compiled), MAX_PROGRAMS, count_graph_bytes(device))

    def run(
        self,
        inputs: ProgramInputs,
        note: Callable[[str], Any],
        function: Callable[..., Any],
        unet: nn.Module,
        *arguments: Any,
        following: UserCompile | None = None,
    ) -> Any:
        """Return ``function(unet, *arguments)``, by its program.

        Args:
            inputs: what layers take from the program's inputs.
            note: told if it cannot be compiled; it runs as it is then.
            function: of :mod:`difffast.unet`.
            following: how the user has compiled the UNet, and programs are to be; None: as is best.
        """
        # torch.compile does not guard attributes that are not there, as FreeU's are until it is switched on.
        key = (function, following, inputs.shapes, describe_shapes(arguments), read_freeu(unet))
        refused = self._refused.get(key)
        if refused is not None:
            note(refused)
        try:
            return self._program(key, function, unet, following)(unet, inputs.values, arguments)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            # The layers have changed too often for one program's cache; a fresh one starts with an empty cache.
            program = self._keep(key, _compile(function, unet.device, following))
            return program(unet, inputs.values, arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            refused = f"{function.__name__} runs without torch.compile: {type(error).__name__}: {_first_line(error)}"
            self._refused[key] = refused
            note(refused)
            return self._keep(key, _run_plainly(function))(unet, inputs.values, arguments)

    def _program(
        self, key: Any, function: Callable[..., Any], unet: nn.Module, following: UserCompile | None
    ) -> Callable[..., Any]:
        with self._lock:
            program = self._compiled.get(key)
        # Diffusers walks over all modules to tell the device: at every call that costs more than the program itself.
        return self._keep(key, program or _compile(function, unet.device, following))

    def _keep(self, key: Any, program: Callable[..., Any]) -> Callable[..., Any]:
        with self._lock:
            self._compiled[key] = program
            self._compiled.move_to_end(key)
            while len(self._compiled) > MAX_PROGRAMS:
                dropped, _ = self._compiled.popitem(last=False)
                self._refused.pop(dropped, None)
        return program


def _run_plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    def program(unet: nn.Module, inputs: LayerInputs, arguments: tuple[Any, ...]) -> Any:
        return function(put_inputs(unet, inputs), *arguments)

    return program


def _compile(
    function: Callable[..., Any], device: torch.device, following: UserCompile | None = None
) -> Callable[..., Any]:
    program = _run_plainly(function)
    # torch.compile keeps its programs by code object: a copy has a cache, and a limit, of its own.
    own = types.FunctionType(
        program.__code__.replace(co_name=function.__name__), program.__globals__, closure=program.__closure__
    )
    if following is not None:
        captured = following.context(own)
        if device.type != "cuda" or not following.captures:
            return captured
    elif device.type != "cuda":
        return torch.compile(own, fullgraph=True, dynamic=False, backend=BACKEND)
    else:
        # Inductor's CUDA graphs, behind torch.compile's guards: one of our own would not see that a layer has changed.
        captured = torch.compile(own, fullgraph=True, dynamic=False, mode="max-autotune")

    def replay(*arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return map_tensors(torch.clone, captured(*arguments))  # the next replay writes into the same memory

    return replay


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
