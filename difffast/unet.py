"""Run any Diffusers UNet in two halves: the encoder (down and mid blocks) and the decoder (up blocks and output).

No block is re-implemented.  Each half is the class's own ``forward``, run on a *view* of the UNet (:mod:`.view`): an
object with the same attributes except that the children of the other half are stand-ins.  While encoding, encoder
children record what they return and decoder children hand their input on.  While decoding, encoder children return
what was recorded and decoder children run.  The UNet itself is never written to, so that threads can share it, and
whatever lives in its children (LoRA layers, offload hooks, attention processors) works as ever.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import attention, decoder
from .conditioning import RESIDUALS
from .ops import repeat_batch
from .view import replaced, view

_ENCODER = (
    "image_latents_proj_in",
    "image_latents_temporal_encoder",
    "conv_in",
    "transformer_in",
    "add_embedding",  # of pooled text, sizes, an image or a hint: the same at every time
    "down_blocks",
    "mid_block",
)
_DECODER = ("up_blocks", "conv_norm_out", "conv_act", "conv_out")

#: Lists of layers in down and up blocks, of which those with one index run one after another.
_LAYERS = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")

#: What runs a function of this module on its arguments: directly, or as a compiled program (:mod:`.programs`).
Run = Callable[..., Any]


def directly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function as it is."""
    return function(*arguments)


#: ControlNet's arguments: what ``forward`` adds to the encoder's outputs.
_ADDED_LATER = RESIDUALS[:2]


@dataclass
class Features:
    """What the encoder half leaves for the decoder half.

    Attributes:
        outputs: per encoder child (``"conv_in"``, ``"down_blocks.0"``, ..., ``"mid_block"``) what it returned.
        batch: first size of the sample they belong to, guidance included.
        parts: what depends on the skips alone, per up-resnet that shares it among all decodes (:mod:`.decoder`).
        unshared: per up-resnet that does not, the reason; empty where sharing was not asked for.
    """

    outputs: Mapping[str, Any]
    batch: int
    parts: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    unshared: Mapping[str, str] = field(default_factory=dict)
    _weights: list[tuple[Tensor, int]] = field(default_factory=list, repr=False)

    def half(self) -> Features:
        """Those of guidance's conditional half."""
        outputs, parts = (conditional_half(each, self.batch) for each in (self.outputs, self.parts))
        return replace(self, outputs=outputs, parts=parts, batch=self.batch // 2)

    def refresh(self, unet: nn.Module) -> None:
        """Make the parts anew if the weights that they depend on have changed since."""
        weights = decoder.weights_state(unet, tuple(self.parts))
        if not decoder.same_weights(weights, self._weights):
            self.parts = decoder.share(unet, skips_of(self.outputs), _bottleneck(self.outputs), tuple(self.parts))
            self._weights = weights


def conditional_half(value: Any, batch: int) -> Any:
    """The second half of all tensors with rows for a batch of [unconditional, conditional]; others stay as they are."""

    def half(tensor: Tensor) -> Tensor:
        rows = tensor.shape[0] if tensor.ndim else 1
        return tensor[rows // 2 :] if rows % batch == 0 else tensor

    return tree_map(half, value)


def skips_of(outputs: Mapping[str, Any]) -> list[Tensor]:
    """The skip tensors [B, C, H, W] in the order in which the encoder made them."""
    first = outputs["transformer_in"][0] if "transformer_in" in outputs else outputs["conv_in"]
    blocks = [out[1] for name, out in outputs.items() if name.startswith("down_blocks.")]
    return [first, *(skip for block in blocks for skip in block)]


def _bottleneck(outputs: Mapping[str, Any]) -> Tensor:
    """What the up blocks begin with: the mid block's output, or the last down block's where there is no mid block."""
    return outputs["mid_block"] if "mid_block" in outputs else list(outputs.values())[-1][0]


def _tiled(outputs: Mapping[str, Any], batch: int, repeats: int) -> Mapping[str, Any]:
    """The outputs for ``repeats`` time steps, batch-major; the bottleneck is always a fresh tensor.

    FreeU and ControlNet-XS write into the bottleneck; every tensor is copied once, however often it occurs (a down
    block returns its last skip tensor twice).
    """
    if repeats > 1:
        return tile(outputs, batch, repeats)
    return {name: tree_map(torch.clone, out) if name == "mid_block" else out for name, out in outputs.items()}


def _without_channels(outputs: Mapping[str, Any], batch: int, repeats: int) -> Mapping[str, Any]:
    """The outputs for up blocks that know the skips: those for ``repeats`` time steps but without channels.

    The last skip meets the bottleneck, which is not repeated yet.
    """
    last = skips_of(outputs)[-1]

    def empty(skip: Tensor) -> Tensor:
        return skip.new_empty((batch * (1 if skip is last else repeats), 0, *skip.shape[2:]))

    changed = {"conv_in": empty(outputs["conv_in"])}
    for name, out in outputs.items():
        if name.startswith("down_blocks."):
            changed[name] = (out[0], tree_map(empty, out[1]))
    if "add_embedding" in outputs:
        changed["add_embedding"] = tile(outputs["add_embedding"], batch, repeats)
    return {**outputs, **changed}


def bind(unet: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call to ``unet`` by name, without those left at their defaults."""
    arguments = _signature(type(unet)).bind(unet, *args, **kwargs).arguments
    return {name: value for name, value in arguments.items() if name != "self"}


@functools.cache
def _signature(cls: type) -> inspect.Signature:
    return inspect.signature(cls.forward)


def with_argument(
    unet: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call to ``unet`` with one of them replaced."""
    bound = _signature(type(unet)).bind(unet, *args, **kwargs)
    bound.arguments[name] = value
    return bound.args[1:], bound.kwargs


def obstacle(unet: nn.Module) -> str | None:
    """Why ``unet`` cannot be split, or None.

    A ``forward`` set on the instance hides the class's own.  It can be followed only if it is that very method
    (accelerate leaves it behind when its hooks go) or one of accelerate's hooks around it.
    """
    own = vars(unet).get("forward")
    if isinstance(own, functools.partial) and own.func.__module__ == "accelerate.hooks" and unet in own.args:
        own = vars(unet).get("_old_forward")
    if own is None or (isinstance(own, types.MethodType) and own == types.MethodType(type(unet).forward, unet)):
        return None
    return f"unet.forward has been replaced on the instance by {getattr(own, '__qualname__', own)!s}"


def run_whole(unet: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """The UNet's output [B, C_out, H, W]."""
    return unet.forward(**{**call, "return_dict": False})[0]


def skips_in(unet: nn.Module) -> int:
    """How many skip tensors the encoder makes, conv_in's included; as many as the up blocks have resnets."""
    return sum(len(block.resnets) for block in unet.up_blocks)


def reentry(unet: nn.Module, branch: int) -> tuple[int, int]:
    """Up block, and resnet in it, that takes the skip with this index.

    Raises:
        ValueError: there is no such skip.
    """
    skips = skips_in(unet)
    if not 0 <= branch < skips:
        raise ValueError(f"branch must lie in 0 .. {skips - 1} for this {type(unet).__name__}, got {branch}")
    places = [(i, j) for i, block in enumerate(unet.up_blocks) for j in range(len(block.resnets))]
    return places[skips - 1 - branch]


def run_recording(unet: nn.Module, call: Mapping[str, Any], branch: int) -> tuple[Tensor, Tensor]:
    """The UNet's output, and the deep feature [B, C, H, W] that :func:`run_reuse` needs."""
    deep: list[Tensor] = []
    i, j = reentry(unet, branch)
    resnet = unet.up_blocks[i].resnets[j]
    of_skip = _skip_channels(unet, branch)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        both = args[0] if args else kwargs["input_tensor"]
        deep.append(both[:, : both.shape[1] - of_skip].contiguous())
        return resnet(*args, **kwargs)

    whole = replaced(unet, {f"up_blocks.{i}.resnets.{j}": _StandIn(resnet, run)})
    return run_whole(whole, call), deep[0]


def _skip_channels(unet: nn.Module, branch: int) -> int:
    """Channels of the skip with this index."""
    widths = unet.config.block_out_channels
    channels = [widths[0]]
    for width, block in zip(widths, unet.down_blocks, strict=True):
        channels += [width] * (len(block.resnets) + len(block.downsamplers or ()))
    return channels[branch]


def run_reuse(unet: nn.Module, call: Mapping[str, Any], deep: Sequence[Tensor], weights: Tensor, branch: int) -> Tensor:
    """The UNet's output [B, C_out, H, W] from its outer layers and deep features of key steps.

    The deep feature contains ControlNet's residual of the middle, and those of the skips below it.

    Args:
        deep: from :func:`run_recording`, one or several.
        weights: [len(deep)], of which the feature is the sum.
        branch: skips made anew besides conv_in's.
    """
    feature = deep[0] if len(deep) == 1 else sum(w * x for w, x in zip(weights.to(deep[0].dtype), deep, strict=True))
    down: list[Any] = []
    left = branch
    for block in unet.down_blocks:
        made = len(block.resnets) + len(block.downsamplers or ())
        if left < made:
            if left:
                down.append(_cut(block, slice(left), downsamplers=None))
            break
        down.append(block)
        left -= made
    call = _without_deep_residuals(call, sum(block in down for block in unet.down_blocks))
    i, j = reentry(unet, branch)
    children = {
        "down_blocks": down,
        "mid_block": _Deep(feature),
        "up_blocks": [_cut(unet.up_blocks[i], slice(j, None)), *list(unet.up_blocks)[i + 1 :]],
    }
    return run_whole(view(unet, children), call)


def _without_deep_residuals(call: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """The call without what ControlNet adds to the middle, and adapters beyond the first ``blocks`` down blocks."""
    changed = dict(call)
    mid = call.get("mid_block_additional_residual")
    if mid is not None:
        changed["mid_block_additional_residual"] = mid.new_zeros(())
    if call.get("down_intrablock_additional_residuals") is not None:
        changed["down_intrablock_additional_residuals"] = list(call["down_intrablock_additional_residuals"])[:blocks]
    return changed


def _cut(block: nn.Module, layers: slice, **children: Any) -> Any:
    """A view of a down or up block with some of its layers."""
    lists = (name for name in _LAYERS if hasattr(block, name))
    return view(block, {**{name: list(getattr(block, name))[layers] for name in lists}, **children})


class _Deep:
    """In place of the mid block: returns a feature."""

    has_cross_attention = False

    def __init__(self, feature: Tensor) -> None:
        self._feature = feature

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        return self._feature


def encode(unet: nn.Module, call: Mapping[str, Any], *, share: bool = False, run: Run = directly) -> Features:
    """Run the encoder half.

    Args:
        unet: a Diffusers UNet whose children are named conv_in, down_blocks, mid_block, up_blocks, conv_out.
        call: its arguments by name (see :func:`bind`); ``sample`` is [B, C, H, W].
        share: make what depends on the skips alone once, for all decodes (:mod:`.decoder`).
        run: runs :func:`run_encoder`.

    Returns:
        The features that :func:`decode` needs, with ControlNet's residuals.
    """
    names, unshared = decoder.shareable(unet) if share else ((), {})
    weights = decoder.weights_state(unet, names)
    outputs, parts = run(run_encoder, unet, call, names)
    return Features(outputs, call["sample"].shape[0], parts, unshared, weights)


def run_encoder(
    unet: nn.Module, call: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """What every encoder child returned, and the shared parts of the up-resnets in ``names``."""
    outputs: dict[str, Any] = {}

    def record(name: str, child: nn.Module) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            outputs[name] = child(*args, **kwargs)
            return outputs[name]

        return run

    def hand_on(_name: str, _child: nn.Module) -> Callable[..., Any]:
        return lambda hidden_states, *_args, **_kwargs: hidden_states

    half = view(unet, {**_stand_ins(unet, _ENCODER, record), **_stand_ins(unet, _DECODER, hand_on)})
    # Adapters' lists are popped by forward; the caller's list must survive.
    arguments = {name: list(value) if isinstance(value, list) else value for name, value in call.items()}
    half.forward(**{**arguments, **dict.fromkeys(arguments.keys() & _ADDED_LATER), "return_dict": False})
    outputs = _with_residuals(outputs, call)
    return outputs, decoder.share(unet, skips_of(outputs), _bottleneck(outputs), names)


def _with_residuals(outputs: dict[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs plus ControlNet's residuals, which ``forward`` adds between its halves."""
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


def _forecast(known: Sequence[Any], weights: Tensor, batch: int) -> Any:
    """Weighted sums of features, a set of weights for each time step, batch-major.

    Args:
        known: the outputs of n key steps, or the same part of each.
        weights: [k, n].
        batch: samples; a tensor may have m rows for each.
    """
    first = known[0]
    if isinstance(first, Mapping):
        return {name: _forecast([each[name] for each in known], weights, batch) for name in first}
    if not isinstance(first, Tensor):
        return tuple(_forecast(parts, weights, batch) for parts in zip(*known, strict=True))
    by_step = weights.to(first.dtype).T.reshape(len(known), 1, -1, *(1 for _ in first.shape))
    samples = (x.unflatten(0, (batch, 1, -1)) for x in known)  # [B, 1, m, ...]
    return sum(x * w for x, w in zip(samples, by_step, strict=True)).flatten(0, 2)


def decode(
    unet: nn.Module,
    features: Features,
    call: Mapping[str, Any],
    timesteps: Tensor,
    *,
    earlier: Sequence[Features] = (),
    weights: Tensor | None = None,
    run: Run = directly,
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
        run: runs :func:`run_decoder`.

    Returns:
        k tensors [B, C_out, H, W]: what ``unet.forward`` returns for each time step, given these features.

    Raises:
        ValueError: a conditioning tensor cannot be repeated over the steps.
    """
    features.refresh(unet)
    known = [each.outputs for each in earlier]
    return run(run_decoder, unet, features.outputs, features.parts, features.batch, call, timesteps, known, weights)


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
        outputs = _forecast([outputs, *earlier], weights, batch)
    elif parts:
        children["up_blocks"] = decoder.up_blocks(unet, skips_of(outputs), parts, repeats)
        outputs = _without_channels(outputs, batch, repeats)
    else:
        outputs = _tiled(outputs, batch, repeats)

    def replay(name: str, _child: nn.Module) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: outputs[name]

    half = view(unet, {**_stand_ins(unet, _ENCODER, replay), **children})
    conditioning = {name: value for name, value in call.items() if name not in ("sample", "timestep", *RESIDUALS)}
    if repeats > 1:
        tiled = tile(conditioning, batch, repeats)
        attention.relabel(conditioning.get("encoder_hidden_states"), tiled.get("encoder_hidden_states"), repeats)
        conditioning = tiled
    sample = call["sample"]
    result = half.forward(
        **{
            **conditioning,
            "sample": sample.new_zeros(()).expand(batch * repeats, *sample.shape[1:]),
            "timestep": timesteps.repeat(batch),
            "return_dict": False,
        }
    )[0]
    return result.unflatten(0, (batch, repeats)).unbind(1)


#: Arguments whose rows are adapters, not samples.
_PER_ADAPTER = ("ip_adapter_masks",)


def tree_map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply ``function`` to every tensor inside nested dicts, lists and tuples; other leaves stay as they are.

    So do those in entries of dicts that are not made of samples.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: item if key in _PER_ADAPTER else tree_map(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(tree_map(function, item) for item in value)
    return value


def tile(value: Any, batch: int, repeats: int) -> Any:
    """Repeat every tensor in a nested structure ``repeats`` times per sample, batch-major.

    A tensor whose first size is m * batch holds m rows a sample, which stay together.  Scalars and, for
    ``batch`` > 1, tensors with a first size of 1 broadcast as they are.

    Raises:
        ValueError: a first size that is no multiple of ``batch``.
    """
    done: list[tuple[Tensor, Tensor]] = []  # compared by `is`: a compiled program cannot hold an id

    def repeated(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or (tensor.shape[0] == 1 and batch > 1):
            return tensor
        if tensor.shape[0] % batch:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} cannot be repeated for a batch of {batch}: "
                "its first size must be a multiple of the batch"
            )
        for original, copy in done:
            if original is tensor:
                return copy
        rows = tensor.shape[0] // batch
        if rows == 1:
            copy = repeat_batch(tensor, repeats)
        else:
            copy = repeat_batch(tensor.unflatten(0, (batch, rows)), repeats).flatten(0, 1)
        done.append((tensor, copy))
        return copy

    return tree_map(repeated, value)


class _StandIn:
    """In place of a child module: calls ``run``, and is the child for everything else (``resnets``, flags, ...)."""

    def __init__(self, child: nn.Module, run: Callable[..., Any]) -> None:
        self._child, self._run = child, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)


def _stand_ins(
    unet: nn.Module, names: Sequence[str], make: Callable[[str, nn.Module], Callable[..., Any]]
) -> dict[str, Any]:
    """Stand-ins for the named children; a ModuleList becomes a list of them, absent children stay absent."""
    result: dict[str, Any] = {}
    for name in names:
        child = getattr(unet, name, None)
        if isinstance(child, (nn.ModuleList, list)):
            result[name] = [_StandIn(c, make(f"{name}.{i}", c)) for i, c in enumerate(child)]
        elif child is not None:
            result[name] = _StandIn(child, make(name, child))
    return result
