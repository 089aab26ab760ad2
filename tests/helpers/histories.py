"""Random histories of a patched pipeline: whatever its user does to it, in any order, between runs and in them.

A stock pipeline has the same history.  A run without a patch, and after one, must be the stock pipeline's bit for bit;
one in which every step is a key step must be the same but for rounding; one that shares must be that of a pipeline in
the same state that was patched a moment ago and decodes one step at a time, so that nothing of the past is in it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import zoo
from diffusers.models.attention_processor import AttnProcessor2_0
from lora_changes import LORA_CHANGES
from others import FadingOut
from sampling import largest, scheduler
from torch import Tensor

from difffast import CfgReuse, EncoderPropagation, FeatureReuse, patch, unpatch
from difffast.models import tiny_pipeline
from difffast.surgery.subclass import is_swapped

#: What is patched with, and whether every step is run in full.
OPTIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "exact": ({"preset": "exact"}, True),
    "all keys, stock layers": ({"propagation": EncoderPropagation(key_steps=1), "fused": False}, True),
    "ahead": ({"propagation": EncoderPropagation(key_steps=3)}, False),
    "one at a time": ({"propagation": EncoderPropagation(key_steps=3, parallel=False, extrapolate=1)}, False),
    "outer layers": ({"propagation": FeatureReuse(2)}, False),
    "halves": ({"propagation": EncoderPropagation(key_steps=1), "cfg": CfgReuse(2)}, False),
    "ahead in halves": ({"propagation": EncoderPropagation(key_steps=3), "cfg": CfgReuse(3)}, False),
    "outer layers in halves": ({"propagation": FeatureReuse(2), "cfg": CfgReuse(4)}, False),
}
SCHEDULERS = ("DDIM", "Euler", "Heun", "DPM++ 2M")
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-9}
STEPS = 6


class StoppedError(Exception):
    """What a callback raises."""


@functools.cache
def _built() -> Any:
    pipe = tiny_pipeline("sd", channels=(32, 64), sample_size=4, text=(16, 1))  # the deepest level is 2x2
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler("DDIM")
    pipe.unet = zoo.unet(sample_size=4, cross_attention_dim=16)
    return pipe.to(dtype=torch.float64)


def _copy(pipe: Any) -> Any:
    """A copy with parts of its own; nothing is done to the others."""
    made = copy.copy(pipe)
    for name in ("unet", "text_encoder", "scheduler"):
        vars(made)[name] = copy.deepcopy(getattr(pipe, name))
    return made


def _processors(pipe: Any) -> None:
    pipe.unet.set_attn_processor({name: FadingOut([]) for name in pipe.unet.attn_processors})


def _replace_unet(pipe: Any) -> None:
    other = copy.deepcopy(_built().unet).to(pipe.unet.dtype)
    with torch.no_grad():
        other.conv_in.weight.mul_(1.2)
    pipe.unet = other


def _strengthen(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
    return 1.3 * output


def _hook(pipe: Any) -> None:
    pipe.unet.mid_block._forward_hooks.clear()
    pipe.unet.mid_block.register_forward_hook(_strengthen)


def _edit_weights(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(1.1)
        pipe.unet.up_blocks[0].resnets[0].conv1.weight.mul_(0.9)


#: What is done to a pipeline between runs; all but the last few also by callbacks in the middle of one.
CHANGES: dict[str, Callable[[Any], None]] = {
    **LORA_CHANGES,
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "no FreeU": lambda pipe: pipe.disable_freeu(),
    "others' processors": lambda pipe: pipe.unet.set_attn_processor(
        {n: FadingOut([]) for n in pipe.unet.attn_processors}
    ),
    "own processors": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
    "a hook": _hook,
    "no hook": lambda pipe: pipe.unet.mid_block._forward_hooks.clear(),
    "train": _edit_weights,
    "another UNet": _replace_unet,
    "float32": lambda pipe: (pipe.unet.to(torch.float32), pipe.text_encoder.to(torch.float32)),
    "float64": lambda pipe: (pipe.unet.to(torch.float64), pipe.text_encoder.to(torch.float64)),
    **{name: (lambda pipe, name=name: setattr(pipe, "scheduler", scheduler(name))) for name in SCHEDULERS},
}
#: What callbacks do besides.
EVENTS = ("none", "none", "none", "raise", "interrupt", "patch", "patch", "edit", "nest", "remake")
IN_RUNS = list(CHANGES)[: list(CHANGES).index("another UNet")]


class History:
    """A pipeline and its stock twin through one random history.

    Args:
        seed: of the history.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.pipe, self.stock = _copy(_built()), _copy(_built())
        self.options: str | None = None
        self.unet = self.pipe.unet
        self.done: list[str] = []

    def play(self, actions: int) -> None:
        """Play the history: changes, patches and runs, and at the end a run without a patch."""
        for _ in range(actions):
            choice = self._random.random()
            if choice < 0.35:
                self.change(self._random.choice(list(CHANGES)))
            elif choice < 0.5:
                self.patch(self._random.choice([*OPTIONS, None]))
            else:
                self.run()
        self.patch(None)
        assert not any(map(is_swapped, [self.pipe, self.pipe.scheduler, *self.pipe.unet.modules()])), self.done
        self.run(event=None)

    def change(self, name: str) -> None:
        """Do the same to both."""
        self.done.append(name)
        for pipe in (self.pipe, self.stock):
            CHANGES[name](pipe)

    def patch(self, name: str | None) -> None:
        """Patch, or unpatch."""
        self.done.append(f"patch {name!r}")
        self.options = name
        _patch(self.pipe, name)
        self.unet = self.pipe.unet

    def run(self, event: str | None = "any") -> None:
        """Run both, and compare."""
        draw = self._random
        call = {
            "prompt": draw.choice(["a cat", "two dogs"]),
            "height": draw.choice([16, 24]),
            "width": 16,
            "guidance_scale": draw.choice([5.0, 5.0, 1.0]),
            "num_images_per_prompt": draw.choice([1, 1, 2]),
        }
        inference = draw.random() < 0.2
        if event is not None:
            # A LoRA that is loaded in inference mode cannot be trained or fused outside of it.
            event = draw.choice(EVENTS if inference else [*EVENTS, *IN_RUNS])
        at, other = draw.randrange(1, STEPS - 1), draw.choice([*OPTIONS, None])
        self.done.append(f"run {call} {event} at {at} {other} inference={inference}")
        shares = self.options is not None and not OPTIONS[self.options][1] and self.pipe.unet is self.unet
        if event == "patch":
            shares = shares or (other is not None and not OPTIONS[other][1])
        fresh = _copy(self.stock) if shares else None
        if fresh is not None:
            _patch(fresh, self.options, one_by_one=True)
        mine = _run(self.pipe, call, event, at, other, inference)
        stock = _run(self.stock, call, event, at, "stock", inference)
        right = stock if fresh is None else _run(fresh, call, event, at, other, inference)
        if event == "patch":
            self.options, self.unet = other, self.pipe.unet
        if (mine is None) != (right is None):
            raise AssertionError(self.done)
        if mine is not None:
            plain = (self.options is None and event != "patch") or self.pipe.unet is not self.unet
            limit = 0 if plain else TOLERANCES[mine.dtype]
            assert largest(mine, right) <= limit * max(1.0, float(right.abs().max())), self.done


def _patch(pipe: Any, name: str | None, *, one_by_one: bool = False) -> None:
    """Patch with options, or unpatch; ``one_by_one``: nothing is decoded ahead, so that nothing of it can be stale."""
    if name is None:
        unpatch(pipe)
    elif name != "stock":
        options, _ = OPTIONS[name]
        sharing = options.get("propagation")
        if one_by_one and isinstance(sharing, EncoderPropagation):
            options = {**options, "propagation": replace(sharing, parallel=False)}
        patch(pipe, **options)


def _run(pipe: Any, call: dict[str, Any], event: str | None, at: int, other: Any, inference: bool) -> Tensor | None:
    """Return the last latents, or None where the run was stopped by an exception."""

    def act(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if event == "remake":
            return {**tensors, "prompt_embeds": tensors["prompt_embeds"] + 0}
        if step != at:
            return tensors
        if event in CHANGES:
            CHANGES[event](pipe)
        elif event == "raise":
            raise StoppedError
        elif event == "interrupt":
            pipe._interrupt = True
        elif event == "patch":
            _patch(pipe, other)
        elif event == "edit":
            tensors["prompt_embeds"].mul_(1.5)
        elif event == "nest":
            inner = copy.copy(pipe.scheduler)  # of its own: few schedulers can be in two loops
            pipe.scheduler, outer = inner, pipe.scheduler
            state = dict(vars(pipe))
            pipe("a bird", **_common(7), height=16, width=16, guidance_scale=3.0)
            vars(pipe).update(state)
            pipe.scheduler = outer
        return tensors

    options = {"callback_on_step_end": act, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with warnings.catch_warnings(), torch.inference_mode() if inference else contextlib.nullcontext():
        warnings.filterwarnings("ignore", "difffast")
        try:
            return pipe(**_common(0), **call, **options)[0]
        except StoppedError:
            return None


def _common(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"num_inference_steps": STEPS, "generator": generator, "output_type": "latent"}
