"""Static programs: the functions of a UNet's calls, each compiled once for every shape that it meets.

A program's inputs are tensors alone: latents, time steps, text or its keys and values, cached features.  So a new
prompt, seed, guidance scale or number of steps needs no new program.  What else a program depends on (layers, adapters,
switches) torch.compile guards: a change compiles it anew, by itself.
"""

from __future__ import annotations

import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import attention

#: Most programs that one UNet keeps; beyond, the one that has not run for longest is dropped.
MAX_PROGRAMS = 16

#: Decoder batches that get a program; segments are decoded in batches of these sizes.
BATCHES = (1, 2, 4, 8)


#: torch.compile's backend.
BACKEND = "inductor"


class Programs:
    """The compiled programs of one UNet; threads may share them."""

    def __init__(self) -> None:
        self._compiled: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self._lock = threading.Lock()

    def run(
        self,
        keys: Mapping[str, tuple[Tensor, Tensor]],
        note: Callable[[str], Any],
        function: Callable[..., Any],
        unet: nn.Module,
        *arguments: Any,
    ) -> Any:
        """``function(unet, *arguments)`` by its program.

        Args:
            keys: text keys and values per attn2 layer that takes them from here (:func:`attention.static_keys`).
            note: told if it cannot be compiled; it runs as it is then.
            function: of :mod:`.unet`.
        """
        key = (function, _signature((keys, arguments)))
        try:
            return self._program(key, function)(unet, keys, arguments)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            # The layers have changed too often for one program's cache; a fresh one starts with an empty cache.
            return self._keep(key, _compiled(function))(unet, keys, arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            note(f"{function.__name__} runs without torch.compile: {type(error).__name__}: {_first_line(error)}")
            return self._keep(key, _uncompiled(function))(unet, keys, arguments)

    def _program(self, key: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        with self._lock:
            program = self._compiled.get(key)
        return self._keep(key, program or _compiled(function))

    def _keep(self, key: Any, program: Callable[..., Any]) -> Callable[..., Any]:
        with self._lock:
            self._compiled[key] = program
            self._compiled.move_to_end(key)
            while len(self._compiled) > MAX_PROGRAMS:
                self._compiled.popitem(last=False)
        return program

    def __len__(self) -> int:
        return len(self._compiled)


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    def program(unet: nn.Module, keys: Mapping[str, tuple[Tensor, Tensor]], arguments: tuple[Any, ...]) -> Any:
        return function(attention.with_keys(unet, keys), *arguments)

    return program


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    program = _uncompiled(function)
    # torch.compile keeps its programs by code object: a copy has a cache, and a limit, of its own.
    own = types.FunctionType(
        program.__code__.replace(co_name=function.__name__), program.__globals__, closure=program.__closure__
    )
    return torch.compile(own, fullgraph=True, dynamic=False, backend=BACKEND)


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
