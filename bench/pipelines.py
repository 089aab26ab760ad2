"""The pipelines that are measured: with random weights at full or CPU size, the embedded model, or a user's own.

Text embeddings are random and given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from workloads import Stage

from difffast import models
from difffast.models.tiny import ddim_scheduler

PROMPT = "a red circle on a blue square"
_TOKENS = 77
#: Widths of the small Stable Diffusion.
TINY = (32, 64, 96)

#: CPU-sized UNets in the layout of the published ones (``models.UNET_CONFIGS``): narrower, shallower, smaller images.
_SMALL: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 16},  # of the tests' pipeline, which is built elsewhere
    "sd21": {
        "sample_size": 16,
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": (1, 2, 3),
    },
    "sdxl": {
        "sample_size": 16,
        "block_out_channels": (32, 64, 96),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 3),
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
    "if-i-xl": {
        "sample_size": 16,
        "block_out_channels": (32, 64, 64, 96),
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "addition_embed_type_num_heads": 4,
        "cross_attention_dim": 96,
        "encoder_hid_dim": 64,
    },
    "if-ii-l": {
        "sample_size": 32,
        "block_out_channels": (32, 32, 64, 64, 96),
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "addition_embed_type_num_heads": 4,
        "cross_attention_dim": 96,
        "encoder_hid_dim": 64,
    },
    "x4-upscaler": {"sample_size": 32, "block_out_channels": (32, 64, 64, 96), "cross_attention_dim": 64},
}

#: The third stage of the cascade, as published (stabilityai/stable-diffusion-x4-upscaler, unet/config.json).
_UPSCALER: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownBlock2D",) + 3 * ("CrossAttnDownBlock2D",),
    "up_block_types": 3 * ("CrossAttnUpBlock2D",) + ("UpBlock2D",),
    "only_cross_attention": (True, True, True, False),
    "cross_attention_dim": 1024,
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}


def tiny(channels: Sequence[int], sample_size: int, *, batch: int = 1) -> Stage:
    """The small Stable Diffusion pipeline of the tests, with its text encoder."""
    pipe = models.tiny_pipeline("sd", channels=channels, sample_size=sample_size)
    return Stage(pipe, {"prompt": [PROMPT] * batch})


def embedded() -> Stage:
    """The embedded model, which is trained."""
    return Stage(models.embedded_pipeline(), {"prompt": PROMPT})


def full_decoder() -> Stage:
    """The small pipeline with Stable Diffusion's VAE in full, for what that takes alone."""
    stage = tiny((32, 64), 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stage.pipe.vae = _Builder(True, 1, torch.device("cpu"), torch.float32).vae(latent_channels=4)
    return stage


def checkpoint(model: str, *, device: str, dtype: torch.dtype) -> Stage:
    """A user's own pipeline, from a folder in Diffusers format."""
    return Stage(models.load_pipeline(model).to(device, dtype), {"prompt": PROMPT})


def stages(name: str, *, full: bool, batch: int, device: str, dtype: torch.dtype) -> tuple[Stage, ...]:
    """The pipeline, or the pipelines of the cascade, with random weights.

    Args:
        name: one of :data:`NAMES`.
        full: the published UNet; else the small one of the same layout.

    Raises:
        ValueError: unknown name.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown pipeline {name!r}; available: {', '.join(NAMES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _BUILDERS[name](_Builder(full, batch, torch.device(device), dtype))


def latent_size(name: str, *, full: bool) -> int:
    """Height and width of what the (first) UNet works on."""
    unet = {"SD2.1": "sd21", "SDXL": "sdxl", "IF-I": "if-i-xl", "IF-II": "if-ii-l", "IF cascade": "if-i-xl"}
    return (models.UNET_CONFIGS if full else _SMALL)[unet.get(name, "sd15")]["sample_size"]


@dataclass(frozen=True)
class _Builder:
    full: bool
    batch: int
    device: torch.device
    dtype: torch.dtype

    def unet(self, name: str) -> nn.Module:
        from diffusers import UNet2DConditionModel

        config = _UPSCALER if name == "x4-upscaler" else models.UNET_CONFIGS[name]
        config = config if self.full else {**config, **_SMALL[name]}
        return self._made(lambda: UNet2DConditionModel(**config))

    def vae(self, widths: tuple[int, ...] = (128, 256, 512, 512), **options: Any) -> nn.Module:
        from diffusers import AutoencoderKL

        widths = widths if self.full else (32, 32, 64)
        return self._made(
            lambda: AutoencoderKL(
                block_out_channels=widths,
                down_block_types=("DownEncoderBlock2D",) * len(widths),
                up_block_types=("UpDecoderBlock2D",) * len(widths),
                layers_per_block=2 if self.full else 1,
                **options,
            )
        )

    def controlnet(self, unet: nn.Module) -> nn.Module:
        from diffusers import ControlNetModel

        # As deep as the VAE, so that the picture meets the latents.
        widths = (16, 32, 96, 256) if self.full else (16, 32, 96)
        return self._made(lambda: ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths))

    def _made(self, make: Callable[[], nn.Module]) -> nn.Module:
        with self.device:
            module = make().eval()
        return module if module.dtype == self.dtype else module.to(dtype=self.dtype)

    def text(self, unet: nn.Module, **extra: int) -> dict[str, Tensor]:
        """Random embeddings, with their negatives, of the width that the UNet takes."""
        width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
        shapes = {"prompt_embeds": (_TOKENS, width), **{name: (size,) for name, size in extra.items()}}
        return {
            f"{sign}{name}": torch.randn(self.batch, *shape).to(self.device, self.dtype)
            for name, shape in shapes.items()
            for sign in ("", "negative_")
        }

    def picture(self, size: int) -> Tensor:
        return torch.rand(self.batch, 3, size, size).to(self.device, self.dtype)


_NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_NO_TEXT = {"tokenizer": None, "text_encoder": None}


def _sd15(build: _Builder) -> tuple[Stage, ...]:
    from diffusers import StableDiffusionPipeline

    if not build.full:
        return (tiny(TINY, latent_size("SD1.5", full=False), batch=build.batch),)
    unet = build.unet("sd15")
    pipe = StableDiffusionPipeline(vae=build.vae(), unet=unet, scheduler=ddim_scheduler(), **_NO_TEXT, **_NO_CHECKER)
    return (Stage(pipe, build.text(unet)),)


def _sd21(build: _Builder) -> tuple[Stage, ...]:
    from diffusers import StableDiffusionPipeline

    unet, scheduler = build.unet("sd21"), ddim_scheduler(prediction_type="v_prediction")
    pipe = StableDiffusionPipeline(vae=build.vae(), unet=unet, scheduler=scheduler, **_NO_TEXT, **_NO_CHECKER)
    return (Stage(pipe, build.text(unet)),)


def _controlnet(build: _Builder) -> tuple[Stage, ...]:
    from diffusers import StableDiffusionControlNetPipeline

    unet = build.unet("sd15" if build.full else "sd21")
    pipe = StableDiffusionControlNetPipeline(
        vae=build.vae(),
        unet=unet,
        controlnet=build.controlnet(unet),
        scheduler=ddim_scheduler(),
        **_NO_TEXT,
        **_NO_CHECKER,
    )
    picture = build.picture(unet.config.sample_size * pipe.vae_scale_factor)
    return (Stage(pipe, {**build.text(unet), "image": picture}),)


def _sdxl(build: _Builder) -> tuple[Stage, ...]:
    from diffusers import StableDiffusionXLPipeline

    unet = build.unet("sdxl")
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    pipe = StableDiffusionXLPipeline(
        vae=build.vae(scaling_factor=0.13025),
        unet=unet,
        scheduler=ddim_scheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
        add_watermarker=False,
        **_NO_TEXT,
    )
    return (Stage(pipe, build.text(unet, pooled_prompt_embeds=pooled)),)


def _if_scheduler() -> Any:
    """DDIM here too: a sampler that draws noise gives another image for another number of steps."""
    scheduler = ddim_scheduler()
    scheduler.register_to_config(variance_type="fixed_small")  # tells IF's loop to drop the learned variance
    return scheduler


def _if_one(build: _Builder) -> tuple[Stage, ...]:
    from diffusers import IFPipeline

    unet = build.unet("if-i-xl")
    pipe = IFPipeline(unet=unet, scheduler=_if_scheduler(), watermarker=None, **_NO_TEXT, **_NO_CHECKER)
    return (Stage(pipe, build.text(unet)),)


def _if_two(build: _Builder, *, alone: bool = True) -> tuple[Stage, ...]:
    from diffusers import IFSuperResolutionPipeline

    unet = build.unet("if-ii-l")
    pipe = IFSuperResolutionPipeline(
        unet=unet,
        scheduler=_if_scheduler(),
        image_noising_scheduler=_if_scheduler(),
        watermarker=None,
        **_NO_TEXT,
        **_NO_CHECKER,
    )
    given = {"image": build.picture(unet.config.sample_size // (4 if build.full else 2))} if alone else {}
    return (Stage(pipe, {**build.text(unet), **given}, takes_image=not alone),)


def _cascade(build: _Builder) -> tuple[Stage, ...]:
    from diffusers import DDPMScheduler, StableDiffusionUpscalePipeline

    unet = build.unet("x4-upscaler")
    pipe = StableDiffusionUpscalePipeline(
        vae=build.vae((128, 256, 512), scaling_factor=0.08333),
        unet=unet,
        scheduler=ddim_scheduler(prediction_type="v_prediction"),
        low_res_scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        **_NO_TEXT,
    )
    return (*_if_one(build), *_if_two(build, alone=False), Stage(pipe, build.text(unet), takes_image=True))


_BUILDERS: dict[str, Callable[[_Builder], tuple[Stage, ...]]] = {
    "SD1.5": _sd15,
    "SD2.1": _sd21,
    "SDXL": _sdxl,
    "ControlNet": _controlnet,
    "IF-I": _if_one,
    "IF-II": _if_two,
    "IF cascade": _cascade,
}
NAMES = tuple(_BUILDERS)
