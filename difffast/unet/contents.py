"""What is in a UNet now: its modules, their hooks, attributes and attention processors, and the scales of adapters.

Users, pipelines and callbacks change all of these without changing an argument of a call, also in the middle of a run.
This is the one place that looks at them; runs ask it at every call, and so do recorded graphs.  Nothing is called and
no tree is walked where nothing has changed: of SD 1.5's 709 modules, dicts are compared by CPython itself.

What is not of Diffusers, PyTorch or the libraries below does what it likes: it may count its calls, split the batch, or
mix samples.  It is named, so that runs can call it as the stock loop does.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import nn

from ..surgery.origin import find_replaced, is_known, name_foreign_class, name_foreign_hook
from ..surgery.subclass import plain_class
from ..surgery.unchanged import flatten_leaves
from .parts import FREEU

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
#: What an attribute that is changed in the middle of a run is called in reports; others by their own names.
_NAMES = {
    **dict.fromkeys(FREEU, "FreeU"),
    **dict.fromkeys(("_hf_peft_config_loaded", "_disable_adapters", "lora_scale"), "which adapters are used"),
    "enabled": "GLIGEN's layers",
    "processor": "an attention processor",
}
#: Where Diffusers keeps the processors that treat every sample for itself.
_SEPARATE = "diffusers.models."


class Contents:
    """What is in one UNet, as of the last look; threads may share it.

    Args:
        unet: the UNet, of which only a weak reference is kept.

    Attributes:
        changes: how often it was found changed, but for values: of weights, and the scales of LoRAs.
        merges: how often adapters may have been merged into weights, or taken out, which PyTorch does not count.
        foreign: the first that is not one of the known libraries' own, as a sentence's subject and verb; or None.
        replaced: which known class's ``forward`` or ``__call__`` has been replaced, for which no operator can stand
            in, as a sentence; or None.
        coupled: the name of a processor of Diffusers' that may mix the samples of a batch; or None.
        modules: all modules of the UNet, itself among them.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._unet = weakref.ref(unet)
        self.changes = self.merges = 0
        self._seen = 0  # changes, of values as well
        self._latest: str | None = None
        self._lock = threading.Lock()
        self._remembered: dict[Hashable, Any] = {}
        self._collect()

    def look(self) -> int:
        """Look at the UNet; returns how many changes have been seen in all, for :meth:`name_change`."""
        with self._lock:
            switches = self._read_switches()
            if not self._is_same_structure():
                self._take_note(self._find_change())
                self.changes += 1
                self.merges += 1
                self._remembered.clear()
                self._collect()
            elif not _are_equal(switches, self._switches):
                self._take_note(self._name_switch(switches))
                self.changes += 1
                self.merges += not _are_equal(*(each[len(self._processors) :] for each in (switches, self._switches)))
                self._remembered.clear()
                self._switches = switches
            self._compare_values()
            return self._seen

    def remember(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """Return what ``find`` returns of the UNet, which is asked for a key once as long as no change is seen."""
        with self._lock:
            if key not in self._remembered:
                self._remembered[key] = find()
            return self._remembered[key]

    def name_change(self, seen: int) -> str | None:
        """Return the latest thing that has changed since :meth:`look` returned ``seen``, or None."""
        return self._latest if seen < self._seen else None

    def _take_note(self, change: str) -> None:
        self._seen, self._latest = self._seen + 1, change

    def _compare_values(self) -> None:
        scales, versions = self._read_scales(), self._read_versions()
        if not _are_close(scales, self._scales):
            self._take_note("the LoRA's scale")
        elif versions != self._versions:
            self._take_note("a weight")
        self._scales, self._versions = scales, versions

    def _collect(self) -> None:
        unet = self._unet()
        modules = list(unet.modules())
        self.modules = modules
        own = [vars(module) for module in modules]
        # Children and hooks, by identity.  What must stay empty is asked for that alone.
        held = [each[kind] for each in own for kind in (*_HOOKS, "_modules")]
        self._empty = [each for each in held if not each]
        self._held = [each for each in held if each]
        # Layers of torch.nn have no switches but their weights.
        self._attributes = [vars(m) for m in modules if not plain_class(m).__module__.startswith("torch.nn.")]
        self._sizes = [vars(m) for m in modules if plain_class(m).__module__.startswith("torch.nn.")]
        self._classes = list(dict.fromkeys(map(plain_class, modules)))
        processors = [getattr(module, "processor", None) for module in modules]
        processors = [processor for processor in processors if processor is not None]
        self._processors = [vars(each) for each in processors if hasattr(each, "__dict__")]
        self._classes += list(dict.fromkeys(map(plain_class, processors)))
        self._adapted = [m for m in modules if plain_class(m).__module__.startswith("peft.")]
        # accelerate puts others in their places at every call, where it offloads a layer.
        held = [weight for each in own if "_hf_hook" not in each for weight in each["_parameters"].values()]
        self._weights = [weight for weight in held if weight is not None and not weight.is_inference()]
        self._structure = self._read_structure()
        self._switches, self._scales, self._versions = self._read_switches(), self._read_scales(), self._read_versions()
        self.replaced = next(filter(None, map(_name_replaced, self._classes)), _name_other_attention())
        self.foreign = next(_list_foreign(unet), None)
        self.coupled = next(
            (type(p).__qualname__ for p in processors if not type(p).__module__.startswith(_SEPARATE)), None
        )

    def _read_structure(self) -> list[Any]:
        """Return what a change of makes it necessary to look for everything anew."""
        return [
            [*map(type, self.modules)],
            [tuple(each.values()) for each in self._held],
            [tuple(each.values()) for each in self._attributes],
            [*map(len, self._sizes)],
            [(getattr(cls, "forward", None), cls.__call__) for cls in self._classes],
            nn.functional.scaled_dot_product_attention,
        ]

    def _is_same_structure(self) -> bool:
        return not any(self._empty) and _are_equal(self._read_structure(), self._structure)

    def _read_switches(self) -> list[Any]:
        """Return what is changed in place: attributes of processors, and which adapters are used."""
        leaves: list[Any] = [flatten_leaves(each) if each else None for each in self._processors]
        for layer in self._adapted:
            if hasattr(layer, "active_adapters"):
                leaves.append((*layer.active_adapters, *layer.merged_adapters, layer.disable_adapters))
        return leaves

    def _read_versions(self) -> list[int]:
        return [weight._version for weight in self._weights]

    def _read_scales(self) -> list[Any]:
        return [dict(scaling) for scaling in (getattr(layer, "scaling", None) for layer in self._adapted) if scaling]

    def _find_change(self) -> str:
        """Name the first part of the structure that has changed."""
        if any(self._empty):
            return "what layers and hooks there are"
        now = self._read_structure()
        if not _are_equal(now[4:], self._structure[4:]):
            return "a method of a layer's class"
        for held, before, after in zip(self._attributes, self._structure[2], now[2], strict=True):
            if not _are_equal(before, after):
                names = list(held)
                at = next((i for i, pair in enumerate(zip(before, after)) if not _are_equal(*pair)), len(before))  # noqa: B905
                name = names[at] if at < len(names) else "an attribute"
                return _NAMES.get(name, f"{name} of a layer")
        return "what layers and hooks there are"

    def _name_switch(self, now: list[Any]) -> str:
        processors, before = now[: len(self._processors)], self._switches[: len(self._processors)]
        if not _are_equal(processors, before):
            return (
                "the IP-Adapter's scale"
                if any("scale" in each for each in self._processors)
                else ("an attention processor's attribute")
            )
        return "which adapters are used"


def _list_foreign(unet: nn.Module) -> Iterator[str]:
    for name, module in unet.named_modules():
        where = name or "the UNet"
        reason = name_foreign_class(plain_class(module))
        if reason is not None:
            yield f"{where} is {reason}"
        reason = name_foreign_hook(module)
        if reason is not None and module is not unet:  # of the UNet itself, runs know what to do
            yield f"{where} has {reason}"
        processor = vars(module).get("processor")
        reason = None if processor is None else name_foreign_class(plain_class(processor))
        if reason is not None:
            yield f"{where} has the attention processor {reason}"
    reason = _name_other_attention()
    if reason is not None:
        yield reason


def _name_replaced(cls: type) -> str | None:
    """Say which method of a known class comes from elsewhere, if one does; layers tell subclasses themselves."""
    method = find_replaced(cls) if is_known(cls.__module__) else None
    return None if method is None else f"{cls.__qualname__}.{method} has been replaced"


def _name_other_attention() -> str | None:
    known = is_known(getattr(nn.functional.scaled_dot_product_attention, "__module__", None) or "torch.")
    return None if known else "scaled_dot_product_attention has been replaced"


def _are_equal(ours: Any, theirs: Any) -> bool:
    """Compare by identity first, as CPython does inside of lists and tuples, and by value where that differs."""
    try:
        return bool(ours == theirs)
    except (RuntimeError, ValueError, TypeError):  # tensors and arrays have no truth value
        return False


def _are_close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> bool:
    """Return whether scales differ by rounding alone: Diffusers multiplies by a call's scale and divides again."""
    if _are_equal(ours, theirs):
        return True
    if [each.keys() for each in ours] != [each.keys() for each in theirs]:
        return False
    return all(
        x is y or (isinstance(x, (int, float)) and isinstance(y, (int, float)) and abs(x - y) <= 1e-9 * abs(y))
        for a, b in zip(ours, theirs, strict=True)
        for x, y in zip(a.values(), b.values(), strict=True)
    )


_contents: weakref.WeakKeyDictionary[nn.Module, Contents] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


def contents_of(unet: nn.Module) -> Contents:
    """Return the contents of a UNet, which everybody shares who asks for them."""
    with _guard:
        found = _contents.get(unet)
        if found is None:
            found = _contents[unet] = Contents(unet)
        return found


def drop_contents(unet: nn.Module) -> None:
    """Forget what is known of a UNet, and with it every object that was looked at."""
    with _guard:
        _contents.pop(unet, None)
