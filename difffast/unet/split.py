"""Run any Diffusers UNet in two halves: the encoder (down and mid blocks) and the decoder (up blocks and output).

No block is re-implemented.  Each half is the class's own ``forward``, run on a *facade* of the UNet
(:mod:`difffast.surgery.facade`): an object with the same attributes except that the children of the other half are
stand-ins.  While encoding, encoder children record what they return and decoder children hand their input on.  While
decoding, encoder children return what was recorded and decoder children run.  The UNet itself is never written to, so
that threads can share it, and whatever lives in its children (LoRA layers, offload hooks, attention processors) works
as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..layers.context import repeat_text, restore_text
from ..surgery.facade import make_facade
from . import shared_skips
from .features import Features, drop_channels, extrapolate, find_bottleneck, find_skips, tile, tile_outputs
from .parts import DECODER, ENCODER, RESIDUALS, Execute, copy_lists, execute_eagerly, make_stand_ins

#: ControlNet's arguments: what ``forward`` adds to the encoder's outputs.
_ADDED_LATER = RESIDUALS[:2]


def encode(
    unet: nn.Module, call: Mapping[str, Any], *, share: bool = False, execute: Execute = execute_eagerly
) -> Features:
    """Run the encoder half.

    Args:
        unet: a Diffusers UNet whose children are named conv_in, down_blocks, mid_block, up_blocks, conv_out.
        call: its arguments by name (:func:`difffast.surgery.calls.bind_arguments`); ``sample`` is [B, C, H, W].
        share: make what depends on the skips alone once, for all decodes (:mod:`.shared_skips`).
        execute: runs :func:`run_encoder`.

    Returns:
        The features that :func:`decode` needs, with ControlNet's residuals.
    """
    names, unshared = shared_skips.find_shareable(unet) if share else ((), {})
    weights = shared_skips.read_weights(unet, names)
    outputs, parts = execute(run_encoder, unet, call, names)
    return Features(outputs, call["sample"].shape[0], parts, unshared, weights)


def run_encoder(
    unet: nn.Module, call: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """Return what every encoder child returned, and the shared parts of the up-resnets in ``names``."""
    outputs: dict[str, Any] = {}

    def record(name: str, child: nn.Module) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            outputs[name] = child(*args, **kwargs)
            return outputs[name]

        return run

    def hand_on(_name: str, _child: nn.Module) -> Callable[..., Any]:
        return lambda hidden_states, *_args, **_kwargs: hidden_states

    children = {**make_stand_ins(unet, ENCODER, record), **make_stand_ins(unet, DECODER, hand_on)}
    half = make_facade(unet, {**children, "up_blocks": []})
    arguments = copy_lists(call)
    without = {name: None for name in _ADDED_LATER if name in arguments}  # torch 2.11 traces no `keys() &`
    half.forward(**{**arguments, **without, "return_dict": False})
    outputs = _add_residuals(outputs, call)
    if not names:
        return outputs, {}
    return outputs, shared_skips.share(unet, find_skips(outputs), find_bottleneck(outputs), names)


def _add_residuals(outputs: dict[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """Add ControlNet's residuals to the outputs, which ``forward`` does between its halves."""
    down, mid = (call.get(name) for name in _ADDED_LATER)
    if down is None:
        return outputs
    left = iter(down)
    added = {**outputs, "conv_in": outputs["conv_in"] + next(left)}
    for name, out in outputs.items():
        if name.startswith("down_blocks."):
            added[name] = (out[0], tuple(skip + next(left) for skip in out[1]))
    last, out = list(outputs.items())[-1]
    added[last] = out + mid if last == "mid_block" else (out[0] + mid, *added[last][1:])
    return added


def decode(
    unet: nn.Module,
    features: Features,
    call: Mapping[str, Any],
    timesteps: Tensor,
    *,
    earlier: Sequence[Features] = (),
    weights: Tensor | None = None,
    execute: Execute = execute_eagerly,
) -> tuple[Tensor, ...]:
    """Run the decoder half for one or several time steps as one batch.

    The batch is batch-major (all time steps of the first sample, then of the second, ...), so that layers which
    chunk the batch into guidance branches find each branch whole.

    Args:
        unet: the UNet that made ``features``.
        features: from :func:`encode`.
        call: the arguments of the call; ``sample`` gives shape, dtype and device, its values are never read.
        timesteps: [k], the time of each step to decode.
        earlier: features of n - 1 key steps before, to extrapolate over.
        weights: [k, n], of which each time step's features are the sum; the first is for ``features``.
        execute: runs :func:`run_decoder`.

    Returns:
        k tensors [B, C_out, H, W]: what ``unet.forward`` returns for each time step, given these features.

    Raises:
        ValueError: a conditioning tensor cannot be repeated over the steps.
    """
    features.refresh(unet)
    known = [each.outputs for each in earlier]
    return execute(run_decoder, unet, features.outputs, features.parts, features.batch, call, timesteps, known, weights)


def run_decoder(
    unet: nn.Module,
    outputs: Mapping[str, Any],
    parts: Mapping[str, tuple[Tensor, Tensor]],
    batch: int,
    call: Mapping[str, Any],
    timesteps: Tensor,
    earlier: Sequence[Mapping[str, Any]] = (),
    weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """:func:`decode` from the encoder's outputs and the shared parts."""
    repeats = timesteps.numel()
    children: dict[str, Any] = {}
    if earlier:
        outputs = extrapolate([outputs, *earlier], weights, batch)
    elif parts:
        children["up_blocks"] = shared_skips.make_up_blocks(unet, find_skips(outputs), parts, repeats)
        outputs = drop_channels(outputs, batch, repeats)
    else:
        outputs = tile_outputs(outputs, batch, repeats)

    def replay(name: str, _child: nn.Module) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: outputs[name]

    half = make_facade(unet, {**make_stand_ins(unet, ENCODER, replay), **children})
    given = {name: value for name, value in call.items() if name not in ("sample", "timestep", *RESIDUALS)}
    conditioning = tile(given, batch, repeats) if repeats > 1 else given
    sample = call["sample"]
    token = repeat_text(given.get("encoder_hidden_states"), conditioning.get("encoder_hidden_states"), repeats)
    try:
        result = half.forward(
            **{
                **conditioning,
                "sample": sample.new_zeros(()).expand(batch * repeats, *sample.shape[1:]),
                "timestep": timesteps.repeat(batch),
                "return_dict": False,
            }
        )[0]
    finally:
        restore_text(token)
    return result.unflatten(0, (batch, repeats)).unbind(1)
