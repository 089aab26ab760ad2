"""What semantic binding costs: FLOPs and saved activations, counted on the meta device at full size.

    python bench/bench_guidance_flops.py --out bench/results

Prints the table and writes guidance_flops.json.  No time is measured: this is what the method asks for on any machine.
FLOPs are 2 per multiply-accumulate, of matrix products, convolutions and attention (FlopCounterMode); activations are
what autograd saves between the passes, every storage once, without parameters.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from difffast import models
from difffast.layers.context import CallContext, Text, use_context
from difffast.layers.cross_attention import CrossAttention
from difffast.layers.text_kv import TextKV
from difffast.steering.binding.config import PRESETS
from difffast.steering.binding.extension import choose_map_layers
from difffast.steering.composite import Columns
from difffast.steering.losses import LOSSES, Target
from difffast.steering.passes import Passes, drop_pooled_text
from difffast.surgery.freezing import freeze

#: The module; its name in difffast.ops is the operator's.
cross_attention = importlib.import_module("difffast.ops.cross_attention")

THINGS = 2
STEPS = 50
#: UNet -> latent height and width.
SIZES = {"sdxl": 128, "sd15": 64}
#: Most of a plain image's FLOPs, per preset, and of an entropy iteration (teraFLOP, GiB): the issue's, for SDXL.
BARS = {"object": 2.5, "attribute": 1.95}
ITERATION_BARS = {"forward": 4.1, "backward": 4.7, "saved": 3.0}


@dataclass(frozen=True)
class Cost:
    """FLOPs of a pass each way, and bytes that autograd saves in between."""

    forward: int
    backward: int = 0
    saved: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward


class Saved:
    """Adds up what autograd saves: every storage once, parameters not."""

    def __init__(self, unet: nn.Module) -> None:
        self._seen = {p.untyped_storage()._cdata: p.untyped_storage() for p in unet.parameters()}
        self.bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage  # held, so that no other storage gets its address
            self.bytes += storage.nbytes()
        return tensor


class FlashAttention(torch.autograd.Function):
    """In place of PyTorch's attention, which on the meta device would count and save whole attention matrices.

    As the fused kernels: the backward pass makes the scores again, and q, k, v and the output are saved.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.transpose(-1, -2)) @ v
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _ = ctx.saved_tensors
        scores = q @ k.transpose(-1, -2)
        slopes = grad @ v.transpose(-1, -2)
        return slopes @ k, slopes.transpose(-1, -2) @ q, scores.transpose(-1, -2) @ grad


def _attention_flops(q: Any, k: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    batch, heads, rows, width = q
    return 4 * batch * heads * rows * k[2] * width


def _attention_backward_flops(
    grad_out: Any, _maps: Any, q: Any, k: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    batch, heads, rows, width = q
    return (6 if grad_out is None else 10) * batch * heads * rows * k[2] * width


#: difffast's operator, of which no backend but the reference would be chosen on the meta device.
FORMULAS = {
    torch.ops.difffast.cross_attention: _attention_flops,
    torch.ops.difffast.cross_attention_backward: _attention_backward_flops,
}


@contextlib.contextmanager
def fused_kernels() -> Iterator[None]:
    """What the kernels compute and save, on the meta device."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return FlashAttention.apply(q, k, v)

    def decide(operands: Any, scale: float | None, *_: Any) -> tuple[str, float]:
        (shape, *_), *_ = operands
        return "triton", shape[3] ** -0.5 if scale is None else scale

    with (
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend),
        mock.patch.object(cross_attention, "_decide", decide),
    ):
        yield


def cost(unet: nn.Module, run: Callable[[], Tensor], leaves: list[Tensor]) -> Cost:
    """Of ``run``, which returns what is differentiated by the leaves; none: of the forward pass alone."""
    saved = Saved(unet)
    counters = [FlopCounterMode(display=False, custom_mapping=FORMULAS) for _ in range(2)]
    with fused_kernels(), freeze(unet):
        with counters[0], torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            result = run()
        if leaves:
            with counters[1]:
                torch.autograd.grad(result, leaves)
    return Cost(*(counter.get_total_flops() for counter in counters), saved.bytes)


def costs(name: str) -> dict[str, Cost]:
    """Of one UNet call of each kind, one image."""
    unet = models.unet(name, dtype=torch.float16)
    CrossAttention().put_in(unet)
    side, width = SIZES[name], unet.config.cross_attention_dim
    kind = {"device": "meta", "dtype": torch.float16}

    def call(batch: int) -> dict[str, Any]:
        given = {"sample": torch.empty(batch, 4, side, side, **kind), "timestep": torch.zeros((), device="meta")}
        if unet.config.addition_embed_type == "text_time":
            given["added_cond_kwargs"] = {
                "text_embeds": torch.empty(batch, 1280, **kind),
                "time_ids": torch.empty(batch, 6, **kind),
            }
        return given

    def text(batch: int, tokens: int = 77) -> Tensor:
        return torch.empty(batch, tokens, width, **kind)

    passes = Passes(unet, choose_map_layers(unet, None), True, lambda reason: None)
    plain = cost(unet, lambda: unet(**call(2), encoder_hidden_states=text(2), return_dict=False)[0].detach(), [])
    things = Target(Columns((2, 5), ((), ()), 8), (side // 4, side // 4))

    def focus(leaf: Tensor, latents: Tensor) -> Tensor:
        maps, _ = passes.maps({**call(1), "sample": latents}, leaf)
        return LOSSES["entropy"](maps, things).sum() + LOSSES["layout"](maps, things).sum()

    def bind(leaf: Tensor) -> Tensor:
        return passes.prediction(drop_pooled_text(call(1)), leaf).square().mean()

    both = text(2)
    silent = lambda reason: None  # noqa: E731
    seen = Text(both, both, TextKV(both, Counter()))
    context = CallContext(True, silent, silent, seen, size=(side, side), only_text=True)

    def step() -> Tensor:
        with use_context(context):
            return unet(**call(2), encoder_hidden_states=both, return_dict=False)[0]

    leaf, latents, token = text(1).requires_grad_(), call(1)["sample"].requires_grad_(), text(1, 1).requires_grad_()
    with torch.no_grad():
        target = cost(unet, lambda: passes.prediction(call(1), text(1)), [])
        first, later = cost(unet, step, []), cost(unet, step, [])
    found = {
        "stock step": plain,
        "step, new text": first,
        "step, text keys and values reused": later,
        "entropy iteration": cost(unet, lambda: focus(leaf, latents), [leaf, latents]),
        "binding target": target,
        "binding iteration": cost(unet, lambda: bind(token), [token]),
    }
    CrossAttention().take_out(unet)
    return found


def guard(found: dict[str, Cost], preset: str) -> float:
    """FLOPs of the looks of paper mode's guard at each step's last updates, against a plain image's."""
    schedule = PRESETS[preset]
    looks = schedule.focus_steps * found["entropy iteration"].forward
    looks += schedule.bind_steps * THINGS * found["binding iteration"].forward
    return looks / (STEPS * found["stock step"].total)


def image(found: dict[str, Cost], preset: str) -> float:
    """FLOPs of an image with every iteration used, against a plain image's; paper mode adds :func:`guard`."""
    schedule = PRESETS[preset]
    plain = STEPS * found["stock step"].total
    changing = max(schedule.bind_steps, schedule.focus_steps)
    steps = changing * found["step, new text"].total
    steps += (STEPS - changing) * found["step, text keys and values reused"].total
    focus = schedule.focus_steps * schedule.iterations * found["entropy iteration"].total
    one = found["binding target"].total + schedule.bind_iterations * found["binding iteration"].total
    return (steps + focus + schedule.bind_steps * THINGS * one) / plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for guidance_flops.json")
    arguments = parser.parse_args()

    record: dict[str, Any] = {"things": THINGS, "steps": STEPS, "dtype": "float16", "torch": torch.__version__}
    table = Table("UNet", "pass", "forward TFLOP", "backward TFLOP", "saved GiB", title="counted, one image or thing")
    images = Table("UNet", *(f"{preset} preset" for preset in PRESETS), title="whole image + guard against a plain one")
    for name in SIZES:
        found = costs(name)
        ratios = {preset: image(found, preset) for preset in PRESETS}
        looks = {preset: guard(found, preset) for preset in PRESETS}
        passes = {kind: asdict(each) for kind, each in found.items()}
        record[name] = {"passes": passes, "images": ratios, "guard": looks}
        for kind, each in found.items():
            table.add_row(
                name, kind, f"{each.forward / 1e12:.3f}", f"{each.backward / 1e12:.3f}", f"{each.saved / 2**30:.2f}"
            )
        images.add_row(name, *(f"{ratio:.3f}x + {looks[preset]:.3f}x" for preset, ratio in ratios.items()))
    console = Console()
    console.print(table)
    console.print(images)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "guidance_flops.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
