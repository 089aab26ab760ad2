"""A negative prompt without classifier-free guidance: the UNet's batch stays as small as it is.

python examples/negative_prompts.py --prompt "a circle and a square" --negative "red"
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import difffast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="a red circle and a blue square")
parser.add_argument("--negative", default="red")
parser.add_argument("--guidance-scale", type=float, default=1.0, help="1: no guidance")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", type=Path, default=Path("negative.png"))
arguments = parser.parse_args()

pipe = difffast.models.embedded_pipeline()
pictures = []
for method in ((), difffast.NegativeAttention()):
    difffast.patch(pipe, "exact", steering=method)
    image = pipe(
        arguments.prompt,
        negative_prompt=arguments.negative,
        guidance_scale=arguments.guidance_scale,
        num_inference_steps=arguments.steps,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    pictures.append(image)
Image.fromarray(np.hstack(pictures)).resize((512, 256), Image.Resampling.NEAREST).save(arguments.out)
