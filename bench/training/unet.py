"""The UNet, trained on the whitened rows of a frozen text tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from diffusers.utils import make_image_grid
from drawn.shapes import draw_scene
from drawn.vocabulary import SHIPPED
from torch import Tensor

from difffast.files import write_whole

from .clip import read_log
from .data import Store
from .judged import measure
from .loop import Budget, Training, load_checkpoint, write_json
from .recipe import DATA_SEED, Recipe
from .text_rows import Affine, Whitening, feed, fit_affine, fit_whitening, ids_of, rows_of, weights_of

_FITTED = 1536  # captions


def find_whitening(pipe: Any, captions: list[list[str]], out: Path) -> Whitening:
    """Of the rows of training captions; fitted once and kept, so that a resumed training has the same."""
    file = out / "whitening.pt"
    if not file.is_file():
        texts = [choices[i % len(choices)] for i, choices in enumerate(captions[:_FITTED])]
        ids = ids_of(pipe.tokenizer, texts)
        fitted = fit_whitening(rows_of(pipe.text_encoder, ids).cpu(), weights_of(ids, pipe.tokenizer.eos_token_id))
        with write_whole(file) as part:
            torch.save(vars(fitted), part)
    kept: dict[str, Tensor] = {}
    load_checkpoint(file, lambda state: kept.update(mean=state["mean"], matrix=state["matrix"]))
    return Whitening(**kept)


def fit_start(pipe: Any, whitening: Whitening, start: Any) -> Affine:
    """The map from whitened rows to a start's rows, on captions that both know, token by token."""
    rng = np.random.default_rng([DATA_SEED, 4])
    texts = [draw_scene(rng, vocabulary=SHIPPED).caption for _ in range(_FITTED)]
    ids, old = ids_of(pipe.tokenizer, texts), ids_of(start.tokenizer, texts)
    weights = weights_of(ids, pipe.tokenizer.eos_token_id)
    if ((ids == pipe.tokenizer.eos_token_id) != (old == start.tokenizer.eos_token_id)).any():
        raise ValueError(
            "the start's tokenizer must write the words of its captions as one token each, as this one does"
        )
    x = whitening(rows_of(pipe.text_encoder, ids).cpu().double())
    return fit_affine(x, rows_of(start.text_encoder, old).cpu(), weights)


def start_from(pipe: Any, whitening: Whitening, start: Any) -> float:
    """Give the UNet a start's weights, such that it reads whitened rows; -> explained share of the start's rows."""
    fitted = fit_start(pipe, whitening, start)
    feed(start.unet, fitted.matrix, fitted.offset)
    pipe.unet.load_state_dict(start.unet.state_dict())
    return fitted.explained


def timestep_shares(schedule: Any, gamma: float) -> Tensor:
    """How often each timestep is drawn, float64 [timesteps].

    Min-SNR (arXiv 2303.09556) weighs errors in noise by min(SNR, gamma) / SNR.  Timesteps are drawn as often as that
    instead, and all weigh 1: the same loss, and no step spent on pictures that hardly count.
    """
    snr = compute_snr(schedule, torch.arange(schedule.config.num_train_timesteps)).double()
    weights = snr.clamp(max=gamma) / snr
    return weights / weights.sum()


def draw_timesteps(shares: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """int64 [count], spread evenly over the shares (one of each ``count``-th), in random order."""
    places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    found = torch.searchsorted(shares.cumsum(0), places.double()).clamp(max=len(shares) - 1)
    return found[torch.randperm(count, generator=generator)]


def choose(store: Store, size: int, single: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers of pictures [size], of which the share ``single`` has one thing; 0: as the store has them."""
    if not single:
        return rng.choice(len(store.things), size, replace=False)
    ones, others = np.flatnonzero(store.things == 1), np.flatnonzero(store.things > 1)
    alone = round(single * size)
    return np.concatenate((rng.choice(ones, alone), rng.choice(others, size - alone)))


def train_unet(
    recipe: Recipe, pipe: Any, whitening: Whitening, latents: Tensor, store: Store, out: Path, budget: Budget
) -> Training:
    """Train ``pipe.unet`` as far as the budget goes; it then has the averaged weights and reads whitened rows."""
    unet, tower = pipe.unet, pipe.text_encoder
    unet.train()
    training = Training(
        "unet",
        unet,
        out,
        rate=recipe.learning_rate,
        count=recipe.steps,
        warmup=recipe.warmup,
        decay=recipe.ema_decay,
        precision=recipe.precision,
    )
    device = training.device
    pipe.to(device)
    if device.type == "cpu":
        # PyTorch's fused attention has a slow backward pass there.
        unet.set_attn_processor(AttnProcessor())
    shares = timestep_shares(pipe.scheduler, recipe.snr_gamma)
    if not training.losses:
        check(recipe, training, pipe, whitening, out)
    for step in training.steps(budget):
        rng = np.random.default_rng([DATA_SEED, 5, step])
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        chosen = choose(store, recipe.batch, recipe.single if step < recipe.steps / 3 else 0.0, rng)
        texts = [store.captions[i][int(rng.integers(len(store.captions[i])))] for i in chosen]
        texts = ["" if rng.random() < recipe.drop_text else text for text in texts]
        clean = latents[torch.from_numpy(chosen)].float()
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = draw_timesteps(shares, recipe.batch, generator)
        noisy = pipe.scheduler.add_noise(clean, noise, timesteps)
        with training.autocast():
            rows = whitening(rows_of(tower, ids_of(pipe.tokenizer, texts)).float())
            guess = unet(noisy.to(device), timesteps.to(device), rows).sample
        training.step((guess.float() - noise.to(device)).square().mean())
        if len(training.losses) % recipe.check_every == 0:
            check(recipe, training, pipe, whitening, out)
    training.averaged()
    unet.set_default_attn_processor()
    return training


def check(recipe: Recipe, training: Training, pipe: Any, whitening: Whitening, out: Path) -> None:
    """Append to unet-checks.json what the judge says of pictures by the averaged weights, and keep some of them."""
    log, step = out / "unet-checks.json", len(training.losses)
    training.average.swap(pipe.unet)
    pipe.unet.eval()
    with training.autocast():
        result, images = measure(pipe, whitening, recipe.checked)
    pipe.unet.train()
    training.average.swap(pipe.unet)
    write_json(log, [*read_log(log, before=step), {"step": step, **result}])
    print(f"\nunet {step} {result}", flush=True)
    shown = [*images[: min(16, recipe.checked)], *images[recipe.checked : recipe.checked + 16]]
    with write_whole(out / "samples" / f"{step:06d}.png") as part:
        make_image_grid(shown, rows=4, cols=len(shown) // 4, resize=128).save(part)
