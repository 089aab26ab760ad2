"""The configured edit, as :func:`difffast.edit` hands it to :func:`difffast.patch`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...sampling.extension import Method
from ..negative_attention import refuse_attention_edits
from .config import EditConfig
from .extension import PromptEditor


class PromptEdit(EditConfig, Method):
    __doc__ = EditConfig.__doc__

    @property
    def prompts(self) -> list[str]:
        """The prompts with which the pipeline is to be called: the source and the target."""
        return [self.source, self.target]

    def attach(self, pipe: Any, unet: nn.Module) -> PromptEditor:
        refuse_attention_edits(pipe, unet)
        return PromptEditor(self, pipe)
