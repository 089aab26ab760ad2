"""What a run's compiled programs take as inputs in the place of layers' own state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.kind import ProgramCall
from ..layers.registry import LAYERS
from ..surgery.facade import StandIn, get_descendant, replace_descendants
from ..unet.contents import contents_of

#: Per kind of layers (:data:`difffast.layers.registry.LAYERS`, by name) and name of a layer, what it takes; under
#: ``LORA_SCALES`` the scales of LoRA layers' adapters.
LayerInputs = dict[str, dict[str, Any]]

LORA_SCALES = "LoRA scales"


@dataclass(frozen=True)
class ProgramInputs:
    """What a program takes from layers.

    Attributes:
        values: the inputs.
        shapes: what a program is chosen by (:func:`describe_shapes`).
    """

    values: LayerInputs
    shapes: Any


def describe_shapes(value: Any) -> Any:
    """Return what a program is chosen by: shapes, dtypes and devices of tensors, and the structure around them."""
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.device)
    if isinstance(value, Mapping):
        return tuple((name, describe_shapes(item)) for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(describe_shapes(item) for item in value)
    return type(value)


class InputReader:
    """Reads what programs take from a UNet's layers.

    Layers are those that were there when the run began.  One that is added later is part of the program as it is, which
    is right, but compiles it anew.
    """

    def __init__(self, unet: nn.Module) -> None:
        # Looking walks the UNet once for every kind, which is a good part of a picture of few steps.
        kinds = tuple(kind.name for kind in LAYERS)
        self._layers, self._adapted = contents_of(unet).remember(kinds, lambda: _find_layers(unet))
        self._latest = ProgramInputs({}, ())
        #: Of each LoRA layer and adapter: the scale, and the tensor that holds it.
        self._scales: dict[tuple[str, str], tuple[float, Tensor]] = {}

    def read(self, call: ProgramCall) -> ProgramInputs:
        """Return the inputs for a call, whose arguments come without a LoRA scale (:func:`apply_lora_scale`)."""
        found = {
            kind.name: kind.as_inputs(self._layers[kind.name], call) for kind in LAYERS if kind.name in self._layers
        }
        found[LORA_SCALES] = {
            f"{name}.scaling": {
                adapter: self._hold_scale(name, adapter, scale, call.unet) for adapter, scale in layer.scaling.items()
            }
            for name, layer in self._adapted.items()
        }
        latest = self._latest.values
        if found.keys() != latest.keys() or any(value is not latest[kind] for kind, value in found.items() if value):
            self._latest = ProgramInputs(found, describe_shapes(found))
        return self._latest

    def _hold_scale(self, name: str, adapter: str, scale: float | Tensor, unet: nn.Module) -> Tensor:
        """Return the scale as a tensor, written only when it has changed; hot-swapped adapters have one already."""
        if isinstance(scale, Tensor):
            return scale
        held = self._scales.get((name, adapter))
        if held is None or held[0] != scale:
            # Of a UNet in float64, a scale in float32 would take half of the digits.
            dtype = torch.float64 if unet.dtype == torch.float64 else torch.float32
            tensor = torch.empty((), dtype=dtype, device=unet.device) if held is None else held[1]
            held = self._scales[name, adapter] = (scale, tensor.fill_(scale))
        return held[1]


def _find_layers(unet: nn.Module) -> tuple[dict[str, dict[str, nn.Module]], dict[str, Any]]:
    """Return the layers that programs take something from, by kind and name, and LoRA's layers by name."""
    adapted = {
        name: layer for name, layer in unet.named_modules() if type(layer).__module__ == "peft.tuners.lora.layer"
    }
    return {kind.name: kind.find(unet) for kind in LAYERS}, adapted


def read_lora_scales(module: nn.Module) -> ProgramInputs:
    """Return the scales of a module's LoRA layers as a program's inputs, of one that has no other layers of ours."""
    adapted = {
        f"{name}.scaling": {adapter: torch.as_tensor(float(scale)) for adapter, scale in layer.scaling.items()}
        for name, layer in module.named_modules()
        if type(layer).__module__ == "peft.tuners.lora.layer"
    }
    return ProgramInputs({LORA_SCALES: adapted}, describe_shapes(adapted))


def put_inputs(unet: nn.Module, inputs: LayerInputs) -> Any:
    """Return a facade of ``unet`` whose layers take their state from a program's inputs."""
    unet = replace_descendants(unet, inputs[LORA_SCALES])
    for kind in reversed(LAYERS):  # linear layers are parts of attention layers
        values = inputs.get(kind.name)
        if values:
            layers = {name: get_descendant(unet, name) for name in values}
            stand_ins = {name: StandIn(layer, kind.stand_in(layer, values[name])) for name, layer in layers.items()}
            unet = replace_descendants(unet, stand_ins)
    return unet


@contextlib.contextmanager
def apply_lora_scale(unet: nn.Module, call: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Let LoRA layers inside the block have the scale that the call asks for; yields the call without it.

    Diffusers' forward does the same around itself, which would make the scale a constant of the program.
    """
    options = dict(call.get("cross_attention_kwargs") or {})
    weight = options.pop("scale", None)
    if weight is None:
        yield dict(call)
        return
    from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

    scale_lora_layers(unet, weight)
    try:
        yield {**call, "cross_attention_kwargs": options or None}
    finally:
        unscale_lora_layers(unet, weight)
