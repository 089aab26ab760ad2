"""Small DeepFloyd IF pipelines of all three stages; see zoo.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
import zoo
from torch import Tensor
from zoo import Inputs, Row

_WIDTH = 24  # of the text encoder's output


def _unet(*, upscaler: bool) -> Any:
    """A UNet of IF's layout: stage I, or stage II, which sees the small picture and its noise level."""
    layout: dict[str, Any] = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "cross_attention_norm": "group_norm",
        "cross_attention_dim": 64,
        "attention_head_dim": 32,
        "encoder_hid_dim": _WIDTH,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
        "act_fn": "gelu",
        "in_channels": 6 if upscaler else 3,
        "out_channels": 6,
    }
    if upscaler:
        layout |= {
            "class_embed_type": "timestep",
            "mid_block_only_cross_attention": True,
            "mid_block_scale_factor": 0.7071,
            "only_cross_attention": True,
            "resnet_skip_time_act": True,
        }
    return zoo.unet(**layout)


def deepfloyd(pipeline: str) -> Callable[[], Any]:
    """Builds one of IF's pipelines; the text encoder is gone, as where memory is short."""
    upscaler = "SuperResolution" in pipeline

    def builder() -> Any:
        scheduler = diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True, sample_max_value=1.5
        )
        parts = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
        parts |= {"unet": _unet(upscaler=upscaler), "scheduler": scheduler}
        if upscaler:
            parts["image_noising_scheduler"] = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        return zoo.build(pipeline, parts)

    return builder


def _draw(pipe: Any, seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(pipe.unet.dtype)


def run(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run on text embeddings that depend on the prompt, at a quarter of the size: these are pixels, not latents."""
    seed = sum(inputs.prompt.encode())
    texts = {
        "prompt": None,
        "prompt_embeds": _draw(pipe, seed, 1, 7, _WIDTH),
        "negative_prompt_embeds": _draw(pipe, 0, 1, 7, _WIDTH),
    }
    size = {"height": inputs.size[0] // 4, "width": inputs.size[1] // 4}
    taken = zoo.taken_by(type(pipe).__call__)
    size = {name: value for name, value in size.items() if name in taken and name not in options}
    return zoo.sample(pipe, inputs, **{**texts, **size, "output_type": "pt", **options})


def _picture(pipe: Any, inputs: Inputs, scale: int, seed: int = 3) -> Tensor:
    return _draw(pipe, seed, 1, 3, inputs.size[0] // scale, inputs.size[1] // scale).clamp(-1, 1)


def _right_half(pipe: Any, inputs: Inputs) -> Tensor:
    mask = torch.zeros(1, 1, inputs.size[0] // 4, inputs.size[1] // 4, dtype=pipe.unet.dtype)
    mask[..., mask.shape[-1] // 2 :] = 1
    return mask


def upscale(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """Stage II from a picture of a quarter of its size."""
    return run(pipe, inputs, **{"image": _picture(pipe, inputs, 8), "noise_level": 100, **options})


def edit(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """Stage I from a picture."""
    steps = inputs.steps * 4 // 3
    given = {"image": _picture(pipe, inputs, 4), "strength": 0.75, "num_inference_steps": steps}
    return run(pipe, inputs, **given, **options)


def edit_and_upscale(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """Stage II of a picture that stage I has edited."""
    given = {"original_image": _picture(pipe, inputs, 4, seed=4), "strength": 0.75}
    return upscale(pipe, inputs, num_inference_steps=inputs.steps * 4 // 3, **given, **options)


def inpaint(pipe: Any, inputs: Inputs) -> Tensor:
    """Stage I on half of a picture."""
    return edit(pipe, inputs, mask_image=_right_half(pipe, inputs))


def inpaint_and_upscale(pipe: Any, inputs: Inputs) -> Tensor:
    """Stage II of a picture whose half stage I has painted."""
    return edit_and_upscale(pipe, inputs, mask_image=_right_half(pipe, inputs))


ROWS: dict[str, Row] = {
    "IFPipeline": Row(deepfloyd("IFPipeline"), run),
    "IFPipeline: without guidance": Row(deepfloyd("IFPipeline"), partial(run, guidance_scale=1.0)),
    "IFImg2ImgPipeline": Row(deepfloyd("IFImg2ImgPipeline"), edit),
    "IFInpaintingPipeline": Row(deepfloyd("IFInpaintingPipeline"), inpaint),
    "IFSuperResolutionPipeline": Row(deepfloyd("IFSuperResolutionPipeline"), upscale),
    "IFImg2ImgSuperResolutionPipeline": Row(deepfloyd("IFImg2ImgSuperResolutionPipeline"), edit_and_upscale),
    "IFInpaintingSuperResolutionPipeline": Row(deepfloyd("IFInpaintingSuperResolutionPipeline"), inpaint_and_upscale),
}
