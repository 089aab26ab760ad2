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
        exact_only: why steps share nothing, so that only what is exact can be had; empty where they do.
        counts: whether the UNet gets times of which the scheduler's counter alone says the step: they are copies.
        remakes: arguments of the UNet that the pipeline makes anew at every step, of the same values.
    """

    family: str
    key_steps: str = "sd"
    parallel: bool = True
    reuse: bool = True
    prior_noise: bool = True
    guidance: str = ""
    note: str = ""
    exact_only: str = ""
    counts: bool = False
    remakes: tuple[str, ...] = ()


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
    "UNet2DModel": Denoiser("UNet2DOutput", "given"),
    "AudioLDM2UNet2DConditionModel": Denoiser("UNet2DConditionOutput", "given"),
    "Kandinsky3UNet": Denoiser("Kandinsky3UNetOutput", "given"),
}

_SD = Support("Stable Diffusion 1, 2")
_XL = Support("Stable Diffusion XL")
_THREE = "its batch has three parts"
_PAG = Support("Perturbed-attention guidance", guidance=_THREE)
_CONTROLNET = Support("ControlNet", note="ControlNet runs at key steps, and under feature reuse at every step")
_IF_1 = Support("DeepFloyd IF, stage I", key_steps="if-1", prior_noise=False)
_IF_2 = Support("DeepFloyd IF, stage II", key_steps="if-2", prior_noise=False)
_KANDINSKY = Support("Kandinsky 2.2 decoder")
_KANDINSKY_1 = Support("Kandinsky 2.1 decoder")
_KANDINSKY_3 = Support("Kandinsky 3", reuse=False, note="its UNet has other blocks, which end in no outer layers")
_CONSISTENCY = Support("Latent consistency", note="at least 8 steps, or force=True")
_UNCLIP = Support("Stable unCLIP")
_MARIGOLD = Support("Marigold", prior_noise=False, note="at least 8 steps, or force=True")
_UNCONDITIONAL = Support("Unconditional UNets for pixels", prior_noise=False)
_DREAMLITE = Support("DreamLite", prior_noise=False, counts=True, remakes=("added_cond_kwargs",))
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

_INVERTS = "its noise maps undo what the whole UNet returned at every step of an inversion"
_DEPRECATED = (
    "AltDiffusionImg2ImgPipeline",
    "AltDiffusionPipeline",
    "AudioDiffusionPipeline",
    "AudioLDMPipeline",
    "BlipDiffusionControlNetPipeline",
    "BlipDiffusionPipeline",
    "CycleDiffusionPipeline",
    "DanceDiffusionPipeline",
    "KarrasVePipeline",
    "LDMPipeline",
    "MusicLDMPipeline",
    "PNDMPipeline",
    "PaintByExamplePipeline",
    "RePaintPipeline",
    "ScoreSdeVePipeline",
    "SemanticStableDiffusionPipeline",
    "StableCascadeCombinedPipeline",
    "StableCascadeDecoderPipeline",
    "StableCascadePriorPipeline",
    "StableDiffusionAttendAndExcitePipeline",
    "StableDiffusionControlNetXSPipeline",
    "StableDiffusionDiffEditPipeline",
    "StableDiffusionGLIGENTextImagePipeline",
    "StableDiffusionInpaintPipelineLegacy",
    "StableDiffusionKDiffusionPipeline",
    "StableDiffusionLDM3DPipeline",
    "StableDiffusionModelEditingPipeline",
    "StableDiffusionPanoramaPipeline",
    "StableDiffusionParadigmsPipeline",
    "StableDiffusionPipelineSafe",
    "StableDiffusionPix2PixZeroPipeline",
    "StableDiffusionSAGPipeline",
    "StableDiffusionXLControlNetXSPipeline",
    "StableDiffusionXLKDiffusionPipeline",
    "UnCLIPImageVariationPipeline",
    "UnCLIPPipeline",
    "UniDiffuserPipeline",
    "VersatileDiffusionDualGuidedPipeline",
    "VersatileDiffusionImageVariationPipeline",
    "VersatileDiffusionPipeline",
    "VersatileDiffusionTextToImagePipeline",
)
_ONNX = (
    "OnnxStableDiffusionImg2ImgPipeline",
    "OnnxStableDiffusionInpaintPipeline",
    "OnnxStableDiffusionInpaintPipelineLegacy",
    "OnnxStableDiffusionPipeline",
    "OnnxStableDiffusionUpscalePipeline",
    "StableDiffusionOnnxPipeline",
)

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
    "LatentConsistencyModelPipeline": _CONSISTENCY,
    "LatentConsistencyModelImg2ImgPipeline": _CONSISTENCY,
    "StableUnCLIPPipeline": _UNCLIP,
    "StableUnCLIPImg2ImgPipeline": _UNCLIP,
    "MarigoldDepthPipeline": _MARIGOLD,
    "MarigoldNormalsPipeline": _MARIGOLD,
    "MarigoldIntrinsicsPipeline": _MARIGOLD,
    "DreamLitePipeline": _DREAMLITE,
    "DreamLiteMobilePipeline": replace(_DREAMLITE, note="at least 8 steps, or force=True"),
    "KandinskyPipeline": _KANDINSKY_1,
    "KandinskyImg2ImgPipeline": _KANDINSKY_1,
    "KandinskyInpaintPipeline": _KANDINSKY_1,
    "KandinskyCombinedPipeline": _KANDINSKY_1,
    "KandinskyImg2ImgCombinedPipeline": _KANDINSKY_1,
    "KandinskyInpaintCombinedPipeline": _KANDINSKY_1,
    "KandinskyV22Pipeline": _KANDINSKY,
    "KandinskyV22Img2ImgPipeline": _KANDINSKY,
    "KandinskyV22InpaintPipeline": _KANDINSKY,
    "KandinskyV22ControlnetPipeline": _KANDINSKY,
    "KandinskyV22ControlnetImg2ImgPipeline": _KANDINSKY,
    "KandinskyV22CombinedPipeline": _KANDINSKY,
    "KandinskyV22Img2ImgCombinedPipeline": _KANDINSKY,
    "KandinskyV22InpaintCombinedPipeline": _KANDINSKY,
    "Kandinsky3Pipeline": _KANDINSKY_3,
    "Kandinsky3Img2ImgPipeline": _KANDINSKY_3,
    "LDMTextToImagePipeline": Support("Latent diffusion", remakes=("encoder_hidden_states",)),
    "LDMSuperResolutionPipeline": Support("Latent diffusion"),
    "DDPMPipeline": _UNCONDITIONAL,
    "DDIMPipeline": _UNCONDITIONAL,
    "ConsistencyModelPipeline": replace(_UNCONDITIONAL, note="at least 8 steps, or force=True"),
    "AudioLDM2Pipeline": Support("AudioLDM 2", prior_noise=False),
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


#: Diffusers' other pipelines with a UNet -> why no steps share anything there.  All but those whose UNet is of a class
#: that is not in ``UNETS``, or has another name than ``unet``, can have what is exact.
EXACT_ONLY: dict[str, str] = {
    "LEditsPPPipelineStableDiffusion": _INVERTS,
    "LEditsPPPipelineStableDiffusionXL": _INVERTS,
    "StableDiffusionLatentUpscalePipeline": "its UNet gets noise levels, not times of the schedule",
    **dict.fromkeys(_DEPRECATED, "deprecated in Diffusers"),
    **dict.fromkeys(_ONNX, "its UNet is an ONNX graph, not a module of PyTorch"),
}

#: Of pipelines that are not in Diffusers, or were not when this was written.
UNKNOWN = Support("", exact_only="how it samples is not known")


def support_of(pipeline: type) -> Support | None:
    """The entry of a class of pipelines, or of the nearest class that it derives from; None if it is unknown."""
    for base in pipeline.__mro__:
        if base.__name__ in PIPELINES:
            return PIPELINES[base.__name__]
        if base.__name__ in EXACT_ONLY:
            return Support("", exact_only=EXACT_ONLY[base.__name__])
    return None


def denoiser_of(unet: type) -> Denoiser | None:
    """The entry of a class of UNets; None if it is not supported."""
    return next((UNETS[base.__name__] for base in unet.__mro__ if base.__name__ in UNETS), None)


def output_of(unet: type) -> type:
    """What calls of a supported class of UNets return with ``return_dict=True``."""
    module = next(base.__module__ for base in unet.__mro__ if base.__name__ in UNETS)
    return getattr(sys.modules[module], denoiser_of(unet).output)


def table_of_exact() -> list[tuple[str, str]]:
    """Which pipelines share nothing between steps, a row for each reason: (reason, pipelines)."""
    reasons = dict.fromkeys(EXACT_ONLY.values())
    return [(reason, ", ".join(name for name, why in EXACT_ONLY.items() if why == reason)) for reason in reasons]


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
