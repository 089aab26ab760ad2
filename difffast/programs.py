"""Static programs: the functions of a UNet's calls, each compiled once for every shape that it meets.

A program's inputs are tensors: latents, time steps, text or its keys and values, cached features, the scales of LoRA
adapters.  So a new prompt, seed, guidance scale, number of steps or LoRA scale needs no new program.  What else a
program depends on (layers, switches) torch.compile guards: a change compiles it anew, by itself.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import attention, linears, self_attention
from .fusion import is_plain
from .ops.linear import backend_of_large
from .unet import tree_map
from .view import descendant, replaced

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
    """

    kept: int
    limit: int
    graph_bytes: int

    def __str__(self) -> str:
        graphs = f"; CUDA graphs hold {self.graph_bytes / 2**20:.0f} MiB" if self.graph_bytes else ""
        return f"{self.kept} compiled, at most {self.limit}{graphs}"


def graph_bytes(device: torch.device) -> int:
    """GPU memory [bytes] in the pools of CUDA graphs on ``device``; 0 where there is no CUDA."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot(include_traces=False)
        if segment["device"] == index and tuple(segment["segment_pool_id"]) != _SHARED_POOL
    )


class Inputs:
    """What a run's programs take as inputs in the place of layers' own state.

    Layers are looked for once a run.  One that is added later is part of the program as it is, which is right, but
    compiles it anew.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._attention = attention.layers_of(unet)
        self._self_attention = self_attention.layers_of(unet)
        self._linears = linears.layers_of(unet)
        self._adapted = {
            name: layer for name, layer in unet.named_modules() if type(layer).__module__ == "peft.tuners.lora.layer"
        }
        #: Of each LoRA layer and adapter: the scale, and the tensor that holds it.
        self._scales: dict[tuple[str, str], tuple[float, Tensor]] = {}

    def of(
        self, unet: nn.Module, call: Mapping[str, Any], keys: attention.TextKeys | None, fused: bool
    ) -> dict[str, Any]:
        """What layers take from a program's inputs.

        Per name: keys and values of a cross-attention layer, () of a self-attention or linear layer that an operator
        computes, or the scales of a LoRA layer's adapters as tensors [].

        Args:
            call: arguments of the UNet call, without a LoRA scale (:func:`scaled`).
            keys: text keys and values of the run; None: cross-attention layers run stock.
            fused: whether self-attention and linear layers may be fused.
        """
        found: dict[str, Any] = {}
        given = dict.fromkeys(call.get("cross_attention_kwargs") or {}, True)
        if fused and self_attention.wins(call["sample"]) and call.get("attention_mask") is None:
            for name, layer in self._self_attention.items():
                if self_attention.obstacle(layer, (), given) is None:
                    found[name] = ()
        if fused and backend_of_large(call["sample"]) != "reference":
            found.update((name, ()) for name, layer in self._linears.items() if is_plain(layer, nn.Linear))
        if keys is not None:
            found.update(attention.static_keys(unet, self._attention, call, keys))
        for name, layer in self._adapted.items():
            scales = {adapter: self._scale(name, adapter, scale, unet) for adapter, scale in layer.scaling.items()}
            found[f"{name}.scaling"] = scales
        return found

    def _scale(self, name: str, adapter: str, scale: float | Tensor, unet: nn.Module) -> Tensor:
        """The scale as a tensor, written only when it has changed; PEFT's hot-swapped adapters have one already."""
        if isinstance(scale, Tensor):
            return scale
        held = self._scales.get((name, adapter))
        if held is None or held[0] != scale:
            tensor = torch.empty((), device=unet.device) if held is None else held[1]
            held = self._scales[name, adapter] = (scale, tensor.fill_(scale))
        return held[1]


@contextlib.contextmanager
def scaled(unet: nn.Module, call: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Inside the block LoRA layers have the scale that the call asks for; -> the call without it.

    Diffusers' forward does the same around itself, which would make the scale a constant of the program.
    """
    options = dict(call.get("cross_attention_kwargs") or {})
    weight = options.pop("scale", None)
    if weight is None:
        yield dict(call)
        return
    from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

    scale_lora_layers(unet, weight)
    try:
        yield {**call, "cross_attention_kwargs": options or None}
    finally:
        unscale_lora_layers(unet, weight)


class Programs:
    """The compiled programs of one UNet; threads may share them."""

    def __init__(self) -> None:
        self._compiled: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self._lock = threading.Lock()

    def stats(self, device: torch.device) -> ProgramStats:
        """``device``: the UNet's."""
        return ProgramStats(len(self._compiled), MAX_PROGRAMS, graph_bytes(device))

    def run(
        self,
        inputs: Mapping[str, Any],
        note: Callable[[str], Any],
        function: Callable[..., Any],
        unet: nn.Module,
        *arguments: Any,
    ) -> Any:
        """``function(unet, *arguments)`` by its program.

        Args:
            inputs: from :meth:`Inputs.of`.
            note: told if it cannot be compiled; it runs as it is then.
            function: of :mod:`.unet`.
        """
        key = (function, _signature((inputs, arguments)))
        device = unet.device
        try:
            return self._program(key, function, device)(unet, inputs, arguments)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            # The layers have changed too often for one program's cache; a fresh one starts with an empty cache.
            return self._keep(key, _compiled(function, device))(unet, inputs, arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            note(f"{function.__name__} runs without torch.compile: {type(error).__name__}: {_first_line(error)}")
            return self._keep(key, _uncompiled(function))(unet, inputs, arguments)

    def _program(self, key: Any, function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        with self._lock:
            program = self._compiled.get(key)
        return self._keep(key, program or _compiled(function, device))

    def _keep(self, key: Any, program: Callable[..., Any]) -> Callable[..., Any]:
        with self._lock:
            self._compiled[key] = program
            self._compiled.move_to_end(key)
            while len(self._compiled) > MAX_PROGRAMS:
                self._compiled.popitem(last=False)
        return program


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    def program(unet: nn.Module, inputs: Mapping[str, Any], arguments: tuple[Any, ...]) -> Any:
        inner, outer = {}, {}  # scales and linear layers are parts of attention layers
        for name, value in inputs.items():
            if isinstance(value, Mapping):
                inner[name] = value
            elif not value and isinstance(layer := descendant(unet, name), nn.Linear):
                inner[name] = linears.Fused(layer)
            else:
                outer[name] = value
        unet = replaced(unet, inner)
        for name, value in outer.items():
            layer = descendant(unet, name)
            outer[name] = attention.Keyed(layer, *value) if value else self_attention.Fused(layer)
        return function(replaced(unet, outer), *arguments)

    return program


def _compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    program = _uncompiled(function)
    # torch.compile keeps its programs by code object: a copy has a cache, and a limit, of its own.
    own = types.FunctionType(
        program.__code__.replace(co_name=function.__name__), program.__globals__, closure=program.__closure__
    )
    if device.type != "cuda":
        return torch.compile(own, fullgraph=True, dynamic=False, backend=BACKEND)
    # Inductor's CUDA graphs, behind torch.compile's guards: a graph of our own would not see that a layer has changed.
    captured = torch.compile(own, fullgraph=True, dynamic=False, mode="max-autotune")

    def replay(*arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map(torch.clone, captured(*arguments))  # the next replay writes into the same memory

    return replay


def _signature(value: Any) -> Any:
    """What a program is chosen by: shapes, dtypes and devices of tensors, and the structure around them."""
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.device)
    if isinstance(value, Mapping):
        return tuple((name, _signature(item)) for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_signature(item) for item in value)
    return type(value)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
