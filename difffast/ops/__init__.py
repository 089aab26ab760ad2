"""Operators: one file each with schema, reference and dispatch."""

from ._registry import BACKENDS, missing, use_backend
from .repeat_batch import repeat_batch

__all__ = ["BACKENDS", "missing", "repeat_batch", "use_backend"]
