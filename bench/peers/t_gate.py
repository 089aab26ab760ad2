"""T-GATE (arXiv 2404.02747): cross-attention outputs stay as they are, and guidance is off, after a gate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .calls import Calls, replaced_forward


@contextlib.contextmanager
def t_gate(pipe: Any, gate: float) -> Iterator[None]:
    """Run the steps up to ``gate``, a share of the schedule, as stock does, and the others without the text.

    The last step before the gate leaves the output of every cross-attention, the mean of guidance's two halves.  After
    it that mean is every cross-attention's output.  Both halves would then compute the same, so one alone runs.

    The paper's gates are 10 of 25 steps for Stable Diffusion 1.5, 2.1 and XL, after which its tables take 0.53 to 0.61
    of stock's time.  Its later version also reuses self-attention before the gate, which is not done here: that trades
    more of the picture for less time.
    """
    run = _Run(pipe, gate)
    layers = [module for name, module in pipe.unet.named_modules() if name.endswith("attn2")]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced_forward(layer, run.attention(layer)))
        stack.enter_context(replaced_forward(pipe.unet, run.unet(pipe.unet.forward)))
        yield


class _Run:
    def __init__(self, pipe: Any, gate: float) -> None:
        self._pipe = pipe
        self._gate = gate
        self._calls = Calls(pipe)
        self._state = "before"  # "at": the last step before the gate; "after" it
        self._frozen: dict[Any, Tensor] = {}

    def unet(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            index, total = self._calls.count()
            gate = max(1, round(self._gate * total))
            self._state = "before" if index < gate - 1 else "at" if index == gate - 1 else "after"
            if self._state != "after" or not self._pipe.do_classifier_free_guidance:
                return stock(sample, *args, **kwargs)

            def conditional(value: Any) -> Any:
                whole = isinstance(value, Tensor) and value.ndim and len(value) == len(sample)
                return value.chunk(2)[1] if whole else value

            made = stock(*tree_map(conditional, (sample, *args)), **tree_map(conditional, kwargs))
            # Guidance adds a multiple of the halves' difference, which is 0.
            return tree_map(lambda value: torch.cat([value, value]), made)

        return forward

    def attention(self, layer: Any) -> Callable[..., Tensor]:
        stock = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if self._state == "after":
                return self._frozen[layer]
            made = stock(*args, **kwargs)
            if self._state == "at":
                halves = made.chunk(2) if self._pipe.do_classifier_free_guidance else (made,)
                self._frozen[layer] = torch.stack(halves).mean(0)
            return made

        return forward
