"""Models: the embedded trained one, tiny untrained ones, and full-size UNet configurations."""

from .configs import UNET_CONFIGS, unet
from .embedded import embedded_pipeline
from .tiny import TINY_PIPELINES, load_pipeline, tiny_pipeline

__all__ = ["TINY_PIPELINES", "UNET_CONFIGS", "embedded_pipeline", "load_pipeline", "tiny_pipeline", "unet"]
