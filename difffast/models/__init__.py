"""Embedded and published models: a tiny complete pipeline, and full-size UNet configurations."""

from .configs import UNET_CONFIGS, unet
from .tiny import TINY_PIPELINES, load_pipeline, tiny_pipeline

__all__ = ["TINY_PIPELINES", "UNET_CONFIGS", "load_pipeline", "tiny_pipeline", "unet"]
