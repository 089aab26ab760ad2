"""What the benchmark of erasure asks for: pictures of things in red and in other colours, and who judges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from drawn.detector import detect
from drawn.judge import judge
from drawn.rendering import render
from drawn.shapes import Scene, draw_scene
from drawn.vocabulary import SHIPPED

RED = "red"
#: Of the scenes whose binding is asked for.
BINDING_SEED = 25
OTHERS = tuple(colour for colour in SHIPPED.colours if colour != RED)
TARGET = tuple(f"a {RED} {shape}" for shape in SHIPPED.shapes)


def phrase(colour: str, shape: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def scenes(count: int, seed: int, things: int, *, red: bool) -> list[Scene]:
    """Scenes with a red thing, or without one."""
    found, number = [], 0
    while len(found) < count:
        scene = draw_scene(np.random.default_rng([seed, number]), things=things)
        number += 1
        if any(thing.colour == RED for thing in scene.things) == red:
            found.append(scene)
    return found


def pairs(chosen: Sequence[Scene]) -> list[tuple[Any, str]]:
    return [(render(scene), scene.caption) for scene in chosen]


#: Prompts of two things that the erasure that puts orange in red's place preserves; no question is among them.
PRESERVED = tuple(scene.caption for scene in scenes(60, 91, 2, red=False))


class Questions:
    """Prompts by group, and the judge of their pictures."""

    def __init__(self, neighbours: int, binding: int) -> None:
        two = [replace(scene, relation=None) for scene in scenes(binding, BINDING_SEED, 2, red=False)]
        self._scenes = {scene.caption: scene for scene in two}
        shapes = SHIPPED.shapes
        places = [(colour, shapes[(i + j) % len(shapes)]) for i, colour in enumerate(OTHERS) for j in range(neighbours)]
        self._colours = {phrase(*each): each[0] for each in places} | dict.fromkeys(TARGET, RED)
        self.prompts = {
            "target": TARGET,
            "neighbours": tuple(phrase(*each) for each in places),
            "binding": tuple(self._scenes),
        }

    def judge(self, image: Any, prompt: str) -> float:
        """A thing in the colour of the prompt is there; of two things, how many are there in their own."""
        if prompt in self._scenes:
            return judge(image, self._scenes[prompt]).binding
        return float(any(found.colour == self._colours[prompt] for found in detect(image)))
