"""Words taken out of a picture: stock, by the embedding alone, and with the text optimised while sampling.

python examples/suppress_words.py --prompt "a red circle and a blue square" --words "blue square"
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import difffast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="a red circle and a blue square")
parser.add_argument("--words", nargs="+", default=["blue square"])
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", type=Path, default=Path("suppressed.png"))
arguments = parser.parse_args()

pipe = difffast.models.embedded_pipeline()


def generate(*prompt, **given):
    seed = torch.Generator().manual_seed(0)
    return pipe(*prompt, **given, num_inference_steps=arguments.steps, generator=seed).images[0]


pictures = [generate(arguments.prompt)]
pictures.append(generate(**difffast.suppress(pipe, arguments.prompt, arguments.words)))
# The authors' step size of 20 is for Stable Diffusion; of this small model a small change of the text changes more.
report = difffast.patch(pipe, "exact", steering=difffast.Suppression(arguments.words, step_size=0.01))
pictures.append(generate(arguments.prompt))
print(report.trace.losses)  # (step, image) -> before every update
Image.fromarray(np.hstack(pictures)).resize((768, 256), Image.Resampling.NEAREST).save(arguments.out)
