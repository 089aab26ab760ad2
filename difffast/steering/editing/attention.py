"""Edited attention without maps: every edit of a map is an attention with other values.

    A' = A_source S + A_own diag(o),    out = A' V = A_source (S V) + A_own (diag(o) V)

S [T, T'] and o [T'] change the values, which are small; two fused attentions do the rest, and one where o is zero.  The
maps of both prompts never exist.  Every edit of Prompt-to-Prompt (arXiv 2208.01626) has this form, see :func:`weigh`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .mappers import Mapper

#: Attention [B, H, N, d] of queries to keys and values.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def weigh(mapper: Mapper, factors: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return S [T, T'] and o [T'] of an edit at one step.

    S = M diag(keep alpha factors),    o = (1 - keep) alpha factors + 1 - alpha

    Args:
        mapper: M and keep.
        factors: [T'], by which tokens' maps are multiplied.
        alpha: how much of the edit: 0 .. 1.
    """
    return mapper.mix * (mapper.keep * alpha * factors), (1 - mapper.keep) * alpha * factors + 1 - alpha


def attend_edited(
    source: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    values: Tensor,
    mix: Tensor,
    keep_own: Tensor | None,
    attend: Attend,
) -> Tensor:
    """Return the attention of an edited map [B, H, N, d]; it can be differentiated.

    Args:
        source: queries [B, H, N, d] and keys [B, H, T, d] of the source.
        own: those of the edited rows; not looked at where ``keep_own`` is None.
        values: [B, H, T', d] of the edited rows.
        mix: S [T, T'].
        keep_own: o [T']; None: it is zero.
        attend: fused attention.
    """
    out = attend(*source, mix.to(values) @ values)
    if keep_own is None:
        return out
    return out + attend(*own, keep_own.to(values)[:, None] * values)


def average_map(source: Tensor, own: Tensor, mix: Tensor, keep_own: Tensor, words: Tensor) -> Tensor:
    """Return what an edited map gives to some words, summed over them: [B, N].

    Args:
        source, own: maps of both prompts [B, N, T], averaged over the heads.
        mix, keep_own: S and o.
        words: [T'], 1 at the words' tokens.
    """
    mix, keep_own, words = (x.to(source) for x in (mix, keep_own, words))
    return source @ (mix @ words) + own @ (keep_own * words)
