"""Operators: one file each with schema, reference and dispatch."""

from ._dispatch import OPERATORS, default_backend, use_backend
from ._installed import BACKENDS, INSTRUCTION_SET, missing
from ._proofs import PROVED, Proof
from .attention_entropy import attention_entropy
from .cross_attention import cross_attention
from .geglu import geglu
from .group_norm_silu import group_norm_silu
from .joint_attention import joint_attention
from .linear import linear
from .repeat_batch import repeat_batch
from .self_attention import self_attention
from .skip_norm_silu import skip_norm_silu

__all__ = [
    "BACKENDS",
    "INSTRUCTION_SET",
    "OPERATORS",
    "PROVED",
    "Proof",
    "attention_entropy",
    "cross_attention",
    "default_backend",
    "geglu",
    "group_norm_silu",
    "joint_attention",
    "linear",
    "missing",
    "repeat_batch",
    "self_attention",
    "skip_norm_silu",
    "use_backend",
]
