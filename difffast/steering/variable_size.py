"""Pictures of other sizes than the model was trained at: self-attention with a scale that follows the number of tokens.

Over more tokens softmax spreads wider than in training, over fewer it is narrower; things are repeated, or torn.  With
    scale = sqrt(ln N / (d ln T))    instead of    1 / sqrt(d),
N tokens now and T in training, its entropy stays about what it was.
Source: Jin et al., Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis (arXiv
2306.08645).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from ..support import Pipeline


@contextlib.contextmanager
def variable_size_attention(pipe: Pipeline, *, trained_size: tuple[int, int] | None = None) -> Iterator[dict[str, int]]:
    """Inside the block the UNet's self-attention layers have the scale above; patched pipelines or not.

    The queries are multiplied by sqrt(ln N / ln T), so that any attention processor and LoRA work as before.

    Args:
        pipe: a pipeline with a UNet.
        trained_size: (height, width) of the latents in training; None: ``unet.config.sample_size``.

    Returns:
        For ``as``: T by name of the layer.

    Raises:
        ValueError: no UNet with self-attention, no size, or one that leaves a layer fewer than 2 tokens.
    """
    unet = getattr(pipe, "unet", None)
    layers = _layers(unet) if unet is not None else {}
    if not layers:
        raise ValueError(f"{type(pipe).__name__} has no UNet with self-attention layers (attn1)")
    size = trained_size or unet.config.sample_size
    if size is None:
        raise ValueError("trained_size must be given: the UNet's configuration has no sample_size")
    height, width = (size, size) if isinstance(size, int) else size
    tokens = {
        name: -(-height // 2**level) * -(-width // 2**level)
        for name, level in ((name, _level(unet, name)) for name in layers)
    }
    small = [name for name, count in tokens.items() if count < 2]
    if small:
        raise ValueError(f"trained_size {(height, width)} leaves {small[0]} fewer than 2 tokens, whose logarithm is 0")
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.to_q.register_forward_hook(_scale(tokens[name])).remove)
        yield tokens


def _scale(trained: int) -> Callable[..., Tensor]:
    def hook(_projection: nn.Module, _arguments: Any, query: Tensor) -> Tensor:
        return query * math.sqrt(math.log(query.shape[1]) / math.log(trained))

    return hook


def _layers(unet: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in unet.named_modules() if name.endswith(".attn1")}


def _level(unet: Any, name: str) -> int:
    """How often a layer's input has been halved."""
    last = len(unet.down_blocks) - 1
    place = re.match(r"(down|up)_blocks\.(\d+)\.", name)
    if place is None:
        return last  # the mid block
    return int(place[2]) if place[1] == "down" else last - int(place[2])
