"""Pictures and seconds that were made so far: an interrupted run goes on, and nothing is made twice."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawn.shapes import Scene
from PIL import Image
from tqdm import tqdm

from difffast.files import write_whole

from .cells import PLAN, PRESET, STOCK, Way

#: Pictures made at once.  Batches begin at multiples of it, so that more prompts leave those before them as they are.
#: Presets and plans make one at a time, as their users do.
BATCH = 12


def generate(pipe: Any, way: Way, prompts: Sequence[str], first_seed: int) -> list[Image.Image]:
    """Make a picture for every prompt, with seeds from ``first_seed`` on; the pipeline is in the way's context."""
    torch.manual_seed(first_seed)  # tomesd draws from the global generator
    return pipe(
        list(prompts),
        num_inference_steps=way.steps,
        generator=[torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))],
    ).images


class Store:
    """What was made of one cell by one model.

    Args:
        folder: of this model and cell.
        keys: way -> what it does; what was made by a way that did something else is not found.
        machine: where seconds are measured; those of other machines are not found.
    """

    def __init__(self, folder: Path, keys: Mapping[str, str], machine: str) -> None:
        self._folder = folder
        self._keys = {name: _digest(key) for name, key in keys.items()}
        self._seconds = folder / f"seconds-{_digest(machine)}.json"
        self.rounds: list[dict[str, float]] = json.loads(self._seconds.read_text()) if self._seconds.is_file() else []

    def pictures(self, way: Way, count: int) -> np.ndarray:
        """Return the pictures of the first ``count`` prompts, or as many as were made: uint8 [n, H, W, 3]."""
        file = self._file(way)
        return np.load(file)[:count] if file.is_file() else np.zeros((0, 0, 0, 3), np.uint8)

    def make_pictures(self, pipe: Any, way: Way, wanted: Sequence[Scene]) -> None:
        """Make what lacks of the pictures of these scenes; prompt i has seed i in every way."""
        made = self.pictures(way, len(wanted))
        if len(made) == len(wanted):
            return
        batch = 1 if way.kind in (PRESET, PLAN) else BATCH
        made = list(made[: len(made) // batch * batch])
        with way.context(pipe):
            for start in tqdm(range(len(made), len(wanted), batch), desc=way.name):
                prompts = [scene.caption for scene in wanted[start : start + batch]]
                made += (np.asarray(image) for image in generate(pipe, way, prompts, start))
                with write_whole(self._file(way)) as part:
                    np.save(part, np.stack(made))

    def make_times(self, pipe: Any, ways: Sequence[Way], prompts: Sequence[str], rounds: int) -> None:
        """Measure seconds of a whole call for one picture, all ways in turn, until each has so many rounds.

        Each round has the next prompt, because a guard makes some pictures slower than others.  Every way has a
        pipeline of its own, which is patched before and has run once: its user does so once as well.
        Each round has stock, because only the ratio to stock in the same round tells what a way is worth.
        """
        lacking = [way for way in ways if len(self.times(way)[0]) < rounds]
        if not lacking:
            return
        ways = [way for way in ways if way in lacking or way.kind == STOCK]
        with contextlib.ExitStack() as stack:
            pipes = {}
            for way in ways:
                pipes[way.name] = _copy(pipe, own_weights=way.kind in (PRESET, PLAN))
                stack.enter_context(way.context(pipes[way.name]))
                generate(pipes[way.name], way, prompts[:1], 0)
            for index in tqdm(range(min(len(self.times(way)[0]) for way in lacking), rounds), desc="rounds"):
                measured, at = {}, index % len(prompts)
                for way in ways:
                    start = time.perf_counter()
                    generate(pipes[way.name], way, prompts[at : at + 1], at)
                    measured[self._keys[way.name]] = time.perf_counter() - start
                self.rounds.append(measured)
                with write_whole(self._seconds) as part:
                    part.write_text(json.dumps(self.rounds))

    def times(self, way: Way) -> tuple[list[float], list[float]]:
        """Return a way's seconds, and their ratios to stock's in the same rounds."""
        key, stock = self._keys[way.name], self._keys[STOCK]
        pairs = [(each[key], each[key] / each[stock]) for each in self.rounds if key in each]
        return [seconds for seconds, _ in pairs], [ratio for _, ratio in pairs]

    def _file(self, way: Way) -> Path:
        return self._folder / f"{self._keys[way.name]}.npy"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _copy(pipe: Any, *, own_weights: bool) -> Any:
    """A pipeline of a way's own; whoever may change the weights' layout has weights of its own as well."""
    memo = {}
    if not own_weights:
        modules = (each for each in pipe.components.values() if isinstance(each, torch.nn.Module))
        memo = {id(tensor): tensor for each in modules for tensor in (*each.parameters(), *each.buffers())}
    copied = copy.deepcopy(pipe, memo)
    copied.set_progress_bar_config(disable=True)
    return copied
