"""Methods that change pictures on purpose: what a prompt's words belong to, losses on attention maps, binding."""

from typing import TYPE_CHECKING

from ..later import import_later

if TYPE_CHECKING:
    from .binding.method import SemanticBinding
    from .composite import correct_by_similarities
    from .inversion.edict import generate_edict
    from .losses import LOSSES
    from .prompts import MarkedPrompt, Subject, get_indices, parse_prompt
    from .variable_size import variable_size_attention

__all__ = [
    "LOSSES",
    "MarkedPrompt",
    "SemanticBinding",
    "Subject",
    "correct_by_similarities",
    "generate_edict",
    "get_indices",
    "parse_prompt",
    "variable_size_attention",
]

if not TYPE_CHECKING:
    __getattr__ = import_later(
        __name__,
        {
            "LOSSES": "losses",
            "MarkedPrompt": "prompts",
            "SemanticBinding": "binding.method",
            "Subject": "prompts",
            "correct_by_similarities": "composite",
            "generate_edict": "inversion.edict",
            "get_indices": "prompts",
            "parse_prompt": "prompts",
            "variable_size_attention": "variable_size",
        },
    )
