"""Fused cross-attention in a stock UNet: text keys and values made once a prompt, attention maps on request.

Two kinds of layers: attn2 layers, which attend to the text, and those with added keys (DeepFloyd IF), which attend to
text and pixels in one softmax.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._attention_checks import MAX_HEAD_DIM, MAX_KEYS, repeat_rows
from .context import CURRENT, AllCollected, CallContext, CrossCall, MapSink, Text, find_context, set_projected_text
from .kind import FOREIGN_PARTS, LayerKind, ProgramCall, is_masked, name_layer
from .text_kv import TextKV
from .text_projections import ADDED, PROJECTIONS, project_text, read_projections, split_heads, watch_projections

#: Operators that cross-attention layers are fused by.
_OPERATORS = ("cross_attention", "joint_attention")
#: Arguments of a UNet call that reach the layers and that compiled programs do not serve.
_FOR_LAYERS = ("attention_mask", "encoder_attention_mask", "cross_attention_kwargs")


class CrossAttention(LayerKind):
    """attn2 layers, and layers with added keys."""

    name = "cross-attention layers"

    def find(self, unet: nn.Module) -> dict[str, nn.Module]:
        return find_layers(unet)

    def refuse(self, layer: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        text = args[0] if args else kwargs.get("encoder_hidden_states")
        return refuse_call(layer, text, args[1:], kwargs, rank=hidden.ndim)

    def forward(self, layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        text = args[0] if args else kwargs.get("encoder_hidden_states")
        return _attend(layer, hidden, text, find_context())

    def wrap(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """As for any kind, but maps may be wanted of a layer that is not fused, and rows of zeros need the operator."""

        def call(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            context = None if torch.compiler.is_compiling() else CURRENT.get()
            text = args[0] if args else kwargs.get("encoder_hidden_states")
            if context is None or not _is_seen(text, context.projected or context.text):
                return plain(layer, hidden_states, *args, **kwargs)
            edit = context.edit
            name = name_layer(layer) if context.sinks or edit is not None else ""
            wanted = [sink for sink in context.sinks if name in sink.layers]
            edited = edit is not None and edit.edits_cross(name)
            sink = (context.projected or context.text).sink
            if not (context.fused or wanted or sink or edited):
                return plain(layer, hidden_states, *args, **kwargs)
            rank = hidden_states.ndim
            reason = refuse_call(layer, text, args[1:], kwargs, rank=rank, sink=sink, maps=bool(wanted))
            if reason is None:
                return _attend(layer, hidden_states, text, context, name, wanted)
            if wanted or sink or edited:
                what = "attention maps of {} cannot be collected" if wanted else "{} cannot do without rows of zeros"
                what = what if wanted or sink else "the attention of {} cannot be edited"
                raise RuntimeError(f"{what.format(name_layer(layer))}: {reason}")
            context.note(f"{name_kind(layer)} layers run stock: {reason}")
            return plain(layer, hidden_states, *args, **kwargs)

        return call

    def as_inputs(self, layers: Mapping[str, nn.Module], call: ProgramCall) -> dict[str, Any]:
        """Return the keys and values by head of each layer; none where the call has masks or the like for them."""
        if call.kv is None or is_masked(call.arguments, _FOR_LAYERS):
            return {}
        projection = find_text_projection(call.unet)
        kv = call.kv if projection is None else call.kv.project(projection)
        if kv.rows > 1:  # programs repeat nothing
            return {}
        slow = tuple(op for op in _OPERATORS if ops.default_backend(op, kv.text.device, kv.text.dtype) == "reference")
        found = kv.recall_all(layers, slow)
        if found is not None:
            return found
        found = {}
        for name, layer in layers.items():
            if name_operator(layer) not in slow and refuse_call(layer, kv.text, (), {}) is None:
                found[name] = kv.get(layer, read_projections(layer), project_text)
        kv.remember_all(layers, slow, found, watch_projections(layers.values()))
        return found

    def stand_in(self, layer: Any, value: Any) -> Callable[..., Any]:
        keys, values = value

        def attend(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            query, pixels = _project_own(layer, hidden)
            return _project_out(layer, _operate(query, keys, values, pixels, 0), hidden)

        return attend

    def describe(self, layers: Mapping[str, Any], weight: Tensor, *, compiled: bool) -> Iterator[tuple[str, str]]:
        kinds = Counter((name_kind(layer), name_operator(layer)) for layer in layers.values())
        for (kind, operator), count in kinds.items():
            backend = ops.default_backend(operator, weight.device, weight.dtype)
            yield f"{kind} ({count} layers)", f"{operator} ({backend}), text keys and values once a prompt"


def find_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """Return the cross-attention layers that can be fused, by name: attn2 layers, and those with added keys."""
    from diffusers.models.attention_processor import Attention

    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention)
        and module.is_cross_attention
        and (name.rpartition(".")[2] == "attn2" or has_added_keys(module))
    }


def has_added_keys(layer: Any) -> bool:
    """Return whether a layer attends to the text and to its own input in one softmax."""
    return layer.added_kv_proj_dim is not None


def name_kind(layer: Any) -> str:
    """Return what reports call a cross-attention layer."""
    return "added-key attention" if has_added_keys(layer) else "attn2"


def name_operator(layer: Any) -> str:
    """Return the operator that a cross-attention layer is fused by."""
    return "joint_attention" if has_added_keys(layer) and not layer.only_cross_attention else "cross_attention"


def process_text(unet: nn.Module, text: Any, process: Callable[[Any], Any]) -> Any:
    """Return ``process(text)``, which is what the UNet does to its text first, and let the layers expect the result.

    A projection of the text alone (DeepFloyd IF) is made once a prompt, of the text before it was repeated.
    """
    context = find_context()
    projection = find_text_projection(unet)
    if context is None or projection is None or not _is_seen(text, context.text):
        return process(text)
    found = context.text
    kv = None if found.kv is None else found.kv.project(projection)
    projected = process(found.original) if kv is None else kv.text
    seen = ops.repeat_batch(projected, found.repeats)
    set_projected_text(context, dataclasses.replace(found, seen=seen, original=projected, kv=kv))
    return seen


def find_text_projection(unet: nn.Module) -> nn.Module | None:
    """Return the UNet's projection of its text, if it has one that depends on nothing else."""
    # UNets for video have no such entry.
    return unet.encoder_hid_proj if getattr(unet.config, "encoder_hid_dim_type", None) == "text_proj" else None


def _is_seen(text: Any, expected: Text | None) -> bool:
    """Return whether a layer was given the text that its call's context speaks of."""
    if expected is None:
        return False
    return expected.seen is None or text is expected.seen or _text_of(text) is expected.seen


def _text_of(text: Any) -> Any:
    """Return the text tensor; with an IP-Adapter it comes in a tuple with the image tokens."""
    return text[0] if isinstance(text, tuple) and text else text


def refuse_call(
    layer: Any,
    text: Any,
    positional: Sequence[Any],
    named: Mapping[str, Any],
    *,
    rank: int | None = None,
    sink: int = 0,
    maps: bool = False,
) -> str | None:
    """Return why a layer cannot be fused in this call, or None; decided by the processor that is there now.

    Args:
        text: what the layer attends to.
        positional, named: its other arguments.
        rank: dimensions of its input; None: what the UNet gives it.
        sink: rows of zeros that the text stands without.
        maps: whether attention maps are wanted.
    """
    processor = type(layer.processor)
    if not processor.__module__.startswith("diffusers.") or processor.__name__ not in PROJECTIONS:
        return f"attention processor {processor.__qualname__}"
    given = [key for key, value in named.items() if value is not None and key != "encoder_hidden_states"]
    if positional or given:
        return f"arguments {', '.join(given) or 'by position'} (masks are not fused)"
    added = layer.added_kv_proj_dim is not None  # has_added_keys, without a call: every layer asks at every step
    if added != (processor.__name__ == ADDED):
        return f"attention processor {processor.__name__} {'with' if added else 'without'} added keys"
    if isinstance(text, tuple) != (processor.__name__ == "IPAdapterAttnProcessor2_0"):
        return "image tokens without an IP-Adapter processor, or the other way round"
    if isinstance(text, tuple) and any(isinstance(scale, list) for scale in layer.processor.scale):
        return "IP-Adapter scales per image"
    if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return "the layer has hooks, or a forward of its own"
    keys = (text[0] if isinstance(text, tuple) else text).shape[1]
    if layer.inner_dim // layer.heads > MAX_HEAD_DIM:
        return f"heads wider than {MAX_HEAD_DIM}"
    if keys > MAX_KEYS and (maps or sink or name_operator(layer) == "joint_attention"):
        return f"more than {MAX_KEYS} text tokens ({keys})"
    if rank is not None and rank != (4 if added else 3):
        return "no [B, C, height, width] input" if added else "no [B, N, C] input"
    if added:
        return "rows of zeros are none after the layer's norm and biases" if sink else None
    return _refuse_parts(layer, sink)


def _refuse_parts(layer: Any, sink: int) -> str | None:
    """Return why an attn2 layer itself cannot be fused, or None."""
    for name in FOREIGN_PARTS:
        if getattr(layer, name, None):
            return f"the layer has a {name}"
    if layer.residual_connection or layer.rescale_output_factor != 1:
        return "the layer adds a residual or rescales its output"
    if sink and any(getattr(to, "bias", None) is not None for to in (layer.to_k, layer.to_v)):
        return "keys or values have a bias, so that rows of zeros are no sink"
    return None


def _attend(
    layer: Any, hidden: Tensor, text: Any, context: CallContext, name: str = "", wanted: Sequence[MapSink] = ()
) -> Tensor:
    """Compute what the layer's processor computes, through the operator."""
    found = context.projected or context.text
    if found.kv is None:
        keys, values = project_text(layer, found.original)
    else:
        keys, values = found.kv.get(layer, read_projections(layer), project_text)
        if found.repeats > 1 and found.kv.rows > 1:
            # The operator lets neighbouring rows share keys; here the frames of one step are neighbours.
            by_sample = (x.unflatten(0, (-1, found.kv.rows)) for x in (keys, values))
            keys, values = (ops.repeat_batch(x, found.repeats).flatten(0, 1) for x in by_sample)
    if (
        isinstance(text, Tensor)
        and text.shape[1] == 1
        and not (wanted or found.sink or layer.added_kv_proj_dim or context.edit)
    ):
        # Softmax over one token is 1: every pixel gets its value, and neither queries nor keys matter.
        out = layer.to_out[1](layer.to_out[0](values.transpose(1, 2).flatten(2)))
        return out.repeat_interleave(len(hidden) // len(out), 0).expand(-1, hidden.shape[1], -1)
    query, pixels = _project_own(layer, hidden)

    def attend() -> Tensor:
        if wanted:
            return _attend_with_maps(query, keys, values, pixels, context, name, wanted)
        return _operate(query, keys, values, pixels, found.sink)

    if context.edit is not None and context.edit.edits_cross(name):
        call = _make_cross_call(layer, name, query, keys, values, context, bool(wanted))
        out = context.edit.attend(call, attend)
    else:
        out = attend()
    if isinstance(text, tuple):
        out = _add_images(layer, query, text[1], out)
    return _project_out(layer, out, hidden)


def _make_cross_call(
    layer: Any, name: str, query: Tensor, keys: Tensor, values: Tensor, context: CallContext, watched: bool
) -> CrossCall:
    """Return a layer's call as an edit meets it."""
    repeats = (context.projected or context.text).repeats

    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return _operate(query, keys, values, (), 0)

    def project(kv: TextKV) -> tuple[Tensor, Tensor]:
        return kv.get(layer, read_projections(layer), project_text)

    return CrossCall(layer, name, query, keys, values, repeats, context.size, watched, attend, project)


def _attend_with_maps(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pixels: Sequence[Tensor],
    context: CallContext,
    name: str,
    wanted: Sequence[MapSink],
) -> Tensor:
    """Attend, and hand out the maps of the tokens that each sink has chosen."""
    found = context.projected or context.text
    tokens = sorted({token for sink in wanted for token in sink.columns(keys.shape[2])})
    out, maps = _operate(query, keys, values, pixels, found.sink, map_tokens=tokens)
    for sink in wanted:
        columns = sink.columns(keys.shape[2])
        chosen = maps if columns == tokens else maps[..., [tokens.index(token) for token in columns]]
        by_step = chosen.unflatten(0, (-1, found.repeats, found.frames)).transpose(1, 2).flatten(0, 1)
        sink.add(name, by_step, context.size)
    if context.stop and all(len(sink.latest) == len(sink.layers) for sink in context.sinks):
        raise AllCollected
    return out


def _add_images(layer: Any, query: Tensor, images: Sequence[Tensor], out: Tensor) -> Tensor:
    """Add what the IP-Adapters' image tokens give, which have keys and values of their own."""
    adapters = zip(images, layer.processor.scale, layer.processor.to_k_ip, layer.processor.to_v_ip, strict=True)
    for image, scale, to_k, to_v in adapters:
        if scale != 0:
            # More than MAX_KEYS image tokens are possible; PyTorch's attention takes any number.
            pair = (split_heads(layer, to(image).flatten(1, -2)) for to in (to_k, to_v))  # [B, images, tokens, C]
            out = out + scale * nn.functional.scaled_dot_product_attention(query, *pair)
    return out


def _project_own(layer: Any, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return, by head, queries of the layer's input, and its keys and values where it attends to its input as well.

    The input is [B, N, C], or [B, C, height, width] of a layer with added keys.
    """
    pixels: tuple[Any, ...] = ()
    if layer.added_kv_proj_dim is not None:
        hidden = layer.group_norm(hidden.flatten(2)).transpose(1, 2)
        pixels = () if layer.only_cross_attention else (layer.to_k, layer.to_v)
    query, *pair = (split_heads(layer, to(hidden)) for to in (layer.to_q, *pixels))
    return query, tuple(pair)


def _operate(query: Tensor, keys: Tensor, values: Tensor, pixels: Sequence[Tensor], sink: int, **options: Any) -> Any:
    """Call the layer's operator on text keys and values, and on those of its own input if there are any."""
    if keys.shape[2] > MAX_KEYS:
        # Long prompts, and texts of other encoders than CLIP's: Kolors has 256 tokens.
        return ops.self_attention(query, *repeat_rows(query, keys, values))
    if pixels:
        return ops.joint_attention(query, keys, values, *pixels, **options)
    return ops.cross_attention(query, keys, values, sink=sink, **options)


def _project_out(layer: Any, out: Tensor, hidden: Tensor) -> Tensor:
    """Return the layer's output from the operator's and the layer's input."""
    out = layer.to_out[1](layer.to_out[0](out.transpose(1, 2).flatten(2)))
    return out if layer.added_kv_proj_dim is None else out.transpose(1, 2).reshape(hidden.shape) + hidden
