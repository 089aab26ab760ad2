"""Losses on cross-attention maps, to be minimised while sampling.

All take maps A [B, N, T] (probabilities of T tokens in N pixels, mean over heads and layers, float32 or float64) and a
:class:`Target`, and return [B].  A_k is the column of subject k; "map of k" is A_k divided by its sum over the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import attention_entropy
from .composite import Columns

_TAU, _EPS = 0.5, 1e-5
#: The layout term counts in these parts of a side, whatever the maps' size: SDXL's 32 pixels.
_LAYOUT_UNITS = 32


@dataclass(frozen=True)
class Target:
    """What a loss needs to know about the maps.

    Attributes:
        columns: where the subjects are.
        size: (height, width) of the maps, N pixels.
        previous: maps [B, N, T] at the end of the step before; None at the first.
        reference: whether the layout term is that of ToMe's released code.
        detach_min: see :func:`difffast.ops.attention_entropy`.
    """

    columns: Columns
    size: tuple[int, int]
    previous: Tensor | None = None
    reference: bool = False
    detach_min: bool = False


def entropy(maps: Tensor, target: Target) -> Tensor:
    """ToMe's entropy loss: -2 sum_k sum_px p ln(p + 1e-5), p the map of k made from softmax(A[words] / 0.5).

    Source: arXiv 2411.07132, section 4.2; see :func:`difffast.ops.attention_entropy`.
    """
    columns = target.columns
    return attention_entropy(maps, columns.anchors, columns.length, _TAU, _EPS, detach_min=target.detach_min)


def layout(maps: Tensor, target: Target) -> Tensor:
    """Two subjects beside each other: 0.2 mean((32 centroid - 32 place)^2), 0 for any other number of subjects.

    centroid: of the entropy loss's p, in sides of the picture, where a pixel is at its centre; places (x, y): the
    middle of the left half, (1/4, 1/2), for the first subject, and of the right half, (3/4, 1/2), for the second.
    Source: ToMe's released code.  With ``target.reference`` it is that: places (10/32, 1/2) and (25/32, 1/2), the first
    pixel of a row or column at 0 and the last at 1, and the sum over the two subjects instead of the mean.
    """
    if len(target.columns.anchors) != 2:
        return maps.new_zeros(maps.shape[0])
    b = (maps[..., 1 : target.columns.length + 1] / _TAU).softmax(-1)[..., [a - 1 for a in target.columns.anchors]]
    rise = b - b.amin(1, keepdim=True)
    p = _normalise(rise)  # [B, N, 2]
    centroid = p.transpose(1, 2) @ _places(target.size, maps, to_the_edge=target.reference)  # [B, 2, (x, y)]
    goal = maps.new_tensor([[10 / 32, 0.5], [25 / 32, 0.5]] if target.reference else [[0.25, 0.5], [0.75, 0.5]])
    off = (_LAYOUT_UNITS * (centroid - goal)).square().mean(2)
    return 0.2 * (off.sum(1) if target.reference else off.mean(1))


def attend_and_excite(maps: Tensor, target: Target) -> Tensor:
    """Attend-and-Excite: max_k max(0, 1 - max_px G B_k), B = softmax(100 A without start token and last column).

    G: Gaussian of 3 x 3 pixels, sigma 0.5, the border reflected.  Source: arXiv 2301.13826, algorithm 1.
    """
    attended = (100 * maps[..., 1:-1]).softmax(-1)[..., [a - 1 for a in target.columns.anchors]]
    pictures = attended.transpose(1, 2).unflatten(-1, target.size)
    peak = _smooth(pictures).amax((2, 3))
    return (1 - peak).clamp(min=0).amax(1)


def segregation(maps: Tensor, target: Target) -> Tensor:
    """A-STAR's segregation: the sum over pairs of subjects of IoU(A_m, A_n), IoU(X, Y) = sum min(X, Y) / sum(X + Y).

    Source: arXiv 2306.14544, equation 3.
    """
    pairs = combinations(target.columns.anchors, 2)
    return sum((_overlap(maps[..., m], maps[..., n]) for m, n in pairs), maps.new_zeros(maps.shape[0]))


def retention(maps: Tensor, target: Target) -> Tensor:
    """A-STAR's retention: the sum over subjects of 1 - IoU(A_m, M_m), M_m where A_m was above its mean a step before.

    0 without a step before.  Source: arXiv 2306.14544, equation 4; the threshold of M is this library's.
    """
    if target.previous is None:
        return maps.new_zeros(maps.shape[0])
    before = target.previous[..., list(target.columns.anchors)]
    masks = (before > before.mean(1, keepdim=True)).to(maps)
    kept = [_overlap(maps[..., m], masks[..., i]) for i, m in enumerate(target.columns.anchors)]
    return sum((1 - each for each in kept), maps.new_zeros(maps.shape[0]))


def syngen(maps: Tensor, target: Target) -> Tensor:
    """SynGen: sum of D(noun, attribute), minus the mean over the other words u of D(w, u) for each word w of a subject.

    D(m, n) = (KL(m || n) + KL(n || m)) / 2 of the words' maps; the means are averaged over the words of a subject.
    Needs subjects that are not merged.  Source: arXiv 2306.08877, section 3.2.
    """
    words = _normalise(maps[..., : target.columns.length + 1]) + torch.finfo(maps.dtype).tiny
    logs = words.log()

    def divergence(m: int, n: int) -> Tensor:
        return ((words[..., m] - words[..., n]) * (logs[..., m] - logs[..., n])).sum(1) / 2

    total = maps.new_zeros(maps.shape[0])
    for anchor, attributes in zip(target.columns.anchors, target.columns.attributes, strict=True):
        inside = (anchor, *attributes)
        outside = [u for u in range(1, target.columns.length + 1) if u not in inside]
        total = sum((divergence(anchor, attribute) for attribute in attributes), total)
        apart = [divergence(w, u) for w in inside for u in outside]
        if apart:
            total = total - sum(apart) / len(apart)
    return total


def divide_and_bind(maps: Tensor, target: Target) -> Tensor:
    """Divide-and-Bind: -min_k TV(A_k), plus JSD(map of the noun, map of the attribute) over all attributes.

    TV: sum of absolute differences of neighbouring pixels; JSD in nats.  Attributes count if subjects are not merged.
    Source: arXiv 2307.10864, section 4.
    """
    chosen = maps[..., list(target.columns.anchors)].transpose(1, 2).unflatten(-1, target.size)
    variation = chosen.diff(dim=2).abs().sum((2, 3)) + chosen.diff(dim=3).abs().sum((2, 3))
    total = -variation.amin(1)
    words = _normalise(maps) + torch.finfo(maps.dtype).tiny
    for anchor, attributes in zip(target.columns.anchors, target.columns.attributes, strict=True):
        for attribute in attributes:
            pair = words[..., anchor], words[..., attribute]
            middle = (pair[0] + pair[1]) / 2
            total = total + sum((x * (x / middle).log()).sum(1) for x in pair) / 2
    return total


#: Name -> loss; they can be added up with weights.
LOSSES: Mapping[str, Callable[[Tensor, Target], Tensor]] = {
    "entropy": entropy,
    "layout": layout,
    "attend-and-excite": attend_and_excite,
    "segregation": segregation,
    "retention": retention,
    "syngen": syngen,
    "divide-and-bind": divide_and_bind,
}


def entropy_threshold(value: float, subjects: int, pixels: int, *, shifted: bool) -> float:
    """The entropy loss at which a step is done: value / 2 * subjects - 2.

    Args:
        value: ToMe's threshold for two subjects, for maps of 32 x 32 pixels.
        subjects: how many.
        pixels: N of the maps.
        shifted: move it with the loss of uniform maps, 2 ln N a subject; else every map below 19 x 19 is focused
            enough.
    """
    shift = 2 * subjects * (math.log(pixels) - math.log(32 * 32)) if shifted else 0.0
    return value / 2 * subjects - 2 + shift


def _normalise(maps: Tensor) -> Tensor:
    """Each column of [B, N, K] divided by its sum over the pixels; a column of zeros stays."""
    total = maps.sum(1, keepdim=True)
    return maps / torch.where(total == 0, 1.0, total)


def _overlap(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(x, y).sum(1) / (x + y).sum(1)


def _places(size: tuple[int, int], like: Tensor, *, to_the_edge: bool) -> Tensor:
    """Where the pixels are, [N, (x, y)], in sides of the picture: their centres, or from 0 to 1."""

    def along(length: int) -> Tensor:
        if to_the_edge:
            return torch.linspace(0, 1, length, dtype=like.dtype, device=like.device)
        return (torch.arange(length, dtype=like.dtype, device=like.device) + 0.5) / length

    y, x = torch.meshgrid(*map(along, size), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def _smooth(pictures: Tensor) -> Tensor:
    """[B, K, h, w] through the 3 x 3 Gaussian; a side of one pixel has nothing to reflect and is repeated."""
    side = torch.exp(torch.tensor([-2.0, 0.0, -2.0], dtype=torch.float64)).to(pictures)
    kernel = side[:, None] * side[None]
    kernel = kernel / kernel.sum()
    mode = "reflect" if min(pictures.shape[-2:]) > 1 else "replicate"
    padded = F.pad(pictures, (1, 1, 1, 1), mode=mode)
    return F.conv2d(padded.flatten(0, 1).unsqueeze(1), kernel[None, None]).squeeze(1).unflatten(0, pictures.shape[:2])
