"""A pipeline's UNet as a function of latents, time and prompt, and guided DDIM moves from noise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..surgery.subclass import is_swapped
from .text import Conditions, check_pipeline, encode_null

_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "rescale_betas_zero_snr",
)


class Denoiser:
    """What training needs of a text-to-image pipeline.

    Attributes:
        unet: the pipeline's.
        scheduler: DDIM with the pipeline's noise schedule and prediction type, Stable Diffusion's spacing and offset,
            and coefficients in float64.
        steps: how many DDIM steps a whole schedule has.
        null: the condition that guidance leads away from.
        autocast: a context that the UNet runs in.

    Raises:
        ValueError: the pipeline is patched, or no text-to-image pipeline of Stable Diffusion 1, 2 or XL's kind.
    """

    def __init__(self, pipe: Any, steps: int = 50) -> None:
        check_pipeline(pipe)
        unet, config = pipe.unet, pipe.unet.config
        if is_swapped(unet):
            raise ValueError("training needs the stock UNet, and this one is patched: difffast.unpatch(pipe) first")
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"training needs a text-to-image UNet, got one that reads {config.in_channels} channels and writes "
                f"{config.out_channels}"
            )
        if config.addition_embed_type not in (None, "text_time") or config.time_cond_proj_dim is not None:
            raise ValueError(
                f"training knows the conditions of Stable Diffusion 1, 2 and XL, got a UNet with addition_embed_type "
                f"{config.addition_embed_type!r} and time_cond_proj_dim {config.time_cond_proj_dim!r}"
            )
        self.null = encode_null(pipe)
        if config.addition_embed_type == "text_time":
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            pooled = self.null.pooled
            if pooled is None or pooled.shape[1] != width:
                raise ValueError("training knows SDXL's six sizes, and this UNet takes others, as refiners do")
        from diffusers import DDIMScheduler

        self.unet, self.steps = unet, steps
        options = {"clip_sample": False, "thresholding": False, "timestep_spacing": "leading", "steps_offset": 1}
        self.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False, **options)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(torch.float64)
        self.scheduler.final_alpha_cumprod = self.scheduler.alphas_cumprod[0]
        self.total: int = self.scheduler.config.num_train_timesteps
        if not 1 <= steps < self.total:
            raise ValueError(f"sampling_steps must lie in 1 .. {self.total - 1}, got {steps}")
        self.scheduler.set_timesteps(steps)
        self.autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        side = config.sample_size
        self.latent_shape = (config.in_channels, *((side, side) if isinstance(side, int) else side))
        pixels = [float(each * pipe.vae_scale_factor) for each in self.latent_shape[1:]]
        self._time_ids = torch.tensor([*pixels, 0.0, 0.0, *pixels], device=unet.device, dtype=unet.dtype)

    def describe(self) -> dict[str, Any]:
        """Return what predictions depend on beside weights, as plain data: noise schedule, prediction type, shapes."""
        config, unet = self.scheduler.config, self.unet.config
        betas = config.trained_betas
        return {
            **{name: config[name] for name in _SCHEDULE},
            "trained_betas": None if betas is None else [float(beta) for beta in betas],
            "latents": list(self.latent_shape),
            "attention_head_dim": unet.attention_head_dim,
        }

    def predict(self, latents: Tensor, timesteps: Tensor | int, conditions: Conditions) -> Tensor:
        """Return what the UNet predicts (noise, or v), [n, C, H, W].

        Args:
            latents: [n, C, H, W].
            timesteps: one for all, or [n].
            conditions: n prompts.
        """
        added = {}
        if conditions.pooled is not None:
            ids = self._time_ids.expand(len(conditions), -1)
            added = {"added_cond_kwargs": {"text_embeds": conditions.pooled, "time_ids": ids}}
        with self.autocast():
            return self.unet(latents, timesteps, conditions.embeds, return_dict=False, **added)[0]

    def draw_noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw standard noise [count, C, H, W]; the generator is the CPU's, so that every device sees the same."""
        return torch.randn(count, *self.latent_shape, generator=generator).to(self.unet.device, self.unet.dtype)

    @torch.no_grad()
    def move(self, latents: Tensor, moves: int, condition: Conditions, guidance_scale: float) -> Iterator[Tensor]:
        """Yield the latents [n, C, H, W] before the first move and after each of ``moves`` guided DDIM moves, eta 0."""
        yield latents
        count = len(latents)
        both = Conditions.join([self.null.repeat(count), condition.repeat(count)])
        for timestep in self.scheduler.timesteps[:moves]:
            null, text = self.predict(latents.repeat(2, 1, 1, 1), timestep, both).chunk(2)
            guided = null + guidance_scale * (text - null)
            latents = self.scheduler.step(guided, timestep, latents, eta=0.0, return_dict=False)[0]
            yield latents

    def draw_timestep(self, moves: int, generator: torch.Generator) -> Tensor:
        """Draw one of the timesteps that latents after so many moves stand for: uniform in its interval."""
        width = self.total // self.steps
        low = self.total - width * (moves + 1)
        return torch.randint(low, low + width, (), generator=generator).to(self.unet.device)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> NoisyLatents:
        """Mix latents and noise [n, C, H, W] at timesteps [n]; the target is what the UNet ought to predict of them."""
        alpha = self.scheduler.alphas_cumprod[timesteps.cpu()].view(-1, 1, 1, 1)
        signal, share = (part.to(clean) for part in (alpha.sqrt(), (1 - alpha).sqrt()))
        kind = self.scheduler.config.prediction_type
        target = {"epsilon": noise, "v_prediction": signal * noise - share * clean, "sample": clean}[kind]
        return NoisyLatents(signal * clean + share * noise, timesteps, target)


@dataclass(frozen=True)
class NoisyLatents:
    """Latents [n, C, H, W] at timesteps [n], and the prediction that is right for them, [n, C, H, W]."""

    latents: Tensor
    timesteps: Tensor
    target: Tensor
