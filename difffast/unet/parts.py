"""The parts of a Diffusers UNet by their names, and what runs them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..surgery.facade import StandIn, make_facade

ENCODER = (
    "image_latents_proj_in",
    "image_latents_temporal_encoder",
    "conv_in",
    "transformer_in",
    "add_embedding",  # of pooled text, sizes, an image or a hint: the same at every time
    "down_blocks",
    "mid_block",
)
DECODER = ("conv_norm_out", "conv_act", "conv_act_out", "conv_out")

#: Arguments that pipelines make anew at every step: what ControlNets and T2I-Adapters add inside ``forward``.
RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)

#: Attributes of up blocks by which FreeU scales the skips and the hidden channels.
FREEU = ("s1", "s2", "b1", "b2")

#: Lists of layers in down and up blocks, of which those with one index run one after another.
_LAYERS = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")

#: What runs a function of this package on a UNet and its other arguments: as it is, or as a compiled program.
Execute = Callable[..., Any]


def execute_eagerly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function as it is."""
    return function(*arguments)


def refuse_split(unet: nn.Module) -> str | None:
    """Return why ``unet`` cannot be run in parts, or None.

    A ``forward`` set on the instance hides the class's own.  It can be followed only if it is that very method
    (accelerate leaves it behind when its hooks go) or one of accelerate's hooks around it.
    """
    own = vars(unet).get("forward")
    if isinstance(own, functools.partial) and own.func.__module__ == "accelerate.hooks" and unet in own.args:
        own = vars(unet).get("_old_forward")
    if own is None or (isinstance(own, types.MethodType) and own == types.MethodType(type(unet).forward, unet)):
        by_latents = any(hasattr(block, "skip_conv") for block in getattr(unet, "up_blocks", ()))
        return "its up blocks begin with the latents themselves" if by_latents else None
    return f"unet.forward has been replaced on the instance by {getattr(own, '__qualname__', own)!s}"


def run_whole(unet: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """Return the UNet's output [B, C_out, H, W]."""
    return unet.forward(**{**copy_lists(call), "return_dict": False})[0]


def copy_lists(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the call with lists of its own: ``forward`` pops adapters' states, and the caller's list must survive."""
    return {name: list(value) if isinstance(value, list) else value for name, value in call.items()}


def count_skips(unet: nn.Module) -> int:
    """Return how many skip tensors the encoder makes, conv_in's included; as many as the up blocks have resnets."""
    return sum(len(block.resnets) for block in unet.up_blocks)


def find_reentry(unet: nn.Module, branch: int) -> tuple[int, int]:
    """Return the up block, and the resnet in it, that takes the skip with this index.

    Raises:
        ValueError: there is no such skip.
    """
    skips = count_skips(unet)
    if not 0 <= branch < skips:
        raise ValueError(f"branch must lie in 0 .. {skips - 1} for this {type(unet).__name__}, got {branch}")
    places = [(i, j) for i, block in enumerate(unet.up_blocks) for j in range(len(block.resnets))]
    return places[skips - 1 - branch]


def read_freeu(module: nn.Module) -> tuple[Any, ...]:
    """Return FreeU's factors by up block, None where there are none; of a module itself, at every call of a program.

    They are looked up where Diffusers puts them: asking a module for what it does not have costs four times as much.
    """
    return tuple([vars(block).get(name) for block in getattr(module, "up_blocks", ()) for name in FREEU])


def refuse_freeu(unet: nn.Module) -> str | None:
    """Return why the up blocks' inputs are not what the encoder made, or None; of a facade as well."""
    if any(getattr(block, name, None) for block in unet.up_blocks for name in FREEU):
        return "FreeU changes the skips"
    return None


def cut_block(block: nn.Module, layers: slice, **children: Any) -> Any:
    """Return a facade of a down or up block with some of its layers."""
    found = {name: list(getattr(block, name)) for name in _LAYERS if hasattr(block, name)}
    count = len(found["resnets"])
    cut = {name: _cut_list(each, layers.indices(count), len(each) // count) for name, each in found.items()}
    return make_facade(block, {**cut, **children})


def _cut_list(layers: Sequence[nn.Module], indices: tuple[int, int, int], width: int) -> list[nn.Module]:
    """Return those of a list with some indices; each index has ``width`` layers, as AudioLDM 2's attention has."""
    start, stop, _ = indices
    return list(layers[start * width : stop * width])


def make_stand_ins(
    unet: nn.Module, names: Sequence[str], make: Callable[[str, nn.Module], Callable[..., Any]]
) -> dict[str, Any]:
    """Return stand-ins for the named children; a ModuleList becomes a list of them, absent children stay absent."""
    result: dict[str, Any] = {}
    for name in names:
        child = getattr(unet, name, None)
        if isinstance(child, (nn.ModuleList, list)):
            result[name] = [StandIn(c, make(f"{name}.{i}", c)) for i, c in enumerate(child)]
        elif child is not None:
            result[name] = StandIn(child, make(name, child))
    return result
