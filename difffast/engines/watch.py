"""What a recorded graph depends on besides its inputs: the modules of a UNet, their weights' addresses, their switches.

A graph replays addresses.  Values that change in place are seen by themselves; a weight that moves, a layer that is
put in or taken out, and an attribute that is set are not, so they are compared before every replay.  All comparisons
are by identity, of objects that are held, so that no address can be used again unnoticed.
"""

from __future__ import annotations

import operator
from itertools import islice
from typing import Any

from torch import Tensor, nn

from ..surgery.pristine import is_wrapped
from ..surgery.subclass import plain_class
from ..surgery.unchanged import flatten_leaves

#: Packages whose modules do the same at every call: a replay leaves nothing out.
_KNOWN = ("torch.nn.", "diffusers.", "peft.")


#: Attributes that every module has; what they hold is looked at by itself.
_COMMON = frozenset(vars(nn.Module()))


class Watch:
    """What a UNet consists of, as of now.

    Args:
        unet: the UNet.
    """

    def __init__(self, unet: nn.Module) -> None:
        modules = [vars(module) for module in unet.modules()]
        held = [module[kind] for module in modules for kind in ("_parameters", "_buffers", "_modules")]
        hooks = [module[kind] for module in modules for kind in ("_forward_hooks", "_forward_pre_hooks")]
        #: What must stay empty is asked for that alone: most modules have no buffers, children or hooks.
        self._empty = [each for each in (*held, *hooks) if not each]
        self._filled = [each for each in (*held, *hooks) if each]
        self._tensors = [module[kind] for module in modules for kind in ("_parameters", "_buffers") if module[kind]]
        # Layers of torch.nn have no switches but their weights; looking at all of them would double the time.
        own = [module for module in unet.modules() if not plain_class(module).__module__.startswith("torch.nn.")]
        self._attributes = [(vars(module), _count_common(module)) for module in own]
        self._processors = [
            vars(module.processor) for module in own if hasattr(getattr(module, "processor", None), "__dict__")
        ]
        self._adapted = [module for module in own if type(module).__module__.startswith("peft.")]
        self._objects, self._values = self._read()

    def still_holds(self) -> bool:
        """Return whether nothing has changed since."""
        if any(self._empty):
            return False
        objects, values = self._read()
        return (
            values == self._values
            and len(objects) == len(self._objects)
            and all(map(operator.is_, objects, self._objects))
        )

    def _read(self) -> tuple[list[Any], list[Any]]:
        """Return what is compared by identity, and what is compared by value."""
        objects = [each for held in self._filled for each in held.values()]
        for attributes, common in self._attributes:
            objects += islice(attributes.values(), common, None)
        values = [None if tensor is None else tensor.data_ptr() for held in self._tensors for tensor in held.values()]
        switches: list[Any] = [leaf for held in self._processors for leaf in flatten_leaves(held)]
        objects += [leaf for leaf in switches if isinstance(leaf, (Tensor, nn.Module))]
        values += [leaf for leaf in switches if isinstance(leaf, (str, int, float, tuple, type(None)))]
        for layer in self._adapted:
            # The scale itself is an input of the graph; these lists are changed in place.
            values += (*layer.active_adapters, *layer.merged_adapters, layer.disable_adapters, len(layer.scaling))
        return objects, values


def _count_common(module: nn.Module) -> int:
    """Return how many attributes of a module come first that every module has."""
    return next((i for i, name in enumerate(vars(module)) if name not in _COMMON), len(vars(module)))


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
