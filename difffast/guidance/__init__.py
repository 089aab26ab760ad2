"""Guidance while sampling: what the prompt's words belong to, losses on attention maps, semantic binding."""

from .binding import SemanticBinding
from .losses import LOSSES
from .tokens import Group, MarkedPrompt, get_indices, marked_prompt

__all__ = ["LOSSES", "Group", "MarkedPrompt", "SemanticBinding", "get_indices", "marked_prompt"]
