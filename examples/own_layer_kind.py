"""A fused layer kind of your own, in one file: the GroupNorm at the entrance of a transformer, by an operator.

python examples/own_layer_kind.py
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import difffast
from difffast import ops
from difffast.layers.kind import LayerKind
from difffast.layers.registry import register
from difffast.surgery.pristine import is_plain
from difffast.surgery.subclass import plain_class

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", type=Path, default=Path("report.txt"))
arguments = parser.parse_args()


class TransformerNorm(LayerKind):
    """The GroupNorm at the entrance of a transformer, by group_norm_silu without its SiLU."""

    name = "transformer norms"

    def find(self, unet):
        return {n: m for n, m in unet.named_modules() if n.endswith(".norm") and plain_class(m) is nn.GroupNorm}

    def refuse(self, layer, hidden, args, kwargs):
        return None if is_plain(layer, nn.GroupNorm) else "one has hooks, or a forward of its own"

    def forward(self, layer, hidden):
        return ops.group_norm_silu(hidden, layer.num_groups, layer.weight, layer.bias, layer.eps, silu=False)

    def describe(self, layers, weight, *, compiled):
        if layers and not compiled:
            yield f"{self.name} ({len(layers)})", "group_norm_silu"


def draw():
    seed = torch.Generator().manual_seed(0)
    return pipe("a red circle", num_inference_steps=arguments.steps, generator=seed, output_type="latent").images


pipe = difffast.models.embedded_pipeline()
stock = draw()
register(TransformerNorm())  # pipelines that are patched from now on use it
report = difffast.patch(pipe, "exact")
difference = float((draw() - stock).abs().max())
arguments.out.write_text(f"{report}\n{report.last_run}\nlargest difference from stock: {difference:.1e}\n")
print(arguments.out.read_text())
