"""difffast: make Hugging Face Diffusers UNet pipelines faster with one call, and exactly undo it with another."""

from typing import TYPE_CHECKING, Any

from . import models
from .collect import collect_maps
from .erase.edit import Erasure, erase
from .later import import_later
from .layers.maps import AttentionMaps
from .patch import patch, patched, unpatch
from .plan import CfgReuse, EncoderPropagation, FeatureReuse, MeasuredPlan, OutputForecast, Plan
from .proofs import ProofReport, prove
from .renamed import warn_renamed
from .report import PatchReport
from .tune import tune

if TYPE_CHECKING:
    from .editing import edit
    from .erase.meta import MetaTrap
    from .erase.relearning import Relearning
    from .erase.report import EraseReport, erase_report
    from .erase.trainer import EraseTrainer
    from .steering.binding.method import SemanticBinding
    from .steering.inversion.inversion import Inversion
    from .steering.inversion.invert import invert
    from .steering.negative_attention import NegativeAttention
    from .steering.safe_guard import SafeGuard
    from .steering.suppression.embeds import suppress
    from .steering.suppression.method import Suppression

__version__ = "0.2.0"

__all__ = [
    "AttentionMaps",
    "CfgReuse",
    "EncoderPropagation",
    "EraseReport",
    "EraseTrainer",
    "Erasure",
    "FeatureReuse",
    "Inversion",
    "MeasuredPlan",
    "MetaTrap",
    "NegativeAttention",
    "OutputForecast",
    "PatchReport",
    "Plan",
    "ProofReport",
    "Relearning",
    "SafeGuard",
    "SemanticBinding",
    "Suppression",
    "__version__",
    "collect_maps",
    "edit",
    "erase",
    "erase_report",
    "invert",
    "models",
    "patch",
    "patched",
    "prove",
    "suppress",
    "tune",
    "unpatch",
]

_find_later = import_later(
    __name__,
    {
        "EraseReport": "erase.report",
        "EraseTrainer": "erase.trainer",
        "Inversion": "steering.inversion.inversion",
        "MetaTrap": "erase.meta",
        "NegativeAttention": "steering.negative_attention",
        "Relearning": "erase.relearning",
        "SafeGuard": "steering.safe_guard",
        "SemanticBinding": "steering.binding.method",
        "Suppression": "steering.suppression.method",
        "edit": "editing",
        "erase_report": "erase.report",
        "invert": "steering.inversion.invert",
        "suppress": "steering.suppression.embeds",
    },
)

#: Public names of 0.1 -> what they are called now.
_RENAMED = {"GuidanceReuse": CfgReuse, "plan_for": tune}


if not TYPE_CHECKING:  # type checkers shall see the names that there are, and no other

    def __getattr__(name: str) -> Any:
        if name in _RENAMED:
            warn_renamed(f"difffast.{name}", f"difffast.{_RENAMED[name].__name__}")
            return _RENAMED[name]
        return _find_later(name)
