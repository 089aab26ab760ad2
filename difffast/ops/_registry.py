"""Backends of the operators: which exist, why one is missing, and which one runs.

``reference`` (plain PyTorch) always runs.  ``cpp`` is the compiled extension ``difffast._C``, built by setup.py
through LibTorch's stable ABI; it serves the CPU.  ``DIFFFAST_BACKEND`` or :func:`use_backend` force one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache

import torch

#: Schemas of all operators; the C++ side only adds implementations, so that they exist without it.
LIBRARY = torch.library.Library("difffast", "DEF")

BACKENDS = ("reference", "cpp")

_forced: ContextVar[str | None] = ContextVar("difffast_backend", default=None)


def missing(backend: str) -> str | None:
    """Why a backend cannot run in this installation, or None if it can.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; available: {', '.join(BACKENDS)}")
    return _extension_error() if backend == "cpp" else None


@cache
def _extension_error() -> str | None:
    spec = importlib.util.find_spec("difffast._C")
    if spec is None or spec.origin is None:
        return "difffast._C is not built (no C++ compiler at installation; `pip install -v .` prints the reason)"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"{spec.origin} cannot be loaded: {error}"
    return None


def choose(operator: str, device_type: str) -> str:
    """The backend that runs ``operator`` on a device type; a forced one that cannot run raises with the reason.

    Raises:
        RuntimeError: the forced backend is missing or does not serve this device.
        ValueError: ``DIFFFAST_BACKEND`` names no backend.
    """
    forced = _forced.get() or os.environ.get("DIFFFAST_BACKEND")
    if forced is None:
        return "cpp" if device_type == "cpu" and missing("cpp") is None else "reference"
    reason = missing(forced)
    if reason is None and forced == "cpp" and device_type != "cpu":
        reason = f"it serves the CPU only, the tensor is on {device_type!r}"
    if reason is not None:
        raise RuntimeError(f"{operator}: backend {forced!r} was forced but cannot run: {reason}")
    return forced


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force a backend for all operators inside a ``with`` block (this thread or task only).

    Raises:
        ValueError: unknown backend.
        RuntimeError: the backend is missing.
    """
    reason = missing(backend)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)
