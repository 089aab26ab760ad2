"""The demo of semantic binding: the same prompts and seeds, stock and bound, with the subjects' attention maps."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..files import write_whole
from ..patch import patched
from ..steering.binding.method import SemanticBinding
from ..steering.binding.trace import BindingTrace

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PROMPTS = (
    "a [striped red circle wearing a hat] and a [dotted blue square]",
    "a [dotted green star] and a [striped orange ring]",
    "a [purple triangle wearing boots] and a [dotted yellow cross]",
)
#: What the embedded model needs instead of ToMe's numbers (found on 16 prompts that bench_binding.py does not use): its
#: UNet has seen nothing like the sum of two rows of its text encoder, small changes of a row change a lot, and its end
#: tokens say more of attributes than its words.
EMBEDDED: dict[str, Any] = {
    "weights": (0.9, 0.1),
    "replace_step": None,
    "bind_step_size": 1.0,
    "optimise": "latents",
    "step_size": 0.3,
}
#: What these do to its pictures, per preset: of the subjects, how many have what is said of another, and how many are
#: right in shape, colour, texture and part, in %, without and with binding (bench/results/binding.json).
MEASURED = {"object": ((21.9, 16.1), (53.5, 35.2)), "attribute": ((21.9, 19.7), (53.5, 35.0))}


def explain(preset: str) -> str:
    """Return what is to be expected of the pictures with binding: what has been measured on many of them."""
    (leaks, leaks_bound), (right, right_bound) = MEASURED[preset]
    return (
        "What binding does to this small model's pictures, measured on 100 prompts with 2 seeds at 50 steps: "
        f"subjects that have what was said of another go from {leaks}% to {leaks_bound}%; "
        f"subjects that are right in everything go from {right}% to {right_bound}%, so it makes them worse: the model "
        "cannot use composite tokens. Single pictures get better or worse."
    )


@dataclass(frozen=True)
class Bound:
    """One image made twice, and what binding did.

    Attributes:
        prompt: with its marks.
        images: stock, and with binding.
        trace: of the latter's run.
    """

    prompt: str
    seed: int
    images: tuple[Image.Image, Image.Image]
    trace: BindingTrace


def compare(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    binding: SemanticBinding,
    *,
    steps: int,
    preset: str,
    on_step: Callable[[], None] = lambda: None,
) -> list[Bound]:
    """Generate every prompt with every seed, patched without and with binding.

    Args:
        on_step: called after every denoising step of every image.
    """

    def on_step_end(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return tensors

    def generate(prompt: str, seed: int) -> Image.Image:
        return pipe(
            prompt,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=on_step_end,
        ).images[0]

    results = []
    for prompt in prompts:
        for seed in seeds:
            with patched(pipe, preset):
                plain = generate(prompt.replace("[", "").replace("]", "").replace("*", ""), seed)
            with patched(pipe, preset, binding=binding) as report:
                results.append(Bound(prompt, seed, (plain, generate(prompt, seed)), report.trace))
    return results


def draw_grid(results: Sequence[Bound], path: Path, words: str, *, cell: int = 160) -> None:
    """Write a PNG: ``words``, and a row per image; without and with binding, then each thing's map over the latter."""
    subjects = max(len(result.trace.subjects[0]) for result in results)
    gap, caption, line = 6, 36, 14
    width = (2 + subjects) * (cell + gap) + gap
    lines = textwrap.wrap(words, width // 7)
    head = 22 + line * len(lines)
    sheet = Image.new("RGB", (width, head + len(results) * (cell + caption + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(lines):
        draw.text((gap, 3 + line * i), text, fill="black")
    titles = ["without binding", "with binding", *("map of:" for _ in range(subjects))]
    for column, title in enumerate(titles):
        draw.text((gap + column * (cell + gap), head - 17), title, fill="black")
    for row, result in enumerate(results):
        top = head + row * (cell + caption + gap)
        maps = [_overlay(result.images[1], attended.cpu().numpy(), cell) for attended in result.trace.maps[0]]
        pictures = [image.resize((cell, cell), Image.Resampling.NEAREST) for image in result.images] + maps
        for column, picture in enumerate(pictures):
            left = gap + column * (cell + gap)
            sheet.paste(picture, (left, top))
            if column >= 2:
                draw.text((left, top + cell + 3), result.trace.subjects[0][column - 2], fill="black")
        draw.text((gap, top + cell + 18), f"{result.prompt} · seed {result.seed}", fill="black")
    with write_whole(path) as part:
        sheet.save(part)


def _overlay(image: Image.Image, attended: np.ndarray, cell: int) -> Image.Image:
    """A map [h, w], from its least to its largest, as red light on the grey picture."""
    span = float(np.ptp(attended)) or 1.0
    light = Image.fromarray(np.uint8(255 * (attended - attended.min()) / span))
    light = np.asarray(light.resize((cell, cell), Image.Resampling.BICUBIC), np.float64) / 255
    grey = np.asarray(image.convert("L").resize((cell, cell), Image.Resampling.NEAREST), np.float64)
    shown = grey[..., None] * (1 - light[..., None]) + np.array([230.0, 30.0, 30.0]) * light[..., None]
    return Image.fromarray(shown.round().clip(0, 255).astype(np.uint8))
