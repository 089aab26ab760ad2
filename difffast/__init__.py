"""difffast: faster Hugging Face Diffusers UNet pipelines, patched in with one call and exactly out again."""

from . import models
from .attention_maps import AttentionMaps, collect_maps
from .guidance import SemanticBinding
from .patch import PatchReport, patch, patched, unpatch
from .plan import EncoderPropagation, FeatureReuse, GuidanceReuse, Plan
from .planner import plan_for

__version__ = "0.1.0"

__all__ = [
    "AttentionMaps",
    "EncoderPropagation",
    "FeatureReuse",
    "GuidanceReuse",
    "PatchReport",
    "Plan",
    "SemanticBinding",
    "__version__",
    "collect_maps",
    "models",
    "patch",
    "patched",
    "plan_for",
    "unpatch",
]
