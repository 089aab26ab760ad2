"""UNet configurations of the published models, to instantiate at full size without a download.

``unet("sd15", device="meta")`` gives shapes, parameter counts and FLOPs at no cost in memory; on a real device
the weights are random.  The numbers are those of the published ``unet/config.json`` files, except for
``if-ii-l``, which is a reconstruction from the paper's description and therefore approximate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

_IF_COMMON: dict[str, Any] = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "attention_head_dim": 64,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
}

UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sd21": {
        "sample_size": 96,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "if-i-xl": {
        **_IF_COMMON,
        "sample_size": 64,
        "in_channels": 3,
        "block_out_channels": (704, 1408, 2112, 2816),
        "layers_per_block": 3,
        "cross_attention_dim": 2816,
        "down_block_types": ("ResnetDownsampleBlock2D",) + 3 * ("SimpleCrossAttnDownBlock2D",),
        "up_block_types": 3 * ("SimpleCrossAttnUpBlock2D",) + ("ResnetUpsampleBlock2D",),
    },
    "if-ii-l": {
        **_IF_COMMON,
        "sample_size": 256,
        "in_channels": 6,
        "block_out_channels": (160, 320, 640, 960, 1280),
        "layers_per_block": (2, 2, 3, 5, 5),
        "cross_attention_dim": 1280,
        "down_block_types": 3 * ("ResnetDownsampleBlock2D",) + 2 * ("SimpleCrossAttnDownBlock2D",),
        "up_block_types": 2 * ("SimpleCrossAttnUpBlock2D",) + 3 * ("ResnetUpsampleBlock2D",),
        "class_embed_type": "timestep",
        "mid_block_only_cross_attention": True,
        "mid_block_scale_factor": 0.7071,
        "only_cross_attention": True,
        "resnet_skip_time_act": True,
    },
}


def unet(name: str, *, device: str | torch.device = "meta", dtype: torch.dtype | None = None) -> UNet2DConditionModel:
    """Instantiate a published UNet with random weights, in eval mode.

    Args:
        name: one of ``UNET_CONFIGS``: sd15, sd21, sdxl, if-i-xl, if-ii-l.
        device: ``"meta"`` (default) allocates nothing; else where the random weights go.
        dtype: parameter dtype; None keeps torch's default dtype.

    Raises:
        ValueError: unknown name.
    """
    if name not in UNET_CONFIGS:
        raise ValueError(f"unknown UNet {name!r}; published configurations: {', '.join(UNET_CONFIGS)}")
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        model = UNet2DConditionModel(**UNET_CONFIGS[name])
    return model.to(dtype=dtype).eval() if dtype is not None else model.eval()
