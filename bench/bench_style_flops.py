"""What an iteration of StyleDiffusion costs on SD 1.5: FLOPs, counted on the meta device at full size.

    python bench/bench_style_flops.py --out bench/results

Prints the table and writes style_flops.json.  How FLOPs are counted is said in bench_guidance_flops.py.
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

from difffast import Inversion, models
from difffast.layers.cross_attention import CrossAttention
from difffast.steering.inversion.prefix import compute_once, find_prefix
from difffast.steering.inversion.style import StyleFit

UNET = "sd15"
#: Tokens and channels of the authors' image encoder, and the embedding's rows.
TOKENS, CHANNELS, ROWS = 197, 768, 77
#: Most teraFLOP of an iteration, and what the published code takes.
BAR, PUBLISHED = 1.7, 4.09
META = {"device": "meta", "dtype": torch.float16}


class MetaMoves:
    """The pipeline's predictions and moves, by a UNet that has no weights."""

    def __init__(self, unet: Any) -> None:
        self._unet, self.text = unet, torch.empty(1, ROWS, CHANNELS, **META)

    def predict_text(self, latents: Tensor, step: int) -> Tensor:
        time = torch.zeros((), device="meta")
        return self._unet(latents, time, encoder_hidden_states=self.text, return_dict=False)[0]

    def forwards(self, latents: Tensor, noise: Tensor, step: int) -> Tensor:
        return latents - noise


def costs() -> dict[str, Cost]:
    """Of what a step does once, and of an iteration."""
    unet = models.unet(UNET, dtype=torch.float16)
    CrossAttention().put_in(unet)
    side = SIZES[UNET]
    latents = torch.empty(1, 4, side, side, **META)
    features = torch.empty(TOKENS, CHANNELS, device="meta")
    found = Inversion("style", "", 7.5, (8 * side, 8 * side), latents, 30, features=features)
    fit = StyleFit(MetaMoves(unet), unet, found)
    weights = list(fit._network.parameters())

    def look() -> Tensor:
        return next(iter(fit._look(latents, 0).values()))

    with torch.no_grad():
        maps = fit._look(latents, 0)
        once = cost(unet, look, [])
        whole = cost(unet, lambda: fit._moves.predict_text(latents, 0), [])

    def iterate() -> Tensor:
        return fit.compute_loss(latents, latents[0], 0, latents, maps)

    with compute_once(find_prefix(unet)):
        first, later = cost(unet, iterate, weights), cost(unet, iterate, weights)
    CrossAttention().take_out(unet)
    return {
        "prediction": whole,
        "maps of the picture, once a step": once,
        "first iteration of a step": first,
        "iteration": later,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for style_flops.json")
    arguments = parser.parse_args()
    found = costs()
    table = Table("pass", "forward TFLOP", "backward TFLOP", title="SD 1.5, counted, one image")
    for name, each in found.items():
        table.add_row(name, f"{each.forward / 1e12:.3f}", f"{each.backward / 1e12:.3f}")
    console = Console()
    console.print(table)
    total = found["iteration"].total / 1e12
    console.print(f"iteration: {total:.3f} TFLOP (bar {BAR}, published {PUBLISHED})")
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"unet": UNET, "torch": torch.__version__, "passes": {name: asdict(each) for name, each in found.items()}}
    (arguments.out / "style_flops.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
