"""What a recorded graph depends on besides its inputs: the modules of a UNet, their weights' addresses, their switches.

A graph replays addresses.  Values that change in place are seen by themselves; a weight that moves, a layer that is
put in or taken out, and an attribute that is set are not, so they are compared before every replay.  All comparisons
are by identity, of objects that are held, so that no address can be used again unnoticed.
"""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ..surgery.pristine import is_wrapped
from ..surgery.subclass import plain_class
from ..surgery.unchanged import flatten_leaves

#: Packages whose modules do the same at every call: a replay leaves nothing out.
_KNOWN = ("torch.nn.", "diffusers.", "peft.")


class Watch:
    """What a UNet consists of, as of now.

    Args:
        unet: the UNet.
    """

    def __init__(self, unet: nn.Module) -> None:
        modules = list(unet.modules())
        self._parts = [
            vars(module)[kind] for module in modules for kind in ("_modules", "_forward_hooks", "_forward_pre_hooks")
        ]
        self._tensors = [vars(module)[kind] for module in modules for kind in ("_parameters", "_buffers")]
        # Layers of torch.nn have no switches but their weights; looking at all of them would double the time.
        own = [module for module in modules if not plain_class(module).__module__.startswith("torch.nn.")]
        self._attributes = [vars(module) for module in own]
        self._processors = [
            vars(module.processor) for module in own if hasattr(getattr(module, "processor", None), "__dict__")
        ]
        self._adapted = [module for module in own if type(module).__module__.startswith("peft.")]
        self._objects, self._addresses = self._read()

    def still_holds(self) -> bool:
        """Return whether nothing has changed since."""
        objects, addresses = self._read()
        return (
            addresses == self._addresses
            and len(objects) == len(self._objects)
            and all(map(operator.is_, objects, self._objects))
        )

    def _read(self) -> tuple[list[Any], list[Any]]:
        """Return what is compared by identity, and what is compared by value."""
        tensors = [each for held in self._tensors for each in held.values()]
        objects = [*tensors, *chain.from_iterable(held.values() for held in (*self._parts, *self._attributes))]
        switches: list[Any] = [leaf for held in self._processors for leaf in flatten_leaves(held)]
        objects += [leaf for leaf in switches if isinstance(leaf, (Tensor, nn.Module))]
        values = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        values += [leaf for leaf in switches if isinstance(leaf, (str, int, float, tuple, type(None)))]
        for layer in self._adapted:
            # The scale itself is an input of the graph; these lists are changed in place.
            values += (*layer.active_adapters, *layer.merged_adapters, layer.disable_adapters, len(layer.scaling))
        return objects, values


def refuse_recording(unet: nn.Module) -> str | None:
    """Return why a UNet's calls must not be recorded, or None: Python that does something else at every call."""
    for name, module in unet.named_modules():
        kind = plain_class(module)
        where = name or "the UNet"
        if not kind.__module__.startswith(_KNOWN):
            return f"{where} is a {kind.__qualname__}, which is not of Diffusers, PyTorch or PEFT"
        if "_hf_hook" in vars(module):
            return f"{where} is offloaded: its weights lie elsewhere at every image"
        if module is not unet and is_wrapped(module):
            return f"{where} has hooks, or a forward of its own"
        processor = type(getattr(module, "processor", None))
        if processor is not type(None) and not processor.__module__.startswith("diffusers."):
            return f"{where} has the attention processor {processor.__qualname__}, which is not one of Diffusers' own"
    return None
