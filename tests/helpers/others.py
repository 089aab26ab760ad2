"""What other people put into a UNet: small versions, written here, of the kinds of code that are in use.

Each is a function that puts it into a pipeline inside a block and yields a list that grows with every call of it, by
the rows of the batch that it sees.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

PutIn = Callable[[Any], contextlib.AbstractContextManager[list[int]]]


class SharingKeys:
    """A processor whose conditional half attends to the unconditional half's keys and values as well."""

    def __init__(self, seen: list[int]) -> None:
        self._seen, self._plain = seen, AttnProcessor2_0()

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **options: Any) -> Tensor:
        self._seen.append(len(hidden_states))
        if encoder_hidden_states is not None:
            return self._plain(attn, hidden_states, encoder_hidden_states, **options)
        negative, positive = hidden_states.chunk(2)
        ours = self._plain(attn, negative, **options)
        theirs = self._plain(attn, positive, torch.cat([negative, positive], 1), **options)
        return torch.cat([ours, theirs])


class FadingOut:
    """A processor that counts its calls, and weakens what it adds step by step."""

    def __init__(self, seen: list[int]) -> None:
        self._seen, self._plain = seen, AttnProcessor2_0()
        self.calls = 0

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        self._seen.append(len(hidden_states))
        self.calls += 1
        return self._plain(attn, hidden_states, *args, **options) * 0.97**self.calls


@contextlib.contextmanager
def processors(pipe: Any, make: Callable[[list[int]], Any]) -> Iterator[list[int]]:
    """A processor in every attention layer, each of its own."""
    seen: list[int] = []
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor({name: make(seen) for name in before})
    yield seen
    pipe.unet.set_attn_processor(before)


@contextlib.contextmanager
def hooked_block(pipe: Any) -> Iterator[list[int]]:
    """A hook on the deepest block, which strengthens the conditional half."""
    seen: list[int] = []

    def strengthen(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        seen.append(len(output))
        negative, positive = output.chunk(2)
        return torch.cat([negative, 1.2 * positive])

    handle = pipe.unet.mid_block.register_forward_hook(strengthen)
    yield seen
    handle.remove()


@contextlib.contextmanager
def own_forwards(pipe: Any) -> Iterator[list[int]]:
    """A ``forward`` of their own on the layers that attend to the text: each swaps the halves' means."""
    seen: list[int] = []
    layers = [m for name, m in pipe.unet.named_modules() if isinstance(m, Attention) and name.endswith("attn2")]

    def forward(layer: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(len(hidden_states))
        out = type(layer).forward(layer, hidden_states, *args, **options)
        means = out.mean(1, keepdim=True)
        return out - means + means.flip(0)

    for layer in layers:
        layer.forward = types.MethodType(forward, layer)
    yield seen
    for layer in layers:
        del layer.forward


@contextlib.contextmanager
def replaced_method(pipe: Any) -> Iterator[list[int]]:
    """Another ``AttnProcessor2_0.__call__``, of the class itself."""
    seen: list[int] = []
    plain = AttnProcessor2_0.__call__

    def call(self: Any, attn: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(len(hidden_states))
        return 0.5 * plain(self, attn, hidden_states, *args, **options)

    with mock.patch.object(AttnProcessor2_0, "__call__", call):
        yield seen


@contextlib.contextmanager
def replaced_attention(pipe: Any) -> Iterator[list[int]]:
    """Another ``scaled_dot_product_attention``, of PyTorch itself."""
    seen: list[int] = []
    plain = nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(len(query))
        return plain(0.5 * query, key, value, *args, **options)

    with mock.patch.object(nn.functional, "scaled_dot_product_attention", attend):
        yield seen


class SmallAtFirst(UNet2DConditionModel):
    """A UNet that works at half the resolution while there is much noise."""

    def forward(self, sample: Tensor, timestep: Tensor, *args: Any, **options: Any) -> Any:
        self.seen.append(len(sample))
        if timestep < 700:
            return super().forward(sample, timestep, *args, **options)
        small = nn.functional.interpolate(sample, scale_factor=0.5)
        (out,) = super().forward(small, timestep, *args, **{**options, "return_dict": False})
        return (nn.functional.interpolate(out, scale_factor=2.0),)


@contextlib.contextmanager
def subclass(pipe: Any) -> Iterator[list[int]]:
    """A UNet of a class of its own, from before the patch."""
    pipe.unet.__class__ = SmallAtFirst
    pipe.unet.seen = seen = []
    yield seen
    pipe.unet.__class__ = UNet2DConditionModel
    del pipe.unet.seen


@contextlib.contextmanager
def reference(pipe: Any) -> Iterator[list[int]]:
    """Blocks that read, at the second call of a step, what they wrote at the first, which is of another picture."""
    seen: list[int] = []
    banks: dict[Any, Tensor] = {}
    blocks = [module for module in pipe.unet.modules() if isinstance(module, BasicTransformerBlock)]
    unet, picture = pipe.unet, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))

    def forward(block: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(len(hidden_states))
        if block in banks:
            hidden_states = hidden_states + 0.1 * banks.pop(block)
        else:
            banks[block] = hidden_states
        return type(block).forward(block, hidden_states, *args, **options)

    class Twice:
        """In place of the UNet: it is called for the other picture first."""

        def __call__(self, sample: Tensor, timestep: Any, *args: Any, **options: Any) -> Any:
            unet(picture.to(sample), timestep, *args, **options)
            return unet(sample, timestep, *args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(unet, name)

    for block in blocks:
        block.forward = types.MethodType(forward, block)
    vars(pipe)["unet"] = Twice()
    yield seen
    vars(pipe)["unet"] = unet
    for block in blocks:
        del block.forward


OTHERS: dict[str, PutIn] = {
    "a processor that lets one half see the other": lambda pipe: processors(pipe, SharingKeys),
    "a processor that counts its calls": lambda pipe: processors(pipe, FadingOut),
    "a hook on a block": hooked_block,
    "forwards of attention layers": own_forwards,
    "a method of a class": replaced_method,
    "scaled_dot_product_attention": replaced_attention,
    "a subclass of the UNet": subclass,
    "blocks that remember another picture": reference,
}
