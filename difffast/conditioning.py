"""What an output of the UNet depends on besides the latents' values and the time: has it changed since the key step?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Arguments that differ at every step as a matter of course.
_FREE = ("sample", "timestep", "return_dict")

#: Arguments that pipelines make anew at every step, of which only presence and shapes are compared: ControlNet says
#: itself when it has run anew (:mod:`.controlnet`), and an adapter's features are copies of the same tensors.
RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


#: Attributes of up blocks by which FreeU scales the skips and the hidden channels.
FREEU = ("s1", "s2", "b1", "b2")


class Conditioning:
    """Everything that an output depends on besides the latents' values and the time, compared by identity.

    Holding the tensors makes identity safe (an address cannot be used again); their version counters catch
    in-place edits, except under inference_mode, which has none.  Two views of the same elements are the same.

    Args:
        call: the arguments by name.
        switches: values inside the model that are compared as well, by name; see :class:`Switches`.
    """

    def __init__(self, call: Mapping[str, Any], switches: Mapping[str, Any] | None = None) -> None:
        sample = call["sample"]
        self._parts: dict[str, list[Any]] = {"the latents' shape": [sample.shape, sample.dtype, sample.device]}
        for name, value in call.items():
            if name not in _FREE:
                self._parts[name] = list(_shapes(value) if name in RESIDUALS else _leaves(value))
        for name, value in (switches or {}).items():
            self._parts[name] = [value]

    def same(self, other: Conditioning | None) -> bool:
        """Whether nothing but the latents' values and the time may differ."""
        return other is not None and self.change(other) is None

    def change(self, other: Conditioning) -> str | None:
        """The name of something that may differ, or None."""
        for name in {**self._parts, **other._parts}:
            ours, theirs = self._parts.get(name, [None]), other._parts.get(name, [None])
            if len(ours) != len(theirs) or not all(_same(a, b) for a, b in zip(ours, theirs, strict=True)):
                return name
        return None


class Switches:
    """What pipelines and callbacks change inside a UNet in the middle of a run, without changing an argument.

    The modules that have them are looked for once: a walk over a UNet takes longer than its calls may wait.
    """

    def __init__(self, unet: nn.Module) -> None:
        from diffusers.models.attention import GatedSelfAttentionDense
        from diffusers.models.attention_processor import Attention

        modules = list(unet.modules())
        self._fusers = [module for module in modules if isinstance(module, GatedSelfAttentionDense)]
        self._attention = [module for module in modules if isinstance(module, Attention)]
        self._up_blocks = list(getattr(unet, "up_blocks", ()))

    def state(self) -> dict[str, Any]:
        """Their values as of now."""
        return {
            "GLIGEN's layers": tuple(fuser.enabled for fuser in self._fusers),
            "the IP-Adapter's scale": tuple(repr(getattr(layer.processor, "scale", None)) for layer in self._attention),
            "FreeU": tuple(getattr(block, name, None) for block in self._up_blocks for name in FREEU),
        }


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        yield len(value)
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, Tensor):
        yield value
        yield None if value.is_inference() else value._version
    else:
        yield value


def _shapes(value: Any) -> Iterator[Any]:
    return (leaf.shape if isinstance(leaf, Tensor) else None for leaf in _leaves(value))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (
            a.shape == b.shape
            and a.dtype == b.dtype
            and a.device == b.device
            and a.stride() == b.stride()
            and a.storage_offset() == b.storage_offset()
            and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0
        )
    plain = (str, int, float, complex, bytes, tuple, torch.dtype, torch.device, type(None))
    return isinstance(a, plain) and isinstance(b, plain) and a == b
