"""Pictures with prompts, encoded once: moments of the VAE's latents, and text embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .denoise import Denoiser, NoisyLatents
from .losses import mean_square
from .params import fingerprint
from .text import Conditions, check_pipeline, encode


@dataclass(frozen=True)
class Examples:
    """Captioned pictures as training sees them.  That they are encoded once changes nothing: noise is drawn each time.

    Attributes:
        mean, std: of the latents, [n, C, H, W], in the UNet's scale.
        conditions: n prompts.
    """

    mean: Tensor
    std: Tensor
    conditions: Conditions

    def __len__(self) -> int:
        return len(self.mean)

    def fingerprint(self) -> str:
        """Return what tells these examples from others."""
        pooled = {} if self.conditions.pooled is None else {"pooled": self.conditions.pooled}
        return fingerprint({"mean": self.mean, "std": self.std, "embeds": self.conditions.embeds, **pooled})

    def take(self, rows: Tensor) -> Examples:
        """Return some of them."""
        return Examples(self.mean[rows], self.std[rows], self.conditions.take(rows))


@torch.no_grad()
def encode_examples(pipe: Any, pairs: Sequence[tuple[Any, str]]) -> Examples:
    """Encode pictures and their prompts.

    Args:
        pipe: a pipeline with a VAE.
        pairs: (picture, prompt); a picture is what the pipeline's image processor takes, and is resized to the
            model's size; PIL's are converted to RGB.

    Raises:
        ValueError: no pair, or a picture of another number of channels.
        TypeError: something else than pairs.
    """
    check_pipeline(pipe)
    pairs = list(pairs)
    if not pairs:
        raise ValueError("examples must be at least one pair of a picture and a prompt, got none")
    if any(not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[1], str) for pair in pairs):
        raise TypeError("examples must be pairs of a picture and a prompt")
    side = pipe.unet.config.sample_size
    height, width = (each * pipe.vae_scale_factor for each in ((side, side) if isinstance(side, int) else side))
    vae, dtype = pipe.vae, pipe.vae.dtype
    upcast = dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    try:
        means, stds = [], []
        for picture, _ in pairs:
            rgb = picture.convert("RGB") if hasattr(picture, "convert") else picture  # of PIL; palettes, alpha and grey
            pixels = pipe.image_processor.preprocess(rgb, height=height, width=width)
            if pixels.shape[1] != vae.config.in_channels:
                raise ValueError(f"pictures must have {vae.config.in_channels} channels, got {pixels.shape[1]}")
            found = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
            means.append(found.mean)
            stds.append(found.std)
    finally:
        if upcast:
            vae.to(dtype)
    scale = vae.config.scaling_factor
    mean, std = ((torch.cat(parts) * scale).to(pipe.unet.device, pipe.unet.dtype) for parts in (means, stds))
    return Examples(mean, std, encode(pipe, [prompt for _, prompt in pairs]))


@dataclass(frozen=True)
class Batch:
    """Examples with noise drawn for them."""

    noisy: NoisyLatents
    conditions: Conditions

    def loss(self, denoiser: Denoiser) -> Tensor:
        """Return the loss of diffusion: the mean square of the prediction minus what is right."""
        found = denoiser.predict(self.noisy.latents, self.noisy.timesteps, self.conditions)
        return mean_square(found, self.noisy.target)


def draw_batches(
    denoiser: Denoiser, examples: Examples, batch_size: int, generator: torch.Generator
) -> Iterator[Batch]:
    """Draw one epoch: every example once, in a new order, with latents, noise and timesteps of its own."""
    order = torch.randperm(len(examples), generator=generator)
    for rows in order.split(batch_size):
        some = examples.take(rows.to(examples.mean.device))
        clean = some.mean + some.std * denoiser.draw_noise(len(rows), generator)
        noise = denoiser.draw_noise(len(rows), generator)
        timesteps = torch.randint(0, denoiser.total, (len(rows),), generator=generator).to(clean.device)
        yield Batch(denoiser.add_noise(clean, noise, timesteps), some.conditions)
