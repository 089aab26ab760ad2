"""Semantic binding of one patched pipeline, between its calls.

:class:`Binder`'s ``encode_prompt`` leaves the prompts there, the first UNet call of the run picks them up
(:mod:`difffast.guidance.run`), and what the run has moved the latents by waits there for ``scheduler.step``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import attention
from ..attention_maps import choose_layers
from .binding import BindingTrace, SemanticBinding
from .prompts import EncodedPrompts, encode_prompt_override
from .run import BindingRun


class Binder:
    """Semantic binding of one pipeline, between its calls.

    Args:
        config: what to do.
        pipe: the pipeline; only a weak reference is kept.
        unet: its plain UNet.

    Raises:
        ValueError: no such attention layers.
    """

    def __init__(self, config: SemanticBinding, pipe: Any, unet: nn.Module) -> None:
        self.config = config
        self.layers = map_layers(unet, config.layers)
        self.trace: BindingTrace | None = None
        self._pipe = weakref.ref(pipe)
        self._unet = weakref.ref(unet)
        # Per thread: prompts that no run has picked up, and (timestep, what latents have been moved by).
        self._encoded: dict[int, EncodedPrompts] = {}
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Overrides of the pipeline's methods (see :mod:`difffast.swap`)."""
        return {"encode_prompt": encode_prompt_override(self._pipe(), self.config.groups, self._remember)}

    def start(self, total: int, fused: bool, note: Callable[[str], None]) -> BindingRun | None:
        """The binding of a run of ``total`` UNet calls that begins in this thread; None if nothing is marked."""
        encoded = self._encoded.pop(threading.get_ident(), None)
        self._moved.pop(threading.get_ident(), None)
        self.trace = BindingTrace()
        if encoded is None:
            note("no semantic binding: this run's prompt has not been through pipe.encode_prompt")
            return None
        if not any(each.groups for each in encoded.marked):
            return None
        return BindingRun(self, self._pipe(), self._unet(), encoded, total, fused, note)

    def displace(self, _scheduler: Any, timestep: Any, sample: Tensor) -> Tensor:
        """The latents to step from: the pipeline's, moved as this step's optimisation did."""
        moved_at, moved = self._moved.pop(threading.get_ident(), (None, None))
        if moved is None or not isinstance(timestep, Tensor) or moved_at.data_ptr() != timestep.data_ptr():
            return sample
        return sample + moved.to(sample.dtype)

    def moved(self, timestep: Tensor, by: Tensor) -> None:
        """Let the scheduler's next step, if it is at this timestep, start from moved latents."""
        self._moved[threading.get_ident()] = (timestep, by)

    def _remember(self, encoded: EncodedPrompts) -> None:
        self._encoded[threading.get_ident()] = encoded


def map_layers(unet: nn.Module, layers: Any) -> tuple[str, ...]:
    """Names of the attn2 layers whose maps are used; see :class:`SemanticBinding`.

    Raises:
        ValueError: a pattern that matches none, or a UNet without such layers.
    """
    if any(map(attention.has_added_keys, attention.layers_of(unet).values())):
        raise ValueError(
            f"{type(unet).__name__} has attention with added keys in place of attn2 layers: after its norm and biases "
            "the rows of absorbed tokens are not zero, so that semantic binding cannot leave them out"
        )
    if layers is not None:
        return choose_layers(unet, layers)
    names = tuple(attention.layers_of(unet))
    sdxl = tuple(f"up_blocks.0.attentions.1.transformer_blocks.{i}.attn2" for i in (1, 2, 3))
    if set(sdxl) <= set(names):
        return sdxl
    levels = [int(name.split(".")[1]) for name in names if name.startswith("down_blocks.")]
    if not levels:
        raise ValueError(f"{type(unet).__name__} has no cross-attention in its encoder; name the layers for maps")
    deepest = max(levels)
    places = f"down_blocks.{deepest}.", f"up_blocks.{len(unet.up_blocks) - 1 - deepest}."
    return tuple(name for name in names if name.startswith(places))
