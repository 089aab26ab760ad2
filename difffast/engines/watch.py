"""What a recorded graph depends on besides its inputs and what is in the UNet: where the weights lie.

A graph replays addresses.  Values that change in place are seen by themselves; a weight that moves is not, so addresses
are compared before every replay.  By identity as well, of tensors that are held, so that no address can be used again
unnoticed.  Layers that are put in or taken out, and attributes that are set, :mod:`difffast.unet.contents` sees.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..surgery.pristine import is_wrapped
from ..unet.contents import contents_of


class Watch:
    """Where the weights of a UNet lie, and what is in it, as of now.

    Args:
        unet: the UNet.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._contents = contents_of(unet)
        self._contents.look()
        self._changes = self._contents.changes
        held = [module[kind] for module in map(vars, unet.modules()) for kind in ("_parameters", "_buffers")]
        self._empty = [each for each in held if not each]
        self._filled = [each for each in held if each]
        self._tensors = self._list_tensors()
        self._ids, self._addresses = _read(self._tensors)

    def still_holds(self) -> bool:
        """Return whether nothing has changed since, as far as the contents have been looked at."""
        if self._contents.changes != self._changes or any(self._empty):
            return False
        return _read(self._list_tensors()) == (self._ids, self._addresses)

    def _list_tensors(self) -> list[Tensor | None]:
        return [tensor for held in self._filled for tensor in held.values()]


def _read(tensors: Sequence[Tensor | None]) -> tuple[list[int], list[int | None]]:
    return list(map(id, tensors)), [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def refuse_recording(unet: nn.Module) -> str | None:
    """Return why a UNet's calls must not be recorded, or None: Python that does something else at every call."""
    foreign = contents_of(unet).foreign
    if foreign is not None:
        return foreign
    for name, module in unet.named_modules():
        if "_hf_hook" in vars(module):
            return f"{name or 'the UNet'} is offloaded: its weights lie elsewhere at every image"
        if module is not unet and is_wrapped(module):
            return f"{name} has hooks, or a forward of its own"
    return None
