"""A small but real Stable Diffusion pipeline, built offline in seconds.

Building (random weights, here) and loading (``from_pretrained`` on a folder in Diffusers format) are two
functions, so that trained weights take the place of random ones without touching anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tokenizer import clip_tokenizer

if TYPE_CHECKING:  # from their own modules: what type checkers see in diffusers are stand-ins that cannot be called
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

TINY_PIPELINES = ("sd",)
_HEAD_WIDTH = 32  # of the UNet's attention; published UNets have 40 to 160


def tiny_pipeline(
    name: str = "sd",
    *,
    channels: Sequence[int] = (64, 128, 192),
    sample_size: int = 32,
    in_channels: int = 4,
    norm_groups: int = 32,
    text: tuple[int, int] = (64, 2),
    tokenizer: CLIPTokenizer | None = None,
    seed: int = 0,
) -> StableDiffusionPipeline:
    """Build a complete pipeline with random weights: tokenizer, text encoder, UNet, VAE and DDIM scheduler.

    Args:
        name: the layout; only ``"sd"`` so far.
        channels: UNet width per level, each a multiple of 32 (a head's); level i works at
            ``sample_size / 2**i``.  All levels but the deepest have cross-attention, as in SD 1.x.
        sample_size: latent height and width; images are four times as large.
        in_channels: 4, or 9 for the inpainting layout (latents, mask, masked latents).
        norm_groups: groups of the UNet's GroupNorms, a divisor of every width.
        text: width of the text encoder, a multiple of 4, and its depth.
        tokenizer: None: one token per letter.
        seed: of the random weights; the global generator's state is left as it was.

    Raises:
        ValueError: unknown name, a width that is no multiple of 32, or a deepest level below 2x2, where
            GroupNorm is ill-conditioned and float32 comparisons mean nothing.
    """
    _check_layout(name, channels, sample_size, norm_groups)
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = tokenizer or clip_tokenizer()
    shallow = len(channels) - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=in_channels,
            block_out_channels=tuple(channels),
            down_block_types=("CrossAttnDownBlock2D",) * shallow + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * shallow,
            norm_num_groups=norm_groups,
            cross_attention_dim=text[0],
            attention_head_dim=tuple(max(2, c // _HEAD_WIDTH) for c in channels),  # in Diffusers: the number of heads
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            sample_size=4 * sample_size,
            norm_num_groups=8,  # 4 channels each, as in published ones; 1 each would lose every colour's mean
        )
        text_encoder = _build_text_encoder(tokenizer, *text)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=ddim_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _check_layout(name: str, channels: Sequence[int], sample_size: int, norm_groups: int) -> None:
    if name not in TINY_PIPELINES:
        raise ValueError(f"unknown tiny pipeline {name!r}; available: {', '.join(TINY_PIPELINES)}")
    if not channels or any(c % 32 for c in channels):
        raise ValueError(f"channels must be multiples of 32 (a head's width), got {tuple(channels)}")
    if norm_groups < 1 or any(c % norm_groups for c in channels):
        raise ValueError(f"norm_groups must divide the channels {tuple(channels)}, got {norm_groups}")
    if sample_size % 2 ** (len(channels) - 1) or sample_size >> (len(channels) - 1) < 2:
        raise ValueError(
            f"sample_size must leave the deepest of {len(channels)} levels at least 2x2 and divide evenly, "
            f"got {sample_size}"
        )


def _build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def ddim_scheduler(**options: Any) -> DDIMScheduler:
    """The scheduler of Stable Diffusion 1.x; ``options`` replace or add to its configuration."""
    from diffusers import DDIMScheduler

    stable_diffusion = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**{**stable_diffusion, **options})


def load_pipeline(directory: str | Path) -> DiffusionPipeline:
    """Load a pipeline that was saved in Diffusers format (``pipe.save_pretrained``) without touching the network."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(directory, local_files_only=True)
