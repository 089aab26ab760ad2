"""A stock attention layer written out, for oracles that look at its maps or change them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor


def attend(layer: Any, hidden: Tensor, text: Tensor | None, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a layer's output with its maps as ``edit`` has them.

    Args:
        layer: of Diffusers, without norms of queries and keys.
        hidden: [B, T, D].
        text: [B, S, D_text]; None: self-attention.
        edit: takes the maps, [B, heads, T, S], and returns them.
    """
    q, k, v = (
        to(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for to, x in (
            (layer.to_q, hidden),
            *((to, hidden if text is None else text) for to in (layer.to_k, layer.to_v)),
        )
    )
    maps = edit((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1))
    return layer.to_out[0]((maps @ v).transpose(1, 2).flatten(2))
