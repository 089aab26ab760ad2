"""Dispatch: which backends an operator has, which is forced, and which one runs.

``DIFFFAST_BACKEND`` (read at import) or :func:`use_backend` force a backend.

A decision depends on what is forced, on what the installation has, which does not change, and on a *signature* of the
operands: shapes, dtypes, devices, and whatever else the operator reads.  Functions that decide are given the signature
instead of the tensors, so that they cannot read what is not in it.  :func:`remember` keeps their latest answers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch.autograd import forward_ad

from . import _installed, _local
from ._installed import BACKENDS, FROM_PYTORCH, SDPA_KERNELS, missing
from ._keys import Key
from ._proofs import is_proved

#: Operator -> its backends, in the order in which they are tried.
OPERATORS: dict[str, tuple[str, ...]] = {
    "attention_entropy": ("cpp", "triton", "reference"),
    "cross_attention": ("cuda", "triton", "cpp", "sdpa", "reference", "flash", "cudnn", "efficient"),
    "convolution": ("cpp", "reference"),
    "edited_attention": ("triton", "cpp", "sdpa", "reference"),
    "geglu": ("cpp", "triton", "reference"),
    "group_norm_silu": ("cuda", "cpp", "triton", "reference"),
    "joint_attention": ("triton", "cpp", "sdpa", "reference", "flash", "cudnn", "efficient"),
    "linear": ("onednn", "reference"),
    "repeat_batch": ("cpp", "reference"),
    "self_attention": ("cpp", "sdpa", "reference", "flash", "cudnn", "efficient"),
    "skip_norm_silu": ("cuda", "cpp", "triton", "reference"),
}

#: What is forced, as pairs (operator, backend): under ``None`` for all operators that have the backend.
Forced = tuple[tuple[str | None, str], ...]

#: A plain global that is only ever replaced: torch.compile guards it, and it is a part of what is remembered.
forced_backends: Forced = ((None, os.environ["DIFFFAST_BACKEND"]),) if os.environ.get("DIFFFAST_BACKEND") else ()

#: How many answers each deciding function remembers.  A run of a pipeline has some dozen signatures.
REMEMBERED = 512

_memories: list[Any] = []

#: What blocks force that have begun and not ended, in their order; the first are of the environment.  Threads may end
#: them in another one.
_blocks: list[Forced] = [forced_backends]
_lock = threading.Lock()

Answer = TypeVar("Answer")


class Operand(NamedTuple):
    """What a decision may know of a tensor; the hot path makes plain tuples of it."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def remember(decide: Callable[..., Answer]) -> Callable[..., Answer]:
    """Make a deciding function remember its latest :data:`REMEMBERED` answers.

    Args:
        decide: takes what is forced, then a signature of hashable values, on which alone its answer depends.  Values of
            different types are different: True is not 1.  Errors are not remembered.

    Returns:
        A function of the signature.
    """

    @functools.lru_cache(REMEMBERED, typed=True)
    @functools.wraps(decide)
    def remembered(forced: Forced, _state: _local.State, *signature: Any, **named: Any) -> Answer:
        return decide(forced, *signature, **named)

    _memories.append(remembered)

    @functools.wraps(decide)
    def recall(*signature: Any, **named: Any) -> Answer:
        # torch.compile can guard what decides, but not what a cache holds.  The last three are is_transformed(), which
        # would be a call more at every operator.
        if (
            torch.compiler.is_compiling()
            or _local.watch is not None
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or torch._C._get_tracing_state() is not None
        ):
            return decide(forced_backends, *signature, **named)
        try:
            return remembered(forced_backends, _local.state, *signature, **named)
        except TypeError:
            pass  # Sizes are symbols, in a trace: those have no hash.
        return decide(forced_backends, *signature, **named)

    signature = inspect.signature(decide)
    recall.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
    return recall


def is_transformed() -> bool:
    """Whether torch.func transforms the call (vmap, grad, jvp, ...), or forward-mode differentiation or a trace may.

    Kernels of ours have no rules for the first two.  They would be called again and again, or lose a tangent without a
    word.  And who converts what torch.jit.trace has seen, to OpenVINO or ONNX, knows PyTorch's operators alone.
    """
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def forget() -> None:
    """Forget all answers, for tests that change what the installation has."""
    for remembered in _memories:
        remembered.cache_clear()


def find_forced(operator: str, forced: Forced, device: torch.device) -> str | None:
    """Return the backend that is forced for an operator, or None.

    Raises:
        ValueError: ``DIFFFAST_BACKEND`` names no backend.
        RuntimeError: it is missing or does not serve this device.
    """
    by_operator = dict(forced)
    backend = by_operator.get(operator, by_operator.get(None))
    if backend is None or (operator not in by_operator and backend in BACKENDS and backend not in OPERATORS[operator]):
        return None
    reason = _installed.find_obstacle(backend, device)
    if reason is not None:
        raise make_error(operator, backend, reason)
    return backend


def may_be_default(operator: str, backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend can run here and may be chosen without being forced."""
    return (
        _installed.find_obstacle(backend, device) is None
        and is_proved(operator, backend, device, dtype)
        and not _local.is_struck(_local.state.version, operator, backend)
    )


@remember
def default_backend(forced: Forced, operator: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that an operator tries first for this device and dtype.

    If one is forced, it is that one.  For some shapes the operator may take another one after all.
    """
    order = OPERATORS[operator]
    return find_forced(operator, forced, device) or next(
        backend for backend in order if may_be_default(operator, backend, device, dtype)
    )


class Case(NamedTuple):
    """What the local table asks of a call besides operator, device and dtype.

    Attributes:
        shapes: of the operands that settle all others.
        strides: of as many of them; None: they make no difference.
        options: pairs (name, number).
    """

    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...] | None
    options: tuple[tuple[str, int], ...]


def choose(
    operator: str,
    forced: Forced,
    device: torch.device,
    dtype: torch.dtype,
    find_obstacle: Callable[[str], str | None],
    loses: Callable[[str], bool] = lambda backend: False,
    case: Case | None = None,
) -> str:
    """Return the forced backend, that of a proof on this machine, or the first default that serves the operands.

    Args:
        find_obstacle: says why a backend that exists here cannot serve these operands, or returns None.
        loses: whether a backend that could run is slower than the next on this shape.
        case: what the local table is asked for; None: it is not asked.

    Raises:
        CannotRunError: the forced backend cannot run.
    """
    if case is not None and _local.watch is not None:
        _local.watch(device, Key.of(operator, dtype, *case))
    backend = find_forced(operator, forced, device)
    if backend is not None:
        reason = find_obstacle(backend)
        if reason is not None:
            raise make_error(operator, backend, reason)
        if backend not in (*FROM_PYTORCH, *SDPA_KERNELS) and is_transformed():
            raise make_error(operator, backend, "torch.func and forward-mode differentiation take the reference alone")
        return backend
    if is_transformed():
        return "reference"
    traced = torch.compiler.is_compiling()
    if case is not None and _local.load(device) and not (traced and not _local.are_static(*case)):
        version, mode = _local.state
        mode = "graph" if traced else mode
        backend = _local.find(version, device, operator, dtype, case.shapes, case.strides, case.options, mode)
        runs = backend in OPERATORS[operator] and _installed.find_obstacle(backend, device) is None
        if runs and find_obstacle(backend) is None:
            return backend
    for backend in OPERATORS[operator]:
        if may_be_default(operator, backend, device, dtype) and find_obstacle(backend) is None and not loses(backend):
            return backend
    raise AssertionError("the reference always runs")


def answer_otherwise(
    operator: str, backend: str, device: torch.device, error: Exception, again: Callable[[], Answer]
) -> Answer:
    """Let another backend answer a call whose chosen one has failed, which is struck out if the other one does.

    Args:
        error: with which it has failed.
        again: makes the call anew.

    Raises:
        Exception: ``error``, where it is not the kernel's, or no other backend would do better: this one is forced or
            the reference, the memory is full, or the call is being traced.  Else what ``again`` raises.
    """
    forced = find_forced(operator, forced_backends, device)
    if (
        backend in ("reference", forced)
        or not _is_of_kernel(error)
        or torch.compiler.is_compiling()
        or device.type == "meta"
    ):
        raise error
    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    _local.strike(operator, backend, reason)
    try:
        answer = again()
    except BaseException:
        _local.acquit(operator, backend)  # nobody else can do it either
        raise
    warnings.warn(
        f"difffast: {operator} takes PyTorch's way from now on, its backend {backend!r} has failed: {reason}",
        stacklevel=3,
    )
    return answer


def _is_of_kernel(error: Exception) -> bool:
    """Whether an error is a kernel's own, and not one that has come through it: a signal's, a hook's, full memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
        return False
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    places = [type(error).__module__, "" if frame is None else frame.tb_frame.f_globals.get("__name__", "")]
    # Checkpointing leaves a recomputation by an exception out of a hook.
    return all(_owns_kernels(place) and not place.startswith("torch.utils.checkpoint") for place in places)


def _owns_kernels(module: str) -> bool:
    package = module.partition(".")[0]
    return package in ("difffast", "torch", "triton") or package in sys.stdlib_module_names


class CannotRunError(RuntimeError):
    """A forced backend cannot run on these operands, or not here."""


def make_error(operator: str, backend: str, reason: str) -> CannotRunError:
    """Make the error for a forced backend that cannot run."""
    return CannotRunError(f"{operator}: backend {backend!r} was forced but cannot run: {reason}")


@contextlib.contextmanager
def use_backend(backend: str, *operators: str) -> Iterator[tuple[str, ...]]:
    """Force a backend inside a ``with`` block.  It is forced in all threads of the process.

    Args:
        backend: one of :data:`BACKENDS`.
        operators: the names of the operators that shall use it.  If none is named, all that have this backend do.  The
            others keep their own choice, and ``report.last_run`` of a patched pipeline names them.

    Yields:
        The names of the operators that use it.

    Raises:
        ValueError: unknown backend or operator, or an operator without this backend.
        RuntimeError: the backend is missing.
    """
    global forced_backends
    reason = missing(backend)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
    for operator in operators:
        if backend not in OPERATORS.get(operator, ()):
            known = "; ".join(f"{name}: {', '.join(has)}" for name, has in OPERATORS.items())
            raise ValueError(f"{operator!r} has no backend {backend!r}; operators and their backends: {known}")
    block = _Block((name, backend) for name in operators or (None,))
    with _lock:
        _blocks.append(block)
        forced_backends = _join_blocks()
    try:
        yield operators or tuple(name for name, has in OPERATORS.items() if backend in has)
    finally:
        with _lock:
            _blocks[:] = [each for each in _blocks if each is not block]
            forced_backends = _join_blocks()


class _Block(tuple[tuple[str | None, str], ...]):
    """What one block forces; known by its identity."""


def _join_blocks() -> Forced:
    """Return what all blocks force: later ones win, without operators over those that earlier ones name."""
    joined: dict[str | None, str] = {}
    for block in _blocks:
        joined = {**({} if None in dict(block) else joined), **dict(block)}
    return tuple(joined.items())


def describe_unforced() -> str:
    """Return, as text, which operators do not have the backend that is forced for all; "" if none is or all have it."""
    backend = dict(forced_backends).get(None)
    named = [operator for operator, _ in forced_backends]
    others = [name for name, has in OPERATORS.items() if backend not in has and name not in named]
    if backend is None or not others:
        return ""
    return f"backend {backend!r} is forced, but {', '.join(others)} do not have it and keep their own choice"
