"""Where the words of a prompt go: the attention map of every word, one beside the other.

python examples/attention_maps.py --prompt "a green star and a red ring"
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

import difffast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="a green star and a red ring")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", type=Path, default=Path("maps.png"))
arguments = parser.parse_args()

pipe = difffast.models.embedded_pipeline()
words = difffast.steering.get_indices(pipe, arguments.prompt)  # position in the tokenised prompt -> word piece
with difffast.collect_maps(pipe, layers="up_blocks.2.*", tokens=list(words)) as maps:
    seed = torch.Generator().manual_seed(0)
    image = pipe(arguments.prompt, num_inference_steps=arguments.steps, generator=seed).images[0]

found = maps.grid()[-1]  # of the last row of the batch, the prompt's own: [words, height, width]
found = (found / found.amax((1, 2), keepdim=True) * 255).byte()
print({word: tuple(each.shape) for word, each in zip(words.values(), found, strict=True)})
sheet = Image.new("RGB", (128 * (1 + len(words)), 128))
sheet.paste(image.resize((128, 128)), (0, 0))
for column, each in enumerate(found, 1):
    sheet.paste(Image.fromarray(each.numpy()).resize((128, 128)).convert("RGB"), (128 * column, 0))
sheet.save(arguments.out)
