"""Which token of a changed prompt takes its attention from which tokens of the prompt before.

With A and A' the maps of the two prompts, a mapper M [T, T'] and a mask keep [T'] say
    A'[:, j] <- sum_i A[:, i] M[i, j]    where keep[j] is 1;  token j keeps its own map where it is 0.
Source: Prompt-to-Prompt (arXiv 2208.01626), section 3.2.  Its released code leaves the rows after the last replaced
word, and those after the end of a refined prompt, where they are, although they have moved if the numbers of pieces
differ: ``shift=False``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...words import Words


@dataclass(frozen=True)
class Mapper:
    """How two prompts of one length in rows belong together.

    Attributes:
        mix: M [T, T'], float64.
        keep: [T'], 1 where a token takes over attention, 0 where it has its own, float64.
    """

    mix: Tensor
    keep: Tensor


@dataclass(frozen=True)
class EditedPrompts:
    """What an edit makes of its two prompts.

    Attributes:
        mapper: how they belong together.
        factors: [T'], by which the target's maps are multiplied.
        blend: for the source and the target, which tokens the local blend looks for; None: there is none.
    """

    mapper: Mapper
    factors: Tensor
    blend: tuple[Tensor, Tensor] | None


def map_replaced(source: Words, target: Words, rows: int, *, shift: bool = True) -> Mapper:
    """Return the mapper of prompts that have as many words, of which some are others.

    The pieces of a word in place of one with another number of pieces share equally what those had.  What stands after
    a replaced word moves with it; rows that fall off the end, or are missing there, are the last row's.  Every row of M
    adds up to 1.

    Args:
        source, target: the words of the two prompts.
        rows: T, of both embeddings.
        shift: whether the rows after the last replaced word move.

    Raises:
        ValueError: the prompts have different numbers of words.
    """
    if len(source.words) != len(target.words):
        raise ValueError(
            f"replacing needs as many words in both prompts, got {len(source.words)} in {source.text!r} and "
            f"{len(target.words)} in {target.text!r}; kind='refine' adds words or leaves them out"
        )
    mix = torch.zeros(rows, rows, dtype=torch.float64)
    pairs = [(before, after) for (_, before), (_, after) in zip(source.words, target.words, strict=True)]
    spelled = [(a[0], b[0]) for a, b in zip(source.words, target.words, strict=True)]
    replaced = [k for k, (a, b) in enumerate(spelled) if a != b]
    i, j = 0, 0
    for before, after in pairs[: replaced[-1] + 1] if replaced else ():
        while i < before[0]:  # the start token
            mix[i, j] = 1
            i, j = i + 1, j + 1
        if len(before) == len(after):
            mix[list(before), list(after)] = 1
        else:
            mix[before[0] : before[-1] + 1, after[0] : after[-1] + 1] = 1 / len(after)
        i, j = before[-1] + 1, after[-1] + 1
    if not shift:
        for row in range(j, rows):
            mix[row, row] = 1
        return Mapper(mix, torch.ones(rows, dtype=torch.float64))
    _map_tail(mix, i, j)
    return Mapper(mix, torch.ones(rows, dtype=torch.float64))


def _map_tail(mix: Tensor, i: int, j: int) -> None:
    """Map rows from i on to rows from j on, in order; what is left over at the end belongs to the last row."""
    rows = len(mix)
    while i < rows - 1 and j < rows - 1:
        mix[i, j] = 1
        i, j = i + 1, j + 1
    if i < rows and j < rows:
        mix[i:, j:] = 1 / (rows - j)


def map_refined(source: Words, target: Words, rows: int, *, shift: bool = True) -> Mapper:
    """Return the mapper of prompts of which one has words that the other has not.

    Their pieces are aligned by a longest common subsequence; of several, the one that matches the earliest pieces.
    Pieces that only the new prompt has keep their own maps.  Start tokens belong together, and so do the end tokens and
    what follows them, in order.

    Args:
        source, target: the words of the two prompts.
        rows: T, of both embeddings.
        shift: whether the rows after the end tokens move with these.
    """
    before, after = source.pieces[1:-1], target.pieces[1:-1]
    mix, keep = torch.zeros(rows, rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    pairs = [(0, 0), *((i + 1, j + 1) for i, j in align(before, after))]
    i, j = len(before) + 1, len(after) + 1
    pairs += [(i, j), *((min(i + k, rows - 1) if shift else j + k, j + k) for k in range(1, rows - j))]
    for a, b in pairs:
        mix[a, b] = keep[b] = 1
    return Mapper(mix, keep)


def align(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, int]]:
    """Return pairs of positions of equal items, a longest common subsequence, the earliest where there are several."""
    longest = [[0] * (len(after) + 1) for _ in range(len(before) + 1)]
    for i in reversed(range(len(before))):
        for j in reversed(range(len(after))):
            same = before[i] == after[j]
            longest[i][j] = 1 + longest[i + 1][j + 1] if same else max(longest[i + 1][j], longest[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(before) and j < len(after):
        if before[i] == after[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
