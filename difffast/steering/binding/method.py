"""The configured method of semantic binding, as a user hands it to :func:`difffast.patch`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...sampling.extension import Method
from ...support import denoiser_of
from .config import BindingConfig
from .extension import Binder


class SemanticBinding(BindingConfig, Method):
    __doc__ = BindingConfig.__doc__

    def attach(self, pipe: Any, unet: nn.Module) -> Binder:
        if not denoiser_of(type(unet)).binding:
            raise ValueError(f"semantic binding is for pictures, got a {type(unet).__name__}")
        if not hasattr(pipe, "encode_prompt"):
            raise ValueError(f"semantic binding needs a prompt, and {type(pipe).__name__} has no encode_prompt")
        return Binder(self, pipe, unet)
