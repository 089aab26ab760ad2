"""The configured edit, as :func:`difffast.edit` hands it to :func:`difffast.patch`."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ...sampling.extension import Method
from ..inversion.inversion import Inversion
from ..inversion.values import ValueTexts
from ..negative_attention import refuse_attention_edits
from .config import EditConfig
from .extension import PromptEditor


class PromptEdit(EditConfig, Method):
    __doc__ = EditConfig.__doc__

    #: The picture whose values are injected, inverted by "style"; None: there is none.
    _picture: Inversion | None = None

    def inject(self, picture: Inversion) -> PromptEdit:
        """Return the same edit, with the values of a picture inverted by "style"."""
        changed = copy.copy(self)
        object.__setattr__(changed, "_picture", picture)
        return changed

    @property
    def prompts(self) -> list[str]:
        """The prompts with which the pipeline is to be called: the source and the target."""
        return [self.source, self.target]

    def attach(self, pipe: Any, unet: nn.Module) -> PromptEditor:
        refuse_attention_edits(pipe, unet)
        if self._picture is not None:
            self._picture.check(pipe, unet)
            return PromptEditor(self, pipe, unet, ValueTexts(self._picture.features, self._picture.networks))
        if self.values:
            raise ValueError(f"values={self.values} needs a picture inverted by 'style', whose values these are")
        return PromptEditor(self, pipe, unet)
