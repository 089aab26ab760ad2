"""Train the embedded model as Stable Diffusion is trained: a CLIP, then a UNet on its frozen text tower's rows.

    python bench/train_shapes.py --preset cpu --out out/shapes --minutes 60
    python bench/train_shapes.py --out out/shapes --export difffast/models/embedded
    python bench/train_shapes.py --out out/shapes --keep kept
    python bench/train_shapes.py --out elsewhere --take-up kept

Every run goes on where the last one stopped, which may have been killed at any moment; --minutes bounds one run.
Sample grids, loss plots and what was measured on the way are in --out.  The last two lines carry a training that is not
finished to another machine: averaged weights in float16, small enough for a repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from drawn.captions import words
from drawn.shapes import SIDE
from training.clip import train_clip
from training.data import VOCABULARY, load_pairs, load_scenes
from training.export import export
from training.kept import keep, take_up
from training.loop import Budget
from training.recipe import RECIPES, Recipe
from training.unet import find_whitening, start_from, train_unet
from training.vae import latents_of, train_vae

from difffast.models import embedded_pipeline, tiny_pipeline
from difffast.models.embedded import FOLDER
from difffast.models.tokenizer import clip_tokenizer, learn_merges


def build(recipe: Recipe) -> Any:
    """The untrained pipeline; its tokenizer writes every word of the captions as one token."""
    pipe = tiny_pipeline(
        channels=recipe.channels,
        sample_size=SIDE // 4,
        norm_groups=16,
        text=(recipe.text_width, recipe.text_layers),
        tokenizer=clip_tokenizer(learn_merges(words(VOCABULARY))),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def take_tower(pipe: Any, clip: Any) -> None:
    """Put CLIP's text tower into the pipeline, frozen, and as it will be exported: rounded to float16."""
    tower = pipe.text_encoder
    # transformers 4 has the tower one level deeper.
    getattr(tower, "text_model", tower).load_state_dict(clip.text_model.state_dict())
    tower.half().float().eval().requires_grad_(False)


def run(recipe: Recipe, arguments: argparse.Namespace, budget: Budget) -> None:
    """All stages, as far as the budget goes; exports if it comes to the UNet."""
    out, pipe = arguments.out, build(recipe)
    start = None if arguments.start is None else embedded_pipeline(arguments.start)
    clip = train_clip(recipe, pipe.tokenizer, load_pairs(recipe, out), out, budget)
    if clip is None:
        return
    take_tower(pipe, clip)
    store = load_scenes(recipe, out)
    if start:
        pipe.vae.load_state_dict(start.vae.state_dict())
        pipe.vae.register_to_config(scaling_factor=start.vae.config.scaling_factor)
    if not train_vae(recipe, pipe.vae, store.pictures, out, budget, started=start is not None):
        return
    latents = latents_of(pipe.vae, store.pictures, out)
    whitening = find_whitening(pipe, store.captions, out)
    if start and not (out / "unet-checkpoint.pt").is_file():
        print(f"the start's text rows are explained to {start_from(pipe, whitening, start):.3f}", flush=True)
    train_unet(recipe, pipe, whitening, latents, store, out, budget)
    if arguments.export:
        export(recipe, pipe, whitening, arguments.export, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=RECIPES, default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder of data, checkpoints and pictures")
    parser.add_argument("--minutes", type=float, help="stop after so many; the next run goes on")
    parser.add_argument(
        "--stop-after", type=int, metavar="STEPS", help="stop after so many steps; the next run goes on"
    )
    parser.add_argument(
        "--start",
        type=Path,
        help=f"model of the recipe's sizes whose autoencoder and UNet are the start, such as {FOLDER.name}; else none",
    )
    parser.add_argument("--export", type=Path, help="write the pipeline (float16) here once the UNet is begun")
    parser.add_argument("--take-up", type=Path, help="go on from what --keep has written, where --out has nothing yet")
    parser.add_argument("--keep", type=Path, help="at the end, write what another machine can go on from, in float16")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.take_up:
        take_up(arguments.take_up, arguments.out)
    budget = Budget(arguments.minutes, arguments.stop_after, arguments.out / "minutes.json")
    budget.stop_on_terminate()
    run(RECIPES[arguments.preset], arguments, budget)
    if arguments.keep:
        keep(arguments.out, arguments.keep)


if __name__ == "__main__":
    main()
