"""Edited attention without maps: every edit of a map is an attention with other values.

    A' = A_source S + A_own diag(o),    out = A' V = A_source (S V) + A_own (diag(o) V)

The operator :func:`difffast.ops.edited_attention` computes it: the maps of both prompts never exist.  Every edit of
Prompt-to-Prompt (arXiv 2208.01626) has this form, see :func:`weigh`.
"""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ...ops._attention_checks import MAX_KEYS
from ...ops.edited_attention import mix_values
from .mappers import Mapper


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
    mixed: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Return the attention of an edited map [B, H, N, d].

    Args:
        source: queries [B, H, N, d] and keys [B, H, T, d] of the source.
        own: those of the edited rows; not looked at where ``keep_own`` is None.
        values: [B, H, T', d] of the edited rows.
        mix: S [T, T'].
        keep_own: o [T']; None: it is zero.  Both are like the values.
        mixed: what :func:`~difffast.ops.edited_attention.mix_values` has made of these three; None: it is made anew.
    """
    mixed = mixed or mix_values(values, mix, keep_own)
    if max(mix.shape) <= MAX_KEYS:
        theirs = (None, None) if keep_own is None else own
        return ops.edited_attention(*source, values, mix, *theirs, keep_own, mixed=mixed)
    out = ops.self_attention(*source, mixed[0])  # long prompts
    return out if mixed[1] is None else out + ops.self_attention(*own, mixed[1])


def average_map(source: Tensor, own: Tensor, mix: Tensor, keep_own: Tensor | None, words: Tensor) -> Tensor:
    """Return what an edited map gives to some words, summed over them: [B, N].

    Args:
        source, own: maps of both prompts [B, N, T], averaged over the heads.
        mix, keep_own: S and o, or None.
        words: [T'], 1 at the words' tokens.
    """
    mix, words = mix.to(source), words.to(source)
    found = source @ (mix @ words)
    return found if keep_own is None else found + own @ (keep_own.to(source) * words)
