"""Semantic binding: the same prompt and seed, stock and with its marked subjects bound to their attributes.

On many prompts, fewer of this small model's subjects get what was said of another, and no more of them are right in
everything (docs/steering.md): do not expect every picture to get better.

python examples/semantic_binding.py --preset attribute
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import difffast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--preset", choices=("object", "attribute"), default="attribute")
parser.add_argument("--prompt", default="a [dotted green star] and a [striped orange ring]")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", type=Path, default=Path("binding.png"))
arguments = parser.parse_args()

pipe = difffast.models.embedded_pipeline()
# ToMe's numbers are for SDXL; the embedded model needs smaller steps, and little of the modifiers in a composite token.
numbers = {"weights": (0.9, 0.1), "replace_step": None, "bind_step_size": 1.0, "optimise": "latents", "step_size": 0.3}
binding = difffast.SemanticBinding(arguments.preset, **numbers)
pictures = []
for chosen in (None, binding):
    report = difffast.patch(pipe, "exact", binding=chosen)
    prompt = arguments.prompt if chosen else arguments.prompt.replace("[", "").replace("]", "")
    seed = torch.Generator().manual_seed(1)
    pictures.append(pipe(prompt, num_inference_steps=arguments.steps, generator=seed).images[0])

print(report.trace.subjects[0])
print(report.trace)  # losses of every update, and how each step ended
Image.fromarray(np.hstack(pictures)).resize((512, 256), Image.Resampling.NEAREST).save(arguments.out)
