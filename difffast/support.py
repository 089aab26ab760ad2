"""Which pipelines difffast patches, and how far: pure data that tests/test_support.py proves row by row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Support:
    """What the patch does for one class of pipelines.

    Attributes:
        family: what it belongs to.
        key_steps: name of the published list that ``key_steps=None`` takes (``difffast.plan.PUBLISHED_KEY_STEPS``).
        parallel: whether several decoder steps can run as one batch; False: always one at a time.
        reuse: whether :class:`difffast.FeatureReuse` works.
        prior_noise: whether prior noise injection is meant for it.
        note: what a user should know.
    """

    family: str
    key_steps: str = "sd"
    parallel: bool = True
    reuse: bool = True
    prior_noise: bool = True
    note: str = ""


#: By class name; subclasses are taken for what they derive from.
PIPELINES: dict[str, Support] = {
    "StableDiffusionPipeline": Support("Stable Diffusion 1, 2"),
    "StableDiffusionImg2ImgPipeline": Support("Stable Diffusion 1, 2"),
    "StableDiffusionInpaintPipeline": Support("Stable Diffusion 1, 2"),
}


def support_of(pipeline: type) -> Support | None:
    """The entry of a class of pipelines, or of the nearest class that it derives from."""
    return next((PIPELINES[base.__name__] for base in pipeline.__mro__ if base.__name__ in PIPELINES), None)
