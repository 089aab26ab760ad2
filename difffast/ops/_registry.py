"""Backends of the operators: which exist, why one is missing, which are proved on which hardware, and which one runs.

``reference`` is plain PyTorch and always runs; ``sdpa`` is PyTorch's own fused attention, ``onednn`` its way to that
library's matrix products on CPUs.  ``cpp`` (CPU) and ``cuda`` (NVIDIA) are compiled into ``difffast._C`` by setup.py
through LibTorch's stable ABI; ``triton`` needs a GPU, or TRITON_INTERPRET=1 on a CPU.  ``DIFFFAST_BACKEND`` (read at
import) or :func:`use_backend` force one.

All state is in plain module globals, which torch.compile guards: a change recompiles instead of going stale.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

#: Schemas of all operators; the C++ side only adds implementations, so that they exist without it.
LIBRARY = torch.library.Library("difffast", "DEF")

#: The oldest PyTorch with all of the stable ABI that the extension calls; setup.py builds it for no older one.
STABLE_ABI = (2, 10)
#: The oldest Triton with tl.range(disable_licm=True), without which loops would hold too many registers.
_TRITON = (3, 5)
#: How the parts that are compiled come into being; setup.py says the same.
_HOW = "and setuptools>=78.0.1 installed, `pip install -v --no-build-isolation .` in a checkout builds"
NOT_BUILT = f"difffast._C is not built: with a C++ compiler {_HOW} it, or prints why it cannot"

#: PyTorch's own, which need no proof.
FROM_PYTORCH = ("reference", "sdpa", "onednn")
BACKENDS = (*FROM_PYTORCH, "cpp", "triton", "cuda")

#: Operator -> its backends, in the order in which they are tried.
OPERATORS: dict[str, tuple[str, ...]] = {
    "attention_entropy": ("cpp", "triton", "reference"),
    "cross_attention": ("cuda", "triton", "cpp", "sdpa", "reference"),
    "group_norm_silu": ("cuda", "cpp", "triton", "reference"),
    "joint_attention": ("triton", "cpp", "sdpa", "reference"),
    "linear": ("onednn", "reference"),
    "repeat_batch": ("cpp", "reference"),
    "self_attention": ("cpp", "sdpa", "reference"),
    "skip_norm_silu": ("cuda", "cpp", "triton", "reference"),
}


@dataclass(frozen=True)
class Proof:
    """One row of the proof table: a run on this hardware passed the operator's tests.

    Attributes:
        operator: its name.
        backend: one of :data:`BACKENDS`.
        architecture: ``"cpu"``, or ``"sm_90"`` and the like.
        dtypes: for which the tests ran.
        run: what ran, where; the raw record is committed.
    """

    operator: str
    backend: str
    architecture: str
    dtypes: frozenset[torch.dtype]
    run: str


_ON_CPU = "make test on x86-64 with AVX-512, AVX2 and SSE2"

#: For which kernels a run on the hardware has proved them.  A GPU kernel that is not listed is never a default: it runs
#: only when forced.  Add a row with the commit that adds the record of the run.
PROVED: tuple[Proof, ...] = (
    Proof(
        "repeat_batch", "cpp", "cpu", frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64}), _ON_CPU
    ),
    Proof("attention_entropy", "cpp", "cpu", frozenset({torch.float32, torch.float64}), _ON_CPU),
    Proof("cross_attention", "cpp", "cpu", frozenset({torch.float32, torch.bfloat16, torch.float64}), _ON_CPU),
    Proof("group_norm_silu", "cpp", "cpu", frozenset({torch.float32, torch.bfloat16, torch.float64}), _ON_CPU),
    Proof("joint_attention", "cpp", "cpu", frozenset({torch.float32, torch.bfloat16, torch.float64}), _ON_CPU),
    Proof("self_attention", "cpp", "cpu", frozenset({torch.float32, torch.bfloat16, torch.float64}), _ON_CPU),
    Proof("skip_norm_silu", "cpp", "cpu", frozenset({torch.float32, torch.bfloat16, torch.float64}), _ON_CPU),
)


def _load_extension() -> tuple[ctypes.CDLL | None, str | None]:
    """Load ``difffast._C``; the library, or why it cannot be."""
    # An older PyTorch may load it all the same, and crashes at its first call.
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < STABLE_ABI:
        oldest = ".".join(map(str, STABLE_ABI))
        return None, f"difffast._C needs torch >= {oldest}, whose ABI is stable, and torch is {torch.__version__}"
    spec = importlib.util.find_spec("difffast._C")
    if spec is None or spec.origin is None:
        return None, NOT_BUILT
    try:
        torch.ops.load_library(spec.origin)
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, f"{spec.origin} cannot be loaded: {error}"
    library.difffast_instruction_set.restype = ctypes.c_char_p
    return library, None


def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of a build with another name
        found = importlib.metadata.version("triton")  # the module's own __version__ would import the compiler
        if tuple(int(part) for part in found.split(".")[:2]) < _TRITON:
            return f"the kernels need triton >= {'.'.join(map(str, _TRITON))}, torch 2.9's own, and triton is {found}"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no CUDA device is visible (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"
    return None


def _no_cuda() -> str | None:
    if _extension is None:
        return _not_built
    if not _extension.difffast_has_cuda():
        return (
            f"difffast._C was built without the CUDA kernels: with a CUDA toolkit {_HOW} them, or prints why it cannot"
        )
    return None if torch.cuda.is_available() else "no CUDA device is visible"


#: Whether Triton kernels run in Triton's interpreter; Triton reads the variable when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_extension, _not_built = _load_extension()
_missing: dict[str, str | None] = {
    "reference": None,
    "sdpa": None,
    "onednn": None if torch.backends.mkldnn.is_available() else "PyTorch was built without oneDNN",
    "cpp": _not_built,
    "triton": _no_triton(),
    "cuda": _no_cuda(),
}
#: The instruction set of the C++ kernels: "avx512", "avx2" or "baseline"; None without them.
INSTRUCTION_SET: str | None = _extension.difffast_instruction_set().decode() if _extension else None

#: Forced backends: by operator, under ``None`` for all that have it.
_forced: dict[str | None, str] = {}
if "DIFFFAST_BACKEND" in os.environ:
    _forced[None] = os.environ["DIFFFAST_BACKEND"]

_DEVICES = {
    "onednn": ("cpu",),
    "cpp": ("cpu",),
    "triton": ("cuda", "cpu") if INTERPRETED else ("cuda",),
    "cuda": ("cuda",),
}


def missing(backend: str) -> str | None:
    """Why a backend cannot run in this installation, or None if it can.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in _missing:
        raise ValueError(f"unknown backend {backend!r}; available: {', '.join(BACKENDS)}")
    return _missing[backend]


def obstacle(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on this device in this installation, or None."""
    reason = missing(backend)
    if reason is None and device.type not in _DEVICES.get(backend, (device.type,)):
        reason = f"it serves {' and '.join(_DEVICES[backend])} tensors, the tensor is on {device.type!r}"
    return reason


def forces() -> bool:
    """Whether any operator's backend is forced."""
    return bool(_forced)


def forced(operator: str, device: torch.device) -> str | None:
    """The backend that was forced for an operator, or None.

    Raises:
        ValueError: ``DIFFFAST_BACKEND`` names no backend.
        RuntimeError: it is missing or does not serve this device.
    """
    backend = _forced.get(operator, _forced.get(None))
    if backend is None or (operator not in _forced and backend in BACKENDS and backend not in OPERATORS[operator]):
        return None
    reason = obstacle(backend, device)
    if reason is not None:
        raise cannot_run(operator, backend, reason)
    return backend


def default(operator: str, backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend can run here and may be chosen without being forced."""
    return obstacle(backend, device) is None and proved(operator, backend, device, dtype)


def default_backend(operator: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that an operator tries first on this device, forced or not; shapes may rule it out."""
    order = OPERATORS[operator]
    return forced(operator, device) or next(backend for backend in order if default(operator, backend, device, dtype))


def choose(
    operator: str,
    x: torch.Tensor,
    obstacle: Callable[[str], str | None],
    loses: Callable[[str], bool] = lambda backend: False,
) -> str:
    """The backend for operands like ``x``: the forced one, or the first that may be a default and serves them.

    Args:
        obstacle: why a backend that exists here cannot serve these operands, or None.
        loses: whether a backend that could run is slower than the next on this shape.

    Raises:
        RuntimeError: the forced backend cannot run.
    """
    backend = forced(operator, x.device)
    if backend is not None:
        reason = obstacle(backend)
        if reason is not None:
            raise cannot_run(operator, backend, reason)
        return backend
    for backend in OPERATORS[operator]:
        if default(operator, backend, x.device, x.dtype) and obstacle(backend) is None and not loses(backend):
            return backend
    raise AssertionError("the reference always runs")


def wants_gradient(*operands: torch.Tensor) -> bool:
    """Whether a call on these operands will be differentiated."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in operands)


def cannot_run(operator: str, backend: str, reason: str) -> RuntimeError:
    """The error for a forced backend that cannot run."""
    return RuntimeError(f"{operator}: backend {backend!r} was forced but cannot run: {reason}")


def proved(operator: str, backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend may be a default: plain PyTorch always, a kernel of ours where a run on the hardware proved it.

    A C++ kernel for the CPU may be a default for every dtype it takes: the tests run on the user's kind of machine.
    """
    if backend in FROM_PYTORCH:
        return True
    rows = [p for p in PROVED if p.operator == operator and p.backend == backend]
    if device.type == "cpu":
        return any(p.architecture == "cpu" for p in rows)
    if not rows or device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return any(p.architecture == f"sm_{major}{minor}" and dtype in p.dtypes for p in rows)


def refuse_second_derivative(operator: str, backward: str) -> None:
    """Make differentiating the backward operator ``backward`` of ``operator`` an error.

    Without a formula PyTorch would take the gradient for a constant.
    """

    def refuse(_ctx: Any, *_grads: Any) -> None:
        raise RuntimeError(
            f"{operator}: the kernels' gradient cannot be differentiated again; "
            f"use_backend('reference', '{operator}') can"
        )

    torch.library.register_autograd(f"difffast::{backward}", refuse, lib=LIBRARY)


@contextlib.contextmanager
def use_backend(backend: str, *operators: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block, in the whole process.

    Args:
        backend: one of :data:`BACKENDS`.
        operators: names of operators; none: all that have this backend, while the others keep their own choice.

    Raises:
        ValueError: unknown backend or operator, or an operator without this backend.
        RuntimeError: the backend is missing.
    """
    global _forced
    reason = missing(backend)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
    for operator in operators:
        if backend not in OPERATORS.get(operator, ()):
            known = "; ".join(f"{name}: {', '.join(has)}" for name, has in OPERATORS.items())
            raise ValueError(f"{operator!r} has no backend {backend!r}; operators and their backends: {known}")
    earlier = _forced
    # The inner block wins: without operators, over those that an outer one names.
    _forced = {**earlier, **dict.fromkeys(operators, backend)} if operators else {None: backend}
    try:
        yield
    finally:
        _forced = earlier
