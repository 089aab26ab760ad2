"""Small video pipelines of every supported kind; see zoo.py."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from sampling import picture
from torch import Tensor, nn
from zoo import Inputs, Row, build_sd

#: What all UNets here have: two levels, one layer each, text attention on the first.
WIDTHS = (32, 64)
LAYOUT = {"sample_size": 8, "block_out_channels": WIDTHS, "layers_per_block": 1, "cross_attention_dim": 64}

#: The least number of steps over which difffast shares features.
FEW = Inputs(steps=8)
#: A second run with everything different.
OTHER = Inputs("two cats", seed=1, images=2, size=(40, 24), steps=8, frames=3)
#: The same for pipelines that make one video at a time.
OTHER_SINGLE = replace(OTHER, images=1)


def several(value: Any, inputs: Inputs) -> Any:
    """As many of something as there are videos: most pipelines here ignore ``num_videos_per_prompt``."""
    return value if inputs.images == 1 else [value] * inputs.images


def video(inputs: Inputs) -> list[Image.Image]:
    """Random frames."""
    return [picture(inputs.size, seed=frame) for frame in range(inputs.frames)]


def run(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run with those of the usual arguments that the pipeline takes."""
    height, width = inputs.size
    usual = {
        "prompt": several(inputs.prompt, inputs),
        "num_frames": inputs.frames,
        "video_length": inputs.frames,
        "height": height,
        "width": width,
        "num_inference_steps": inputs.steps,
        "generator": inputs.generator,
        "output_type": "latent",
        **options,
    }
    taken = inspect.signature(pipe.__call__).parameters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs.seed)  # I2VGenXL encodes its picture with the global generator
        return pipe(**{name: value for name, value in usual.items() if name in taken})[0]


def from_video(pipe: Any, inputs: Inputs) -> Tensor:
    """A run from a video that skips the first four steps of its schedule; the fifth is a key step in all the tests."""
    total = inputs.steps + 4
    strength = {"num_inference_steps": total, "strength": (inputs.steps + 0.5) / total}
    return run(pipe, inputs, video=several(video(inputs), inputs), **strength)


def from_picture(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run from a picture."""
    return run(pipe, inputs, image=several(picture(inputs.size), inputs), **options)


def between_prompts(pipe: Any, inputs: Inputs) -> Tensor:
    """A run of FreeNoise: every frame has a text of its own, between those of the first and the last frame."""
    return run(pipe, inputs, prompt={0: inputs.prompt, inputs.frames - 1: "a blue square"})


def zero_shot(pipe: Any, inputs: Inputs) -> Tensor:
    """A run of Text2Video-Zero; the other frames join at the fifth step, a key step in all the tests."""
    with warnings.catch_warnings():
        for call in ("torch.meshgrid: in an upcoming release", "Default grid_sample and affine_grid behavior"):
            warnings.filterwarnings("ignore", message=call)  # the pipeline's own calls
        return run(pipe, inputs, t0=inputs.steps - 7, t1=inputs.steps - 5)


def _assemble(pipeline: str, parts: Mapping[str, Any], **more: Any) -> Any:
    """A pipeline of those parts that it takes."""
    import diffusers

    cls = getattr(diffusers, pipeline)
    parts = {**parts, **more}
    return cls(**{name: parts[name] for name in inspect.signature(cls.__init__).parameters if name in parts})


def _seeded(cls: type[nn.Module], **config: Any) -> nn.Module:
    """A module with random weights, also where Diffusers begins with zeros, which would hide a layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = cls(**config).eval()
        for weight in module.parameters():
            if weight.ndim > 1 and not weight.any():
                nn.init.normal_(weight, std=0.05)
    return module


def _parts(**scheduler: Any) -> dict[str, Any]:
    """Text encoder, tokenizer, VAE and a DDIM scheduler."""
    from diffusers import DDIMScheduler

    parts = build_sd().components
    return {**parts, "scheduler": DDIMScheduler.from_config(parts["scheduler"].config, **scheduler)}


def _image_encoder() -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=64,
        image_size=224,
        patch_size=56,
    )
    return {
        "image_encoder": _seeded(CLIPVisionModelWithProjection, config=config),
        "feature_extractor": CLIPImageProcessor(crop_size=224, size=224),
    }


def _image_unet(**config: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return _seeded(
        UNet2DConditionModel,
        **{
            **LAYOUT,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 2,  # in Diffusers: the number of heads
            **config,
        },
    )


def _sdxl_parts() -> dict[str, Any]:
    """SDXL's second text encoder and its UNet."""
    from transformers import CLIPTextModelWithProjection

    parts = _parts(beta_schedule="linear")
    encoder = _seeded(CLIPTextModelWithProjection, config=parts["text_encoder"].config)
    unet = _image_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 64,
    )
    return {**parts, "text_encoder_2": encoder, "tokenizer_2": parts["tokenizer"], "unet": unet}


def _adapter(**config: Any) -> nn.Module:
    from diffusers import MotionAdapter

    layout = {"block_out_channels": WIDTHS, "motion_layers_per_block": 1, "motion_num_attention_heads": 2}
    return _seeded(MotionAdapter, motion_max_seq_length=8, **layout, **config)


def animatediff(pipeline: str = "AnimateDiffPipeline", in_channels: int = 4, **options: Any) -> Any:
    """AnimateDiff as its users make it: an image UNet and a motion adapter."""
    adapter = _adapter(conv_in_channels=in_channels if in_channels != 4 else None)
    parts = {**_parts(beta_schedule="linear"), "unet": _image_unet(), "motion_adapter": adapter}
    return _assemble(pipeline, parts, **options)


def animatediff_sdxl() -> Any:
    return _assemble("AnimateDiffSDXLPipeline", _sdxl_parts(), motion_adapter=_adapter(use_motion_mid_block=False))


def free_init() -> Any:
    """AnimateDiff that samples twice."""
    pipe = animatediff()
    pipe.enable_free_init(num_iters=2)
    return pipe


def free_noise() -> Any:
    """AnimateDiff in overlapping windows of frames."""
    pipe = animatediff()
    pipe.enable_free_noise(context_length=2, context_stride=1)
    return pipe


def stable_video() -> Any:
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel

    unet = _seeded(
        UNetSpatioTemporalConditionModel,
        **LAYOUT,
        in_channels=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_attention_heads=2,
    )
    vae = _seeded(
        AutoencoderKLTemporalDecoder, block_out_channels=(32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3
    )
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    parts = {"unet": unet, "vae": vae, "scheduler": scheduler, **_image_encoder()}
    return _assemble("StableVideoDiffusionPipeline", parts)


def text_to_video(pipeline: str = "TextToVideoSDPipeline") -> Any:
    from diffusers import UNet3DConditionModel

    unet = _seeded(
        UNet3DConditionModel,
        **LAYOUT,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=16,
    )
    return _assemble(pipeline, _parts(), unet=unet)


def i2vgen() -> Any:
    from diffusers import I2VGenXLUNet

    unet = _seeded(
        I2VGenXLUNet,
        **LAYOUT,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=16,
    )
    return _assemble("I2VGenXLPipeline", _parts(), unet=unet, **_image_encoder())


def text_to_video_zero() -> Any:
    return _assemble("TextToVideoZeroPipeline", _parts(), unet=_image_unet(), requires_safety_checker=False)


def text_to_video_zero_sdxl() -> Any:
    return _assemble("TextToVideoZeroSDXLPipeline", _sdxl_parts())


def _row(build: Callable[[], Any], runs: Callable[[Any, Inputs], Tensor] = run, other: Inputs = OTHER) -> Row:
    return Row(build, runs, other, inputs=FEW)


ROWS: dict[str, Row] = {
    "AnimateDiffPipeline": _row(animatediff),
    "AnimateDiffPipeline:FreeInit": _row(free_init, other=OTHER_SINGLE),
    "AnimateDiffPipeline:FreeNoise": _row(free_noise, between_prompts, OTHER_SINGLE),
    "AnimateDiffVideoToVideoPipeline": _row(partial(animatediff, "AnimateDiffVideoToVideoPipeline"), from_video),
    "AnimateDiffSDXLPipeline": _row(animatediff_sdxl),
    "AnimateDiffPAGPipeline": _row(partial(animatediff, "AnimateDiffPAGPipeline")),
    "PIAPipeline": _row(partial(animatediff, "PIAPipeline", 9), from_picture, OTHER_SINGLE),
    "StableVideoDiffusionPipeline": _row(stable_video, from_picture),
    "TextToVideoSDPipeline": _row(text_to_video),
    "VideoToVideoSDPipeline": _row(partial(text_to_video, "VideoToVideoSDPipeline"), from_video, OTHER_SINGLE),
    # Its default, the text encoder's last layer but one, is not to be had from transformers 5.
    "I2VGenXLPipeline": _row(i2vgen, partial(from_picture, clip_skip=None)),
    "TextToVideoZeroPipeline": _row(text_to_video_zero, zero_shot, OTHER_SINGLE),
    "TextToVideoZeroSDXLPipeline": _row(text_to_video_zero_sdxl, zero_shot, OTHER_SINGLE),
}
