"""Guidance while sampling: what the prompt's words belong to, losses on attention maps, semantic binding."""

from .binding import SemanticBinding
from .composite import correct_by_similarities
from .losses import LOSSES
from .tokens import Group, MarkedPrompt, get_indices, marked_prompt
from .variable_size import variable_size_attention

__all__ = [
    "LOSSES",
    "Group",
    "MarkedPrompt",
    "SemanticBinding",
    "correct_by_similarities",
    "get_indices",
    "marked_prompt",
    "variable_size_attention",
]
