"""Sizes and lengths of a training, by preset."""

from __future__ import annotations

from dataclasses import dataclass

#: Scenes of this seed are for training only; the judge's come from others.
DATA_SEED = 0
#: Scenes and noise of what is measured while training goes on.
CHECK_SEED = 4040


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths; what a preset means.

    Attributes:
        channels: the UNet's widths.
        text_width, text_layers: of CLIP's text tower, which ships.
        vision_width, vision_layers: of CLIP's vision tower, which does not.
        scenes: pictures for UNet and autoencoder.
        captions: of each picture, one of which is drawn whenever the picture is.
        pairs: scenes for CLIP, each with a second one that differs in one attribute.
        vae_steps: from random weights; a start keeps its autoencoder, but for ``vae_tune_steps``.
        steps, batch: of the UNet.
        single: share of pictures with one thing during the first third of the UNet's steps.
        clip_check_every, check_every: steps after which fresh scenes are retrieved, and drawn and judged.
        checked: pictures of one thing, and of two, that are then drawn.
    """

    channels: tuple[int, ...]
    text_width: int
    text_layers: int
    vision_width: int
    vision_layers: int
    scenes: int
    pairs: int
    vae_steps: int
    vae_batch: int
    clip_steps: int
    clip_batch: int
    steps: int
    batch: int
    captions: int = 6
    vae_tune_steps: int = 2_500
    learning_rate: float = 5e-4
    warmup: int = 200
    vae_learning_rate: float = 1e-3
    clip_learning_rate: float = 1e-3
    drop_text: float = 0.1
    snr_gamma: float = 5.0
    ema_decay: float = 0.999
    single: float = 0.55
    clip_check_every: int = 200
    check_every: int = 500
    checked: int = 48
    precision: str = "bf16"


RECIPES = {
    "cpu": Recipe(
        channels=(64, 128, 192),
        text_width=128,
        text_layers=4,
        vision_width=128,
        vision_layers=4,
        scenes=48_000,
        pairs=20_000,
        vae_steps=4_000,
        vae_batch=16,
        clip_steps=1_800,
        clip_batch=128,
        steps=10_000,
        batch=32,
    ),
    "gpu": Recipe(
        channels=(64, 128, 192),
        text_width=128,
        text_layers=4,
        vision_width=128,
        vision_layers=6,
        scenes=400_000,
        pairs=200_000,
        vae_steps=20_000,
        vae_batch=64,
        clip_steps=20_000,
        clip_batch=512,
        steps=60_000,
        batch=256,
    ),
    "test": Recipe(
        channels=(32, 64, 96),
        text_width=32,
        text_layers=2,
        vision_width=32,
        vision_layers=1,
        scenes=64,
        pairs=32,
        vae_steps=4,
        vae_batch=4,
        clip_steps=4,
        clip_batch=8,
        steps=4,
        batch=4,
        captions=2,
        vae_tune_steps=2,
        warmup=2,
        clip_check_every=2,
        check_every=2,
        checked=2,
        precision="no",
    ),
}
