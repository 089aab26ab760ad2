"""Backends of the operators: which exist, why one is missing, and which one runs.

``reference`` (plain PyTorch) always runs.  ``cpp`` is the compiled extension ``difffast._C``, built by setup.py
through LibTorch's stable ABI; it serves the CPU.  ``DIFFFAST_BACKEND`` (read at import) or :func:`use_backend` force
one.  All state is in plain module globals, which torch.compile guards: a change recompiles instead of going stale.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch

#: Schemas of all operators; the C++ side only adds implementations, so that they exist without it.
LIBRARY = torch.library.Library("difffast", "DEF")

BACKENDS = ("reference", "cpp")


def _load_extension() -> str | None:
    """Load ``difffast._C``; why it cannot be, or None."""
    spec = importlib.util.find_spec("difffast._C")
    if spec is None or spec.origin is None:
        return "difffast._C is not built (`pip install -v --no-build-isolation .` prints the reason)"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"{spec.origin} cannot be loaded: {error}"
    return None


_missing: dict[str, str | None] = {"reference": None, "cpp": _load_extension()}
_forced: str | None = os.environ.get("DIFFFAST_BACKEND")


def missing(backend: str) -> str | None:
    """Why a backend cannot run in this installation, or None if it can.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in _missing:
        raise ValueError(f"unknown backend {backend!r}; available: {', '.join(BACKENDS)}")
    return _missing[backend]


def choose(operator: str, device_type: str) -> str:
    """The backend that runs ``operator`` on a device type; a forced one that cannot run raises with the reason.

    Raises:
        RuntimeError: the forced backend is missing or does not serve this device.
        ValueError: ``DIFFFAST_BACKEND`` names no backend.
    """
    if _forced is None:
        return "cpp" if device_type == "cpu" and missing("cpp") is None else "reference"
    reason = missing(_forced)
    if reason is None and _forced == "cpp" and device_type != "cpu":
        reason = f"it serves the CPU only, the tensor is on {device_type!r}"
    if reason is not None:
        raise RuntimeError(f"{operator}: backend {_forced!r} was forced but cannot run: {reason}")
    return _forced


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force a backend for all operators of the process inside a ``with`` block.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the backend is missing.
    """
    global _forced
    reason = missing(backend)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
    earlier, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = earlier
