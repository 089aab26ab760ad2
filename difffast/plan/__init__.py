"""Which step of a schedule does what: configurations, plans as printable data.  Nothing here imports torch."""

from .configs import DEFAULT_MAX_PARALLEL, MIN_STEPS, CfgReuse, EncoderPropagation, FeatureReuse, Sharing
from .key_steps import PUBLISHED_KEY_STEPS, scale_published_key_steps
from .measured import LEAST_CALLS, MeasuredPlan, Schedule
from .output_forecast import OutputForecast
from .rows import OuterReuse, PlanStep
from .steps import Plan

__all__ = [
    "DEFAULT_MAX_PARALLEL",
    "LEAST_CALLS",
    "MIN_STEPS",
    "PUBLISHED_KEY_STEPS",
    "CfgReuse",
    "EncoderPropagation",
    "FeatureReuse",
    "MeasuredPlan",
    "OuterReuse",
    "OutputForecast",
    "Plan",
    "PlanStep",
    "Schedule",
    "Sharing",
    "scale_published_key_steps",
]
