"""Small video pipelines of every supported kind; see zoo.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler
from PIL import Image
from sampling import picture
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection
from zoo import Inputs, Row, build, controlnet, parts_of_sd, sample, sd, seeded, taken_by, xl

#: What all UNets here have: two levels, one layer each.
SMALL = {"block_out_channels": (32, 64), "layers_per_block": 1}
#: Of those that are no UNet2DConditionModel.
LAYOUT = {**SMALL, "sample_size": 8, "cross_attention_dim": 64}

#: A second run with everything different.
OTHER = Inputs("two cats", seed=1, images=2, size=(40, 24), frames=3)
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
    given = {"prompt": several(inputs.prompt, inputs), "num_frames": inputs.frames, "video_length": inputs.frames}
    taken = taken_by(type(pipe).__call__)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs.seed)  # I2VGenXL encodes its picture with the global generator
        return sample(pipe, inputs, **{name: value for name, value in given.items() if name in taken} | options)


def from_video(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run from a video that skips the first four steps of its schedule."""
    total = inputs.steps + 4
    strength = {"num_inference_steps": total, "strength": (inputs.steps + 0.5) / total}
    return run(pipe, inputs, video=several(video(inputs), inputs), **strength, **options)


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


def _linear() -> DDIMScheduler:
    """The scheduler that AnimateDiff's motion modules are trained with."""
    return DDIMScheduler.from_config(parts_of_sd()["scheduler"].config, beta_schedule="linear")


def _adapter(**config: Any) -> nn.Module:
    """A motion adapter."""
    layout = {"block_out_channels": SMALL["block_out_channels"], "motion_layers_per_block": SMALL["layers_per_block"]}
    heads = {"motion_num_attention_heads": 2, "motion_max_seq_length": 8}
    return seeded(diffusers.MotionAdapter, **{**layout, **heads, **config})


def animatediff(pipeline: str = "AnimateDiffPipeline", **config: Any) -> Any:
    """AnimateDiff as its users make it: from a UNet for pictures and a motion adapter."""
    return sd(pipeline, SMALL, motion_adapter=_adapter(**config), scheduler=_linear())()


def animatediff_xl() -> Any:
    adapter = _adapter(use_motion_mid_block=False)
    return xl("AnimateDiffSDXLPipeline", SMALL, motion_adapter=adapter, scheduler=_linear())()


def animatediff_under(make: Callable[[nn.Module], nn.Module], pipeline: str) -> Any:
    """AnimateDiff with a ControlNet made from the UNet for pictures."""
    return sd(pipeline, SMALL, motion_adapter=_adapter(), scheduler=_linear(), controlnet=make)()


def sparse_controlnet(unet: nn.Module) -> nn.Module:
    """A ControlNet for some of the frames."""
    config = {
        **{name: value for name, value in LAYOUT.items() if name != "sample_size"},
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "motion_num_attention_heads": 2,
        "conditioning_embedding_out_channels": (16, 32, 64),
        "conditioning_channels": 3,
        "use_simplified_condition_embedding": False,
    }
    return seeded(diffusers.SparseControlNetModel, **config)


def under_some_frames(pipe: Any, inputs: Inputs) -> Tensor:
    """A run under a picture for the first frame."""
    return run(pipe, inputs, conditioning_frames=video(inputs)[:1], controlnet_frame_indices=[0])


def from_video_under_frames(pipe: Any, inputs: Inputs) -> Tensor:
    """A run from a video under a picture for every frame."""
    return from_video(pipe, inputs, conditioning_frames=video(inputs))


def under_frames(pipe: Any, inputs: Inputs) -> Tensor:
    """A run under a picture for every frame."""
    return run(pipe, inputs, conditioning_frames=video(inputs))


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


def _image_encoder() -> dict[str, Any]:
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**layers, projection_dim=LAYOUT["cross_attention_dim"], image_size=224, patch_size=56)
    return {
        "image_encoder": seeded(CLIPVisionModelWithProjection, config),
        "feature_extractor": CLIPImageProcessor(crop_size=224, size=224),
    }


def stable_video() -> Any:
    unet = seeded(
        diffusers.UNetSpatioTemporalConditionModel,
        **LAYOUT,
        in_channels=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
        num_attention_heads=2,
    )
    levels = {"block_out_channels": (32, 32, 64), "down_block_types": ("DownEncoderBlock2D",) * 3}
    vae = seeded(diffusers.AutoencoderKLTemporalDecoder, **levels)
    # Old pipelines encode their picture in float32, whatever the VAE is in.
    vae.encoder.register_forward_pre_hook(lambda encoder, args: (args[0].to(encoder.conv_in.weight.dtype),))
    scheduler = diffusers.EulerDiscreteScheduler(  # as published
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    parts = {"unet": unet, "vae": vae, "scheduler": scheduler, **_image_encoder()}
    return build("StableVideoDiffusionPipeline", parts)


def _in_three_dimensions(cls: type[nn.Module]) -> nn.Module:
    """A UNet with convolutions and attention over the frames after those of each frame."""
    return seeded(
        cls,
        **LAYOUT,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=16,
    )


def text_to_video(pipeline: str = "TextToVideoSDPipeline") -> Any:
    return build(pipeline, {**parts_of_sd(), "unet": _in_three_dimensions(diffusers.UNet3DConditionModel)})


def i2vgen() -> Any:
    unet = _in_three_dimensions(diffusers.I2VGenXLUNet)
    return build("I2VGenXLPipeline", {**parts_of_sd(), **_image_encoder(), "unet": unet})


def _row(make: Callable[[], Any], runs: Callable[[Any, Inputs], Tensor] = run, other: Inputs = OTHER) -> Row:
    return Row(make, runs, other)


ROWS: dict[str, Row] = {
    "AnimateDiffControlNetPipeline": Row(
        partial(animatediff_under, controlnet, "AnimateDiffControlNetPipeline"), under_frames, OTHER_SINGLE
    ),
    "AnimateDiffVideoToVideoControlNetPipeline": Row(
        partial(animatediff_under, controlnet, "AnimateDiffVideoToVideoControlNetPipeline"),
        from_video_under_frames,
        OTHER_SINGLE,
    ),
    "AnimateDiffSparseControlNetPipeline": Row(
        partial(animatediff_under, sparse_controlnet, "AnimateDiffSparseControlNetPipeline"),
        under_some_frames,
        OTHER_SINGLE,
    ),
    "AnimateDiffPipeline": _row(animatediff),
    "AnimateDiffPipeline:FreeInit": _row(free_init, other=OTHER_SINGLE),
    "AnimateDiffPipeline:FreeNoise": _row(free_noise, between_prompts, OTHER_SINGLE),
    "AnimateDiffVideoToVideoPipeline": _row(partial(animatediff, "AnimateDiffVideoToVideoPipeline"), from_video),
    "AnimateDiffSDXLPipeline": _row(animatediff_xl),
    "AnimateDiffPAGPipeline": _row(partial(animatediff, "AnimateDiffPAGPipeline")),
    "PIAPipeline": _row(partial(animatediff, "PIAPipeline", conv_in_channels=9), from_picture, OTHER_SINGLE),
    "StableVideoDiffusionPipeline": _row(stable_video, from_picture),
    "TextToVideoSDPipeline": _row(text_to_video),
    "VideoToVideoSDPipeline": _row(partial(text_to_video, "VideoToVideoSDPipeline"), from_video, OTHER_SINGLE),
    # Its default, the text encoder's last layer but one, is not to be had from transformers 5.
    "I2VGenXLPipeline": _row(i2vgen, partial(from_picture, clip_skip=None)),
    "TextToVideoZeroPipeline": _row(sd("TextToVideoZeroPipeline", SMALL), zero_shot, OTHER_SINGLE),
    "TextToVideoZeroSDXLPipeline": _row(xl("TextToVideoZeroSDXLPipeline", SMALL), zero_shot, OTHER_SINGLE),
}
