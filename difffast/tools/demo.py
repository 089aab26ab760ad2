"""The demo: the same prompts and seeds through a stock and a patched pipeline, timed in turn and drawn side by side."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..files import write_whole
from ..patch import patched
from ..report import PatchReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PROMPTS = (
    "a green star wearing a hat",
    "a yellow square and a blue ring",
    "a red triangle above a dotted purple circle",
)


@dataclass(frozen=True)
class Comparison:
    """One image made twice: seconds for the whole pipeline call, and how alike the two images are.

    ``psnr_db`` is the peak signal-to-noise ratio of the 8-bit images against stock; infinite if identical.
    """

    prompt: str
    seed: int
    stock_s: float
    patched_s: float
    psnr_db: float
    images: tuple[Image.Image, Image.Image]

    @property
    def speedup(self) -> float:
        return self.stock_s / self.patched_s


def compare(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    preset: str,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[list[Comparison], PatchReport]:
    """Generate every prompt with every seed, stock and patched in turn (A B A B).

    Args:
        on_step: called after every denoising step of every image.
    """

    def generate(prompt: str, seed: int, count: int = steps) -> tuple[Image.Image, float]:
        def on_step_end(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return tensors

        start = time.perf_counter()
        image = pipe(
            prompt,
            num_inference_steps=count,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=on_step_end,
        ).images[0]
        return image, time.perf_counter() - start

    results = []
    generate(prompts[0], seeds[0])  # warm-up: first calls allocate and plan
    for prompt in prompts:
        for seed in seeds:
            stock, stock_s = generate(prompt, seed)
            with patched(pipe, preset) as report:
                fast, fast_s = generate(prompt, seed)
            results.append(Comparison(prompt, seed, stock_s, fast_s, psnr(stock, fast), (stock, fast)))
    return results, report


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit images of one size, in dB."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return math.inf if error == 0 else float(10 * np.log10(255.0**2 / error))


def draw_grid(results: Sequence[Comparison], path: Path, *, cell: int = 160) -> None:
    """Write a PNG: a row per prompt; per seed the stock image, the patched one and their difference, times 4."""
    by_prompt: dict[str, list[Comparison]] = {}
    for result in results:
        by_prompt.setdefault(result.prompt, []).append(result)
    columns = 3 * max(map(len, by_prompt.values()))
    gap, caption, head = 6, 20, 22
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, head + len(by_prompt) * (cell + caption + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        title = ("stock", "difffast", "difference x4")[column % 3]
        draw.text((gap + column * (cell + gap), 5), title, fill="black")
    for row, (prompt, comparisons) in enumerate(by_prompt.items()):
        top = head + row * (cell + caption + gap)
        for number, result in enumerate(comparisons):
            stock, fast = (np.asarray(image, np.int16) for image in result.images)
            difference = Image.fromarray(np.clip(4 * np.abs(stock - fast), 0, 255).astype(np.uint8))
            for column, image in enumerate((*result.images, difference)):
                left = gap + (3 * number + column) * (cell + gap)
                sheet.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (left, top))
            text = f"{prompt} · seed {result.seed} · {result.speedup:.2f}x · {result.psnr_db:.1f} dB"
            draw.text((gap + 3 * number * (cell + gap), top + cell + 3), text, fill="black")
    with write_whole(path) as part:
        sheet.save(part)


def write_json(results: Sequence[Comparison], path: Path, *, steps: int, preset: str, model: str) -> None:
    """Write the numbers with what they were measured on; README tables are made from such files."""
    import diffusers

    record = {
        "model": model,
        "steps": steps,
        "preset": preset,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "rows": [_row(result) for result in results],
    }
    with write_whole(path) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")


def _row(result: Comparison) -> dict[str, Any]:
    psnr_db = result.psnr_db if math.isfinite(result.psnr_db) else None  # JSON has no infinity
    return {
        "prompt": result.prompt,
        "seed": result.seed,
        "stock_s": result.stock_s,
        "patched_s": result.patched_s,
        "psnr_db": psnr_db,
    }


def device_name() -> str:
    """The accelerator's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
