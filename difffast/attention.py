"""Fused cross-attention in a stock UNet: text keys and values made once a prompt; :mod:`.attention_maps` on request.

Two kinds of layers: attn2 layers, which attend to the text, and those with added keys (DeepFloyd IF), which attend to
text and pixels in one softmax.

The UNet's text argument carries a *label* (:func:`labelled`) from the patched UNet's call to these layers.  A layer
that finds one may use the operator, remember its text keys and values, and hand out maps.  Without a label a layer is
stock: what a layer does depends on nothing but its call, so that threads and pipelines can share a UNet.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import ops
from .ops._attention_checks import MAX_HEAD_DIM, MAX_KEYS, repeat_rows
from .swap import plain_class, swap_calls, swap_out

if TYPE_CHECKING:
    from .attention_maps import AttentionMaps

_LABEL = "_difffast_label"


class TextKeys:
    """Keys and values of one text tensor, per layer: they do not change over the steps.

    An entry holds as long as the layer's weights do: :func:`weights_state` sees LoRA, hot-swaps, moves and updates.

    Args:
        text: the tensor [B * frames, T, D].
        counts: where "computed" and "reused" are counted.
        frames: rows of the text for each sample.  If they are all equal, keys and values are made for one of them; to
            find out, they are compared, which waits for the device once a text.

    Attributes:
        rows: rows of keys and values for each sample.
    """

    def __init__(self, text: Tensor, counts: Counter[str], frames: int = 1) -> None:
        self.text, self._version = text, _version(text)
        first = text[::frames]
        equal = frames > 1 and torch.equal(text, first.repeat_interleave(frames, 0))
        self._distinct, self.rows = (first, 1) if equal else (text, frames)
        self._entries: dict[nn.Module, tuple[tuple[Any, ...], Tensor, Tensor]] = {}
        self._projected: tuple[list[Any], TextKeys] | None = None
        self._counts = counts

    def belong_to(self, text: Any) -> bool:
        """Whether they are of this very tensor, unchanged; under inference_mode an in-place change cannot be seen."""
        return text is self.text and _version(text) == self._version

    def after(self, projection: nn.Module) -> TextKeys:
        """Those of the text that ``projection`` makes of this one, which is made once as well."""
        state = weights_state(projection)
        if state is not None and self._projected is not None and _same(self._projected[0], state):
            return self._projected[1]
        projected = TextKeys(projection(self.text), self._counts)
        self._projected = None if state is None else (state, projected)
        return projected

    def get(self, layer: nn.Module, project: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]) -> Any:
        """The pair (keys, values) of a layer."""
        state = projections_state(layer)
        entry = self._entries.get(layer)
        if state is not None and entry is not None and _same(entry[0], state):
            self._counts["reused"] += 1
            return entry[1:]
        keys, values = project(layer, self._distinct)
        self._counts["computed"] += 1
        if state is not None:
            self._entries[layer] = (state, keys, values)
        return keys, values


@dataclasses.dataclass(frozen=True)
class Label:
    """What one UNet call allows its cross-attention layers.

    Attributes:
        fused: whether layers use the operator.
        text: the text tensor [B * frames, T, D] that layers see, before it was repeated for parallel decoding.
        repeats: decoder steps in the batch, batch-major.
        keys: where keys and values are remembered; None: nowhere (gradients are wanted).
        collectors: who wants maps.
        size: (height, width) of the latents.
        note: told the reason when a layer runs stock.
        stop: whether the call ends, by :class:`AllCollected`, once every collector has all of its layers.
        frames: rows of the text for each sample.
        sink: rows of zeros that ``text`` stands without; they are in the softmax all the same.
    """

    fused: bool
    text: Tensor
    repeats: int
    keys: TextKeys | None
    collectors: tuple[AttentionMaps, ...]
    size: tuple[int, int]
    note: Callable[[str], None]
    stop: bool = False
    frames: int = 1
    sink: int = 0


class AllCollected(Exception):  # noqa: N818 - no error: it ends a UNet call of which only the maps are wanted
    """Every map that a call was made for has been collected."""


def labelled(text: Tensor, label: Label) -> Tensor:
    """An alias of ``text`` that carries a label; operations on it lose the label, which then means stock."""
    alias = text.view_as(text)
    setattr(alias, _LABEL, label)
    return alias


def relabel(text: Any, copy: Any, repeats: int) -> None:
    """Give ``copy``, which is ``text`` repeated ``repeats`` times a row, the label of ``text``, if it has one."""
    found = getattr(text, _LABEL, None)
    if found is not None and copy is not text:
        setattr(copy, _LABEL, dataclasses.replace(found, repeats=repeats * found.repeats))


#: Inside :func:`over_copies`: the label of the text that attn2 layers get copies of.
_copied: ContextVar[Label | None] = ContextVar("difffast_copied_text", default=None)


@contextlib.contextmanager
def over_copies(text: Any) -> Iterator[None]:
    """Inside the block this thread's attn2 layers take whatever text they get for copies of ``text``, with its label.

    For UNets that repeat their text over frames or pixels: the copies of a sample's row are neighbours.
    """
    token = _copied.set(getattr(text, _LABEL, None))
    try:
        yield
    finally:
        _copied.reset(token)


def processed(unet: nn.Module, text: Any, process: Callable[[Any], Any]) -> Any:
    """``process(text)``, which is what the UNet does to its text first; the label of a text is passed on to the result.

    A projection of the text alone (DeepFloyd IF) is made once a prompt, of the text before it was repeated.
    """
    found = None if torch.compiler.is_compiling() else getattr(text, _LABEL, None)
    projection = _text_projection(unet)
    if found is None or projection is None:
        return process(text)
    keys = None if found.keys is None else found.keys.after(projection)
    projected = process(found.text) if keys is None else keys.text
    label = dataclasses.replace(found, text=projected, keys=keys)
    return labelled(ops.repeat_batch(projected, found.repeats), label)


def _text_projection(unet: nn.Module) -> nn.Module | None:
    """The UNet's projection of its text, if it has one that depends on nothing else."""
    # UNets for video have no such entry.
    return unet.encoder_hid_proj if getattr(unet.config, "encoder_hid_dim_type", None) == "text_proj" else None


def install(unet: nn.Module) -> None:
    """Put :func:`_call` in front of every cross-attention layer; without labelled calls nothing changes."""
    swap_calls(layers_of(unet), _call)


def uninstall(unet: nn.Module) -> None:
    """Undo :func:`install`."""
    for layer in layers_of(unet).values():
        swap_out(layer)


def layers_of(unet: nn.Module) -> dict[str, nn.Module]:
    """The cross-attention layers that can be fused, by name: attn2 layers, and those with added keys."""
    from diffusers.models.attention_processor import Attention

    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention)
        and module.is_cross_attention
        and (name.rpartition(".")[2] == "attn2" or has_added_keys(module))
    }


def has_added_keys(layer: Any) -> bool:
    """Whether a layer attends to the text and to its own input in one softmax."""
    return layer.added_kv_proj_dim is not None


def kind_of(layer: Any) -> str:
    """What reports call a cross-attention layer."""
    return "added-key attention" if has_added_keys(layer) else "attn2"


def _call(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        text = args[0] if args else kwargs.get("encoder_hidden_states")
        # A compiled region must not depend on what a tensor carries beside its data.
        found = None if torch.compiler.is_compiling() else getattr(_text_of(text), _LABEL, _copied.get())
        if found is None:
            return plain(self, hidden_states, *args, **kwargs)
        wanted = [c for c in found.collectors if name in c.layers]
        if not (found.fused or wanted or found.sink):
            return plain(self, hidden_states, *args, **kwargs)
        reason = _obstacle(self, text, args[1:], kwargs, found.sink, hidden_states.ndim, maps=bool(wanted))
        if reason is not None:
            if wanted or found.sink:
                what = "attention maps of {} cannot be collected" if wanted else "{} cannot do without rows of zeros"
                raise RuntimeError(f"{what.format(name)}: {reason}")
            found.note(f"{kind_of(self)} layers run stock: {reason}")
            return plain(self, hidden_states, *args, **kwargs)
        return _attend(name, self, hidden_states, text, found, wanted)

    return call


def _text_of(text: Any) -> Any:
    """The text tensor; with an IP-Adapter it comes in a tuple with the image tokens."""
    return text[0] if isinstance(text, tuple) and text else text


def _obstacle(
    layer: Any,
    text: Any,
    positional: Sequence[Any],
    named: Mapping[str, Any],
    sink: int = 0,
    rank: int | None = None,
    *,
    maps: bool = False,
) -> str | None:
    """Why a layer cannot be fused in this call, or None; decided by the processor that is there now.

    ``rank`` is that of its input; None: what the UNet gives it.  ``maps`` are wanted.
    """
    processor = type(layer.processor)
    if not processor.__module__.startswith("diffusers.") or processor.__name__ not in _PROJECTIONS:
        return f"attention processor {processor.__qualname__}"
    given = [key for key, value in named.items() if value is not None and key != "encoder_hidden_states"]
    if positional or given:
        return f"arguments {', '.join(given) or 'by position'} (masks are not fused)"
    added = has_added_keys(layer)
    if added != (processor.__name__ == _ADDED):
        return f"attention processor {processor.__name__} {'with' if added else 'without'} added keys"
    if isinstance(text, tuple) != (processor.__name__ == "IPAdapterAttnProcessor2_0"):
        return "image tokens without an IP-Adapter processor, or the other way round"
    if isinstance(text, tuple) and any(isinstance(scale, list) for scale in layer.processor.scale):
        return "IP-Adapter scales per image"
    if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return "the layer has hooks, or a forward of its own"
    keys = _text_of(text).shape[1]
    if layer.inner_dim // layer.heads > MAX_HEAD_DIM:
        return f"heads wider than {MAX_HEAD_DIM}"
    if keys > MAX_KEYS and (maps or sink or operator_of(layer) == "joint_attention"):
        return f"more than {MAX_KEYS} text tokens ({keys})"
    if added:
        if rank not in (4, None):
            return "no [B, C, height, width] input"
        return "rows of zeros are none after the layer's norm and biases" if sink else None
    for name in ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k"):
        if getattr(layer, name, None):
            return f"the layer has a {name}"
    if layer.residual_connection or layer.rescale_output_factor != 1:
        return "the layer adds a residual or rescales its output"
    if sink and any(getattr(to, "bias", None) is not None for to in (layer.to_k, layer.to_v)):
        return "keys or values have a bias, so that rows of zeros are no sink"
    return "no [B, N, C] input" if rank not in (3, None) else None


def _attend(name: str, layer: Any, hidden: Tensor, text: Any, found: Label, wanted: Sequence[AttentionMaps]) -> Tensor:
    """What the layer's processor computes, through the operator."""
    project = _PROJECTIONS[type(layer.processor).__name__]
    keys, values = project(layer, found.text) if found.keys is None else found.keys.get(layer, project)
    if found.repeats > 1 and found.keys is not None and found.keys.rows > 1:
        # The operator lets neighbouring rows share keys; here one step's frames are neighbours, not one frame's steps.
        by_sample = (x.unflatten(0, (-1, found.keys.rows)) for x in (keys, values))
        keys, values = (ops.repeat_batch(x, found.repeats).flatten(0, 1) for x in by_sample)
    if isinstance(text, Tensor) and text.shape[1] == 1 and not (wanted or found.sink or has_added_keys(layer)):
        # Softmax over one token is 1: every pixel gets its value, and neither queries nor keys matter.
        out = layer.to_out[1](layer.to_out[0](values))
        return out.repeat_interleave(len(hidden) // len(out), 0).expand(-1, hidden.shape[1], -1)
    query, pixels = _own(layer, hidden)
    keys, values = _by_head(layer, keys), _by_head(layer, values)
    if wanted:
        tokens = sorted({token for collector in wanted for token in collector.columns(keys.shape[2])})
        out, maps = _operate(query, keys, values, pixels, found.sink, map_tokens=tokens)
        for collector in wanted:
            columns = collector.columns(keys.shape[2])
            chosen = maps if columns == tokens else maps[..., [tokens.index(token) for token in columns]]
            by_step = chosen.unflatten(0, (-1, found.repeats, found.frames)).transpose(1, 2).flatten(0, 1)
            collector.add(name, by_step, found.size)
        if found.stop and all(len(collector.latest) == len(collector.layers) for collector in found.collectors):
            raise AllCollected
    else:
        out = _operate(query, keys, values, pixels, found.sink)
    if isinstance(text, tuple):
        for image, scale, to_k, to_v in zip(
            text[1], layer.processor.scale, layer.processor.to_k_ip, layer.processor.to_v_ip, strict=True
        ):
            if scale != 0:
                # More than MAX_KEYS image tokens are possible; PyTorch's attention takes any number.
                pair = (_by_head(layer, to(image).flatten(1, -2)) for to in (to_k, to_v))  # [B, images, tokens, C]
                out = out + scale * nn.functional.scaled_dot_product_attention(query, *pair)
    return _to_out(layer, out, hidden)


def static_keys(
    unet: nn.Module, layers: Mapping[str, nn.Module], call: Mapping[str, Any], keys: TextKeys
) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and values by head of each cross-attention layer that a compiled program shall take from its inputs.

    A compiled region cannot follow labels.  Layers that are not named in the result run stock, and so do all where
    the call has masks or other arguments for them, or where the operator has no kernel for their device and dtype.

    Args:
        layers: from :func:`layers_of`.
        call: arguments of the UNet call.
        keys: of the call's text.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    projection = _text_projection(unet)
    keys = keys if projection is None else keys.after(projection)
    text = keys.text
    given = ("attention_mask", "encoder_attention_mask", "cross_attention_kwargs")
    if keys.rows > 1:  # programs repeat nothing
        return found
    if any(call.get(name) is not None for name in given):
        return found
    operators = {operator_of(layer) for layer in layers.values()}
    slow = {each for each in operators if ops.default_backend(each, text.device, text.dtype) == "reference"}
    for name, layer in layers.items():
        if operator_of(layer) in slow:
            continue
        if _obstacle(layer, text, (), {}) is None:
            pair = keys.get(layer, _PROJECTIONS[type(layer.processor).__name__])
            found[name] = tuple(_by_head(layer, x) for x in pair)
    return found


class Keyed:
    """In place of a cross-attention layer whose text keys and values are known.

    Args:
        layer: the layer.
        keys, values: [B, heads, T, d]; B divides the batch of the layer's input.
    """

    def __init__(self, layer: Any, keys: Tensor, values: Tensor) -> None:
        self._layer, self._keys, self._values = layer, keys, values

    def __call__(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        query, pixels = _own(self._layer, hidden_states)
        out = _operate(query, self._keys, self._values, pixels, 0)
        return _to_out(self._layer, out, hidden_states)


def operator_of(layer: Any) -> str:
    """The operator that a cross-attention layer is fused by."""
    return "joint_attention" if has_added_keys(layer) and not layer.only_cross_attention else "cross_attention"


def _own(layer: Any, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """By head, queries of the layer's input, and keys and values of it where it attends to its input as well.

    The input is [B, N, C], or [B, C, height, width] of a layer with added keys.
    """
    if has_added_keys(layer):
        hidden = layer.group_norm(hidden.flatten(2)).transpose(1, 2)
    pixels = (layer.to_k, layer.to_v) if operator_of(layer) == "joint_attention" else ()
    query, *pair = (_by_head(layer, to(hidden)) for to in (layer.to_q, *pixels))
    return query, tuple(pair)


def _operate(query: Tensor, keys: Tensor, values: Tensor, pixels: Sequence[Tensor], sink: int, **options: Any) -> Any:
    """The layer's operator, on text keys and values and on those of its own input, if there are any; -> out by head."""
    if keys.shape[2] > MAX_KEYS:
        # Long prompts, and texts of other encoders than CLIP's: Kolors has 256 tokens.
        return ops.self_attention(query, *repeat_rows(query, keys, values))
    if pixels:
        return ops.joint_attention(query, keys, values, *pixels, **options)
    return ops.cross_attention(query, keys, values, sink=sink, **options)


def _to_out(layer: Any, out: Tensor, hidden: Tensor) -> Tensor:
    """The layer's output from the operator's and the layer's input."""
    out = layer.to_out[1](layer.to_out[0](out.transpose(1, 2).flatten(2)))
    return out.transpose(1, 2).reshape(hidden.shape) + hidden if has_added_keys(layer) else out


def _by_head(layer: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (layer.heads, -1)).transpose(1, 2)


def _separate(layer: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    return layer.to_k(text), layer.to_v(text)


def _together(layer: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    return layer.to_kv(text).chunk(2, -1)


def _added(layer: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    if layer.norm_cross is not None:
        # A GroupNorm over all tokens: those that only fill up the text count as well.
        text = layer.norm_encoder_hidden_states(text)
    return layer.add_k_proj(text), layer.add_v_proj(text)


#: The processor of layers with added keys.
_ADDED = "AttnAddedKVProcessor2_0"
#: Processors that can be fused -> how they make keys and values.  Modules are called, never their weights used: PEFT's
#: ``.weight`` is the base weight.
_PROJECTIONS: dict[str, Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    "AttnProcessor2_0": _separate,
    "FusedAttnProcessor2_0": _together,
    "IPAdapterAttnProcessor2_0": _separate,
    "CrossFrameAttnProcessor2_0": _separate,  # Text2Video-Zero's, whose frames meet in self-attention only
    _ADDED: _added,
}


def projections_state(layer: Any) -> tuple[Any, ...] | None:
    """All that a layer's text keys and values depend on besides the text; None if that cannot be told."""
    processor = type(layer.processor).__name__
    if processor == "FusedAttnProcessor2_0":
        modules = [layer.to_kv]
    elif processor == _ADDED:
        modules = [layer.add_k_proj, layer.add_v_proj, *([] if layer.norm_cross is None else [layer.norm_cross])]
    else:
        modules = [layer.to_k, layer.to_v]
    state: list[Any] = [processor]
    for module in modules:
        part = weights_state(module)
        if part is None:
            return None
        state += part
    return tuple(state)


def weights_state(projection: nn.Module) -> list[Any] | None:
    """Identity, version and address of every weight, and the switches of LoRA layers; None if there may be more."""
    plain = plain_class(projection) in (nn.Linear, nn.GroupNorm, nn.LayerNorm)
    if not plain and not (
        type(projection).__module__ == "peft.tuners.lora.layer" and plain_class(projection.base_layer) is nn.Linear
    ):
        return None  # quantised, or of a kind not known here
    state: list[Any] = []
    # This runs for every layer at every step: walking a plain layer's tree costs more than all the rest.
    for module in (projection,) if plain else projection.modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return None  # offloaded layer by layer, or observed
    for weight in projection._parameters.values() if plain else projection.parameters():
        if weight is not None:
            state += (weight, _version(weight), weight.data_ptr())
    if not plain:
        state += (
            tuple(projection.active_adapters),
            tuple(projection.merged_adapters),
            projection.disable_adapters,
            tuple(sorted(projection.scaling.items())),
            projection.training,
        )
    return state


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(x is y or (not isinstance(x, Tensor) and x == y) for x, y in zip(a, b, strict=True))
