"""Erase red from the embedded model in closed form, look at what it draws instead, and put red back, bit for bit.

python examples/erase_a_concept.py --colour purple
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import difffast

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--colour", default="red")
parser.add_argument("--method", choices=("uce", "rece"), default="uce")
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--out", type=Path, default=Path("erased.png"))
arguments = parser.parse_args()

pipe = difffast.models.embedded_pipeline()
prompts = [f"a {arguments.colour} circle", f"a {arguments.colour} star", "a blue circle", "a green star"]


def draw():
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return np.hstack(pipe(prompts, num_inference_steps=arguments.steps, generator=seeds, output_type="np").images)


before = draw()
edit = difffast.erase(
    pipe,
    [f"a {arguments.colour} {shape}" for shape in SHAPES],
    preserve=[f"a {colour} {shape}" for colour in ("blue", "green", "purple", "pink") for shape in SHAPES],
    method=arguments.method,
)
print(edit)
erased = draw()
edit.disable()
assert np.array_equal(draw(), before)
picture = Image.fromarray((np.vstack((before, erased)) * 255).round().astype(np.uint8))
picture.resize((4 * 128, 2 * 128), Image.Resampling.NEAREST).save(arguments.out)
