"""What inference-time optimisation of a text minimises: the other words' maps stay, those of the words do not.

Source: SuppressEOT (arXiv 2402.05375), section 3.3 ("paper"), and its released code ("reference").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

#: Shares of a map's largest value above which its pixels are a word's own: of words that stay, and of those that go.
_OWN = 0.95, 0.85
#: How much larger maps are made before that is asked.
_ENLARGE = 16


@dataclass(frozen=True)
class ImageMaps:
    """Attention maps of one image, averaged over heads and layers.

    Attributes:
        cross: [N, T], what each pixel attends to among the tokens.
        itself: [N, N], among the pixels; None: not asked for.
    """

    cross: Tensor
    itself: Tensor | None = None


def paper_loss(source: ImageMaps, own: ImageMaps, kept: Sequence[int], removed: Sequence[int], weight: float) -> Tensor:
    """Return ||A_kept - A'_kept||^2 - weight ||A_removed - A'_removed||^2.

    Args:
        source: maps without suppression.
        own: maps with it.
        kept, removed: positions of the words that stay and of those that go.
        weight: of the second term.
    """
    squares = (source.cross - own.cross).square().sum(0)
    return squares[list(kept)].sum() - weight * squares[list(removed)].sum()


def reference_loss(
    source: ImageMaps,
    own: ImageMaps,
    kept: Sequence[int],
    removed: Sequence[int],
    weight: float,
    size: tuple[int, int],
) -> Tensor:
    """Return the released code's loss, of cosine distances d over the pixels.

    sum_kept d(A_i, A'_i) - weight sum_removed d(A_i, A'_i), and the same for the columns j of self-attention, for each
    word i those of the pixels j that are its own (:func:`find_own_pixels`).

    Args:
        source, own, kept, removed, weight: as for :func:`paper_loss`.
        size: (height, width) of the maps.
    """
    of_words = _distances(source.cross, own.cross)
    loss = of_words[list(kept)].sum() - weight * of_words[list(removed)].sum()
    if source.itself is None or own.itself is None:
        raise ValueError("the reference's loss needs maps of self-attention")
    of_pixels = _distances(source.itself, own.itself)
    for words, share, sign in ((kept, _OWN[0], 1.0), (removed, _OWN[1], -weight)):
        for word in words:
            loss = loss + sign * of_pixels[find_own_pixels(source.cross[:, word], size, share)].sum()
    return loss


def find_own_pixels(attended: Tensor, size: tuple[int, int], share: float) -> Tensor:
    """Return which pixels are a word's own, bool [N]: a map [N], enlarged, is above a share of its largest value."""
    grid = attended.detach().reshape(1, 1, *size)
    large = functional.interpolate(grid, scale_factor=_ENLARGE, mode="bilinear")
    own = (large > share * large.max()).to(grid.dtype)
    return functional.interpolate(own, size, mode="bilinear").flatten() > 0


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return 1 - cosine of the columns of x and y [N, M], over N: [M]."""
    return 1 - functional.cosine_similarity(x, y, dim=0)


def compute_self_maps(layer: torch.nn.Module, hidden: Tensor) -> Tensor:
    """Return a self-attention layer's map of an input [B, N, C], averaged over its heads: [B, N, N], in float32."""
    if type(layer.processor).__name__ == "FusedAttnProcessor2_0":
        query, key, _ = layer.to_qkv(hidden).chunk(3, -1)
    else:
        query, key = layer.to_q(hidden), layer.to_k(hidden)
    query, key = (x.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in (query, key))
    precise = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(precise) @ key.to(precise).transpose(-1, -2) * query.shape[-1] ** -0.5
    return logits.softmax(-1).mean(1)
