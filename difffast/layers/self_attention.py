"""Fused self-attention in a stock UNet, where the operator beats PyTorch's attention: on CPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..ops._attention_checks import MAX_HEAD_DIM
from ..ops._local import load
from ..ops.self_attention import choose
from ..surgery.pristine import is_wrapped
from .context import CallContext
from .kind import FOREIGN_PARTS, LayerKind, ProgramCall, is_masked, name_layer

#: Processors that can be fused.
_PROCESSORS = ("AttnProcessor2_0", "FusedAttnProcessor2_0")
#: Those that compute something else on purpose: perturbed-attention guidance, Text2Video-Zero.  No report complains.
_ON_PURPOSE = (
    "PAGIdentitySelfAttnProcessor2_0",
    "PAGCFGIdentitySelfAttnProcessor2_0",
    "CrossFrameAttnProcessor",
    "CrossFrameAttnProcessor2_0",
)
#: Arguments that a pipeline gives to every layer and these processors ignore.
_IGNORED = ("ip_adapter_masks",)


class SelfAttention(LayerKind):
    """Attention of pixels to pixels, or of frames to frames."""

    name = "self-attention layers"
    edits = True

    def find(self, unet: nn.Module) -> dict[str, nn.Module]:
        from diffusers.models.attention_processor import Attention

        return {
            name: module
            for name, module in unet.named_modules()
            if isinstance(module, Attention)
            and not module.is_cross_attention
            and module.added_kv_proj_dim is None
            and module.inner_dim // module.heads <= MAX_HEAD_DIM
            and not any(getattr(module, part, None) for part in FOREIGN_PARTS)
            and not module.residual_connection
            and module.rescale_output_factor == 1
        }

    def may_pay(self, weight: Tensor) -> bool:
        return weight.device.type in ("cpu", "meta") or load(weight.device)  # on a GPU by proof alone

    def pays(self, layer: Any, hidden: Tensor) -> bool:
        if hidden.ndim != 3:
            return False
        if hidden.is_cpu:
            return ops.default_backend("self_attention", hidden.device, hidden.dtype) != "sdpa"
        if not load(hidden.device):  # without proofs all would ask in vain
            return False
        batch, pixels, _ = hidden.shape
        dim = layer.inner_dim // layer.heads
        parts = 3 if type(layer.processor).__name__ == "FusedAttnProcessor2_0" else 1
        row = parts * layer.inner_dim
        return choose(hidden, (batch, layer.heads, pixels, dim), (pixels * row, dim, row, 1)) != "sdpa"

    def refuse(self, layer: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        processor = type(layer.processor)
        if not processor.__module__.startswith("diffusers.") or processor.__name__ not in _PROCESSORS:
            return "" if processor.__name__ in _ON_PURPOSE else f"attention processor {processor.__qualname__}"
        given = [key for key, value in kwargs.items() if value is not None and key not in _IGNORED]
        if given or any(value is not None for value in args):
            return f"arguments {', '.join(given) or 'by position'}"
        return "the layer has hooks, or a forward of its own" if is_wrapped(layer) else None

    def forward(self, layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Modules are called, never their weights used: PEFT's `.weight` is the base weight.
        if type(layer.processor).__name__ == "FusedAttnProcessor2_0":
            projected = layer.to_qkv(hidden).chunk(3, -1)
        else:
            projected = (layer.to_q(hidden), layer.to_k(hidden), layer.to_v(hidden))
        query, key, value = (x.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in projected)
        out = ops.self_attention(query, key, value).transpose(1, 2).flatten(2)
        return layer.to_out[1](layer.to_out[0](out))

    def edit(self, layer: Any, context: CallContext, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        hidden, others = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        if context.edit is None or hidden.ndim != 3:
            return None
        name = name_layer(layer)
        rows = context.edit.share_rows(name, hidden.shape[0], hidden.shape[1])
        if rows is None:
            return None
        given = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        reason = self.refuse(layer, hidden, others, given)
        if reason is not None:
            raise RuntimeError(f"the attention of {name} cannot be edited: {reason or 'others compute it on purpose'}")
        return self._share(layer, hidden, rows)

    def _share(self, layer: Any, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Attend with the queries and keys of ``rows``, which are made once each, and every row's own values."""
        sources = sorted(set(rows))
        shared, places = hidden[sources], [sources.index(row) for row in rows]
        if type(layer.processor).__name__ == "FusedAttnProcessor2_0":
            query, key, _ = layer.to_qkv(shared).chunk(3, -1)
            value = layer.to_qkv(hidden).chunk(3, -1)[2]
        else:
            query, key, value = layer.to_q(shared), layer.to_k(shared), layer.to_v(hidden)
        query, key, value = (x.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in (query, key, value))
        out = ops.self_attention(query[places], key[places], value).transpose(1, 2).flatten(2)
        return layer.to_out[1](layer.to_out[0](out))

    def as_inputs(self, layers: Mapping[str, nn.Module], call: ProgramCall) -> dict[str, Any]:
        sample = call.arguments["sample"]
        if not call.fused or not _wins(sample) or is_masked(call.arguments, ("attention_mask",)):
            return {}
        given = dict.fromkeys(call.arguments.get("cross_attention_kwargs") or {}, True)
        return {name: () for name, layer in layers.items() if self.refuse(layer, sample, (), given) is None}

    def stand_in(self, layer: Any, value: Any) -> Callable[..., Any]:
        return lambda hidden, *_, **__: self.forward(layer, hidden)

    def describe(self, layers: Mapping[str, Any], weight: Tensor, *, compiled: bool) -> Iterator[tuple[str, str]]:
        if layers and _wins(weight):
            backend = ops.default_backend("self_attention", weight.device, weight.dtype)
            yield f"self-attention ({len(layers)} layers)", f"self_attention ({backend})"


def _wins(x: Tensor) -> bool:
    """Return whether a kernel is the faster one for inputs with the device and the dtype of this one."""
    return x.device.type == "cpu" and ops.default_backend("self_attention", x.device, x.dtype) != "sdpa"
