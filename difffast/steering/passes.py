"""The UNet passes of semantic binding: maps without the rest of the network, predictions from one token alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layers.context import AllCollected, CallContext, Text, use_context
from ..layers.maps import AttentionMaps
from ..surgery.trees import map_tensors
from ..unet.parts import copy_lists


@dataclass(frozen=True)
class Passes:
    """Passes through a UNet whose attn2 layers find a context (:mod:`difffast.layers.context`).

    Attributes:
        unet: the plain UNet, called with arguments by name.
        layers: attn2 layers whose maps are used.
        fused: whether other attn2 layers use the operator as well.
        note: told the reason when they do not.
    """

    unet: Callable[..., Any]
    layers: tuple[str, ...]
    fused: bool
    note: Callable[[str], None]

    def maps(
        self, call: Mapping[str, Any], text: Tensor, absorbed: Sequence[int] = ()
    ) -> tuple[Tensor, tuple[int, int]]:
        """Return the maps [B, N, T] of ``text`` [B, T, D], mean over heads and layers; the pass ends at the last layer.

        Args:
            call: the UNet's other arguments.
            text: the embeddings.
            absorbed: rows that are zero in all of them.  They are left out, and the attention counts them as a sink;
                of what the other keys of a pixel leave, each has its equal share.

        Returns:
            the maps, and their (height, width).

        Raises:
            ValueError: layers of several sizes.
        """
        collected = AttentionMaps(self.layers, None)
        # Before Diffusers 0.36, an exception would leave LoRA layers scaled.
        stop = not (call.get("cross_attention_kwargs") or {}).get("scale")
        with contextlib.suppress(AllCollected):
            kept = [row for row in range(text.shape[1]) if row not in absorbed]
            present = text[:, kept] if absorbed else text
            self._run(call, present, sinks=(collected,), stop=stop, absorbed=len(absorbed))
        maps = list(collected.latest.values())
        pixels = {layer.shape[1] for layer in maps}
        if len(pixels) > 1:
            raise ValueError(f"the layers for maps must be of one size, got {sorted(pixels)} pixels: {self.layers}")
        mean = torch.stack(maps).mean(0)
        if absorbed:
            left = (1 - mean.sum(-1, keepdim=True)) / len(absorbed)
            columns = torch.tensor(kept, device=mean.device)
            mean = left.expand(-1, -1, text.shape[1]).index_copy(2, columns, mean)
        return mean, collected.picture_size(pixels.pop())

    def prediction_and_maps(self, call: Mapping[str, Any], text: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Return the output [B, C, H, W], and the maps of ``text`` [B, N, T] as :meth:`maps` does, from one pass."""
        collected = AttentionMaps(self.layers, None)
        output = self._run(call, text, sinks=(collected,))[0]
        maps = torch.stack(list(collected.latest.values())).mean(0)
        return output, maps, collected.picture_size(maps.shape[1])

    def prediction(self, call: Mapping[str, Any], text: Tensor) -> Tensor:
        """Return the output [B, C, H, W] for embeddings [B, T, D] of any length; one token needs no queries or keys."""
        return self._run(call, text)[0]

    def _run(self, call: Mapping[str, Any], text: Tensor, absorbed: int = 0, **options: Any) -> Any:
        context = CallContext(
            self.fused,
            self.note,
            self.note,
            Text(text, text, None, sink=absorbed),
            size=tuple(call["sample"].shape[-2:]),
            only_text=True,
            **options,
        )
        with use_context(context):
            return self.unet(**{**copy_lists(call), "encoder_hidden_states": text, "return_dict": False})


def input_scale(scheduler: Any, timestep: Tensor) -> Tensor:
    """Return what the scheduler multiplies latents by to make the UNet's input."""
    one = torch.ones((), dtype=torch.float64 if timestep.device.type == "cpu" else torch.float32)
    return scheduler.scale_model_input(one.to(timestep.device), timestep)


def take_rows(call: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Return the call for some rows of its batch, which may repeat."""
    batch = call["sample"].shape[0]

    def chosen(tensor: Tensor) -> Tensor:
        return tensor[list(rows)] if tensor.ndim and tensor.shape[0] == batch else tensor

    return map_tensors(chosen, dict(call))


def shift_latents(sample: Tensor, by: Tensor) -> Tensor:
    """Return ``sample`` with ``by`` added to its first channels, the latents; an inpainting UNet has more."""
    channels = by.shape[1]
    return torch.cat([sample[:, :channels] + by.to(sample.dtype), sample[:, channels:]], 1)


def drop_pooled_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the call with SDXL's pooled text embedding zero; its time ids stay."""
    added = call.get("added_cond_kwargs") or {}
    if "text_embeds" not in added:
        return dict(call)
    return {**call, "added_cond_kwargs": {**added, "text_embeds": torch.zeros_like(added["text_embeds"])}}
