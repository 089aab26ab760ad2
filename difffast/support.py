"""Which pipelines difffast patches, and how far: pure data that tests/test_support.py proves row by row."""

from __future__ import annotations

import sys
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


#: UNets that are split in two, by class name -> what a call returns (a class of the same module).
UNETS: dict[str, str] = {
    "UNet2DConditionModel": "UNet2DConditionOutput",
    "UNetMotionModel": "UNetMotionOutput",
    "UNetSpatioTemporalConditionModel": "UNetSpatioTemporalConditionOutput",
    "UNet3DConditionModel": "UNet3DConditionOutput",
    "I2VGenXLUNet": "UNet3DConditionOutput",
}

_CROSS_FRAME = "every frame attends to the first frame of its batch, which would mix steps that are decoded together"

#: By class name; subclasses are taken for what they derive from.
PIPELINES: dict[str, Support] = {
    "StableDiffusionPipeline": Support("Stable Diffusion 1, 2"),
    "StableDiffusionImg2ImgPipeline": Support("Stable Diffusion 1, 2"),
    "StableDiffusionInpaintPipeline": Support("Stable Diffusion 1, 2"),
    "AnimateDiffPipeline": Support("AnimateDiff", prior_noise=False),
    "AnimateDiffVideoToVideoPipeline": Support("AnimateDiff", prior_noise=False),
    "AnimateDiffPAGPipeline": Support("AnimateDiff", prior_noise=False),
    "AnimateDiffSDXLPipeline": Support("AnimateDiff", prior_noise=False),
    "PIAPipeline": Support("AnimateDiff", prior_noise=False),
    "StableVideoDiffusionPipeline": Support("Stable Video Diffusion", prior_noise=False),
    "TextToVideoSDPipeline": Support("ModelScope text-to-video", prior_noise=False),
    "VideoToVideoSDPipeline": Support("ModelScope text-to-video", prior_noise=False),
    "I2VGenXLPipeline": Support("I2VGen-XL", prior_noise=False),
    "TextToVideoZeroPipeline": Support("Text2Video-Zero", parallel=False, prior_noise=False, note=_CROSS_FRAME),
    "TextToVideoZeroSDXLPipeline": Support("Text2Video-Zero", parallel=False, prior_noise=False, note=_CROSS_FRAME),
}


def support_of(pipeline: type) -> Support | None:
    """The entry of a class of pipelines, or of the nearest class that it derives from."""
    return next((PIPELINES[base.__name__] for base in pipeline.__mro__ if base.__name__ in PIPELINES), None)


def output_of(unet: type) -> type | None:
    """What calls of a class of UNets return with ``return_dict=True``; None if the class is not supported."""
    for base in unet.__mro__:
        if base.__name__ in UNETS:
            return getattr(sys.modules[base.__module__], UNETS[base.__name__])
    return None
