"""A kind of fused layer: everything that the rest of the library asks about it, in one object."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery.subclass import is_swapped, swap_in, swap_out
from .context import CURRENT, CallContext
from .text_kv import TextKV


@dataclass(frozen=True)
class ProgramCall:
    """The UNet call that a compiled program is to serve.

    Attributes:
        unet: the UNet.
        arguments: of the call, by name.
        fused: whether layers may be computed by operators.
        kv: text keys and values of the run; None: cross-attention layers run stock.
    """

    unet: nn.Module
    arguments: Mapping[str, Any]
    fused: bool
    kv: TextKV | None


#: Parts of an attention layer that no operator can stand in for.
FOREIGN_PARTS = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")

#: The kinds that have been put in, by name.
_kinds: dict[str, LayerKind] = {}
#: The names of patched layers; what overrides their methods is shared by all layers of a kind and knows no name.
_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
#: The layers that a kind, by its name, has been put into, by the UNet: from there it is taken out, whatever has become
#: of them.
_layers: dict[str, weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]]] = {}
#: What each kind overrides of a plain class.
_methods: weakref.WeakKeyDictionary[LayerKind, dict[type, dict[str, Callable[..., Any]]]] = weakref.WeakKeyDictionary()


class LayerKind(ABC):
    """One kind of stock layer that an operator computes.

    A new kind is a subclass in a file of its own, registered by :func:`difffast.layers.registry.register`.
    """

    #: What reports call layers of this kind.
    name: str
    #: What a layer's ``forward`` calls its input, which callers may pass by name.
    input_name = "hidden_states"
    #: Whether :meth:`edit` changes anything.
    edits = False

    @abstractmethod
    def find(self, unet: nn.Module) -> dict[str, nn.Module]:
        """Return the layers of a UNet that can be fused, by name (as by ``named_modules``)."""

    def pays(self, layer: Any, hidden: Tensor) -> bool:
        """Return whether the operator is faster than stock for an input like this one; asked at every call."""
        return True

    def may_pay(self, weight: Tensor) -> bool:
        """Return whether the operator can be the faster one for any input, of layers with weights like this one.

        Layers are left alone where it cannot.  Asked again when the weights have gone elsewhere, or have been cast.
        """
        return True

    def suits(self, layer: Any) -> bool:
        """Return whether a layer can be fused for any input; asked once, when it is patched."""
        return True

    @abstractmethod
    def refuse(self, layer: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Return why a call of a layer must run stock, or None; an empty reason is not reported.

        Args:
            hidden: the layer's input.
            args, kwargs: the other arguments of the call.
        """

    def edit(self, layer: Any, context: CallContext, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what the layer gives where the call's edit changes it, or None; asked where there is an edit."""
        return None

    @abstractmethod
    def forward(self, layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what the layer computes, through the operator; with the arguments that the layer is called with."""

    def as_inputs(self, layers: Mapping[str, nn.Module], call: ProgramCall) -> dict[str, Any]:
        """Return, by name, what layers take from the inputs of a compiled program; who is not named runs stock."""
        return {}

    def stand_in(self, layer: Any, value: Any) -> Callable[..., Any]:
        """Return what runs in place of a layer in a compiled program, given what :meth:`as_inputs` returned for it."""
        raise TypeError(f"{self.name} take nothing from programs' inputs, got {value!r}")

    @abstractmethod
    def describe(self, layers: Mapping[str, Any], weight: Tensor, *, compiled: bool) -> Iterator[tuple[str, str]]:
        """Yield (what is replaced, by what) for reports.

        Args:
            layers: all fused layers of this kind, from :meth:`find`.
            weight: any weight of the UNet, for device and dtype.
            compiled: whether the UNet runs as compiled programs.
        """

    def wrap(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Return the ``__call__`` of patched layers, which all layers of one class share.

        Args:
            plain: the class's own ``__call__``.
        """

        # torch.compile can trace a function that holds strings, but none that holds an object.
        kind, input_name = self.name, self.input_name

        def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            context = None if torch.compiler.is_compiling() else CURRENT.get()
            if context is not None and context.edit is not None:
                edited = _kinds[kind].edit(layer, context, args, kwargs)
                if edited is not None:
                    return edited
            if context is None or not context.fused or context.only_text:
                return plain(layer, *args, **kwargs)
            own = _kinds[kind]
            if not args and input_name in kwargs:  # as UNetMotionModel calls its resnets
                args = (kwargs.pop(input_name),)
            if not args or not (context.always or own.pays(layer, args[0])):
                return plain(layer, *args, **kwargs)
            reason = own.refuse(layer, args[0], args[1:], kwargs)
            if reason is None:
                return own.forward(layer, *args, **kwargs)
            if reason:
                context.record(f"{kind} run stock: {reason}")
            return plain(layer, *args, **kwargs)

        return call

    def put_in(self, unet: nn.Module, *, always: bool = False) -> None:
        """Put :meth:`wrap` in front of every layer that has no class of its own yet.

        Args:
            unet: the UNet.
            always: also where the operator cannot pay, if the kind has edits.
        """
        _kinds[self.name] = self
        if not (always and self.edits) and not self.may_pay(next(unet.parameters())):
            return
        methods = _methods.setdefault(self, {})
        for name, layer in self.find(unet).items():
            if is_swapped(layer):
                self._remember(unet, layer)
            elif self.suits(layer):
                _names[layer] = name
                plain = type(layer)
                if plain not in methods:
                    methods[plain] = {"__call__": self.wrap(plain.__call__)}
                self.override(unet, layer, methods[plain])

    def override(self, unet: nn.Module, layer: nn.Module, methods: dict[str, Callable[..., Any]]) -> None:
        """Override methods of a layer of a UNet, until the kind is taken out of that."""
        self._remember(unet, layer)
        swap_in(layer, methods, equal=True)  # what finds layers by their types in a dict (quantisation) finds them

    def _remember(self, unet: nn.Module, layer: nn.Module) -> None:
        _layers.setdefault(self.name, weakref.WeakKeyDictionary()).setdefault(unet, weakref.WeakSet()).add(layer)

    def take_out(self, unet: nn.Module) -> None:
        """Undo :meth:`put_in`, also for layers that are not in the UNet any more, or that others have changed.

        Layers that it shares with another UNet stay as they are until that one needs them no more.
        """
        held = _layers.get(self.name, {})
        for layer in [*held.get(unet, ()), *self.find(unet).values()]:
            if any(layer in layers for other, layers in held.items() if other is not unet):
                continue
            self.forget(layer)
            swap_out(layer)
            _names.pop(layer, None)
        held.pop(unet, None)

    def forget(self, layer: nn.Module) -> None:
        """Drop what has been made for a layer that is taken out."""
        return


def name_layer(layer: nn.Module) -> str:
    """Return the name of a patched layer in its UNet."""
    return _names[layer]


def is_masked(arguments: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """Return whether any of the named arguments of a UNet call is given."""
    return any(arguments.get(name) is not None for name in names)
