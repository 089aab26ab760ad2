"""What users do with a LoRA, as changes of a pipeline for random histories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch

NAME = "style"


def load(pipe: Any) -> None:
    """Load a LoRA, the same each time, where none is loaded."""
    if getattr(pipe.unet, "peft_config", None):
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "conv1"], init_lora_weights=False)
        pipe.unet.add_adapter(config, adapter_name=NAME)
        pipe.unet.to(pipe.unet.conv_in.weight.dtype)


def _loaded(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def changed(pipe: Any) -> None:
        load(pipe)
        change(pipe)

    return changed


def _fuse(pipe: Any) -> None:
    pipe.unet.unfuse_lora()
    pipe.unet.fuse_lora()


def _unload(pipe: Any) -> None:
    if getattr(pipe.unet, "peft_config", None):
        pipe.unet.unfuse_lora()
        pipe.unet.delete_adapters([NAME])


LORA_CHANGES: dict[str, Callable[[Any], None]] = {
    "load a LoRA": load,
    "scale it": _loaded(lambda pipe: pipe.unet.set_adapters([NAME], [0.4])),
    "scale it back": _loaded(lambda pipe: pipe.unet.set_adapters([NAME], [1.0])),
    "fuse it": _loaded(_fuse),
    "unfuse it": _loaded(lambda pipe: pipe.unet.unfuse_lora()),
    "unload it": _unload,
}
