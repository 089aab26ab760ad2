"""What the encoder half of a UNet leaves for the decoder half, and how it is laid out for several time steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import repeat_batch
from ..surgery.trees import map_tensors, take_second_half
from ..surgery.unchanged import are_same
from . import shared_skips


@dataclass
class Features:
    """What the encoder half leaves for the decoder half.

    Attributes:
        outputs: per encoder child (``"conv_in"``, ``"down_blocks.0"``, ..., ``"mid_block"``) what it returned.
        batch: first size of the sample they belong to, guidance included.
        parts: what depends on the skips alone, per up-resnet that shares it among all decodes (:mod:`.shared_skips`).
        unshared: per up-resnet that does not, the reason; empty where sharing was not asked for.
    """

    outputs: Mapping[str, Any]
    batch: int
    parts: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    unshared: Mapping[str, str] = field(default_factory=dict)
    _weights: list[Any] = field(default_factory=list, repr=False)

    def take_conditional(self) -> Features:
        """Return the same features for the conditional half of the batch."""
        outputs, parts = (take_second_half(each, self.batch) for each in (self.outputs, self.parts))
        return replace(self, outputs=outputs, parts=parts, batch=self.batch // 2)

    def list_tensors(self) -> list[Tensor]:
        """Return all tensors of outputs and parts, each once: a down block returns its last skip twice."""
        found: dict[int, Tensor] = {}
        map_tensors(lambda tensor: found.setdefault(id(tensor), tensor), (self.outputs, self.parts))
        return list(found.values())

    def fill(self, tensors: Sequence[Tensor]) -> Features:
        """Return features of the same structure and memory layout, with other tensors for :meth:`list_tensors`."""
        ours = self.list_tensors()
        filled = {
            id(old): new if new.stride() == old.stride() else torch.empty_like(old, device=new.device).copy_(new)
            for old, new in zip(ours, tensors, strict=True)
        }
        outputs, parts = map_tensors(lambda tensor: filled[id(tensor)], (self.outputs, self.parts))
        return replace(self, outputs=outputs, parts=parts)

    def refresh(self, unet: nn.Module) -> None:
        """Make the parts anew if the weights that they depend on have changed since."""
        weights = shared_skips.read_weights(unet, tuple(self.parts))
        if not are_same(weights, self._weights):
            names = tuple(self.parts)
            self.parts = shared_skips.share(unet, find_skips(self.outputs), find_bottleneck(self.outputs), names)
            self._weights = weights


def find_skips(outputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the skip tensors [B, C, H, W] in the order in which the encoder made them."""
    first = outputs["transformer_in"][0] if "transformer_in" in outputs else outputs["conv_in"]
    blocks = [out[1] for name, out in outputs.items() if name.startswith("down_blocks.")]
    return [first, *(skip for block in blocks for skip in block)]


def find_bottleneck(outputs: Mapping[str, Any]) -> Tensor:
    """Return what the up blocks begin with: the last down block's output where there is no mid block."""
    return outputs["mid_block"] if "mid_block" in outputs else list(outputs.values())[-1][0]


def tile_outputs(outputs: Mapping[str, Any], batch: int, repeats: int) -> Mapping[str, Any]:
    """Lay the outputs out for ``repeats`` time steps, batch-major; the bottleneck is always a fresh tensor.

    FreeU and ControlNet-XS write into the bottleneck; every tensor is copied once, however often it occurs (a down
    block returns its last skip tensor twice).
    """
    if repeats > 1:
        return tile(outputs, batch, repeats)
    return {name: map_tensors(torch.clone, out) if name == "mid_block" else out for name, out in outputs.items()}


def drop_channels(outputs: Mapping[str, Any], batch: int, repeats: int) -> Mapping[str, Any]:
    """Lay the outputs out for up blocks that know the skips: for ``repeats`` time steps but without channels.

    The last skip meets the bottleneck, which is not repeated yet.
    """
    last = find_skips(outputs)[-1]

    def empty(skip: Tensor) -> Tensor:
        return skip.new_empty((batch * (1 if skip is last else repeats), 0, *skip.shape[2:]))

    changed = {"conv_in": empty(outputs["conv_in"])}
    for name, out in outputs.items():
        if name.startswith("down_blocks."):
            changed[name] = (out[0], map_tensors(empty, out[1]))
    if "add_embedding" in outputs:
        changed["add_embedding"] = tile(outputs["add_embedding"], batch, repeats)
    return {**outputs, **changed}


def extrapolate(known: Sequence[Any], weights: Tensor, batch: int) -> Any:
    """Return weighted sums of features, a set of weights for each time step, batch-major.

    Args:
        known: the outputs of n key steps, or the same part of each.
        weights: [k, n].
        batch: samples; a tensor may have m rows for each.
    """
    first = known[0]
    if isinstance(first, Mapping):
        return {name: extrapolate([each[name] for each in known], weights, batch) for name in first}
    if not isinstance(first, Tensor):
        return tuple(extrapolate(parts, weights, batch) for parts in zip(*known, strict=True))
    by_step = weights.to(first.dtype).T.reshape(len(known), 1, -1, *(1 for _ in first.shape))
    samples = (x.unflatten(0, (batch, 1, -1)) for x in known)  # [B, 1, m, ...]
    return sum(x * w for x, w in zip(samples, by_step, strict=True)).flatten(0, 2)


def tile(value: Any, batch: int, repeats: int) -> Any:
    """Repeat every tensor in a nested structure ``repeats`` times per sample, batch-major.

    A tensor whose first size is m * batch holds m rows a sample, which stay together.  Scalars and, for
    ``batch`` > 1, tensors with a first size of 1 broadcast as they are.

    Raises:
        ValueError: a first size that is no multiple of ``batch``.
    """
    done: list[tuple[Tensor, Tensor]] = []  # compared by `is`: a compiled program cannot hold an id

    def repeat(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or (tensor.shape[0] == 1 and batch > 1):
            return tensor
        if tensor.shape[0] % batch:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} cannot be repeated for a batch of {batch}: "
                "its first size must be a multiple of the batch"
            )
        for original, copy in done:
            if original is tensor:
                return copy
        rows = tensor.shape[0] // batch
        if rows == 1:
            copy = repeat_batch(tensor, repeats)
        else:
            copy = repeat_batch(tensor.unflatten(0, (batch, rows)), repeats).flatten(0, 1)
        done.append((tensor, copy))
        return copy

    return map_tensors(repeat, value)
