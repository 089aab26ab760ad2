"""OpenVINO: functions of a module, each converted once for every shape that it meets, with weights as constants.

What a model has taken in is compared before every call (:mod:`.constants`); whatever has changed, all models of the
module are dropped and made anew.  A function that cannot be converted runs eagerly, and the report says why; so does
one that is faster that way (:mod:`.race`).
"""

from __future__ import annotations

import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..layers.transformed import forget_all
from ..ops._memory import count_all, leaves_enough
from ..surgery.subclass import plain_class
from . import conversion, model_files, race
from .constants import Constants, holds_foreign_code, refuse_constants
from .inputs import ProgramInputs, put_inputs
from .nests import UnknownValueError, describe_tensors, fill, take_apart
from .programs import MAX_PROGRAMS, ProgramStats
from .race import Verdict
from .watch import refuse_recording

#: The precisions that can be asked for.
PRECISIONS = tuple(conversion.PRECISIONS.values())


class _Short(str):
    """Why there is no model for now: memory is short, which may be otherwise for the next picture."""


class OpenVino:
    """The converted functions of one module; threads may share them."""

    def __init__(self) -> None:
        #: A verdict: Python is faster.  Text: why it cannot be converted.
        self._models: OrderedDict[Any, conversion.Model | Verdict | str] = OrderedDict()
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
        """Compare the bits of all weights when :meth:`refuse` is asked next, and look at what memory is left again."""
        with self._lock:
            for key in [key for key, each in self._models.items() if isinstance(each, _Short)]:
                del self._models[key]
            if self._constants is not None:
                self._constants.distrust()

    def forget(self) -> None:
        """Drop all models; what is faster in Python stays so, whatever the weights are."""
        with self._lock:
            for key in [key for key, each in self._models.items() if not isinstance(each, Verdict)]:
                del self._models[key]
            self._constants = None

    def count(self, device: torch.device) -> ProgramStats:
        """Return what the models take; ``device`` is the module's."""
        models = self._list_models()
        outrun = [str(each) for each in self._models.values() if isinstance(each, Verdict)]
        return ProgramStats(
            len(models),
            MAX_PROGRAMS,
            0,
            weight_bytes=sum(model.weight_bytes for model in models),
            start_seconds=self._seconds,
            loaded=self._loaded,
            precisions=tuple(sorted({model.precision for model in models})),
            outrun=tuple(outrun),
        )

    def run(
        self,
        inputs: ProgramInputs,
        note: Callable[[str], Any],
        function: Callable[..., Any],
        module: nn.Module,
        *arguments: Any,
        precision: str | None = None,
        eager: Callable[[], Any] | None = None,
        compare: bool = False,
    ) -> Any:
        """Return ``function(module, *arguments)``, by its model.

        Args:
            inputs: what layers take from the model's inputs.
            note: told if it cannot be converted, and what became of a damaged file.
            function: of tensors, nested in ``arguments``.
            module: the module.
            precision: "f32" or "bf16"; None: that of the weights.
            eager: computes the same in Python; None: the function, as it is.
            compare: whether it runs in Python where that is faster.
        """
        eager = eager or (lambda: function(put_inputs(module, inputs.values), *arguments))
        tensors: list[torch.Tensor] = []
        try:
            structure = take_apart((inputs.values, arguments), tensors)
        except UnknownValueError as reason:
            note(f"{_name(function)} runs without OpenVINO: {reason}")
            return eager()
        # Of the weights: what comes in may be token ids, or a LoRA scale in float32.
        own = conversion.PRECISIONS[next(module.parameters()).dtype]
        wanted = precision or own
        rival = eager if compare and wanted == own else None
        key = (function, structure, describe_tensors(tensors), own, wanted, rival is None, torch.get_num_threads())
        with self._lock:
            if key not in self._models:
                self._keep(key, self._make(function, module, structure, tensors, wanted, rival, note))
            model = self._models[key]
            self._models.move_to_end(key)
            if isinstance(model, conversion.Model):
                return model.run(tensors)
        if isinstance(model, str):
            note(f"{_name(function)} runs without OpenVINO: {model}")
        return eager()

    def _make(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        structure: Any,
        tensors: list[torch.Tensor],
        precision: str,
        rival: Callable[[], Any] | None,
        note: Callable[[str], Any],
    ) -> conversion.Model | Verdict | str:
        """Load or convert a function; returns the verdict if its rival is faster, and why there can be no model.

        Args:
            rival: computes the same in Python, in the same precision; None: nothing does.
        """
        start = time.perf_counter()
        name, marks = _name(function), self._constants
        find_file = functools.partial(
            model_files.find_file, name, structure=structure, tensors=tensors, precision=precision
        )
        # Which is faster depends on the structure alone, a model on the weights as well.
        judged = find_file(mark=marks.mark_structure(module)).with_suffix(".json")
        verdict = None if rival is None else race.read(judged)
        if verdict is not None and verdict.eager_wins:
            return verdict
        if not leaves_enough(size := conversion.count_copied_bytes(module, precision)):
            return _Short(f"too little memory is left for a model of {size >> 20} MiB")
        file = find_file(mark=marks.mark(module))
        model = found = model_files.read(file, precision, note)
        if model is None:
            called = functools.partial(_call, function, module, structure)
            try:
                model = conversion.convert(called, module, tensors, precision)
            except Exception as error:  # whatever PyTorch's tracer or OpenVINO's frontend raises
                return f"{type(error).__name__}: {_first_line(error)}"
        if rival is not None and verdict is None:
            whole_name = f"{plain_class(module).__name__}.{name.strip('_')}"
            verdict = race.race(whole_name, functools.partial(model.run, tensors), rival)
            race.write(judged, verdict)
            if not verdict.eager_wins:
                forget_all(module)  # what the race has made layers keep takes more memory than they do
        self._seconds += time.perf_counter() - start
        if verdict is not None and verdict.eager_wins:
            return verdict
        if found is None:
            model_files.write(file, model, note)
        self._loaded += model.cached
        return model

    def _keep(self, key: Any, model: conversion.Model | Verdict | str) -> None:
        self._models[key] = model
        while len(self._models) > MAX_PROGRAMS or (len(self._models) > 1 and self._weigh() > _find_limit()):
            self._models.popitem(last=False)

    def _weigh(self) -> int:
        return sum(model.weight_bytes for model in self._list_models())

    def _list_models(self) -> list[conversion.Model]:
        return [model for model in self._models.values() if isinstance(model, conversion.Model)]


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
    """Return the most weights [bytes] that one module's models may copy: half of all memory."""
    return (count_all() or 1 << 35) // 2
