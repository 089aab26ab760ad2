"""Parts: which pieces of a problem are compared with the definition in float64.

A GPU has time for all of them.  A CPU would take minutes for the largest attentions.  There pieces of the first sample
and the last are compared, which costs about the same whatever the size; the rest is compared with what PyTorch's own
way gives.  Samples, and queries of an attention, depend on nothing of each other: a piece of a result is defined by
pieces of the operands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import EllipsisType

import torch

from ..ops._keys import Key

#: Of one dimension after another; an ellipsis is everything.
Index = tuple[slice, ...] | EllipsisType

#: Products of queries and keys, or elements times :data:`_PASSES`, that a CPU computes in float64.
_MOST = 1 << 23
#: Products from which on a CPU takes seconds for a call.
_LARGE = 1 << 26
#: How many products of an attention take as long as one element of a norm.
_PASSES = 4
#: Blocks of queries.  They begin at thirds, in one of which lies the query that make_problem spikes.
_BLOCKS = 3


@dataclass(frozen=True)
class Part:
    """A piece of a problem.

    Attributes:
        operands: of each operand, what of it the piece depends on.
        outputs: of each result, where the piece lies.
    """

    operands: tuple[Index, ...]
    outputs: tuple[Index, ...]


def is_attention(key: Key) -> bool:
    """Whether a key's operands are queries [B, H, N, d], then keys and values."""
    return key.operator.endswith("attention")


def count_products(key: Key) -> int:
    """Return what computing a key costs, in products of queries and keys."""
    if is_attention(key):
        return math.prod(key.shapes[0][:3]) * key.shapes[-1][2]
    return _PASSES * sum(map(math.prod, key.shapes))


def is_slow(key: Key, device: torch.device) -> bool:
    """Whether a device takes seconds to prove a key."""
    return device.type == "cpu" and is_attention(key) and count_products(key) > _LARGE


def split(key: Key, shapes: list[torch.Size], device: torch.device) -> tuple[list[Part], bool]:
    """Return the parts of a problem that are compared with the definition, and whether they are all of it.

    Args:
        shapes: of all operands.
    """
    samples = min(x[0] for x in key.shapes) if key.operator == "skip_norm_silu" else key.shapes[0][0]
    whole = device.type != "cpu" or count_products(key) <= _MOST
    # Of an attention blocks of queries are chosen; a sample of a norm is one piece.
    both = is_attention(key) or count_products(key) <= samples * _MOST
    chosen = list(range(samples)) if whole else sorted({0, samples - 1} if both else {samples - 1})
    queries = key.shapes[0][2] if is_attention(key) else 0
    blocks = [slice(None)]
    if queries and not whole:
        each = count_products(key) // (samples * queries)  # products of one query
        blocks = _find_blocks(queries, max(8, _MOST // (len(chosen) * (_BLOCKS + 1) * each)))
    parts = [_cut(key, shapes, sample, samples, block) for sample in chosen for block in blocks]
    return parts, whole or (len(chosen) == samples and blocks == [slice(None)])


def _find_blocks(queries: int, length: int) -> list[slice]:
    if (_BLOCKS + 1) * length >= queries:
        return [slice(None)]
    starts = [queries * i // _BLOCKS for i in range(_BLOCKS)]
    return [slice(start, start + length) for start in (*starts, queries - length)]


def _cut(key: Key, shapes: list[torch.Size], sample: int, samples: int, queries: slice) -> Part:
    """Return the part of one sample; operands with fewer samples serve neighbours, those with more have several."""

    def rows(length: int) -> slice:
        start = sample * length // samples
        return slice(start, max(start + 1, (sample + 1) * length // samples))

    everything = slice(None)
    operands: list[Index] = [(everything,) if len(x) == 1 else (rows(x[0]),) for x in shapes]
    if not is_attention(key):
        return Part(tuple(operands), tuple((rows(x[0]),) for x in key.shapes))
    of_queries = (rows(key.shapes[0][0]), everything, queries)
    operands[0] = of_queries
    maps = ((of_queries[0], queries),) if key.option("maps") else ()
    return Part(tuple(operands), (of_queries, *maps))


def shorten(key: Key, most: int) -> Key:
    """Return the key of the first samples of an attention, so many that they cost no more than ``most`` products.

    At least the samples of one text are left.
    """
    if not is_attention(key) or count_products(key) <= most:
        return key
    fewest = min(shape[0] for shape in key.shapes)
    left = max(1, fewest * most // count_products(key))
    return key._replace(shapes=tuple((shape[0] * left // fewest, *shape[1:]) for shape in key.shapes))
