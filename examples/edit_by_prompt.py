"""A colour of a picture changed by its prompt, of a generated picture and of a real one.

python examples/edit_by_prompt.py --source "a red star and a blue ring" --target "a green star and a blue ring"
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import difffast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--source", default="a red star and a blue ring")
parser.add_argument("--target", default="a green star and a blue ring")
parser.add_argument("--blend", nargs=2, default=["star", "star"], help="where the picture may change")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", type=Path, default=Path("edited.png"))
arguments = parser.parse_args()

pipe = difffast.models.embedded_pipeline()
options = {"cross": 0.8, "self_": 0.4, "blend": tuple(arguments.blend)}
with difffast.edit(pipe, arguments.source, arguments.target, **options) as edited:
    seed = torch.Generator().manual_seed(0)
    before, after = pipe(edited.prompts, num_inference_steps=arguments.steps, generator=seed).images

# As if the first picture came from a camera: nothing is known of it but its prompt.
inversion = difffast.invert(pipe, before, arguments.source, steps=arguments.steps)
inversion.save("inversion.safetensors")
inversion = difffast.Inversion.load("inversion.safetensors")
with difffast.edit(pipe, arguments.source, arguments.target, inversion=inversion, **options) as edited:
    again, changed = pipe(edited.prompts, **inversion.arguments).images
Image.fromarray(np.hstack([before, after, again, changed])).resize((1024, 256), 0).save(arguments.out)
