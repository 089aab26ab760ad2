"""Conversion: a function of tensors, traced through PyTorch and compiled by OpenVINO.

A function is traced once on the arguments that it is called with.  While it is, sizes are plain numbers, so that the
graph is static, and operators run as their definitions, in plain PyTorch, which OpenVINO knows.

Measured, in seconds of the processor, for a UNet (32, 64) of 1528 nodes: trace 0.3 (0.5 with its modules in it),
decoding 0.2, conversion 0.6 (twice that by ``openvino.convert_model``, which prepares what is not needed here),
compilation 0.5.  By way of ``torch.export`` it took 1.1 (wide UNet) to 1.6 times (narrow) as long as by a trace, in one
noisy run; the model is no faster.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..layers.context import use_context
from .nests import Structure, fill, take_apart

#: How the extra is installed.
INSTALL = 'pip install "difffast[openvino]"'

#: The dtypes that models take, and the precision in which they run unless another one is asked for.
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}

#: Largest error, relative to the largest number, of a model against PyTorch's own result; beyond, it is not used.
LARGEST_ERROR = {"f32": 1e-3, "bf16": 0.25}


def find_missing() -> str | None:
    """Return why there is no OpenVINO here, or None."""
    try:
        importlib.import_module("openvino")
    except ImportError as error:
        return f"engine='openvino' needs OpenVINO ({error}): {INSTALL}"
    return None


def find_version() -> str:
    """Return OpenVINO's version."""
    return importlib.metadata.version("openvino")


@dataclass
class Model:
    """A function that OpenVINO runs.

    Attributes:
        compiled: OpenVINO's compiled model.
        output: the structure of what the function returns.
        weight_bytes: size of the weights that it holds copies of.
        cached: whether it comes from a file.
    """

    compiled: Any
    output: Structure
    weight_bytes: int
    cached: bool = False
    #: The memory of the file that it comes from, which OpenVINO reads for as long as the model lives.
    _file: Any = None
    _request: Any = None
    #: By index: the tensor that an input was read from last, its state, and the memory that the request reads.
    _bound: dict[int, tuple[Tensor, Any, Tensor]] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """The precision in which it runs, as OpenVINO says."""
        return self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Return what the function returns for these tensors; calls must come one after another."""
        if self._request is None:
            self._request = self.compiled.create_infer_request()
        for index, tensor in enumerate(tensors):
            # Text keys and values are the same tensors at every step: OpenVINO reads them where it has read them.
            state, bound = _find_state(tensor), self._bound.get(index)
            if bound is None or bound[0] is not tensor or bound[1] != state or state is None:
                memory = tensor.detach().contiguous()
                self._request.set_input_tensor(index, _share(memory))
                self._bound[index] = (tensor, state, memory)
        outputs = []
        for index, port in enumerate(self.compiled.outputs):
            outputs.append(torch.empty(tuple(port.shape), dtype=_DTYPES[port.element_type.get_type_name()]))
            self._request.set_output_tensor(index, _share(outputs[-1]))
        self._request.infer()
        return fill(self.output, outputs)

    def save(self, file: BinaryIO) -> None:
        """Write what :func:`load` reads."""
        self.compiled.export_model(_Stream(file))


class _Stream(io.BytesIO):
    """A file from where it stands on: OpenVINO takes this class alone, and in memory a model would be there twice."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file, self._begin = file, file.tell()

    def write(self, part: Any) -> int:
        return self._file.write(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset + (self._begin if whence == io.SEEK_SET else 0), whence) - self._begin

    def tell(self) -> int:
        return self._file.tell() - self._begin


_DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "u8": torch.uint8,
    "boolean": torch.bool,
}


def _find_state(tensor: Tensor) -> Any:
    """Return what, while it is the same, lets a request read the memory that it was given for a tensor; None: nothing.

    Of a contiguous tensor it is the tensor's own memory, so that changes in place are seen.  Of others it is a copy.
    """
    if tensor.is_contiguous():
        return tensor.data_ptr()
    return None if tensor.is_inference() else (tensor.data_ptr(), tensor._version)


def _share(tensor: Tensor) -> Any:
    """Return OpenVINO's tensor on the same memory."""
    import openvino

    if tensor.dtype == torch.bfloat16:  # NumPy has none
        return openvino.Tensor(tensor.view(torch.uint16).numpy(), openvino.Shape(tensor.shape), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


def convert(function: Callable[..., Any], module: nn.Module, tensors: Sequence[Tensor], precision: str) -> Model:
    """Trace and compile ``function(*tensors)``.

    Args:
        function: takes tensors alone, and returns nested dicts, lists and tuples of them.
        module: whose weights it uses.
        tensors: the arguments.
        precision: "f32" or "bf16".

    Raises:
        Exception: it cannot be converted, for any reason that PyTorch or OpenVINO may have.
    """
    from openvino import PartialShape
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    traced = _Function(function, module)
    with warnings.catch_warnings(), torch.no_grad(), use_context(None), _PlainSizes():
        warnings.simplefilter("ignore")  # of what a trace takes as constant, which here is all but tensors
        graph = torch.jit.trace(traced, tuple(tensors), check_trace=False, strict=False)
        # Of weights that lie otherwise OpenVINO makes a copy, and of bfloat16 it reads that when it is gone.
        shared = _lies_as_expected(module)
        decoder = TorchScriptPythonDecoder(graph, example_input=tuple(tensors), shared_memory=shared)
    frontend = FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(decoder))
    if len(model.inputs) != len(tensors):
        raise RuntimeError(f"the converted model has {len(model.inputs)} inputs, the function {len(tensors)}")
    model.reshape({place: PartialShape(list(tensor.shape)) for place, tensor in enumerate(tensors)})
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    weights = sum(_narrow(op.get_byte_size(), op.get_element_type().get_type_name(), precision) for op in constants)
    if any(port.partial_shape.is_dynamic for port in model.outputs):
        raise RuntimeError("the sizes of its results depend on the arguments' values")
    compiled = _core().compile_model(model, "CPU", _settings(precision))
    converted = Model(compiled, traced.output, weights)
    _prove(converted, tensors, traced.results)
    return converted


def count_copied_bytes(module: nn.Module, precision: str) -> int:
    """Return the most bytes that a model of a function of the module copies of its weights.

    Making it takes little more: Stable Diffusion 1.5's UNet of 3.2 GiB in float32 took 4.1 GiB, and in bfloat16 2.5, of
    which 1 is for the run that is traced.
    """
    weights = list(_list_weights(module))
    held = 0 if _lies_as_expected(module) else sum(each.nbytes for each in weights)
    return held + sum(_narrow(each.nbytes, PRECISIONS.get(each.dtype, ""), precision) for each in weights)


def _narrow(size: int, dtype: str, precision: str) -> int:
    """Return the bytes in a model of a precision of a constant that takes ``size`` bytes in PyTorch."""
    bfloat16 = precision == "bf16" and "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return size // 2 if bfloat16 and dtype == "f32" else size


def _lies_as_expected(module: nn.Module) -> bool:
    """Return whether OpenVINO can read the weights where they are."""
    return all(weight.dtype != torch.bfloat16 or weight.is_contiguous() for weight in _list_weights(module))


def _list_weights(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _prove(model: Model, tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compare a model with what PyTorch has computed in the trace.

    Raises:
        RuntimeError: the numbers are others.
    """
    found: list[Tensor] = []
    take_apart(model.run(tensors), found)
    limit = LARGEST_ERROR[model.precision if model.precision in LARGEST_ERROR else "bf16"]
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = ours.double().nan_to_num(), theirs.double().nan_to_num()
        error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)) if theirs.numel() else 0.0
        if error > limit:
            raise RuntimeError(f"the converted model is off by {error:.1e} of its largest number")


def load(file: np.ndarray, output: Structure, weight_bytes: int, precision: str) -> Model:
    """Return the model that :meth:`Model.save` has written.

    Args:
        file: its bytes, mapped into memory: that way it is read once and not copied.
        output, weight_bytes: of the model.
        precision: in which it runs.

    Raises:
        Exception: OpenVINO cannot read them.
    """
    import openvino

    compiled = _core().import_model(openvino.Tensor(file, shared_memory=True), "CPU", _settings(precision))
    return Model(compiled, output, weight_bytes, cached=True, _file=file)


def describe_processor() -> str:
    """Return what a compiled model depends on besides the function: the processor, and how many threads may run."""
    name = _core().get_property("CPU", "FULL_DEVICE_NAME")
    able = sorted(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return f"OpenVINO {find_version()}, {name}, {able}, {torch.get_num_threads()} threads"


def _settings(precision: str) -> Mapping[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }


def _core() -> Any:
    import openvino

    global _CORE
    if _CORE is None:
        _CORE = openvino.Core()
    return _CORE


_CORE: Any = None


class _Function(nn.Module):
    """A function of tensors as one module that holds all weights, and by that a trace knows them.

    The modules that they belong to stay out of it: PyTorch would make one of TorchScript's of each, which takes as
    long as all the rest of a trace, and OpenVINO would look for every weight on the way through them.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        super().__init__()
        self._function = function
        for place, weight in enumerate(module.parameters()):
            self.register_parameter(f"parameter{place}", weight)
        for place, value in enumerate(module.buffers()):
            self.register_buffer(f"buffer{place}", value)
        self.output: Structure = None
        self.results: tuple[Tensor, ...] = ()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        self.output = take_apart(self._function(*tensors), found)
        self.results = tuple(found)
        return self.results


class _PlainSizes(TorchFunctionMode):
    """Lets sizes be numbers in a trace, which otherwise makes tensors of them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _SIZES:
            if isinstance(result, tuple):
                return torch.Size([int(each) for each in result])
            return int(result)
        return result


_SIZES = (torch.Tensor.shape.__get__, torch.Tensor.size, torch.Tensor.numel)
