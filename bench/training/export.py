"""The trained pipeline on disk: float16 weights, checksums, how it was made, and a card."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawn.shapes import SIDE
from drawn.vocabulary import LARGE

from difffast.models.embedded import write_checksums
from difffast.tools.demo import device_name

from .recipe import Recipe
from .text_rows import Whitening, fold

STAGES = ("clip", "vae", "unet")


def export(recipe: Recipe, pipe: Any, whitening: Whitening, folder: Path, out: Path) -> None:
    """Write the pipeline in float16 with how it was trained, and checksums; its UNet reads the tower's own rows.

    Args:
        recipe: sizes and lengths.
        pipe: with a UNet that reads whitened rows; left as it is.
        whitening: of these rows.
        folder: to write to.
        out: the training's, with losses and checks.
    """
    unet = deepcopy(pipe.unet).float()
    fold(unet, whitening, torch.float16)
    stock = type(pipe)(**{**pipe.components, "unet": unet, "vae": deepcopy(pipe.vae)}, requires_safety_checker=False)
    stock.text_encoder = deepcopy(pipe.text_encoder)
    stock.to("cpu", torch.float16).save_pretrained(folder, max_shard_size="15MB")
    record = record_of(recipe, out)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(card(record))
    write_vocabulary(folder / "tokenizer")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes them for their owner only, and packages keep that
    write_checksums(folder)


def record_of(recipe: Recipe, out: Path) -> dict[str, Any]:
    """What training.json says."""
    losses = {name: _read(out / f"{name}-losses.json", []) for name in STAGES}
    runs = _read(out / "minutes.json", [])

    def total(key: str) -> float:
        return round(sum(stage[key] for run in runs for stage in run.values()), 1)

    return {
        "recipe": asdict(recipe),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "minutes": total("minutes"),
        "processor_minutes": total("processor_minutes"),
        "clip_steps": len(losses["clip"]),
        "vae_steps": len(losses["vae"]),
        "steps": len(losses["unet"]),
        "pictures_seen": len(losses["unet"]) * recipe.batch,
        "loss": float(np.mean(losses["unet"][-500:])) if losses["unet"] else None,
        "clip": _read(out / "clip-checks.json", [None])[-1],
        "drawn": _read(out / "unet-checks.json", [None])[-1],
    }


def _read(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text()) if path.is_file() else otherwise


def write_vocabulary(folder: Path) -> None:
    """Write vocab.json and merges.txt, which transformers 4 reads, from transformers 5's tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))


def card(record: dict[str, Any]) -> str:
    """The model card of an export."""
    recipe = record["recipe"]
    autoencoder = f"{record['vae_steps']} steps of {recipe['vae_batch']}" if record["vae_steps"] else "its start's"
    return f"""# difffast's embedded model

A small Stable Diffusion in the layout of SD 1.x (CLIP text encoder, UNet with widths {recipe["channels"]}, autoencoder
with factor 4) that draws captioned shapes, {SIDE} x {SIDE} pixels. It exists so that difffast can be tried, tested and
judged without a download: `difffast.models.embedded_pipeline()`.

**Data**: {recipe["scenes"]} scenes and {recipe["pairs"]} pairs of scenes, drawn by `bench/drawn` (no data of others):
one to {LARGE.most} of {len(LARGE.shapes)} shapes ({", ".join(LARGE.shapes)}) in {len(LARGE.colours)} colours
({", ".join(LARGE.colours)}) and {len(LARGE.textures)} textures ({", ".join(LARGE.textures)}), some wearing
{", ".join(LARGE.parts[:-1])} or {LARGE.parts[-1]}, on a background that is {", ".join(LARGE.backgrounds[:-1])} or
{LARGE.backgrounds[-1]}; captions such as "a striped red triangle above a blue circle on a gradient background".

**Training**: `bench/train_shapes.py`, as Stable Diffusion was trained: a CLIP learns which caption belongs to which
picture ({record["clip_steps"]} steps of {recipe["clip_batch"]} pictures, in pairs that differ in one attribute); its
text tower is frozen, and the UNet learns to draw from its last hidden state ({record["steps"]} steps of
{recipe["batch"]}, {record["pictures_seen"]} pictures; noise prediction, min-SNR {recipe["snr_gamma"]:g},
{recipe["drop_text"]:.0%} empty captions, averaged weights). Autoencoder: {autoencoder}.
{record["processor_minutes"]:.0f} processor minutes in all on {record["device"]} ({record["threads"]} threads).
`training.json` has the numbers.

**How good it is**: how many things are there and in their colours is in the table below, measured by
`bench/text_space.py`; textures and parts are in docs/steering.md, measured by `bench/bench_binding.py`.

**What it cannot do**: anything but such scenes. Words outside those captions mean nothing to it, other picture sizes
are outside its training, and with several things it confuses colours, textures and parts, as large models do: that is
what it is for. It has seen nothing like a sum of two rows of its text: where a method adds them up, as ToMe's composite
tokens do, its pictures are ruined (docs/steering.md).

Licence: Apache-2.0.
"""
