"""A stock attention layer written out, for oracles that look at its maps or change them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
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


class Recorder:
    """An attention processor that computes what AttnAddedKVProcessor2_0 does, and keeps the text's probabilities."""

    def __init__(self, store, name):
        self.store, self.name = store, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        text = attn.norm_cross(encoder_hidden_states.transpose(1, 2)).transpose(1, 2)
        rows = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        q, k, v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (
                attn.to_q(rows),
                torch.cat([attn.add_k_proj(text), attn.to_k(rows)], 1),
                torch.cat([attn.add_v_proj(text), attn.to_v(rows)], 1),
            )
        )
        p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        self.store.setdefault(self.name, []).append(p[..., : text.shape[1]].mean(1))
        out = attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))
        return out.transpose(1, 2).reshape(hidden_states.shape) + hidden_states
