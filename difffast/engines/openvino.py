"""OpenVINO: functions of a module, each converted once for every shape that it meets, with weights as constants.

What a model has taken in is compared before every call (:mod:`.constants`); whatever has changed, all models of the
module are dropped and made anew.  A function that cannot be converted runs eagerly, and the report says why.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import conversion, model_files
from .constants import Constants, holds_foreign_code, refuse_constants
from .inputs import ProgramInputs, put_inputs
from .nests import UnknownValueError, describe_tensors, fill, take_apart
from .programs import MAX_PROGRAMS, ProgramStats
from .watch import refuse_recording

#: The precisions that can be asked for.
PRECISIONS = tuple(conversion.PRECISIONS.values())


class OpenVino:
    """The converted functions of one module; threads may share them."""

    def __init__(self) -> None:
        self._models: OrderedDict[Any, conversion.Model | None] = OrderedDict()  # None: it cannot be converted
        self._constants: Constants | None = None
        self._refusal: str | None = None
        #: How often the module has been found changed.
        self.changes = 0
        self._seconds = 0.0
        self._loaded = 0
        self._lock = threading.RLock()

    def refuse(self, module: nn.Module) -> str | None:
        """Return why the module's functions cannot be converted as it is now, or None; drop models of what it was.

        To be asked before every :meth:`run`.
        """
        with self._lock:
            if self._constants is None or not self._constants.still_hold(module):
                self.forget()
                self._refusal = _refuse(module)
                self._constants = Constants(module) if self._refusal is None else None
                self.changes += 1
            return self._refusal

    def distrust(self) -> None:
        """Compare the bits of all weights when :meth:`refuse` is asked next."""
        with self._lock:
            if self._constants is not None:
                self._constants.distrust()

    def forget(self) -> None:
        """Drop all models."""
        with self._lock:
            self._models.clear()
            self._constants = None

    def count(self, device: torch.device) -> ProgramStats:
        """Return what the models take; ``device`` is the module's."""
        models = [model for model in self._models.values() if model is not None]
        return ProgramStats(
            len(models),
            MAX_PROGRAMS,
            0,
            weight_bytes=sum(model.weight_bytes for model in models),
            start_seconds=self._seconds,
            loaded=self._loaded,
            precisions=tuple(sorted({model.precision for model in models})),
        )

    def run(
        self,
        inputs: ProgramInputs,
        note: Callable[[str], Any],
        function: Callable[..., Any],
        module: nn.Module,
        *arguments: Any,
        precision: str | None = None,
    ) -> Any:
        """Return ``function(module, *arguments)``, by its model.

        Args:
            inputs: what layers take from the model's inputs.
            note: told if it cannot be converted, and what became of a damaged file.
            function: of tensors, nested in ``arguments``.
            module: the module.
            precision: "f32" or "bf16"; None: that of the weights.
        """
        tensors: list[torch.Tensor] = []
        try:
            structure = take_apart((inputs.values, arguments), tensors)
        except UnknownValueError as reason:
            note(f"{_name(function)} runs without OpenVINO: {reason}")
            return function(put_inputs(module, inputs.values), *arguments)
        key = (function, structure, describe_tensors(tensors), precision, torch.get_num_threads())
        with self._lock:
            if key not in self._models:
                self._keep(key, self._make(function, module, structure, tensors, precision, note))
            model = self._models[key]
            self._models.move_to_end(key)
            if model is not None:
                return model.run(tensors)
        return function(put_inputs(module, inputs.values), *arguments)

    def _make(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        structure: Any,
        tensors: list[torch.Tensor],
        precision: str | None,
        note: Callable[[str], Any],
    ) -> conversion.Model | None:
        """Load or convert a function; returns None where it cannot be converted."""
        start = time.perf_counter()
        # Of the weights: what comes in may be token ids, or a LoRA scale in float32.
        precision = precision or conversion.PRECISIONS[next(module.parameters()).dtype]
        file = model_files.find_file(_name(function), self._constants.mark(module), structure, tensors, precision)
        model = model_files.read(file, precision, note)
        if model is None:
            try:
                called = functools.partial(_call, function, module, structure)
                model = conversion.convert(called, module, tensors, precision)
            except Exception as error:  # whatever PyTorch's tracer or OpenVINO's frontend raises
                note(f"{_name(function)} runs without OpenVINO: {type(error).__name__}: {_first_line(error)}")
                return None
            model_files.write(file, model, note)
        model.seconds = time.perf_counter() - start
        self._seconds += model.seconds
        self._loaded += model.cached
        return model

    def _keep(self, key: Any, model: conversion.Model | None) -> None:
        self._models[key] = model
        while len(self._models) > MAX_PROGRAMS or (len(self._models) > 1 and self._weigh() > _find_limit()):
            self._models.popitem(last=False)

    def _weigh(self) -> int:
        return sum(model.weight_bytes for model in self._models.values() if model is not None)


def _call(function: Callable[..., Any], module: nn.Module, structure: Any, *tensors: torch.Tensor) -> Any:
    inputs, arguments = fill(structure, tensors)
    return function(put_inputs(module, inputs), *arguments)


def _refuse(module: nn.Module) -> str | None:
    missing = conversion.find_missing()
    if missing is not None:
        return missing
    weight = next(module.parameters(), None)
    if weight is None or weight.device.type != "cpu":
        return f"the module is on {'no device' if weight is None else repr(weight.device.type)}"
    if weight.dtype not in conversion.PRECISIONS:
        return f"OpenVINO runs float32 and bfloat16 on CPUs, and the weights are {weight.dtype}"
    return holds_foreign_code(module) or refuse_recording(module) or refuse_constants(module)


def _name(function: Callable[..., Any]) -> str:
    return function.__qualname__


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"


@functools.cache
def _find_limit() -> int:
    """Return the most weights [bytes] that one module's models may copy: half of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 1 << 34
