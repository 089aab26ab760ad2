"""What content suppression costs on SD 1.5: FLOPs, counted on the meta device at full size.

    python bench/bench_suppression_flops.py --out bench/results

Prints the table and writes suppression_flops.json.  How FLOPs are counted is said in bench_guidance_flops.py.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench_guidance_flops import SIZES, Cost, cost
from rich.console import Console
from rich.table import Table
from torch import Tensor

from difffast import Suppression, models
from difffast.layers.cross_attention import CrossAttention
from difffast.steering.binding.extension import choose_map_layers
from difffast.steering.passes import Passes
from difffast.steering.suppression.losses import ImageMaps, paper_loss

UNET = "sd15"
STEPS = 50
#: Most teraFLOP of a suppressed image, and what the published schedule takes.
BAR, PUBLISHED = 180.0, 287.0


def costs() -> dict[str, Cost]:
    """Of one UNet call of each kind, one image."""
    unet = models.unet(UNET, dtype=torch.float16)
    CrossAttention().put_in(unet)
    side, width = SIZES[UNET], unet.config.cross_attention_dim
    kind = {"device": "meta", "dtype": torch.float16}
    passes = Passes(unet, choose_map_layers(unet, None), True, lambda reason: None)

    def call(batch: int) -> dict[str, Any]:
        return {"sample": torch.empty(batch, 4, side, side, **kind), "timestep": torch.zeros((), device="meta")}

    def text(batch: int) -> Tensor:
        return torch.empty(batch, 77, width, **kind)

    def iterate(leaf: Tensor) -> Tensor:
        maps, _ = passes.maps(call(1), leaf)
        return paper_loss(ImageMaps(torch.empty_like(maps[0])), ImageMaps(maps[0]), (1, 2), (3,), 0.5)

    leaf = text(1).requires_grad_()
    with torch.no_grad():
        found = {
            "stock step": cost(unet, lambda: unet(**call(2), encoder_hidden_states=text(2), return_dict=False)[0], []),
            "source step with maps": cost(unet, lambda: passes.prediction_and_maps(call(2), text(2))[0], []),
            "source maps alone": cost(unet, lambda: passes.maps(call(1), text(1))[0], []),
        }
    found["iteration"] = cost(unet, lambda: iterate(leaf), [leaf])
    CrossAttention().take_out(unet)
    return found


def count_image(found: dict[str, Cost], config: Suppression) -> float:
    """Return the teraFLOP of an image with every iteration used."""
    first, end = config.find_window(STEPS)
    source = (end - first - 1) * found["source step with maps"].total + found["source maps alone"].total
    guard = found["iteration"].forward if config.mode == "paper" and config.iterations else 0
    optimisation = (end - first) * (config.iterations * found["iteration"].total + guard)
    return (STEPS * found["stock step"].total + source + optimisation) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for suppression_flops.json")
    arguments = parser.parse_args()
    found = costs()
    image = count_image(found, Suppression("word"))
    table = Table("pass", "forward TFLOP", "backward TFLOP", title="SD 1.5, counted, one image")
    for name, each in found.items():
        table.add_row(name, f"{each.forward / 1e12:.3f}", f"{each.backward / 1e12:.3f}")
    console = Console()
    console.print(table)
    console.print(f"suppressed image: {image:.1f} TFLOP (bar {BAR:.0f}, published schedule {PUBLISHED:.0f})")
    record = {name: asdict(each) for name, each in found.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "suppression_flops.json"
    path.write_text(json.dumps({"unet": UNET, "steps": STEPS, "passes": record, "image": image}, indent=1) + "\n")


if __name__ == "__main__":
    main()
