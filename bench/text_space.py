"""What the embedded model's text space is like, shown by what its pictures show; written into the model's card.

    python bench/text_space.py --model difffast/models/embedded --out bench/results --card

Writes text_space.json.  Prompts and seeds are those of no other benchmark, and of no training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawn.judge import detect, judge
from drawn.shapes import Scene, Thing, draw_scene
from drawn.vocabulary import LARGE, SMALL, Vocabulary
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from difffast.files import write_whole
from difffast.models import embedded_pipeline
from difffast.models.embedded import FOLDER, write_checksums
from difffast.tools.demo import device_name

SEED = 7070
BATCH = 24
HEADING = "## Its text space"


@dataclass(frozen=True)
class Studio:
    """A pipeline that draws rows of text, and the words that it knows."""

    pipe: Any
    vocabulary: Vocabulary
    steps: int

    @torch.no_grad()
    def rows(self, texts: Sequence[str]) -> Tensor:
        """[n, 77, width]."""
        ids = self.pipe.tokenizer(
            list(texts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        return self.pipe.text_encoder(ids)[0]

    def draw(self, rows: Tensor, what: str) -> list[Image.Image]:
        """Pictures of rows [n, 77, width], a seed each, the same in every call."""
        images: list[Image.Image] = []
        empty = self.rows([""])
        for start in tqdm(range(0, len(rows), BATCH), desc=what, mininterval=5):
            some = rows[start : start + BATCH]
            images += self.pipe(
                prompt_embeds=some,
                negative_prompt_embeds=empty.expand_as(some),
                num_inference_steps=self.steps,
                generator=[torch.Generator().manual_seed(SEED + start + i) for i in range(len(some))],
            ).images
        return images

    def things_in(self, image: Image.Image) -> list[tuple[str | None, str]]:
        """(shape, colour) of everything in a picture."""
        return [(found.shape, found.colour) for found in detect(image, vocabulary=self.vocabulary)]


def pairs_of_things(vocabulary: Vocabulary, count: int) -> list[tuple[Thing, Thing]]:
    """Two things of different shapes and colours each."""
    rng = np.random.default_rng([SEED, 1])
    shapes = [rng.choice(vocabulary.shapes, 2, replace=False) for _ in range(count)]
    colours = [rng.choice(vocabulary.colours, 2, replace=False) for _ in range(count)]
    return [(Thing(str(s[0]), str(c[0])), Thing(str(s[1]), str(c[1]))) for s, c in zip(shapes, colours, strict=True)]


def phrase(thing: Thing) -> str:
    """Of three words, so that all have the same places; grammar would say "an orange ring"."""
    return f"a {thing.colour} {thing.shape}"


def share(
    images: Sequence[Image.Image], holds: Callable[[int, list[tuple[str | None, str]]], bool], studio: Studio
) -> float:
    """Of the pictures in which something holds."""
    return float(np.mean([holds(i, studio.things_in(image)) for i, image in enumerate(images)]))


def replace_ends(studio: Studio, count: int) -> dict[str, float]:
    """Words of one prompt, end token and padding of another: which of the two does the picture show?

    Returns:
        For the words' thing and the end tokens': shares of pictures with its shape, its colour, and both in one thing.
    """
    pairs = pairs_of_things(studio.vocabulary, count)
    words, ends = (studio.rows([phrase(pair[i]) for pair in pairs]) for i in (0, 1))
    images = studio.draw(torch.cat((words[:, :4], ends[:, 4:]), 1), "end tokens replaced")
    result = {}
    for i, name in enumerate(("words", "ends")):
        result |= {
            f"{name}_shape": share(images, lambda n, seen, i=i: pairs[n][i].shape in [s for s, _ in seen], studio),
            f"{name}_colour": share(images, lambda n, seen, i=i: pairs[n][i].colour in [c for _, c in seen], studio),
            f"{name}_both": share(images, lambda n, seen, i=i: (pairs[n][i].shape, pairs[n][i].colour) in seen, studio),
        }
    return result


def add_rows(studio: Studio, count: int) -> dict[str, float]:
    """What is drawn where a noun's row is the sum of two rows.

    Returns:
        ``colour_and_noun``: share of pictures of "a circle", its noun's row being the sum of the colour's and the
        noun's of "a red circle", that show the shape in the colour; ``noun_alone``: the same without the sum, which is
        chance.  ``one_noun``, ``other_noun``, ``both_nouns``: shapes in pictures of "a red circle", its noun's row
        being the sum of this one's and another's, the end tokens being of all.
    """
    pairs = pairs_of_things(studio.vocabulary, count)
    full = studio.rows([phrase(one) for one, _ in pairs])
    bare = studio.rows([f"a {one.shape}" for one, _ in pairs])
    other = studio.rows([f"a {one.colour} {two.shape}" for one, two in pairs])
    summed = bare.clone()
    summed[:, 2] = full[:, 2] + full[:, 3]
    two_nouns = full.clone()
    two_nouns[:, 3] += other[:, 3]

    def own(n: int, seen: list[tuple[str | None, str]]) -> bool:
        return (pairs[n][0].shape, pairs[n][0].colour) in seen

    def shapes(n: int, seen: list[tuple[str | None, str]]) -> tuple[bool, bool]:
        there = [shape for shape, _ in seen]
        return pairs[n][0].shape in there, pairs[n][1].shape in there

    images = studio.draw(two_nouns, "sum of two nouns")
    return {
        "colour_and_noun": share(studio.draw(summed, "sum of colour and noun"), own, studio),
        "noun_alone": share(studio.draw(bare, "noun alone"), own, studio),
        "one_noun": share(images, lambda n, seen: shapes(n, seen) == (True, False), studio),
        "other_noun": share(images, lambda n, seen: shapes(n, seen) == (False, True), studio),
        "both_nouns": share(images, lambda n, seen: shapes(n, seen) == (True, True), studio),
    }


def bind(studio: Studio, count: int) -> dict[str, dict[str, float]]:
    """Presence and binding by number of plain things; ``extra``: things besides, a picture."""
    result = {}
    for number in range(1, studio.vocabulary.most + 1):
        scenes = []
        for i in range(count):
            rng = np.random.default_rng([SEED, 2, number, i])
            drawn = draw_scene(rng, vocabulary=studio.vocabulary, things=number, relation=False)
            things = tuple(replace(thing, texture="plain", part=None, size="medium") for thing in drawn.things)
            phrases = [thing.phrase() for thing in things]
            text = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
            scenes.append(Scene(things, "white", text))
        images = studio.draw(studio.rows([scene.caption for scene in scenes]), f"things: {number}")
        verdicts = [
            judge(image, scene, vocabulary=studio.vocabulary) for image, scene in zip(images, scenes, strict=True)
        ]
        result[str(number)] = {
            name: float(np.mean([getattr(verdict, name) for verdict in verdicts]))
            for name in ("presence", "binding", "extra")
        }
    return result


def cosines(studio: Studio) -> dict[str, float]:
    """How alike the rows of two nouns are ("a red ..."), and of two colours ("a ... circle"): means over all pairs."""
    texts = {
        "nouns": (3, [f"a red {shape}" for shape in studio.vocabulary.shapes]),
        "colours": (2, [f"a {colour} circle" for colour in studio.vocabulary.colours]),
    }
    result = {}
    for name, (place, prompts) in texts.items():
        rows = torch.nn.functional.normalize(studio.rows(prompts)[:, place], dim=-1)
        result[name] = float(np.mean([float(a @ b) for a, b in combinations(rows, 2)]))
    return result


def describe(record: dict[str, Any]) -> str:
    """The card's section."""
    ends, sums, alike = record["ends"], record["sums"], record["cosines"]
    rows = "\n".join(
        f"| {number} | {row['presence']:.0%} | {row['binding']:.0%} | {row['extra']:.2f} |"
        for number, row in record["binding"].items()
    )
    told = record["retrieval"]
    found = (
        f"A caption finds its picture among {told['batch']} (in pairs that differ in one attribute) in "
        f"{told['text_to_picture']:.0%}, and prefers it to its pair's in {told['pairs']:.0%} of the cases. "
        if told
        else ""
    )
    return f"""{HEADING}

Made by `bench/text_space.py`: {record["pictures"]} pictures each, {record["steps"]} steps, judged by `bench/drawn`.
{found}Cosine of the rows of two nouns {alike["nouns"]:.3f}, of two colours {alike["colours"]:.3f}.

- **End tokens**: of words of one prompt and end tokens of another, pictures show the words' thing in
  {ends["words_both"]:.0%} (its shape {ends["words_shape"]:.0%}, its colour {ends["words_colour"]:.0%}) and the end
  tokens' thing in {ends["ends_both"]:.0%} (shape {ends["ends_shape"]:.0%}, colour {ends["ends_colour"]:.0%}).
- **Sums**: "a circle" whose noun's row is the sum of "red" and "circle" is drawn as a red circle in
  {sums["colour_and_noun"]:.0%} ({sums["noun_alone"]:.0%} without the sum). The sum of two nouns draws the first alone
  in {sums["one_noun"]:.0%}, the second alone in {sums["other_noun"]:.0%} and both in {sums["both_nouns"]:.0%}.

| Things | present | in their colour | others besides |
| --- | --- | --- | --- |
{rows}
"""


def put_into_card(folder: Path, section: str) -> None:
    """Write the section before the licence, in the place of an earlier one, and the checksums anew."""
    card = folder / "README.md"
    before, licence, after = card.read_text().partition("Licence:")
    if not licence:
        raise ValueError(f"{card} has no line that begins with 'Licence:', before which the section would go")
    before = before.partition(HEADING)[0].rstrip()
    with write_whole(card) as part:
        part.write_text(f"{before}\n\n{section}\n{licence}{after}")
    write_checksums(folder)


def measure(studio: Studio, model: Path, count: int) -> dict[str, Any]:
    training = json.loads((model / "training.json").read_text())
    told = training.get("clip")
    return {
        "pictures": count,
        "steps": studio.steps,
        "device": device_name(),
        "retrieval": {**told, "batch": training["recipe"]["clip_batch"]} if told else None,
        "cosines": cosines(studio),
        "ends": replace_ends(studio, count),
        "sums": add_rows(studio, count),
        "binding": bind(studio, count),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--pictures", type=int, default=96, help="of each question")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("out/text_space"))
    parser.add_argument("--card", action="store_true", help="write the section into the model's README.md")
    arguments = parser.parse_args()
    pipe = embedded_pipeline(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    knows_all = len(pipe.tokenizer.tokenize(LARGE.colours[-1])) == 1
    studio = Studio(pipe, LARGE if knows_all else SMALL, arguments.steps)
    record = measure(studio, arguments.model, arguments.pictures)
    with write_whole(arguments.out / "text_space.json") as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
    print(describe(record))
    if arguments.card:
        put_into_card(arguments.model, describe(record))


if __name__ == "__main__":
    main()
