"""A CLIP of drawn scenes: its text tower ships, its vision tower does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from drawn.shapes import SIDE
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from .data import CAPTIONED, Store, load_pairs, to_pixels
from .loop import Budget, Training, write_json
from .recipe import CHECK_SEED, DATA_SEED, Recipe
from .text_rows import mean_cosine

PATCH = 8
#: Spread of a token's embedding at first.  CLIP's .02 drowns in what the layers add: rows would tell little of words.
TOKEN_SPREAD = 0.1
#: The logits' scale is kept below this, as CLIP's is.
MOST_SCALE = 100.0
_CHECKED = 4  # batches


def build_clip(recipe: Recipe, tokenizer: Any) -> CLIPModel:
    """An untrained CLIP: causal text tower, pooled at the end token; vision tower on patches of ``PATCH`` pixels."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=4,
        projection_dim=recipe.text_width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=recipe.vision_width,
        intermediate_size=4 * recipe.vision_width,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=4,
        projection_dim=recipe.text_width,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DATA_SEED)
        clip = CLIPModel(
            CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=recipe.text_width)
        )
        torch.nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=TOKEN_SPREAD)
    # PyTorch's fused attention has a slow backward pass on CPUs.
    clip.set_attn_implementation("eager" if not torch.cuda.is_available() else "sdpa")
    return clip


def embed(clip: CLIPModel, pictures: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of pictures [n, 3, H, W] and of texts [m, tokens]: float32 [n, width], [m, width]."""
    seen = clip.visual_projection(clip.vision_model(pictures).pooler_output)
    read = clip.text_projection(clip.text_model(ids).pooler_output)
    return F.normalize(seen.float(), dim=-1), F.normalize(read.float(), dim=-1)


def contrast(seen: Tensor, read: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's loss of n pictures and their n texts (arXiv 2103.00020), both ways.

    Args:
        seen, read: unit vectors [n, width].
        scale: of the logits.
        same: bool [n, n]: texts that are the same, which are no negatives of each other.
    """
    logits = scale * seen @ read.T
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(same & ~own, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def tokens_of(tokenizer: Any, texts: list[str]) -> Tensor:
    """int64 [n, longest]: nobody after the end token has a say in a causal tower."""
    return tokenizer(texts, padding=True, return_tensors="pt").input_ids


def draw_batch(store: Store, size: int, seed: list[int]) -> tuple[Tensor, list[str]]:
    """``size`` / 2 pairs: float32 [size, 3, SIDE, SIDE] and a caption of each, said in the same way in both of a pair.

    Args:
        store: of pairs.
        size: how many pictures.
        seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    first = 2 * np.sort(rng.choice(len(store.captions) // 2, size // 2, replace=False))
    chosen = np.stack((first, first + 1), 1).ravel()
    others = len(store.captions[0]) - 1
    said = np.where(rng.random(size // 2) < CAPTIONED, 0, rng.integers(1, others + 1, size // 2)).repeat(2)
    texts = [store.captions[i][int(which)] for i, which in zip(chosen, said, strict=True)]
    return to_pixels(store.pictures[chosen]), texts


def train_clip(recipe: Recipe, tokenizer: Any, store: Store, out: Path, budget: Budget) -> CLIPModel | None:
    """-> the CLIP with averaged weights; None: the budget was used up before the end."""
    clip = build_clip(recipe, tokenizer)
    training = Training(
        "clip",
        clip,
        out,
        rate=recipe.clip_learning_rate,
        count=recipe.clip_steps,
        warmup=recipe.warmup,
        decay=min(recipe.ema_decay, 0.995),
        precision="no",  # matrices so small that casts take what bfloat16 saves
    )
    clip.train()
    for step in training.steps(budget):
        pictures, texts = draw_batch(store, recipe.clip_batch, [DATA_SEED, 2, step])
        ids = tokens_of(tokenizer, texts).to(training.device)
        with training.autocast():
            seen, read = embed(clip, pictures.to(training.device), ids)
        same = torch.tensor([[a == b for b in texts] for a in texts], device=training.device)
        training.step(contrast(seen, read, clip.logit_scale.exp().clamp(max=MOST_SCALE), same))
        if len(training.losses) % recipe.clip_check_every == 0:
            check(recipe, training, tokenizer, out)
    if not training.finished:
        return None
    training.averaged()
    return clip.float()


def check(recipe: Recipe, training: Training, tokenizer: Any, out: Path) -> None:
    """Append to clip-checks.json how well fresh scenes are told apart, with the averaged weights."""
    log = out / "clip-checks.json"
    clip = training.model
    training.average.swap(clip)
    clip.eval()
    result = {"step": len(training.losses), **measure_clip(recipe, clip, tokenizer, out)}
    clip.train()
    training.average.swap(clip)
    earlier = read_log(log, before=len(training.losses))
    write_json(log, [*earlier, result])
    print(f"\nclip {result}", flush=True)


def read_log(path: Path, *, before: int) -> list[dict[str, Any]]:
    """The entries of earlier steps; a resumed run makes the others again."""
    entries = json.loads(path.read_text()) if path.is_file() else []
    return [entry for entry in entries if entry["step"] < before]


@torch.no_grad()
def measure_clip(recipe: Recipe, clip: CLIPModel, tokenizer: Any, out: Path) -> dict[str, float]:
    """How well fresh scenes are told apart, in batches as large as those of training.

    Returns:
        ``text_to_picture``, ``picture_to_text``: shares of which the own one is the nearest in its batch.  ``pairs``:
        share of the texts nearer to their own picture than to the one that differs in an attribute.  ``shapes``,
        ``colours``: mean cosine of the text rows of two nouns, and of two colours.
    """
    device = next(clip.parameters()).device
    fresh = replace(recipe, pairs=_CHECKED * recipe.clip_batch // 2)
    store = load_pairs(fresh, out, seed=CHECK_SEED, name="fresh-pairs")
    found, named, chosen = [], [], []
    for start in range(0, len(store.captions), recipe.clip_batch):
        part = slice(start, start + recipe.clip_batch)
        texts = [captions[0] for captions in store.captions[part]]
        seen, read = embed(clip, to_pixels(store.pictures[part]).to(device), tokens_of(tokenizer, texts).to(device))
        alike = (read @ seen.T).float()
        own = torch.arange(len(alike), device=device)
        found.append((alike.argmax(1) == own).float())
        named.append((alike.argmax(0) == own).float())
        chosen.append((alike[own, own] > alike[own, own ^ 1]).float())
    result = {
        "text_to_picture": torch.cat(found).mean(),
        "picture_to_text": torch.cat(named).mean(),
        "pairs": torch.cat(chosen).mean(),
        **mean_cosine(clip.text_model, tokenizer),
    }
    return {name: round(float(value), 4) for name, value in result.items()}
