"""How well the UNet in training draws what captions say, by the judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from drawn.judge import judge
from drawn.shapes import Scene, Thing, draw_scene
from drawn.vocabulary import LARGE
from PIL import Image

from .recipe import CHECK_SEED
from .text_rows import Whitening, ids_of, rows_of

#: Of a check; a stock pipeline takes 50, which draws no other things.
STEPS = 20
BATCH = 32


@torch.no_grad()
def draw(
    pipe: Any, whitening: Whitening, captions: Sequence[str], *, seed: int, steps: int = STEPS
) -> list[Image.Image]:
    """Pictures of captions by a pipeline whose UNet reads whitened rows; one seed each, counted from ``seed``."""
    images = []
    empty = whitening(rows_of(pipe.text_encoder, ids_of(pipe.tokenizer, [""])))
    for start in range(0, len(captions), BATCH):
        some = list(captions[start : start + BATCH])
        rows = whitening(rows_of(pipe.text_encoder, ids_of(pipe.tokenizer, some)))
        images += pipe(
            prompt_embeds=rows,
            negative_prompt_embeds=empty.expand_as(rows),
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(some))],
        ).images
    return images


def single_scenes(count: int) -> list[Scene]:
    """One thing of a colour and a shape each, said so and no more; all shapes as often as can be."""
    scenes = []
    for i in range(count):
        colour = LARGE.colours[(i + i // len(LARGE.shapes)) % len(LARGE.colours)]
        thing = Thing(LARGE.shapes[i % len(LARGE.shapes)], colour)
        scenes.append(Scene((thing,), "white", thing.phrase()))
    return scenes


def double_scenes(count: int) -> list[Scene]:
    """Two plain things of different colours, said so and no more."""
    scenes = []
    number = 0
    while len(scenes) < count:
        scene = draw_scene(np.random.default_rng([CHECK_SEED, 2, number]), vocabulary=LARGE, things=2, relation=False)
        number += 1
        things = tuple(replace(thing, texture="plain", part=None, size="medium") for thing in scene.things)
        if things[0].colour != things[1].colour:
            scenes.append(Scene(things, "white", " and ".join(thing.phrase() for thing in things)))
    return scenes


def measure(
    pipe: Any, whitening: Whitening, count: int, *, steps: int = STEPS
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Judge ``count`` pictures of one thing and as many of two.

    Returns:
        ``single``: share of single things that have their shape and their colour.  ``present``: share of things of two
        that are there in their shape.  ``bound``: share that have their colour too.  ``missed``: shapes of single
        things that were not drawn, by number.  And the pictures, single ones first.
    """
    ones, twos = single_scenes(count), double_scenes(count)
    images = draw(pipe, whitening, [scene.caption for scene in (*ones, *twos)], seed=CHECK_SEED, steps=steps)
    verdicts = [judge(image, scene, vocabulary=LARGE) for image, scene in zip(images, (*ones, *twos), strict=True)]
    single, double = verdicts[:count], verdicts[count:]
    missed: dict[str, int] = {}
    for scene, verdict in zip(ones, single, strict=True):
        if not verdict.present:
            missed[scene.things[0].shape] = missed.get(scene.things[0].shape, 0) + 1
    result = {
        "single": float(np.mean([v.binding for v in single])),
        "single_shape": float(np.mean([v.presence for v in single])),
        "present": float(np.mean([v.presence for v in double])),
        "bound": float(np.mean([v.binding for v in double])),
        "missed": missed,
    }
    return result, images
