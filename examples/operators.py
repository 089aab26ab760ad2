"""The operators alone: attention with maps, a loss on the maps with its gradient, and kernels against their reference.

python examples/operators.py --queries 4096
"""

import argparse
import json
from pathlib import Path

import torch

from difffast import ops

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--queries", type=int, default=1024, help="pixels")
parser.add_argument("--out", type=Path, default=Path("operators.json"))
arguments = parser.parse_args()

torch.manual_seed(0)
q, k, v = (torch.randn(2, 8, n, 40) for n in (arguments.queries, 77, 77))
q.requires_grad_()

out, maps = ops.cross_attention(q, k, v, map_tokens=range(12))  # maps [2, queries, 12]: mean over the heads
loss = ops.attention_entropy(maps, anchors=[2, 5], n_tokens=6)  # how spread out the maps of tokens 2 and 5 are
(gradient,) = torch.autograd.grad(loss.sum(), q)
print(f"out {tuple(out.shape)}, maps {tuple(maps.shape)}, entropy {loss.tolist()}, gradient {gradient.norm():.2e}")

x, weight, bias = torch.randn(2, 320, 32, 32), torch.randn(320), torch.randn(320)
calls = {
    "cross_attention": lambda: ops.cross_attention(q.detach(), k, v),
    "self_attention": lambda: ops.self_attention(k, k, v),
    "group_norm_silu": lambda: ops.group_norm_silu(x, 32, weight, bias),
}
errors = {}
for name, call in calls.items():
    with ops.use_backend("reference", name):
        expected = call()
    errors[name] = float((call() - expected).abs().max())
    print(f"{name}: {ops.default_backend(name, x.device, x.dtype)}, {errors[name]:.1e} from the reference")
arguments.out.write_text(json.dumps(errors))
