"""What an output of the UNet depends on besides the latents' values and the time: has it changed since the key step?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..surgery.unchanged import are_same, flatten_leaves
from .parts import FREEU, RESIDUALS

_ABSENT: list[Any] = [None]
#: Arguments that differ at every step as a matter of course.
_FREE = ("sample", "timestep", "return_dict")


class Fingerprint:
    """Everything that an output depends on besides the latents' values and the time, compared by identity.

    Of ``RESIDUALS`` only presence and shapes are compared: ControlNet says itself when it has run anew
    (:mod:`difffast.sampling.controlnet`), and an adapter's features are copies of the same tensors.

    Args:
        call: the arguments by name.
        switches: values inside the model that are compared as well, by name; see :class:`Switches`.
        remade: arguments that the pipeline makes anew at every step, of the same values: their shapes are compared.
    """

    def __init__(
        self, call: Mapping[str, Any], switches: Mapping[str, Any] | None = None, remade: Sequence[str] = ()
    ) -> None:
        sample = call["sample"]
        self._parts: dict[str, list[Any]] = {"the latents' shape": [sample.shape, sample.dtype, sample.device]}
        for name, value in call.items():
            if name not in _FREE:
                self._parts[name] = _shapes(value) if name in (*RESIDUALS, *remade) else flatten_leaves(value)
        for name, value in (switches or {}).items():
            self._parts[name] = [value]

    def find_change(self, other: Fingerprint) -> str | None:
        """Return the name of something that may differ, or None."""
        for name in {**self._parts, **other._parts}:
            ours, theirs = self._parts.get(name, _ABSENT), other._parts.get(name, _ABSENT)
            if ours is not theirs and not are_same(ours, theirs):
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

    def read(self) -> dict[str, Any]:
        """Return their values as of now."""
        return {
            "GLIGEN's layers": tuple([fuser.enabled for fuser in self._fusers]),
            "the IP-Adapter's scale": tuple(
                [repr(getattr(layer.processor, "scale", None)) for layer in self._attention]
            ),
            "FreeU": tuple([getattr(block, name, None) for block in self._up_blocks for name in FREEU]),
        }


def _shapes(value: Any) -> list[Any]:
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in flatten_leaves(value)]
