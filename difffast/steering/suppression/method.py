"""The configured method of content suppression, as a user hands it to :func:`difffast.patch`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...sampling.extension import Method
from ..negative_attention import refuse_attention_edits
from .config import SuppressionConfig
from .extension import Suppressor


class Suppression(SuppressionConfig, Method):
    __doc__ = SuppressionConfig.__doc__

    def attach(self, pipe: Any, unet: nn.Module) -> Suppressor:
        refuse_attention_edits(pipe, unet, added_keys=True)
        return Suppressor(self, pipe, unet)
