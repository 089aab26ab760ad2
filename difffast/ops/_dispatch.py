"""Dispatch: which backends an operator has, which is forced, and which one runs.

``DIFFFAST_BACKEND`` (read at import) or :func:`use_backend` force a backend.  All state is in plain module globals,
which torch.compile guards: a change recompiles instead of going stale.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

from ._installed import BACKENDS, find_obstacle, missing
from ._proofs import is_proved

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

#: Forced backends: by operator, under ``None`` for all that have it.
_forced: dict[str | None, str] = {}
if "DIFFFAST_BACKEND" in os.environ:
    _forced[None] = os.environ["DIFFFAST_BACKEND"]


def forces() -> bool:
    """Whether any operator's backend is forced."""
    return bool(_forced)


def find_forced(operator: str, device: torch.device) -> str | None:
    """The backend that was forced for an operator, or None.

    Raises:
        ValueError: ``DIFFFAST_BACKEND`` names no backend.
        RuntimeError: it is missing or does not serve this device.
    """
    backend = _forced.get(operator, _forced.get(None))
    if backend is None or (operator not in _forced and backend in BACKENDS and backend not in OPERATORS[operator]):
        return None
    reason = find_obstacle(backend, device)
    if reason is not None:
        raise make_error(operator, backend, reason)
    return backend


def may_be_default(operator: str, backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend can run here and may be chosen without being forced."""
    return find_obstacle(backend, device) is None and is_proved(operator, backend, device, dtype)


def default_backend(operator: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that an operator tries first on this device, forced or not; shapes may rule it out."""
    order = OPERATORS[operator]
    return find_forced(operator, device) or next(
        backend for backend in order if may_be_default(operator, backend, device, dtype)
    )


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
    backend = find_forced(operator, x.device)
    if backend is not None:
        reason = obstacle(backend)
        if reason is not None:
            raise make_error(operator, backend, reason)
        return backend
    for backend in OPERATORS[operator]:
        if may_be_default(operator, backend, x.device, x.dtype) and obstacle(backend) is None and not loses(backend):
            return backend
    raise AssertionError("the reference always runs")


def wants_gradient(*operands: torch.Tensor) -> bool:
    """Whether a call on these operands will be differentiated."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in operands)


def make_error(operator: str, backend: str, reason: str) -> RuntimeError:
    """The error for a forced backend that cannot run."""
    return RuntimeError(f"{operator}: backend {backend!r} was forced but cannot run: {reason}")


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
