"""Which pipelines difffast patches, and how far: pure data that tests/test_support.py proves row by row."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol


class Pipeline(Protocol):
    """Any pipeline of Diffusers, for type checkers.

    They see Diffusers' classes as its stand-ins for a missing PyTorch, which do not derive from each other.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Support:
    """What the patch does for one class of pipelines.

    Attributes:
        family: what it belongs to.
        key_steps: name of the published list that ``key_steps=None`` takes (``difffast.plan.PUBLISHED_KEY_STEPS``).
        parallel: whether several decoder steps can run as one batch; False: always one at a time.
        reuse: whether :class:`difffast.FeatureReuse` works.
        prior_noise: whether prior noise injection is meant for it.
        guidance: why guidance cannot be reused; empty where the UNet's batch is [unconditional, conditional].
        note: what a user should know.
    """

    family: str
    key_steps: str = "sd"
    parallel: bool = True
    reuse: bool = True
    prior_noise: bool = True
    guidance: str = ""
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

_SD = Support("Stable Diffusion 1, 2")
_XL = Support("Stable Diffusion XL")
_THREE = "its batch has three parts"
_PAG = Support("Perturbed-attention guidance", guidance=_THREE)
_CONTROLNET = Support("ControlNet", note="ControlNet runs at key steps, and under feature reuse at every step")
_IF_1 = Support("DeepFloyd IF, stage I", key_steps="if-1", prior_noise=False)
_IF_2 = Support("DeepFloyd IF, stage II", key_steps="if-2", prior_noise=False)
_KANDINSKY = Support("Kandinsky 2.2 decoder")
_KOLORS = Support("Kolors")
_ANIMATEDIFF = Support("AnimateDiff", prior_noise=False)
_MODELSCOPE = Support("ModelScope text-to-video", prior_noise=False)
_ZERO = Support(
    "Text2Video-Zero",
    parallel=False,
    prior_noise=False,
    note="all frames attend to the first of the batch, which would mix steps that are decoded together",
)
_ADAPTER = Support("T2I-Adapter", note="the adapter's features enter at key steps only")

#: By class name; subclasses are taken for what they derive from.
PIPELINES: dict[str, Support] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD,
    "StableDiffusionInstructPix2PixPipeline": replace(_SD, guidance=_THREE),
    "StableDiffusionXLPipeline": _XL,
    "StableDiffusionXLImg2ImgPipeline": _XL,
    "StableDiffusionXLInpaintPipeline": _XL,
    "StableDiffusionPAGPipeline": _PAG,
    "StableDiffusionPAGImg2ImgPipeline": _PAG,
    "StableDiffusionPAGInpaintPipeline": _PAG,
    "StableDiffusionXLPAGPipeline": _PAG,
    "StableDiffusionXLPAGImg2ImgPipeline": _PAG,
    "StableDiffusionXLPAGInpaintPipeline": _PAG,
    "StableDiffusionControlNetPipeline": _CONTROLNET,
    "StableDiffusionControlNetImg2ImgPipeline": _CONTROLNET,
    "StableDiffusionControlNetInpaintPipeline": _CONTROLNET,
    "StableDiffusionControlNetPAGPipeline": replace(_CONTROLNET, guidance=_THREE),
    "StableDiffusionControlNetPAGInpaintPipeline": replace(_CONTROLNET, guidance=_THREE),
    "StableDiffusionXLControlNetPipeline": _CONTROLNET,
    "StableDiffusionXLControlNetImg2ImgPipeline": _CONTROLNET,
    "StableDiffusionXLControlNetInpaintPipeline": _CONTROLNET,
    "StableDiffusionXLControlNetPAGPipeline": replace(_CONTROLNET, guidance=_THREE),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": replace(_CONTROLNET, guidance=_THREE),
    "StableDiffusionXLControlNetUnionPipeline": _CONTROLNET,
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": _CONTROLNET,
    "StableDiffusionXLControlNetUnionInpaintPipeline": _CONTROLNET,
    "StableDiffusionAdapterPipeline": _ADAPTER,
    "StableDiffusionXLAdapterPipeline": _ADAPTER,
    "StableDiffusionXLInstructPix2PixPipeline": replace(_XL, guidance=_THREE),
    "StableDiffusionUpscalePipeline": Support("Stable Diffusion x4 upscaler", key_steps="upscaler", prior_noise=False),
    "StableDiffusionGLIGENPipeline": Support("GLIGEN", note="the step at which grounding ends is a key step"),
    "StableDiffusionImageVariationPipeline": _SD,
    "LatentConsistencyModelPipeline": Support("Latent consistency", note="at least 8 steps, or force=True"),
    "KandinskyV22Pipeline": _KANDINSKY,
    "KandinskyV22Img2ImgPipeline": _KANDINSKY,
    "KandinskyV22ControlnetPipeline": _KANDINSKY,
    "KolorsPipeline": _KOLORS,
    "KolorsImg2ImgPipeline": _KOLORS,
    "KolorsPAGPipeline": replace(_KOLORS, guidance=_THREE),
    "IFPipeline": _IF_1,
    "IFImg2ImgPipeline": _IF_1,
    "IFInpaintingPipeline": _IF_1,
    "IFSuperResolutionPipeline": _IF_2,
    "IFImg2ImgSuperResolutionPipeline": _IF_2,
    "IFInpaintingSuperResolutionPipeline": _IF_2,
    "StableDiffusionDepth2ImgPipeline": _SD,
    "AnimateDiffPipeline": _ANIMATEDIFF,
    "AnimateDiffVideoToVideoPipeline": _ANIMATEDIFF,
    "AnimateDiffPAGPipeline": replace(_ANIMATEDIFF, guidance=_THREE),
    "AnimateDiffSDXLPipeline": _ANIMATEDIFF,
    "AnimateDiffControlNetPipeline": replace(_ANIMATEDIFF, note=_CONTROLNET.note),
    "AnimateDiffVideoToVideoControlNetPipeline": replace(_ANIMATEDIFF, note=_CONTROLNET.note),
    "AnimateDiffSparseControlNetPipeline": replace(_ANIMATEDIFF, note=_CONTROLNET.note),
    "PIAPipeline": _ANIMATEDIFF,
    "StableVideoDiffusionPipeline": Support("Stable Video Diffusion", prior_noise=False),
    "TextToVideoSDPipeline": _MODELSCOPE,
    "VideoToVideoSDPipeline": _MODELSCOPE,
    "I2VGenXLPipeline": Support("I2VGen-XL", prior_noise=False),
    "TextToVideoZeroPipeline": _ZERO,
    "TextToVideoZeroSDXLPipeline": _ZERO,
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


#: Head of :func:`table`.
COLUMNS = ("family", "pipelines", "decoders", "feature reuse", "notes")


def table() -> list[tuple[str, str, str, str, str]]:
    """The table as text, a row for each entry that is different."""
    entries = dict.fromkeys(PIPELINES.values())
    return [
        (
            entry.family,
            ", ".join(name for name, other in PIPELINES.items() if other == entry),
            "in parallel" if entry.parallel else "one at a time",
            "yes" if entry.reuse else "no",
            entry.note,
        )
        for entry in entries
    ]
