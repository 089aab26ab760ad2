"""How attn2 layers, and layers with added keys, make keys and values of a text, and what these depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ..surgery.unchanged import ProjectionWatch, read_projection


def split_heads(layer: Any, x: Tensor) -> Tensor:
    """Return x [B, N, H d] by head: [B, H, N, d]."""
    return x.unflatten(-1, (layer.heads, -1)).transpose(1, 2)


def _project_separately(layer: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    return layer.to_k(text), layer.to_v(text)


def _project_together(layer: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    return layer.to_kv(text).chunk(2, -1)


def _project_added(layer: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    if layer.norm_cross is not None:
        # A GroupNorm over all tokens: those that only fill up the text count as well.
        text = layer.norm_encoder_hidden_states(text)
    return layer.add_k_proj(text), layer.add_v_proj(text)


Projection = Callable[[Any, Tensor], tuple[Tensor, Tensor]]

#: The processor of layers with added keys.
ADDED = "AttnAddedKVProcessor2_0"
#: Processors that can be fused -> (how they make keys and values, the modules that make them).  Modules are called,
#: never their weights used: PEFT's ``.weight`` is the base weight.
PROJECTIONS: dict[str, tuple[Projection, tuple[str, ...]]] = {
    "AttnProcessor2_0": (_project_separately, ("to_k", "to_v")),
    "FusedAttnProcessor2_0": (_project_together, ("to_kv",)),
    "IPAdapterAttnProcessor2_0": (_project_separately, ("to_k", "to_v")),
    # Text2Video-Zero's, whose frames meet in self-attention only.
    "CrossFrameAttnProcessor2_0": (_project_separately, ("to_k", "to_v")),
    ADDED: (_project_added, ("add_k_proj", "add_v_proj", "norm_cross")),
}


def project_text(layer: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's keys and values [B, H, T, d] of a text [B, T, D]."""
    keys, values = PROJECTIONS[type(layer.processor).__name__][0](layer, text)
    return split_heads(layer, keys), split_heads(layer, values)


def watch_projections(layers: Iterable[Any]) -> ProjectionWatch | None:
    """Return what tells whether any layer's keys and values have changed; None: they must be asked one by one."""
    watch = ProjectionWatch()
    for layer in layers:
        names = PROJECTIONS.get(type(layer.processor).__name__, (None, ()))[1]
        if not names or not watch.add(layer, names):
            return None
    return watch


def read_projections(layer: Any) -> list[Any] | None:
    """Return all that a layer's text keys and values depend on besides the text; None if that cannot be told."""
    processor = type(layer.processor).__name__
    state: list[Any] = [processor]
    for name in PROJECTIONS[processor][1]:
        module = getattr(layer, name)
        if module is None:  # a layer with added keys need not have a norm
            continue
        part = read_projection(module)
        if part is None:
            return None
        state += part
    return state
