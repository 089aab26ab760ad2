"""What a UNet computes before it first sees the text: the same at every update of a text at one step."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from ...layers.cross_attention import find_layers


def find_prefix(unet: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules of a UNet that run before its first attention to the text, none of them inside another.

    There are none where they cannot be told by that layer's name.
    """
    for name in find_layers(unet):
        place = re.fullmatch(r"down_blocks\.(\d+)\.attentions\.0\.transformer_blocks\.0\.attn2", name)
        if place is not None:
            blocks, level = unet.down_blocks, int(place[1])
            attention = unet.get_submodule(name.removesuffix("attn2") + "attn1")
            return unet.conv_in, *blocks[:level], blocks[level].resnets[0], attention
    return ()


@contextlib.contextmanager
def compute_once(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules return inside the block what they returned at their first call there; other threads' calls run.

    Modules that have a ``forward`` of their own, as offloading gives them, are left alone.
    """
    owner, known = threading.get_ident(), dict[nn.Module, Any]()

    def remember(module: nn.Module) -> Callable[..., Any]:
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != owner:
                return plain(*args, **kwargs)
            if module not in known:
                known[module] = plain(*args, **kwargs)
            return known[module]

        return forward

    changed = [module for module in modules if "forward" not in vars(module)]
    try:
        for module in changed:
            module.forward = remember(module)
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)
