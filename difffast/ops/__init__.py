"""Operators: one file each with schema, reference and dispatch."""

from ._registry import BACKENDS, INSTRUCTION_SET, OPERATORS, PROVED, Proof, default_backend, missing, use_backend
from .attention_entropy import attention_entropy
from .cross_attention import cross_attention
from .repeat_batch import repeat_batch

__all__ = [
    "BACKENDS",
    "INSTRUCTION_SET",
    "OPERATORS",
    "PROVED",
    "Proof",
    "attention_entropy",
    "cross_attention",
    "default_backend",
    "missing",
    "repeat_batch",
    "use_backend",
]
