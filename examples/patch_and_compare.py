"""The same prompt and seed, stock and patched: seconds, PSNR, and both pictures side by side.

python examples/patch_and_compare.py --preset turbo
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import difffast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--preset", choices=difffast.presets.PRESETS, default="balanced")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", type=Path, default=Path("compare.png"))
arguments = parser.parse_args()

pipe = difffast.models.embedded_pipeline()


def draw():
    start = time.perf_counter()
    seed = torch.Generator().manual_seed(0)
    image = pipe("a yellow square and a blue ring", num_inference_steps=arguments.steps, generator=seed).images[0]
    return image, time.perf_counter() - start


draw()  # first calls are slower
stock, stock_seconds = draw()
with difffast.patched(pipe, arguments.preset) as report:
    fast, fast_seconds = draw()

error = np.mean((np.asarray(stock, float) - np.asarray(fast, float)) ** 2)
likeness = f"PSNR {10 * np.log10(255**2 / error):.1f} dB" if error else "the same picture"
print(report, report.last_run, sep="\n")
print(f"stock {stock_seconds:.2f} s, {arguments.preset} {fast_seconds:.2f} s, {likeness}")
Image.fromarray(np.hstack([stock, fast])).resize((512, 256), Image.Resampling.NEAREST).save(arguments.out)
