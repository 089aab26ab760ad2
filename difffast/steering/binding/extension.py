"""Semantic binding of one patched pipeline, between its calls.

:class:`Binder`'s ``encode_prompt`` leaves the prompts there, the first UNet call of the run picks them up
(:mod:`.run`), and what the run has moved the latents by waits there for ``scheduler.step``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...layers.cross_attention import find_layers, has_added_keys
from ...layers.maps import choose_layers
from ...sampling.extension import Extension, RunInfo
from ...sampling.scheduler_step import Edit
from ..encoding import EncodedPrompts, override_encode_prompt
from .config import BindingConfig
from .run import BindingRun
from .trace import BindingTrace


class Binder(Extension):
    """Semantic binding of one pipeline, between its calls.

    Args:
        config: what to do.
        pipe: the pipeline; only a weak reference is kept.
        unet: its plain UNet.

    Raises:
        ValueError: no such attention layers.
    """

    alone = True

    def __init__(self, config: BindingConfig, pipe: Any, unet: nn.Module) -> None:
        self.config = config
        self.layers = choose_map_layers(unet, config.layers)
        self.trace: BindingTrace | None = None
        self._pipe = weakref.ref(pipe)
        self._unet = weakref.ref(unet)
        # Per thread: prompts that no run has picked up, and (timestep, what latents have been moved by).
        self._encoded: dict[int, EncodedPrompts] = {}
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}

    def describe(self) -> Iterator[tuple[str, str]]:
        yield "encode_prompt", "subjects marked by square brackets"
        yield "scheduler.step", "from optimised latents"
        how = f'semantic binding "{self.config.preset}" ({self.config.mode})'
        yield "unet calls", f"{how}, maps of {len(self.layers)} attn2 layers"

    def pipeline_methods(self) -> Mapping[str, Callable[..., Any]]:
        return {"encode_prompt": override_encode_prompt(self._pipe(), self.config.subjects, self._remember)}

    def latent_edits(self) -> Sequence[Edit]:
        return (self._displace,)

    def full_steps(self, total: int) -> Sequence[int]:
        return self.config.full_steps(total)

    def begin(self, info: RunInfo) -> BindingRun | None:
        """Begin the binding of a run in this thread; None: nothing is marked."""
        encoded = self._encoded.pop(threading.get_ident(), None)
        self._moved.pop(threading.get_ident(), None)
        self.trace = BindingTrace()
        if encoded is None:
            info.note("no semantic binding: this run's prompt has not been through pipe.encode_prompt")
            return None
        if not any(each.subjects for each in encoded.marked):
            return None
        return BindingRun(self.config, self._pipe, self._unet(), encoded, info, self.layers, self.trace, self._move)

    def _displace(self, _scheduler: Any, timestep: Any, sample: Tensor) -> Tensor:
        """Return the latents to step from: the pipeline's, moved as this step's optimisation did."""
        moved_at, moved = self._moved.pop(threading.get_ident(), (None, None))
        if moved is None or not isinstance(timestep, Tensor) or moved_at.data_ptr() != timestep.data_ptr():
            return sample
        return sample + moved.to(sample.dtype)

    def _move(self, timestep: Tensor, by: Tensor) -> None:
        """Let the scheduler's next step, if it is at this timestep, start from moved latents."""
        self._moved[threading.get_ident()] = (timestep, by)

    def _remember(self, encoded: EncodedPrompts) -> None:
        self._encoded[threading.get_ident()] = encoded


def choose_map_layers(unet: nn.Module, layers: Any, *, added_keys: bool = False) -> tuple[str, ...]:
    """Names of the attn2 layers whose maps are used; see :class:`SemanticBinding`.

    Args:
        unet: the UNet.
        layers: names or shell-style patterns; None: the default.
        added_keys: whether layers that attend to text and pixels in one softmax will do (DeepFloyd IF).

    Raises:
        ValueError: a pattern that matches none, or a UNet without such layers.
    """
    if not added_keys and any(map(has_added_keys, find_layers(unet).values())):
        raise ValueError(
            f"{type(unet).__name__} has attention with added keys in place of attn2 layers: after its norm and biases "
            "the rows of absorbed tokens are not zero, so that semantic binding cannot leave them out"
        )
    if layers is not None:
        return choose_layers(unet, layers)
    names = tuple(find_layers(unet))
    sdxl = tuple(f"up_blocks.0.attentions.1.transformer_blocks.{i}.attn2" for i in (1, 2, 3))
    if set(sdxl) <= set(names):
        return sdxl
    levels = [int(name.split(".")[1]) for name in names if name.startswith("down_blocks.")]
    if not levels:
        raise ValueError(f"{type(unet).__name__} has no cross-attention in its encoder; name the layers for maps")
    deepest = max(levels)
    places = f"down_blocks.{deepest}.", f"up_blocks.{len(unet.up_blocks) - 1 - deepest}."
    return tuple(name for name in names if name.startswith(places))
