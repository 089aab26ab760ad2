"""Small pipelines of every supported kind with random weights, and one way to run each of them."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from sampling import mask, picture
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from difffast.models import tiny_pipeline
from difffast.models.tiny import ddim_scheduler


@dataclass(frozen=True)
class Inputs:
    """What a run varies.

    Attributes:
        prompt, seed: as they are.
        images: how many at once.
        size: (height, width) in pixels; latents are a quarter of it.
        steps: denoising steps.
        frames: of each video; pictures have none.
    """

    prompt: str = "a red circle"
    seed: int = 0
    images: int = 1
    size: tuple[int, int] = (32, 32)
    steps: int = 8
    frames: int = 2

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Row:
    """One kind of pipeline.

    Attributes:
        build: makes it, in float32 and evaluation mode.
        run: runs it, at least eight steps, and returns the last latents (not decoded).
        other: inputs of a second run, different in everything that may differ.
        reasons: what the report says besides the plan, beginnings of it; anything else is an error.
        slow: whether its kind is proved by another row as well, so that it is left to the slow suite.
    """

    build: Callable[[], Any]
    run: Callable[[Any, Inputs], Tensor]
    other: Inputs = Inputs("two cats", seed=1, images=2, size=(40, 24))
    reasons: tuple[str, ...] = ()
    slow: bool = False


def taken_by(function: Callable[..., Any]) -> set[str]:
    """Names of a function's arguments."""
    return set(inspect.signature(function).parameters)


def sample(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """Run a pipeline on those of ``inputs`` that it takes, and on ``options``."""
    height, width = inputs.size
    given = {
        "prompt": inputs.prompt,
        "num_images_per_prompt": inputs.images,
        "height": height,
        "width": width,
        "num_inference_steps": inputs.steps,
        "generator": inputs.generator,
        "output_type": "latent",
    }
    taken = taken_by(type(pipe).__call__)
    made = pipe(**{name: value for name, value in given.items() if name in taken} | options)[0]
    return torch.as_tensor(made)  # Diffusers 0.35.0 gives pixels as an array


def on_picture(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run with a picture an image: to condition on, or to edit."""
    return sample(pipe, inputs, **{"image": [picture(inputs.size)] * inputs.images, **options})


def image_to_image(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run from a picture; three quarters of the steps are executed."""
    pictures = [picture(inputs.size)] * inputs.images
    steps = inputs.steps * 4 // 3
    return sample(pipe, inputs, **{"image": pictures, "strength": 0.75, "num_inference_steps": steps, **options})


def inpainting(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run on half of a picture."""
    pictures = {"image": picture(inputs.size), "mask_image": mask(inputs.size)}
    strength = {"strength": 1.0} if "strength" in taken_by(type(pipe).__call__) else {}
    return sample(pipe, inputs, **{**pictures, **strength, **options})


@functools.cache
def parts_of_sd() -> dict[str, Any]:
    """What pipelines of Stable Diffusion's kind are made of, but for the UNet."""
    pipe = tiny_pipeline("sd", channels=(32, 64), sample_size=8)
    pipe.vae.register_to_config(force_upcast=False)  # SDXL would make float32 of float64
    names = ("vae", "text_encoder", "tokenizer", "scheduler", "feature_extractor", "safety_checker", "image_encoder")
    return {name: pipe.components[name] for name in names}


def seeded(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A model with random weights, none of them zero: fresh ones start without effect, and would prove nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(*args, **kwargs)
        with torch.no_grad():
            for weight in model.parameters():
                if not weight.any():
                    weight.normal_(std=0.1)
    return model.eval()


def unet(**config: Any) -> Any:
    """A UNet of Stable Diffusion's layout, with the least layers of which its decoder still has several a level."""
    layout = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": (2, 4),
        "layers_per_block": 1,
    }
    return seeded(diffusers.UNet2DConditionModel, **{**layout, **config})


def three_levels():
    """A UNet with cross-attention on three levels, the third of a sixteenth of the latents' pixels."""
    return unet(
        block_out_channels=(32, 32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=2,
    )


def build(pipeline: str, parts: dict[str, Any], **config: Any) -> Any:
    """A pipeline of those ``parts`` that it takes, and of ``config``."""
    cls = getattr(diffusers, pipeline)
    taken = taken_by(cls.__init__)
    switches = {"requires_safety_checker": False, "add_watermarker": False}
    given = {name: value for name, value in {**switches, **parts, **config}.items() if name in taken}
    return cls(**copy.deepcopy(given))


def sd(pipeline: str, unet_config: dict[str, Any] | None = None, **config: Any) -> Callable[[], Any]:
    """Builds a pipeline of Stable Diffusion's parts; functions in ``config`` make something from the UNet."""

    def builder() -> Any:
        parts = {**parts_of_sd(), "unet": unet(**(unet_config or {}))}
        return build(pipeline, parts, **{name: _made(value, parts["unet"]) for name, value in config.items()})

    return builder


def xl(pipeline: str, unet_config: dict[str, Any] | None = None, *, refiner: bool = False, **config: Any) -> Any:
    """Builds a pipeline of Stable Diffusion XL's parts; functions in ``config`` make something from the UNet."""

    def builder() -> Any:
        base = parts_of_sd()
        size = base["text_encoder"].config.hidden_size
        layout = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": (5 if refiner else 6) * 8 + size,
            "cross_attention_dim": size if refiner else 2 * size,
        }
        both = {
            "text_encoder_2": seeded(CLIPTextModelWithProjection, base["text_encoder"].config),
            "tokenizer_2": base["tokenizer"],
            "unet": unet(**{**layout, **(unet_config or {})}),
        }
        if refiner:
            base = {**base, "text_encoder": None, "tokenizer": None}
        return build(pipeline, {**base, **both}, **{name: _made(value, both["unet"]) for name, value in config.items()})

    return builder


def _made(value: Any, unet: Any) -> Any:
    return value(unet) if inspect.isfunction(value) else value


def controlnet(unet: Any) -> Any:
    """A ControlNet for a UNet."""
    return seeded(diffusers.ControlNetModel.from_unet, unet, conditioning_embedding_out_channels=(16, 32, 64))


def controlnets(unet: Any) -> list[Any]:
    """Two of them."""
    return [controlnet(unet), copy.deepcopy(controlnet(unet))]


#: Layers of a level of the encoder.
_AS_PUBLISHED = {"layers_per_block": 2}
_PIX2PIX = {"in_channels": 8}
_INPAINT = {"in_channels": 9}
_PAG = {"pag_applied_layers": ["mid", "up_blocks"]}
_DEPTH = {"in_channels": 5}


def from_picture_and_map(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run from a picture under a ControlNet's."""
    pictures = {
        name: [picture(inputs.size, seed)] * inputs.images for name, seed in (("image", 0), ("control_image", 5))
    }
    prompts = {"prompt": [inputs.prompt] * inputs.images, "num_images_per_prompt": 1}
    return image_to_image(pipe, inputs, **{**pictures, **prompts, **options})


def refine(pipe: Any, inputs: Inputs) -> Tensor:
    """A refiner's run: it takes over latents at a third of the schedule."""
    height, width = (side // 4 for side in inputs.size)
    latents = torch.randn(1, 4, height, width, generator=inputs.generator).to(pipe.unet.dtype)
    return sample(pipe, inputs, image=latents, denoising_start=0.34, num_inference_steps=inputs.steps * 3 // 2)


def inpainting_under_map(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run on half of a picture under a ControlNet's."""
    return inpainting(pipe, inputs, control_image=picture(inputs.size, seed=5), **options)


def under_map(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run under one picture."""
    return sample(pipe, inputs, **{"image": picture(inputs.size, seed=5), **options})


def under_union(pipe: Any, inputs: Inputs, run: Callable[..., Tensor] = sample, **options: Any) -> Tensor:
    """A run under one picture of the union ControlNet's second kind."""
    return run(pipe, inputs, control_image=[picture(inputs.size, seed=5)], control_mode=[1], **options)


def under_two_maps(pipe: Any, inputs: Inputs) -> Tensor:
    """A run under two pictures, each for a part of the schedule and with a strength of its own."""
    return under_map(
        pipe,
        inputs,
        image=[picture(inputs.size, seed=5), picture(inputs.size, seed=6)],
        controlnet_conditioning_scale=[0.8, 0.5],
    )


def union(unet: Any) -> Any:
    """A ControlNet for several kinds of pictures."""
    made = {"conditioning_embedding_out_channels": (16, 32, 64), "num_control_type": 2, "num_trans_channel": 32}
    config = {**unet.config, **made, "num_trans_head": 2, "num_proj_channel": 32}
    taken = taken_by(diffusers.ControlNetUnionModel.__init__)
    return seeded(diffusers.ControlNetUnionModel, **{name: value for name, value in config.items() if name in taken})


def upscaler_vae() -> Any:
    """The VAE with the scale that x4 upscalers have."""
    vae = copy.deepcopy(parts_of_sd()["vae"])
    vae.register_to_config(scaling_factor=0.08333)
    return vae


def adapter(kind: str, channels: Sequence[int], downscale_factor: int) -> Any:
    """A T2I-Adapter."""
    made = {"channels": channels, "downscale_factor": downscale_factor, "adapter_type": kind}
    return seeded(diffusers.T2IAdapter, in_channels=3, num_res_blocks=1, **made)


ROWS: dict[str, Row] = {
    "StableDiffusionPipeline": Row(sd("StableDiffusionPipeline", _AS_PUBLISHED), sample),
    "StableDiffusionPipeline: v-prediction, zero terminal SNR": Row(
        sd(
            "StableDiffusionPipeline",
            {"use_linear_projection": True},
            scheduler=ddim_scheduler(
                prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
            ),
        ),
        partial(sample, guidance_rescale=0.7),
    ),
    "StableDiffusionImg2ImgPipeline": Row(sd("StableDiffusionImg2ImgPipeline"), image_to_image),
    "StableDiffusionInpaintPipeline": Row(sd("StableDiffusionInpaintPipeline", _INPAINT), inpainting),
    "StableDiffusionInstructPix2PixPipeline": Row(sd("StableDiffusionInstructPix2PixPipeline", _PIX2PIX), on_picture),
    "StableDiffusionPAGPipeline": Row(sd("StableDiffusionPAGPipeline", **_PAG), sample),
    "StableDiffusionPAGImg2ImgPipeline": Row(sd("StableDiffusionPAGImg2ImgPipeline", **_PAG), image_to_image),
    "StableDiffusionPAGInpaintPipeline": Row(sd("StableDiffusionPAGInpaintPipeline", _INPAINT, **_PAG), inpainting),
    "StableDiffusionXLPipeline": Row(xl("StableDiffusionXLPipeline", _AS_PUBLISHED), sample),
    "StableDiffusionXLPipeline: denoising_end": Row(
        xl("StableDiffusionXLPipeline"), partial(sample, denoising_end=0.8, num_inference_steps=12)
    ),
    "StableDiffusionXLImg2ImgPipeline: refiner": Row(
        xl("StableDiffusionXLImg2ImgPipeline", refiner=True, requires_aesthetics_score=True), refine
    ),
    "StableDiffusionXLImg2ImgPipeline": Row(xl("StableDiffusionXLImg2ImgPipeline"), image_to_image),
    "StableDiffusionXLInpaintPipeline": Row(xl("StableDiffusionXLInpaintPipeline", _INPAINT), inpainting),
    "StableDiffusionXLPAGPipeline": Row(xl("StableDiffusionXLPAGPipeline", **_PAG), sample),
    "StableDiffusionXLPAGImg2ImgPipeline": Row(xl("StableDiffusionXLPAGImg2ImgPipeline", **_PAG), image_to_image),
    "StableDiffusionXLPAGInpaintPipeline": Row(xl("StableDiffusionXLPAGInpaintPipeline", _INPAINT, **_PAG), inpainting),
    "StableDiffusionControlNetPipeline": Row(
        sd("StableDiffusionControlNetPipeline", _AS_PUBLISHED, controlnet=controlnet), under_map
    ),
    "StableDiffusionControlNetPipeline: guess mode": Row(
        sd("StableDiffusionControlNetPipeline", controlnet=controlnet), partial(under_map, guess_mode=True)
    ),
    "StableDiffusionControlNetPipeline: two": Row(
        sd("StableDiffusionControlNetPipeline", controlnet=controlnets), under_two_maps
    ),
    "StableDiffusionControlNetImg2ImgPipeline": Row(
        sd("StableDiffusionControlNetImg2ImgPipeline", controlnet=controlnet), from_picture_and_map
    ),
    "StableDiffusionControlNetInpaintPipeline": Row(
        sd("StableDiffusionControlNetInpaintPipeline", controlnet=controlnet), inpainting_under_map
    ),
    "StableDiffusionControlNetPAGPipeline": Row(
        sd("StableDiffusionControlNetPAGPipeline", controlnet=controlnet, **_PAG), under_map
    ),
    "StableDiffusionControlNetPAGInpaintPipeline": Row(
        sd("StableDiffusionControlNetPAGInpaintPipeline", controlnet=controlnet, **_PAG), inpainting_under_map
    ),
    "StableDiffusionXLControlNetPipeline": Row(
        xl("StableDiffusionXLControlNetPipeline", controlnet=controlnet), under_map
    ),
    "StableDiffusionXLControlNetImg2ImgPipeline": Row(
        xl("StableDiffusionXLControlNetImg2ImgPipeline", controlnet=controlnet), from_picture_and_map
    ),
    "StableDiffusionXLControlNetInpaintPipeline": Row(
        xl("StableDiffusionXLControlNetInpaintPipeline", controlnet=controlnet), inpainting_under_map
    ),
    "StableDiffusionXLControlNetPAGPipeline": Row(
        xl("StableDiffusionXLControlNetPAGPipeline", controlnet=controlnet, **_PAG), under_map
    ),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": Row(
        xl("StableDiffusionXLControlNetPAGImg2ImgPipeline", controlnet=controlnet, **_PAG), from_picture_and_map
    ),
    "StableDiffusionXLControlNetUnionPipeline": Row(
        xl("StableDiffusionXLControlNetUnionPipeline", controlnet=union), under_union
    ),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": Row(
        xl("StableDiffusionXLControlNetUnionImg2ImgPipeline", controlnet=union),
        partial(under_union, run=from_picture_and_map),
    ),
    "StableDiffusionXLControlNetUnionInpaintPipeline": Row(
        xl("StableDiffusionXLControlNetUnionInpaintPipeline", controlnet=union), partial(under_union, run=inpainting)
    ),
    "StableDiffusionAdapterPipeline": Row(
        sd("StableDiffusionAdapterPipeline", adapter=lambda _: adapter("full_adapter", (32, 64), 4)), under_map
    ),
    "StableDiffusionXLAdapterPipeline": Row(
        xl("StableDiffusionXLAdapterPipeline", adapter=lambda _: adapter("full_adapter_xl", (32, 64, 64, 64), 8)),
        under_map,
    ),
    "StableDiffusionXLInstructPix2PixPipeline": Row(
        xl("StableDiffusionXLInstructPix2PixPipeline", _PIX2PIX), on_picture
    ),
    "StableDiffusionUpscalePipeline": Row(
        sd(
            "StableDiffusionUpscalePipeline",
            {"in_channels": 7, "num_class_embeds": 400},
            low_res_scheduler=diffusers.DDPMScheduler(),
            vae=lambda _: upscaler_vae(),
        ),
        lambda pipe, inputs: sample(pipe, inputs, image=[picture((inputs.size[0] // 4, inputs.size[1] // 4))]),
    ),
    "StableDiffusionDepth2ImgPipeline": Row(
        sd("StableDiffusionDepth2ImgPipeline", _DEPTH, depth_estimator=None, feature_extractor=None),
        lambda pipe, inputs: image_to_image(
            pipe,
            inputs,
            depth_map=torch.rand(inputs.images, *inputs.size, generator=inputs.generator, dtype=pipe.unet.dtype),
        ),
    ),
}
