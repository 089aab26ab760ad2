"""Where the words of a prompt go: the attention map of every word, one beside the other.

python examples/attention_maps.py --prompt "a green star and a red ring"
"""

import argparse
from pathlib import Path

import torch

import difffast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="a green star and a red ring")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", type=Path, default=Path("maps.png"))
arguments = parser.parse_args()

pipe = difffast.models.embedded_pipeline()
with difffast.collect_maps(pipe, layers="up_blocks.2.*") as maps:
    seed = torch.Generator().manual_seed(0)
    pipe(arguments.prompt, num_inference_steps=arguments.steps, generator=seed)

print(maps)
for word in ("star", "ring"):
    if word in arguments.prompt:
        print(word, tuple(maps.locate(word).shape))
maps.plot(arguments.out)
