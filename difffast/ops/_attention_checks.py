"""What the attention operators share: limits, checks of their operands, and how keys and results are laid out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._dispatch import Operand

MAX_KEYS = 128
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def count_repeats(q: Tensor, k: Tensor) -> int:
    """Return how many neighbours in q's batch share a row of k; of an empty k, 1."""
    return q.shape[0] // k.shape[0] if k.shape[0] else 1


def repeat_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat the rows of keys and values [Bk, ...] until there are as many as of queries [B, ...]; Bk divides B."""
    repeats = count_repeats(q, k)
    return (k, v) if repeats == 1 else (k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0))


def store_by_row(x: Tensor) -> Tensor:
    """Copy x [B, H, N, d] so that it is stored as [B, N, H, d]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def check_scale(scale: float | None) -> float | None:
    """Check the factor of the logits and return it as a float; None stays None."""
    if scale is None:
        return None
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def check_attention(q: Operand, k: Operand, v: Operand, prefix: str = "", most: int | None = MAX_KEYS) -> None:
    """Check that queries, keys and values fit together.

    Args:
        q, k, v: only shapes, dtypes and devices are read.
        prefix: what errors put before the names of k and v.
        most: how many keys there may be.

    Raises:
        ValueError: they do not.
    """
    of_k, of_v = f"{prefix}k", f"{prefix}v"
    if len(q.shape) != 4 or len(k.shape) != 4 or len(v.shape) != 4:
        raise ValueError(
            f"q, {of_k} and {of_v} must be [batch, heads, rows, head_dim], got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape != v.shape:
        raise ValueError(f"{of_k} and {of_v} must have the same shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[1] != k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and {of_k} must have the same heads and head_dim, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.shape[0] % k.shape[0] if k.shape[0] else q.shape[0]:
        raise ValueError(f"{of_k}'s batch must divide q's, got {k.shape[0]} and {q.shape[0]}")
    if k.shape[2] < 1 or (most is not None and k.shape[2] > most):
        raise ValueError(
            f"{of_k} must have {'at least 1 key' if most is None else f'1 to {most} keys'}, got {k.shape[2]}"
        )
    if not q.shape[1] or not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"q needs a head and a head_dim of 1 to {MAX_HEAD_DIM}, got {tuple(q.shape)}")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, {of_k} and {of_v} must have one dtype of float16, bfloat16, float32 and float64, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"q, {of_k} and {of_v} must be on one device, got {q.device}, {k.device} and {v.device}")


def check_tokens(map_tokens: Sequence[int] | None, keys: torch.Size) -> list[int]:
    """Check which keys' maps are wanted and return them as a list; it is empty where None are.

    Args:
        map_tokens: positions among the keys, at least one.
        keys: shape of the keys [B, H, T, d].  Another one is refused elsewhere, whatever the tokens.
    """
    if map_tokens is None or len(keys) != 4:
        return []
    tokens = list(map_tokens)
    if not tokens:
        raise ValueError("map_tokens must name at least one token (or be None), got none")
    for token in tokens:
        if type(token) is not int or not 0 <= token < keys[2]:
            raise ValueError(f"map_tokens must be ints in 0 .. {keys[2] - 1}, got {token!r}")
    return tokens
