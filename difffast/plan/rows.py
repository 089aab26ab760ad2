"""One row of a plan."""

from __future__ import annotations

from dataclasses import dataclass

from .key_steps import check_int


@dataclass(frozen=True)
class OuterReuse:
    """What a step between key steps runs of the UNet, under :class:`difffast.FeatureReuse`.

    Attributes:
        branch: skips that it makes anew besides conv_in's.
        extrapolate: degree of the polynomial over the deep features of the last key steps, at most 2.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    branch: int = 0
    extrapolate: int = 0

    def __post_init__(self) -> None:
        for name in ("branch", "extrapolate"):
            object.__setattr__(self, name, check_int(name, getattr(self, name)))
        if self.branch < 0:
            raise ValueError(f"branch must not be negative, got {self.branch}")
        if self.extrapolate not in (0, 1, 2):
            raise ValueError(f"extrapolate must be 0, 1 or 2, got {self.extrapolate}")


@dataclass(frozen=True)
class PlanStep:
    """One row of a plan.

    Attributes:
        step: its index in the schedule.
        key: whether it runs the encoder, or the whole UNet.
        decoded_with: the steps decoded in its batch.
        reuse: whether it runs the outer layers alone.
        half: whether it runs on the conditional half of the batch alone.
        full: whether embeddings or latents are changed on purpose at it, so that it runs in full.
        forecast: whether nothing of the UNet runs: its output is forecast from those of earlier steps.
    """

    step: int
    key: bool
    decoded_with: tuple[int, ...]
    reuse: bool = False
    half: bool = False
    full: bool = False
    forecast: bool = False
