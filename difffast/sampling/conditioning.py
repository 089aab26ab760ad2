"""What a run is conditioned on: texts and the like, which must be the same tensors at every step to be shared.

Some callers make them anew at every step, with equal values; and edits in place are not counted under
``torch.inference_mode``, through ``.data`` or through NumPy.  Where tensors can be compared without waiting for a
device, on the CPU, they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..surgery.trees import map_tensors
from ..surgery.unchanged import have_equal_bits, is_same_view, read_version
from ..unet.fingerprint import FREE
from ..unet.parts import RESIDUALS


class _Held:
    """A tensor that the caller gave, and the one that layers get for it.

    Args:
        given: the tensor.
        hidden: whether it had other values before, of which its version says nothing: layers get a copy, which tells.
    """

    def __init__(self, given: Tensor, *, hidden: bool = False) -> None:
        self.source, self.version = given, read_version(given)
        copied = hidden or self.version is None
        self.values = _copy(given) if copied or can_compare(given) else None
        self.settled = self.values if copied else given

    def is_intact(self) -> bool:
        """Return whether the layers' tensor is as often written to as it was; a copy never is."""
        return self.settled is not self.source or self.source._version == self.version

    def has_values_of(self, given: Tensor) -> bool:
        """Return whether another tensor on the CPU has the values that layers have been given, and still are."""
        if not self.is_intact() or not have_equal_bits(self.values, given):
            return False
        return self.settled is given or self.settled is self.values or have_equal_bits(self.values, self.settled)


class Conditioning:
    """The tensors that a run is conditioned on.

    Args:
        remakes: arguments that this kind of pipeline makes anew at every step, with equal values.

    Attributes:
        remade: the name of the first argument that was given anew with equal values; None: none was.
    """

    def __init__(self, remakes: Sequence[str] = ()) -> None:
        self._remakes = remakes
        self._held: dict[tuple[str, ...], _Held] = {}
        self.remade: str | None = None

    def settle(self, call: Mapping[str, Any], *, key: bool) -> dict[str, Any]:
        """Return the call with the same tensors as at the step before wherever they have the same values.

        Tensors without a version get a copy that has one: made when their values change where those can be compared,
        and at every key step elsewhere.

        Args:
            call: the UNet's arguments by name.
            key: whether it is a key step.
        """
        return {
            name: value if name in FREE or name in RESIDUALS else self._settle((name,), value, key)
            for name, value in call.items()
        }

    def identify(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a settled call with what the caller gave in place of copies that do not tell edits."""
        copies = {
            id(held.settled): held.source
            for held in self._held.values()
            if held.settled is not held.source and not can_compare(held.source)
        }
        return map_tensors(lambda tensor: copies.get(id(tensor), tensor), dict(call)) if copies else call

    def forget(self) -> None:
        """Drop the tensors."""
        self._held.clear()

    def _settle(self, path: tuple[str, ...], value: Any, key: bool) -> Any:
        if isinstance(value, Tensor):
            return self._settle_tensor(path, value, key)
        if isinstance(value, Mapping):
            return {name: self._settle((*path, str(name)), item, key) for name, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self._settle((*path, str(i)), item, key) for i, item in enumerate(value)])
        return value

    def _settle_tensor(self, path: tuple[str, ...], given: Tensor, key: bool) -> Tensor:
        held, hidden = self._held.get(path), False
        version = read_version(given)
        if held is not None and _is_alike(held.settled, given):
            same = held.source is given or is_same_view(held.source, given)
            if can_compare(given):
                if held.has_values_of(given):
                    if not same and self.remade is None and path[0] not in self._remakes:
                        self.remade = path[0]
                    return held.settled
                hidden = same and version == held.version
            elif path[0] in self._remakes or (same and (not key if version is None else held.is_intact())):
                return held.settled
        held = self._held[path] = _Held(given, hidden=hidden)
        return held.settled


def check_rows(text: Any, sample: Tensor) -> None:
    """Refuse a text with another number of rows than the latents of pictures, as stock layers do.

    Fused layers could take its rows for those of time steps or of a video's frames, which a text may have as well.

    Raises:
        ValueError: it has.
    """
    if isinstance(text, Tensor) and sample.ndim == 4 and len(text) != len(sample):
        raise ValueError(
            f"the UNet needs as many rows of text as of latents, got {len(text)} and {len(sample)}: latents must have "
            "a row for every image of every prompt"
        )


def can_compare(tensor: Tensor) -> bool:
    """Return whether values of a tensor can be compared without waiting for a device."""
    return tensor.device.type == "cpu"


def _is_alike(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.device == theirs.device


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy that counts its edits, also inside of ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()
