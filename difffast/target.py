"""What is to be patched: a pipeline, its plain UNet, and what is supported of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .engines.user_compiled import unwrap
from .support import UNETS, UNKNOWN, Denoiser, Support, denoiser_of, support_of
from .surgery.subclass import plain_class


@dataclass(frozen=True)
class Target:
    """A pipeline that can be patched.

    Attributes:
        pipe: the pipeline.
        unet: its plain UNet.
        support: what is supported of the pipeline's kind.
        denoiser: what sets the UNet's kind apart.
    """

    pipe: Any
    unet: nn.Module
    support: Support
    denoiser: Denoiser

    @classmethod
    def of(cls, pipe: Any) -> Target:
        """Return the target that a pipeline is.

        Raises:
            TypeError: ``pipe`` is no pipeline.
            ValueError: it has no UNet, or one of an unknown class.
        """
        from diffusers import DiffusionPipeline

        name = type(pipe).__name__
        if not isinstance(pipe, DiffusionPipeline):
            raise TypeError(f"pipe must be a diffusers.DiffusionPipeline, got {name}")
        unet = getattr(pipe, "unet", None)
        if unet is None:
            found = ", ".join(key for key in pipe.components if "transformer" in key or "prior" in key) or "none"
            raise ValueError(f"{name} has no UNet (other denoisers: {found}); difffast patches UNet pipelines only")
        plain = unwrap(unet)
        denoiser = denoiser_of(type(plain))
        if denoiser is None:
            raise ValueError(
                f"{name}.unet is a {type(plain).__name__}, which difffast does not know; UNets that it knows: "
                f"{', '.join(UNETS)}"
            )
        return cls(pipe, plain, support_of(type(pipe)) or UNKNOWN, denoiser)

    @property
    def name(self) -> str:
        """The pipeline's class."""
        return type(self.pipe).__name__

    def refuse_cfg_reuse(self) -> str:
        """Return why guidance cannot be reused: its batch is not [unconditional, conditional], or not known to be."""
        if self.support.exact_only or self.support.guidance:
            return self.support.exact_only or self.support.guidance
        tells = hasattr(plain_class(self.pipe), "do_classifier_free_guidance")
        return "" if tells else "it does not tell whether a run is guided"
