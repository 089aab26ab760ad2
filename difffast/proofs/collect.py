"""Which keys a UNet asks for: it is run dry, on the meta device, with its layers patched as difffast patches them."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..layers.context import CallContext, Text, use_context
from ..layers.cross_attention import process_text
from ..layers.registry import LAYERS
from ..layers.resnet import Resnet
from ..models.configs import unet as make_unet
from ..ops import _local
from ..ops._keys import Key
from ..surgery.memory_format import lies_channels_last, suits_channels_last
from ..surgery.subclass import plain_class
from ..unet.features import Features
from ..unet.shared_skips import read_weights
from ..unet.split import decode, encode, run_encoder
from .parts import is_slow
from .problems import KINDS

#: Time steps that are decoded at once.
DECODERS = (1, 2, 4)
#: Tokens of a text, of CLIP's encoder.
_TOKENS = 77

_collecting = threading.Lock()


def make_dry(source: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return a UNet without memory, in the memory format in which it would run patched.

    Args:
        source: a name of :data:`difffast.models.configs.UNET_CONFIGS`, or a UNet of which it is a copy.
        dtype: of its weights.
        device: where it would run.

    Raises:
        ValueError: there is no UNet of this name.
    """
    if isinstance(source, str):
        dry, channels_last = make_unet(source), False
    else:
        with torch.device("meta"):
            dry = plain_class(source).from_config(source.config)
        channels_last = lies_channels_last(source)
    layout = torch.channels_last if channels_last or suits_channels_last(device, dtype) else torch.preserve_format
    return nn.Module.to(dry, dtype=dtype, memory_format=layout).eval().requires_grad_(False)


def make_call(unet: nn.Module, batch: int) -> dict[str, Any]:
    """Return the arguments of a call of a dry UNet.

    Args:
        batch: rows, guidance included.

    Raises:
        ValueError: nobody knows what this UNet is called with.
    """
    from diffusers import UNet2DConditionModel

    config, like = unet.config, next(unet.parameters())
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"keys can be collected from a UNet2DConditionModel, got {type(unet).__name__}")

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    layout = torch.channels_last if lies_channels_last(unet) else torch.contiguous_format
    size = config.sample_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    width_of_text = config.encoder_hid_dim or config.cross_attention_dim
    width_of_text = width_of_text if isinstance(width_of_text, int) else width_of_text[0]
    call: dict[str, Any] = {
        "sample": empty(batch, config.in_channels, height, width).to(memory_format=layout),
        "timestep": torch.zeros((), dtype=torch.int64, device=like.device),
        "encoder_hidden_states": empty(batch, _TOKENS, width_of_text),
    }
    if config.addition_embed_type == "text_time":
        ids = 6 if config.projection_class_embeddings_input_dim != 2560 else 5
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        call["added_cond_kwargs"] = {"text_embeds": empty(batch, pooled), "time_ids": empty(batch, ids)}
    if config.class_embed_type == "timestep":
        call["class_labels"] = torch.zeros(batch, dtype=torch.int64, device=like.device)
    return call


def patch_dry(unet: nn.Module) -> None:
    """Patch the layers of a UNet that is never given back."""
    for kind in LAYERS:
        kind.put_in(unet)
    if getattr(unet.config, "encoder_hid_dim_type", None) == "text_proj":
        unet.process_encoder_hidden_states = functools.partial(_process_text, unet)


def make_context(call: dict[str, Any]) -> CallContext:
    """Return what such a UNet's layers are allowed in a call: everything."""
    text = Text(seen=None, original=call["encoder_hidden_states"], kv=None)
    return CallContext(fused=True, note=_ignore, record=_ignore, text=text, always=True)


def collect(unet: nn.Module, batch: int, device: torch.device, decoders: Sequence[int] = DECODERS) -> list[Key]:
    """Return the keys that a UNet asks for, in the order in which they should be proved.

    Whole calls come first, then decoders of more and more steps at once; among these, what moves the most bytes, and
    last of all what takes long to prove.

    Args:
        unet: from :func:`make_dry`; it stays patched.
        batch: rows of a call, guidance included.
        device: where the proofs are for.
        decoders: how many steps may be decoded at once.
    """
    call = make_call(unet, batch)
    patch_dry(unet)
    context = make_context(call)
    with _listen(device) as found:
        with use_context(context):
            unet(**call, return_dict=False)
        with use_context(context):
            features = encode(unet, call)
            shared = _share(unet, call)
        for steps in decoders:
            found.append(Counter())
            for each in (features, shared):
                with use_context(context):
                    decode(unet, each, call, torch.zeros(steps, dtype=torch.int64, device="meta"))
    ordered = [
        key for each in found for key in sorted(each, key=lambda key: (is_slow(key, device), -each[key] * key.size))
    ]
    return list(dict.fromkeys(ordered))


def collect_other_uses(keys: Sequence[Key], device: torch.device) -> list[Key]:
    """Return the keys that the same calls ask for when attention maps are collected, and when they are differentiated.

    Args:
        keys: from :func:`collect`.
        device: where the proofs are for; on a CPU operators do not ask whether they will be differentiated.
    """
    samples = min((key.shapes[0][0] for key in keys), default=0)
    found = [_set(key, "maps") for key in keys if _has(key, "maps") and key.shapes[0][0] == samples]
    if device.type != "cpu":
        found += [_set(key, "gradient") for key in (*keys, *found) if _has(key, "gradient")]
    return list(dict.fromkeys(found))


def _has(key: Key, option: str) -> bool:
    return (option, 0) in key.options


def _set(key: Key, option: str) -> Key:
    return key._replace(options=tuple((name, 1 if name == option else value) for name, value in key.options))


def collect_decoder(vae: Any, dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> list[Key]:
    """Return the keys that the decoder of a VAE asks for; of a VAE of another kind than AutoencoderKL, none.

    Args:
        vae: the VAE, of which a dry one is made.
        dtype: of its weights.
        device: where the proofs are for.
        shape: of the latents.
    """
    from diffusers import AutoencoderKL

    if not isinstance(vae, AutoencoderKL):
        return []
    with torch.device("meta"):
        decoder = plain_class(vae).from_config(vae.config).decoder.to(dtype).eval().requires_grad_(False)
    Resnet().put_in(decoder)
    context = CallContext(fused=True, note=_ignore, record=_ignore, always=True)
    with _listen(device) as found, use_context(context):
        decoder(torch.empty(*shape, dtype=dtype, device="meta"))
    return sorted(found[-1], key=lambda key: -found[-1][key] * key.size)


@contextlib.contextmanager
def _listen(device: torch.device) -> Iterator[list[Counter[Key]]]:
    """Count the keys that are asked for on the meta device, into the last counter of the list."""
    found: list[Counter[Key]] = [Counter()]

    def watch(where: torch.device, key: Key) -> None:
        if where.type == "meta" and key.operator in KINDS:
            found[-1][_move(key, device)] += 1

    with _collecting, torch.no_grad(), _CudnnFormats():
        _local.watch = watch
        try:
            yield found
        finally:
            _local.watch = None


class _CudnnFormats(TorchDispatchMode):
    """Convolutions on the meta device hand on channels_last, as cuDNN's do; PyTorch's own there forget it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default and any(map(_is_channels_last, args[:2])):
            return result.contiguous(memory_format=torch.channels_last)
        return result


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _share(unet: nn.Module, call: dict[str, Any]) -> Features:
    """Encode for decoders that share their skips; of a dry UNet nobody else would believe that it can."""
    names = tuple(
        name
        for name, module in unet.named_modules()
        if name.startswith("up_blocks.") and ".resnets." in name and getattr(module, "conv_shortcut", None) is not None
    )
    outputs, parts = run_encoder(unet, call, names)
    return Features(outputs, call["sample"].shape[0], parts, {}, read_weights(unet, tuple(parts)))


def _process_text(unet: nn.Module, encoder_hidden_states: Any, added_cond_kwargs: Any) -> Any:
    plain = type(unet).process_encoder_hidden_states
    return process_text(unet, encoder_hidden_states, lambda text: plain(unet, text, added_cond_kwargs))


def _move(key: Key, device: torch.device) -> Key:
    """Return the key that is asked for on a device, of one that was asked for on the meta device."""
    # On a CPU attention does not ask how operands lie in memory.
    return key._replace(layouts=()) if device.type == "cpu" and "norm" not in key.operator else key


def _ignore(_reason: str) -> None:
    """Nobody reads the report of a dry run."""
