"""Small UNets of the published layouts, and arguments to call them with."""

import torch
from diffusers import UNet2DConditionModel

from difffast.surgery.calls import bind_arguments

_ATTENTION = {"cross_attention_dim": 32, "attention_head_dim": 8, "layers_per_block": 2}
CONFIGS = {
    "sd": {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sd-three-levels": {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sdxl": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    },
    "if": {
        "block_out_channels": (32, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "cross_attention_norm": "group_norm",
        "encoder_hid_dim": 24,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
        "act_fn": "gelu",
        "out_channels": 8,
    },
    "class-conditioned": {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "class_embed_type": "timestep",
        "time_cond_proj_dim": 16,
        "center_input_sample": True,
    },
    "no-mid-block": {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
}


def make(name, dtype=torch.float32, seed=0, **changes):
    """A UNet of a published layout, with ``changes`` to its configuration."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(sample_size=8, **{**_ATTENTION, **CONFIGS[name], **changes}).to(dtype).eval()


def make_small(**changes):
    """The UNet of ``difffast.models.tiny_pipeline("sd", channels=(32, 64))`` with one layer a level in place of two."""
    with torch.random.fork_rng(devices=[]):
        return make("sd", cross_attention_dim=64, attention_head_dim=2, layers_per_block=1, **changes)


def call_for(unet, *, batch=2, size=(8, 8), dtype=torch.float32, **extra):
    """Arguments of one call, with everything this configuration needs."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
    kwargs = {"encoder_hidden_states": draw(batch, 7, width), **extra}
    if unet.config.addition_embed_type == "text_time":
        kwargs["added_cond_kwargs"] = {"text_embeds": draw(batch, 16), "time_ids": draw(batch, 6)}
    if unet.config.class_embed_type == "timestep":
        kwargs["class_labels"] = torch.arange(batch) * 10
        kwargs["timestep_cond"] = draw(batch, 16)
    return bind_arguments(unet, (draw(batch, 4, *size), torch.tensor(400)), kwargs)
