"""Which pipelines difffast patches, and how far: pure data that tests/test_support.py proves row by row."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal


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


@dataclass(frozen=True)
class Denoiser:
    """What sets one class of UNets apart from another.

    Attributes:
        output: what a call returns: the name of a class in the UNet's module.
        text: how attn2 layers get the text argument: "given", as it is; "repeated", over frames or pixels; "extended",
            by tokens that the UNet makes from other arguments.
        binding: whether semantic binding is meant for it.
    """

    output: str
    text: Literal["given", "repeated", "extended"]
    binding: bool = False


#: UNets that are split in two, by class name; subclasses are taken for what they derive from.
UNETS: dict[str, Denoiser] = {
    "UNet2DConditionModel": Denoiser("UNet2DConditionOutput", "given", binding=True),
    "UNetMotionModel": Denoiser("UNetMotionOutput", "given"),
    "UNetSpatioTemporalConditionModel": Denoiser("UNetSpatioTemporalConditionOutput", "repeated"),
    "UNet3DConditionModel": Denoiser("UNet3DConditionOutput", "repeated"),
    "I2VGenXLUNet": Denoiser("UNet3DConditionOutput", "extended"),
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


def denoiser_of(unet: type) -> Denoiser | None:
    """The entry of a class of UNets; None if it is not supported."""
    return next((UNETS[base.__name__] for base in unet.__mro__ if base.__name__ in UNETS), None)


def output_of(unet: type) -> type:
    """What calls of a supported class of UNets return with ``return_dict=True``."""
    module = next(base.__module__ for base in unet.__mro__ if base.__name__ in UNETS)
    return getattr(sys.modules[module], denoiser_of(unet).output)
