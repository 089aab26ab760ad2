"""The autoencoder: from random weights, or a start's that is tuned or left as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import make_image_grid
from drawn.shapes import SIDE
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from difffast.files import write_whole

from .data import to_pixels
from .loop import Budget, Training, find_device
from .recipe import DATA_SEED, Recipe


class Autoencoding(nn.Module):
    """The autoencoder's forward and loss."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> Tensor:
        posterior = self.vae.encode(pixels).latent_dist
        made = self.vae.decode(posterior.sample()).sample
        error = made.float() - pixels
        # Squares alone blur edges.
        return error.abs().mean() + 2 * error.square().mean() + 1e-6 * posterior.kl().mean()


def train_vae(recipe: Recipe, vae: Any, images: np.ndarray, out: Path, budget: Budget, *, started: bool) -> bool:
    """-> whether it is finished; then ``vae`` holds the averaged weights and its latents have a deviation of 1.

    Args:
        recipe: sizes and lengths.
        vae: trained in place.
        images: uint8 [n, SIDE, SIDE, 3].
        out: folder of checkpoints.
        budget: of this run.
        started: whether ``vae`` is a trained one already.
    """
    count = recipe.vae_tune_steps if started else recipe.vae_steps
    model = Autoencoding(vae)
    training = Training(
        "vae",
        model,
        out,
        rate=recipe.vae_learning_rate / (3 if started else 1),
        count=count,
        warmup=min(recipe.warmup, count),
        decay=recipe.ema_decay,
        precision=recipe.precision,
    )
    for step in training.steps(budget):
        rng = np.random.default_rng([DATA_SEED, 3, step])
        torch.manual_seed(int(rng.integers(1 << 62)))
        batch = to_pixels(images[np.sort(rng.choice(len(images), recipe.vae_batch, replace=False))])
        if step % 8:
            # Crops cost a quarter; whole pictures now and then, for the attention in the middle.
            top, left = rng.integers(0, SIDE // 2 + 1, 2)
            batch = batch[..., top : top + SIDE // 2, left : left + SIDE // 2]
        with training.autocast():
            loss = model(batch.to(training.device))
        training.step(loss)
    if not training.finished:
        return False
    training.averaged()
    with torch.no_grad():
        sample = to_pixels(images[: min(256, len(images))]).to(training.device)
        latents = vae.encode(sample).latent_dist.mode()
        if not started:
            vae.register_to_config(scaling_factor=1 / float(latents.std()))
        made = vae.decode(latents[:8]).sample
    pairs = [to_picture(x) for pair in zip(sample[:8], made, strict=False) for x in pair]
    make_image_grid(pairs, rows=len(pairs) // 4, cols=4, resize=128).save(out / "vae.png")
    return True


def to_picture(pixels: Tensor) -> Image.Image:
    """[3, H, W] in -1 .. 1 -> RGB."""
    values = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.movedim(0, -1).cpu().numpy())


@torch.no_grad()
def psnr(vae: Any, images: np.ndarray) -> float:
    """Mean PSNR in dB of pictures uint8 [n, SIDE, SIDE, 3] that went through the autoencoder."""
    values = []
    for start in range(0, len(images), 64):
        pixels = to_pixels(images[start : start + 64]).to(vae.device)
        made = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((made - pixels) / 2).square().mean((1, 2, 3))))
    return float(torch.cat(values).mean())


def latents_of(vae: Any, images: np.ndarray, out: Path) -> Tensor:
    """All pictures' latents float16 [n, 4, SIDE / 4, SIDE / 4], scaled; encoded once."""
    file = out / "latents.npy"
    if not file.is_file():
        vae.to(find_device())
        rows = []
        with torch.no_grad():
            for start in tqdm(range(0, len(images), 64), desc="latents", mininterval=10):
                mode = vae.encode(to_pixels(images[start : start + 64]).to(vae.device)).latent_dist.mode()
                rows.append((mode * vae.config.scaling_factor).half().cpu().numpy())
        with write_whole(file) as part, part.open("wb") as stream:
            np.save(stream, np.concatenate(rows))
    try:
        latents = torch.from_numpy(np.load(file))
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it to have the latents encoded anew") from error
    if len(latents) != len(images):
        raise ValueError(f"{file} holds {len(latents)} latents for {len(images)} pictures; remove it")
    return latents
