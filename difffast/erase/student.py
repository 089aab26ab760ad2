"""A LoRA to train in place of a UNet's own weights, through peft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "difffast"


def check_adapters(unet: Any) -> None:
    """Refuse a UNet that has adapters.

    Raises:
        ValueError: it has.
    """
    if getattr(unet, "peft_config", None):
        raise ValueError(f"adapters are loaded already ({', '.join(unet.peft_config)}): unload or fuse them first")


def add_lora(unet: Any, names: Sequence[str], rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Add a LoRA, without effect yet, to the linear layers of which ``names`` are parameters; returns its own.

    Raises:
        ValueError: no linear layer among them, or adapters are loaded already.
        ImportError: peft is missing.
    """
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise ImportError(f"training a LoRA needs peft: `pip install peft` ({error})") from error
    check_adapters(unet)
    wanted = {name.removesuffix(".weight") for name in names}
    targets = [name for name, module in unet.named_modules() if name in wanted and isinstance(module, nn.Linear)]
    if not targets:
        raise ValueError("a LoRA is trained on linear layers, and none of the chosen parameters is the weight of one")
    wanted_before = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), adapter_name=ADAPTER)
    for parameter, earlier in wanted_before:  # peft freezes them
        parameter.requires_grad_(earlier)
    found = {name: parameter for name, parameter in unet.named_parameters() if f".{ADAPTER}." in name}
    for parameter in found.values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return found


def lora_tensors(unet: Any) -> dict[str, Tensor]:
    """Return the LoRA as Diffusers' ``load_lora_weights`` names it."""
    from peft.utils import get_peft_model_state_dict

    return {f"unet.{name}": value for name, value in get_peft_model_state_dict(unet, adapter_name=ADAPTER).items()}


def fuse_lora(unet: Any) -> None:
    """Add the LoRA to the UNet's weights, and take its layers out.

    Raises:
        ValueError: other adapters were loaded since, whose layers are the same and cannot stay.
    """
    others = [name for name in unet.peft_config if name != ADAPTER]
    if others:
        raise ValueError(
            f"a LoRA is fused alone, and adapters were loaded since ({', '.join(others)}): unload them first"
        )
    unet.fuse_lora(adapter_names=[ADAPTER])
    remove_lora(unet)


def remove_lora(unet: Any) -> None:
    """Take the LoRA's layers out of the UNet; other adapters, of the UNet and of the text encoders, stay."""
    unet.delete_adapters(ADAPTER)
    if not getattr(unet, "peft_config", None):
        unet.unload_lora()
