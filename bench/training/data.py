"""What is trained on: pictures and captions of drawn scenes, made once and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from drawn.captions import FORMS, alterations, altered, paraphrase
from drawn.rendering import render
from drawn.shapes import SIDE, Scene, draw_scene
from drawn.vocabulary import LARGE, Vocabulary
from torch import Tensor
from tqdm import tqdm

from .loop import write_json
from .recipe import DATA_SEED, Recipe

#: What is trained for.
VOCABULARY: Vocabulary = LARGE
#: What a pair for CLIP differs in, where several alterations are possible: shapes are what it would else tell apart
#: last.  All others count 1.
_OFTEN = {"shape": 4.0, "swap": 0.5}
#: How the UNet is told what is in a picture: rarely less than there is, or it would draw more than it is told.
_FORMS = {"caption": 0.52, "reordered": 0.15, "clauses": 0.1, "list": 0.15, "partial": 0.05, "word": 0.03}
#: Share of CLIP's texts that are captions; the others are paraphrases, which may leave out what a pair differs in.
CAPTIONED = 0.6


@dataclass(frozen=True)
class Store:
    """Pictures and what may be said of them.

    Attributes:
        pictures: uint8 [n, SIDE, SIDE, 3], on disk.
        captions: of each picture, several.
        things: int [n], how many are in each.
    """

    pictures: np.ndarray
    captions: list[list[str]]
    things: np.ndarray


def load_scenes(recipe: Recipe, out: Path) -> Store:
    """Pictures for UNet and autoencoder, drawn on the first call."""

    def drawn() -> Iterator[tuple[np.ndarray, list[str], int]]:
        for i in range(recipe.scenes):
            rng = np.random.default_rng([DATA_SEED, i])
            scene = draw_scene(rng, vocabulary=VOCABULARY)
            forms = rng.choice(list(_FORMS), recipe.captions, p=list(_FORMS.values()))
            captions = [paraphrase(rng, scene, form=str(form)) for form in forms]
            yield np.asarray(render(scene)), captions, len(scene.things)

    return _load("scenes", recipe.scenes, drawn(), out)


def load_pairs(recipe: Recipe, out: Path, *, seed: int = DATA_SEED, name: str = "pairs") -> Store:
    """Pictures for CLIP: 2 i and 2 i + 1 are of scenes that differ in one attribute, which their captions tell."""

    def drawn() -> Iterator[tuple[np.ndarray, list[str], int]]:
        for i in range(recipe.pairs):
            rng = np.random.default_rng([seed, 1, i])
            for scene, captions in draw_pair(rng, recipe.captions):
                yield np.asarray(render(scene)), captions, len(scene.things)

    return _load(name, 2 * recipe.pairs, drawn(), out)


def draw_pair(rng: np.random.Generator, count: int) -> list[tuple[Scene, list[str]]]:
    """Two scenes that differ in one attribute, and ``count`` texts of each: captions first, then in the same forms."""
    scene = draw_scene(rng, vocabulary=VOCABULARY)
    possible = alterations(scene, VOCABULARY)
    often = np.array([_OFTEN.get(what, 1.0) for what in possible])
    other = altered(rng, scene, vocabulary=VOCABULARY, what=str(rng.choice(possible, p=often / often.sum())))
    forms = [str(form) for form in rng.choice(list(FORMS), count - 1, p=list(FORMS.values()))]
    return [(each, [each.caption, *(paraphrase(rng, each, form=form) for form in forms)]) for each in (scene, other)]


def _load(name: str, count: int, drawn: Iterator[tuple[np.ndarray, list[str], int]], out: Path) -> Store:
    file, said = out / f"{name}.npy", out / f"{name}.json"
    if not said.is_file():
        store = np.lib.format.open_memmap(file, "w+", np.uint8, (count, SIDE, SIDE, 3))
        captions, things = [], []
        for i, (picture, texts, number) in enumerate(tqdm(drawn, total=count, desc=name, mininterval=10)):
            store[i] = picture
            captions.append(texts)
            things.append(number)
        store.flush()
        # Last: what is cut off is drawn anew.
        write_json(said, {"captions": captions, "things": things})
    try:
        record = json.loads(said.read_text())
        pictures = np.load(file, mmap_mode="r")
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} or {said} is damaged ({error}); remove both to have them drawn anew") from error
    if len(pictures) != count or len(record["captions"]) != count:
        raise ValueError(f"{file} holds {len(pictures)} pictures, the recipe asks for {count}; give another --out")
    return Store(pictures, record["captions"], np.array(record["things"]))


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in -1 .. 1."""
    return torch.from_numpy(np.array(images)).movedim(-1, -3).float() / 127.5 - 1
