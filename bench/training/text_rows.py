"""The rows of a frozen text tower, as the UNet is trained on them and as the pipeline that ships has them.

CLIP's rows are squeezed: two nouns differ in directions of little variance, which a UNet learns late.  It is therefore
trained on whitened rows, (x - mean) M, and M and the mean then go into its weights, so that the exported pipeline is a
stock one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from drawn.vocabulary import LARGE
from torch import Tensor, nn

#: Directions of less than this share of the largest's deviation are not stretched further: they are float16's noise.
_LEAST = 0.01
#: What a start's weights for the text may be off by, so that a fit on few rows stays calm.
_RIDGE = 1e-4


@dataclass(frozen=True)
class Whitening:
    """Rows x of width w become (x - mean) @ matrix.

    Attributes:
        mean: float64 [w].
        matrix: float64 [w, w], symmetric.
    """

    mean: Tensor
    matrix: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., w] -> [..., w], in the rows' type."""
        with torch.autocast(rows.device.type, enabled=False):
            return (rows - self.mean.to(rows)) @ self.matrix.to(rows)


def ids_of(tokenizer: Any, texts: list[str]) -> Tensor:
    """int64 [n, 77]."""
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def rows_of(tower: nn.Module, ids: Tensor) -> Tensor:
    """The tower's last hidden state [n, 77, w], in its type: bfloat16 would drown what whitening stretches."""
    device = next(tower.parameters()).device
    with torch.autocast(device.type, enabled=False):
        return torch.cat([tower(part.to(device)).last_hidden_state for part in ids.split(128)])


def weights_of(ids: Tensor, end: int) -> Tensor:
    """float64 [n, 77], how much a row counts: 1, and all that follow the first end token as much as all others."""
    padding = (ids == end).cumsum(1) > 1
    return torch.where(padding, (~padding).sum() / padding.sum(), 1.0).double()


def fit_whitening(rows: Tensor, weights: Tensor) -> Whitening:
    """From rows [n, tokens, w] and what each counts [n, tokens]: mean 0 and, but for tiny directions, covariance 1."""
    x, weight = rows.flatten(0, 1).double(), weights.flatten()[:, None] / weights.sum()
    mean = (weight * x).sum(0)
    variances, directions = torch.linalg.eigh((x - mean).T @ (weight * (x - mean)))
    floor = variances.max() * _LEAST**2
    return Whitening(mean, directions @ torch.diag(variances.clamp(min=floor).rsqrt()) @ directions.T)


@dataclass(frozen=True)
class Affine:
    """y = x @ matrix + offset, and the share of y's variance that it explains."""

    matrix: Tensor
    offset: Tensor
    explained: float


def fit_affine(x: Tensor, y: Tensor, weights: Tensor) -> Affine:
    """The affine map with the least weighted squared error, by normal equations with a small ridge.

    Args:
        x: [n, tokens, a].
        y: [n, tokens, b].
        weights: [n, tokens].
    """
    x, y, weight = x.flatten(0, 1).double(), y.flatten(0, 1).double(), weights.flatten()[:, None] / weights.sum()
    x_mean, y_mean = (weight * x).sum(0), (weight * y).sum(0)
    dx, dy = x - x_mean, y - y_mean
    gram = dx.T @ (weight * dx)
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    matrix = torch.linalg.solve(gram, dx.T @ (weight * dy))
    left = (weight * (dy - dx @ matrix).square()).sum() / (weight * dy.square()).sum()
    return Affine(matrix, y_mean - x_mean @ matrix, 1 - float(left))


def cross_attentions(unet: nn.Module) -> Iterator[Attention]:
    """The layers that read the text."""
    return (part for name, part in unet.named_modules() if name.endswith("attn2") and isinstance(part, Attention))


@torch.no_grad()
def feed(unet: nn.Module, matrix: Tensor, offset: Tensor) -> None:
    """Change a UNet that read rows y so that it does the same with rows x, where y = x @ matrix + offset.

    Keys and values take the matrix.  The offset adds the same to all of a query's logits, which softmax does not see,
    and to every value, of which each query takes shares that sum to 1: it goes into the bias of what follows.
    """
    for layer in cross_attentions(unet):
        projection = layer.to_out[0]
        old = layer.to_v.weight.double()
        for part in (layer.to_k, layer.to_v):
            weight = part.weight.double() @ matrix.T.to(old)
            part.weight = nn.Parameter(weight.to(part.weight.dtype))
            part.in_features = weight.shape[1]
        added = projection.weight.double() @ (old @ offset.to(old))
        projection.bias.add_(added.to(projection.bias.dtype))
    unet.register_to_config(cross_attention_dim=matrix.shape[0])


@torch.no_grad()
def fold(unet: nn.Module, whitening: Whitening, dtype: torch.dtype = torch.float64) -> None:
    """Change a UNet trained on whitened rows into one that reads a tower's own rows.

    Args:
        unet: changed in place.
        whitening: that of its training.
        dtype: that the weights will be stored in.  Values are rounded to it before the mean is taken off, or the mean's
            rounding error would be added to every value.
    """
    for layer in cross_attentions(unet):
        projection = layer.to_out[0]
        for part in (layer.to_k, layer.to_v):
            weight = part.weight.double() @ whitening.matrix.T.to(part.weight.device)
            part.weight.copy_(weight.to(dtype).to(part.weight.dtype))
        mean = layer.to_v.weight.double() @ whitening.mean.to(layer.to_v.weight.device)
        projection.bias.sub_((projection.weight.to(dtype).double() @ mean).to(projection.bias.dtype))


@torch.no_grad()
def mean_cosine(tower: nn.Module, tokenizer: Any) -> dict[str, Tensor]:
    """How alike the rows of two words are, in the same caption but for the word: mean cosines of all pairs.

    Returns:
        ``shapes``: of nouns, "a red ..."; ``colours``: of colours, "a ... circle".
    """
    texts = {
        "shapes": (3, [f"a red {shape}" for shape in LARGE.shapes]),
        "colours": (2, [f"a {colour} circle" for colour in LARGE.colours]),
    }
    cosines = {}
    for name, (place, captions) in texts.items():
        rows = F.normalize(rows_of(tower, ids_of(tokenizer, captions))[:, place].float(), dim=-1)
        cosines[name] = torch.stack([rows[i] @ rows[j] for i, j in combinations(range(len(rows)), 2)]).mean()
    return cosines
