"""FLOPs of an image per preset, counted on the meta device at full size: what the plans leave to do on any machine.

    python bench/bench_flops.py --out bench/results

Prints the table and writes flops.json.  FLOPs are 2 per multiply-accumulate, of matrix products, convolutions and
attention (FlopCounterMode); text keys and values are counted at every step, though presets compute them once a prompt.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import flops_table
from torch.utils.flop_counter import FlopCounterMode

from difffast import models
from difffast.plan import EncoderPropagation, Plan
from difffast.presets import PRESETS
from difffast.surgery.calls import bind_arguments
from difffast.unet import split
from difffast.unet.outer_layers import run_recording, run_reuse

STEPS = 50
#: UNet -> (latent height and width, text tokens).
SIZES = {"sd15": (64, 77), "sd21": (96, 77), "sdxl": (128, 77), "if-i-xl": (64, 77)}
#: Published key steps, where they are not those of Stable Diffusion.
KINDS = {"if-i-xl": "if-1"}
#: DeepCache's: what its package does by itself, and what its published tables are of.
BRANCHES = (0, 1)
#: Those whose pipelines do not tell whether a run is guided, so that guidance is not reused.
UNGUIDED = ("if-i-xl",)


def counted(run: Callable[[], Any]) -> tuple[int, Any]:
    """-> (FLOPs, result)"""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


class Costs:
    """FLOPs of one UNet's programs, guidance on (batch 2)."""

    def __init__(self, name: str) -> None:
        self._unet = unet = models.unet(name, dtype=torch.float16)
        side, tokens = SIZES[name]
        kind = {"device": "meta", "dtype": torch.float16}
        width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
        given: dict[str, Any] = {"encoder_hidden_states": torch.empty(2, tokens, width, **kind)}
        if unet.config.addition_embed_type == "text_time":
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            given["added_cond_kwargs"] = {
                "text_embeds": torch.empty(2, pooled, **kind),
                "time_ids": torch.empty(2, 6, **kind),
            }
        sample = torch.empty(2, unet.config.in_channels, side, side, **kind)
        self._call = bind_arguments(unet, (sample, torch.zeros((), device="meta")), given)
        # On the meta device weights are "away"; here all resnets share their skips, as with weights they would.
        resnets = (name for name, _ in unet.named_modules() if re.fullmatch(r"up_blocks\.\d+\.resnets\.\d+", name))
        self.reuse: dict[int, int] = {}
        for branch in BRANCHES:
            self.whole, (_, deep) = counted(lambda branch=branch: run_recording(unet, self._call, branch))
            again = unet, self._call, [deep], torch.ones(1), branch
            self.reuse[branch], _ = counted(lambda again=again: run_reuse(*again))
        self.encode, (self._outputs, self._parts) = counted(lambda: split.run_encoder(unet, self._call, tuple(resnets)))
        self._decode: dict[int, int] = {}

    def decode(self, steps: int) -> int:
        """A batch of so many time steps."""
        if steps not in self._decode:
            times = torch.zeros(steps, device="meta")
            run = split.run_decoder
            arguments = self._unet, self._outputs, self._parts, 2, self._call, times
            self._decode[steps], _ = counted(lambda: run(*arguments))
        return self._decode[steps]

    def image(self, plan: Plan) -> int:
        """A whole schedule."""
        total = 0
        for row in plan.steps():
            alone = plan.segment_end(row.step) == row.step + 1
            if row.reuse:
                cost = self.reuse[plan.reuse.branch]
            elif row.key and (plan.reuse is not None or alone):
                cost = self.whole
            else:
                cost = self.encode * row.key
                cost += self.decode(len(row.decoded_with)) * (row.step == row.decoded_with[0])
            total += cost // 2 if row.half else cost
        return total


def record() -> dict[str, Any]:
    """Per UNet: FLOPs of its parts, and of an image per preset."""
    found: dict[str, Any] = {"steps": STEPS, "torch": torch.__version__, "unets": {}}
    for name in SIZES:
        costs = Costs(name)
        images = {}
        for preset, meaning in PRESETS.items():
            way = meaning.propagation
            published = {"device": "cuda", "kind": KINDS.get(name, "sd")}
            options = published if isinstance(way, EncoderPropagation) else {}
            plan = way.plan(STEPS, **options)
            guidance = None if name in UNGUIDED else meaning.cfg
            images[preset] = costs.image(plan if guidance is None else guidance.apply(plan))
        parts = {"whole": costs.whole, "encoder": costs.encode, "decoder": costs.decode(1)}
        parts |= {f"reuse step, branch {branch}": cost for branch, cost in costs.reuse.items()}
        found["unets"][name] = {"parts": parts, "images": images}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for flops.json")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "flops.json").write_text(json.dumps(record(), indent=1) + "\n")
    sys.stdout.write(flops_table(arguments.out) + "\n")


if __name__ == "__main__":
    main()
