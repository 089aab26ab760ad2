"""Composite tokens: a subject's noun and all that is said of it as one row of the prompt embedding.

Rows of an embedding [T, D]: 0 the start token, 1 .. n the words, the rest end tokens.  Source of merging and
substitution: ToMe (arXiv 2411.07132), section 4.1 ("paper"), and its released code ("reference").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .prompts import Subject

Mode = Literal["paper", "reference"]
#: mode -> weights of the nouns' rows and of the modifiers' rows in the sum.
WEIGHTS: dict[str, tuple[float, float]] = {"paper": (1.0, 1.0), "reference": (1.1, 1.2)}


@dataclass(frozen=True)
class Columns:
    """Where subjects are in an embedding, or in the columns of an attention map.

    Attributes:
        anchors: of each subject, its noun's (first) row.
        attributes: of each subject, the rows of what is said of it; empty where it is merged.
        length: number of words, n.
    """

    anchors: tuple[int, ...]
    attributes: tuple[tuple[int, ...], ...]
    length: int


def locate_subjects(subjects: Sequence[Subject], length: int) -> Columns:
    """Return where subjects are in the embedding as it was encoded."""
    return Columns(tuple(g.anchor for g in subjects), tuple(g.modifiers for g in subjects), length)


def merge(
    text: Tensor,
    subjects: Sequence[Subject],
    length: int,
    mode: Mode = "paper",
    weights: tuple[float, float] | None = None,
) -> tuple[Tensor, Columns]:
    """Put the sum of a subject's rows in its noun's place; differentiable in ``text``.

    With nouns N and modifiers M of a subject, e[anchor] = u * sum(e[N]) + w * sum(e[M]), (u, w) from ``WEIGHTS``.  Text
    encoders whose rows do not add up as CLIP's do, because a noun's row already speaks of what stands before it, need a
    smaller w.
    The absorbed rows are taken out, and the last row is repeated at the end, so that T stays ("paper"); or they become
    zero ("reference"), which without biases is a key of logit 0 and value 0: an attention sink.

    Args:
        text: [T, D].
        subjects: the subjects, on disjoint rows of 1 .. ``length``.
        length: number of words.
        mode: one of ``WEIGHTS``.
        weights: (u, w); None: the mode's.

    Returns:
        the embedding [T, D], and where the subjects are now.
    """
    noun_weight, modifier_weight = WEIGHTS[mode] if weights is None else weights
    sums = [
        noun_weight * text[list(subject.nouns)].sum(0) + modifier_weight * text[list(subject.modifiers)].sum(0)
        for subject in subjects
    ]
    anchors = [subject.anchor for subject in subjects]
    absorbed = sorted(position for subject in subjects for position in subject.absorbed)
    merged = text.index_copy(0, _index(anchors, text), torch.stack(sums)) if sums else text
    if mode == "reference":
        merged = merged.index_fill(0, _index(absorbed, text), 0.0)
    else:
        kept = [row for row in range(len(text)) if row not in absorbed]
        merged = merged[kept + [len(text) - 1] * len(absorbed)]
        anchors = [kept.index(anchor) for anchor in anchors]
        length -= len(absorbed)
    return merged, Columns(tuple(anchors), ((),) * len(anchors), length)


def substitute_end(text: Tensor, length: int, simplified: Tensor, simplified_length: int, mode: Mode) -> Tensor:
    """Replace the rows after the last word by those of a prompt that does not speak of attributes.

    Args:
        text: [T, D], with ``length`` words.
        simplified: [T, D], of that prompt, with ``simplified_length`` words.
        mode: "reference" takes the same rows; "paper" that prompt's own end tokens from the first on, the last one
            repeated.
    """
    rows = torch.arange(length + 1, len(text), device=text.device)
    if mode == "paper":
        rows = (rows - length + simplified_length).clamp(max=len(simplified) - 1)
    return torch.cat([text[: length + 1], simplified[rows]])


def _index(rows: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=like.device)


def correct_by_similarities(
    text: Tensor, columns: Sequence[int], *, quantile: float = 0.5, window: int = 5, amount: float = 0.5
) -> Tensor:
    """Correction by Similarities: mix into a row what its similar neighbours have in common with it.

    S_j = f_c * f_j elementwise; entries up to the quantile of S_j become zero, and S_j is divided by its largest entry;
    f_c <- (1 - amount) f_c + amount * sum of S_j * f_j over rows j != c with |j - c| <= window, start token excluded.

    Args:
        text: [T, D].
        columns: the rows c to correct.
        quantile: tau, 0 .. 1.
        window: gamma, in rows, at least 1.
        amount: a, 0 .. 1.

    Raises:
        ValueError: a value out of range.
    """
    if not (0 <= quantile <= 1 and 0 <= amount <= 1):
        raise ValueError(f"quantile and amount must lie in 0 .. 1, got {quantile} and {amount}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    result = text.clone()
    for column in columns:
        near = [j for j in range(max(1, column - window), min(len(text), column + window + 1)) if j != column]
        similar = text[column] * text[near]
        # torch.quantile takes float32 and float64 only.
        bound = similar.to(torch.promote_types(text.dtype, torch.float32)).quantile(quantile, dim=1, keepdim=True)
        similar = similar.masked_fill(similar <= bound, 0.0)
        largest = similar.amax(1, keepdim=True)
        similar = similar / torch.where(largest == 0, 1.0, largest)
        result[column] = (1 - amount) * text[column] + amount * (similar * text[near]).sum(0)
    return result
