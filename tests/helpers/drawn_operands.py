"""How operands of operators are drawn: sizes, numbers, and by whom they are judged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import hostile_operands as hostile
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

Results = tuple[Tensor, ...]


@dataclasses.dataclass
class Case:
    """A call.

    Attributes:
        operands: the tensors, by name.
        call: calls the operator with such operands.
        define: computes the definition, in the dtype of the operands.
        shares: for each result, how many of its last dimensions belong together: one error is allowed for all.
        about: the other arguments, for messages.
        spread: by how many rounding errors numbers differ that are divided by what they differ by.
        blurs: side of the tiles of pixels within which what is not finite spreads.
        sizes: for each operand, how large the terms are that cancel in its gradient, some one weight of the results.
    """

    operator: str
    operands: dict[str, Tensor]
    call: Callable[..., Results]
    define: Callable[..., Results]
    shares: tuple[int, ...]
    about: dict
    sizes: dict[str, float] = dataclasses.field(default_factory=dict)
    spread: float = math.inf
    blurs: int = 1

    def __repr__(self):
        of = {name: (tuple(x.shape), x.stride(), x.storage_offset()) for name, x in self.operands.items()}
        return f"{self.operator}({of}, {self.about}, {next(iter(self.operands.values())).dtype})"


def reach(*tensors):
    """Return the product of the largest finite absolute values, each at least 1."""
    return math.prod(float(x.double().nan_to_num(0, 0, 0).abs().max().clamp(1)) if x.numel() else 1.0 for x in tensors)


def attention_sizes(operands, factor):
    """Return the terms of softmax's gradients, with all keys and values."""
    q, keys, values = (
        torch.cat([x.flatten() for name, x in operands.items() if name.endswith(end)]) for end in ("q", "k", "v")
    )
    of = {"q": reach(keys, values), "k": reach(q, values), "v": 1 / max(abs(factor), 1e-30)}
    return {name: abs(factor) * of[name[-1]] for name in operands}


def norm_sizes(operands, z, groups, eps):
    """Return the terms of the norm's gradients; ``z`` is what is normalised, in float64."""
    by_group = z.reshape(z.shape[0], groups, math.prod(z.shape[1:]) // groups)
    apart = by_group - by_group.mean(-1, keepdim=True)
    rstd = (apart.square().mean(-1, keepdim=True) + eps).rsqrt()
    n, scale = reach(apart * rstd), 1 + reach(operands["scale"]) if "scale" in operands else 1.0
    inner = reach(rstd, operands["weight"]) * scale * n * n
    of_scale = reach(operands["weight"]) * n + reach(operands["bias"])
    outer = {"weight": scale * n, "bias": scale, "scale": of_scale, "shift": 1.0}
    return {name: outer.get(name, inner) for name in operands}


def find_spread(z, groups, dtype):
    """Return by how many rounding errors the numbers of a group differ, at least; groups of equal ones do not count."""
    by_group = z.reshape(z.shape[0], groups, math.prod(z.shape[1:]) // groups)
    spread = (by_group - by_group.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    ratios = spread / (torch.finfo(dtype).eps * by_group.abs().amax(-1))
    return min([math.inf, *ratios[spread > 0].tolist()])


def attend(q, keys, values, scale, sink=0, tokens=()):
    """Attention by its definition -> out, and the mean over heads of the probabilities of tokens."""
    logits = q @ keys.transpose(-1, -2) * scale
    logits = torch.cat([logits, logits.new_zeros(*logits.shape[:-1], sink)], -1)
    p = logits.softmax(-1)[..., : keys.shape[2]]
    maps = p[..., list(tokens)].mean(1)
    return p @ values, maps


def normalise(z, groups, weight, bias, eps, silu, scale=None, shift=None):
    """GroupNorm by its definition, the variance from the differences to the mean."""
    rows = (*z.shape[:2], *(1 for _ in z.shape[2:]))
    one = (1, *rows[1:])
    if z.dtype == torch.float32 and z.numel():  # what PyTorch makes of it
        u = torch.group_norm(z.contiguous().flatten(2), groups, weight, bias, eps).reshape(z.shape)
    else:
        by_group = z.reshape(z.shape[0], groups, math.prod(z.shape[1:]) // groups)
        apart = by_group - by_group.mean(-1, keepdim=True)
        n = (apart / (apart.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(z.shape)
        u = n * weight.reshape(one) + bias.reshape(one)
    if scale is not None:
        u = u * (1 + scale.reshape(rows)) + shift.reshape(rows)
    return F.silu(u) if silu else u


def draw_operands(draw, shapes, dtype, kinds):
    seed = draw(hostile.seeds)
    made = {}
    for i, (name, shape) in enumerate(shapes.items()):
        made[name] = hostile.make(shape, dtype, draw(kinds), draw(hostile.layouts), seed + i)
    return made


_sizes = st.sampled_from([1, 2, 3, 5, 16, 17, 33, 65])
_keys = st.sampled_from([1, 2, 7, 15, 16, 17, 64, 76, 77, 80, 128])
_dims = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 40])
_few = st.sampled_from([1, 2, 3])
_tiles = st.sampled_from([2, 4])
_scales = st.sampled_from([None, 1.0, 0.1, -2.0, 30.0])


def _tokens(draw, keys):
    if draw(st.booleans()):
        return None
    return draw(st.lists(st.integers(0, keys - 1), min_size=1, max_size=4))
