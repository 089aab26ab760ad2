"""What a step of erasing by training costs: FLOPs of the calls that were really made, and seconds."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from erasure_questions import TARGET, pairs, scenes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import difffast
from difffast.erase.denoise import Denoiser
from difffast.erase.examples import Examples, encode_examples
from difffast.erase.params import Weights, select_parameters
from difffast.models import unet

SEED = 3


class Uncached(Examples):
    """Examples whose pictures and prompts are encoded anew each time."""

    def __init__(self, pipe: Any, given: Sequence[tuple[Any, str]]) -> None:
        super().__init__(**vars(encode_examples(pipe, given)))
        object.__setattr__(self, "again", lambda rows: encode_examples(pipe, [given[row] for row in rows]))

    def take(self, rows: torch.Tensor) -> Examples:
        return self.again(rows.tolist())


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def flops_of_calls(model: nn.Module, side: int, text: int, params: str) -> dict[str, int]:
    """FLOPs of a row of the UNet without gradients, and with those of a set of parameters (both passes)."""
    device = next(model.parameters()).device
    inputs = torch.empty(1, 4, side, side, device=device), torch.zeros(1, device=device)
    embeds = torch.empty(1, 77, text, device=device)
    with torch.no_grad():
        forward = flops(lambda: model(*inputs, embeds).sample)
    weights = Weights(select_parameters(model, params))
    with weights.training(model):
        both = flops(lambda: model(*inputs, embeds).sample.sum().backward())
    return {"forward": forward, "both": both}


def sd15_flops() -> dict[str, int]:
    """FLOPs of calls of Stable Diffusion 1.5 at 512 x 512, on the meta device."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **blocks)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, intermediate_size=3072))
        picture, ids = torch.empty(1, 3, 512, 512), torch.zeros(1, 77, dtype=torch.long)
        with torch.no_grad():
            extra = {
                "picture": flops(lambda: vae.encode(picture).latent_dist.parameters),
                "prompt": flops(lambda: text(ids)[0]),
            }
        return flops_of_calls(unet("sd15", dtype=torch.float32), 64, 768, "full") | extra


@dataclass(frozen=True)
class Small:
    """A pipeline of Stable Diffusion 1.5's proportions with a part of its channels, for smaller pictures.

    The embedded model's autoencoder is far smaller beside its UNet than those of published models.

    Attributes:
        part: one over the share of the channels: 2, 4 or 8.
        pixels: of a side of its pictures.
    """

    part: int = 8
    pixels: int = 128

    def build(self) -> Any:
        from diffusers import AutoencoderKL, UNet2DConditionModel

        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        layout = {"layers_per_block": 2, "norm_num_groups": 8, "latent_channels": 4, "sample_size": self.pixels}
        pipe = difffast.models.tiny_pipeline(channels=(32,), sample_size=self._side, text=(self._text, 12))
        pipe.register_modules(
            vae=AutoencoderKL(block_out_channels=self._divide(128, 256, 512, 512), **layout, **blocks).eval(),
            unet=UNet2DConditionModel(
                sample_size=self._side,
                block_out_channels=self._divide(320, 640, 1280, 1280),
                norm_num_groups=8,
                cross_attention_dim=self._text,
                attention_head_dim=8,
            ).eval(),
        )
        pipe.vae_scale_factor = 8
        pipe.image_processor.register_to_config(vae_scale_factor=8)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def count_flops(self) -> dict[str, int]:
        pipe, ids = self.build(), torch.zeros(1, 77, dtype=torch.long)
        with torch.no_grad():
            pixels = torch.zeros(1, 3, self.pixels, self.pixels)
            extra = {
                "picture": flops(lambda: pipe.vae.encode(pixels).latent_dist.parameters),
                "prompt": flops(lambda: pipe.text_encoder(ids)[0]),
            }
        return flops_of_calls(pipe.unet, self._side, self._text, "full") | extra

    @property
    def _side(self) -> int:
        return self.pixels // 8

    @property
    def _text(self) -> int:
        return 768 // self.part

    def _divide(self, *channels: int) -> tuple[int, ...]:
        return tuple(each // self.part for each in channels)


class Counted:
    """A trainer whose calls are counted: rows of the UNet in one pass and in two, pictures and prompts encoded.

    Moves are not drawn but taken evenly, so that their mean is that of the draws, however few steps are made.
    """

    def __init__(self, pipe: Any, *, pool: int | None = None, cached: bool | None = None) -> None:
        self.calls: Counter[str] = Counter()
        self._trainer = difffast.EraseTrainer(pipe, TARGET, params="full", pool=pool, learning_rate=1e-8, seed=SEED)
        even = itertools.cycle(range(2, 50, 5))
        moves = (lambda _: [next(even)]) if pool is None else (lambda _: list(range(2, 50, 5)))
        self._trainer._state.points.choose_moves = moves if cached is None else lambda _: [0]
        if cached is not None:
            kind = encode_examples if cached else Uncached
            sets = (scenes(4, 10, 1, red=True), scenes(2, 11, 1, red=False), scenes(2, 12, 2, red=False))
            sets = [kind(pipe, pairs(each)) for each in sets]
            self._trainer.attach(difffast.MetaTrap(*sets, learning_rate=1e-8, compat="published"))
            self._count(pipe.vae, "encode", lambda pixels: {"picture": len(pixels)})
            self._count(pipe, "encode_prompt", lambda **given: {"prompt": len(given["prompt"])})
        denoiser: Denoiser = self._trainer._denoiser
        self._count(denoiser, "predict", lambda z, *_: {"both" if torch.is_grad_enabled() else "forward": len(z)})

    def _count(self, owner: Any, name: str, what: Callable[..., dict[str, int]]) -> None:
        method = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.calls.update(what(*args, **kwargs))
            return method(*args, **kwargs)

        setattr(owner, name, counting)

    def run(self, steps: int) -> float:
        """Make so many steps; returns the processor's seconds of one, which do not depend on what else it does."""
        start = time.process_time()
        self._trainer.train(self._trainer.step + steps, progress=False)
        return (time.process_time() - start) / steps

    def per_step(self, each: dict[str, int]) -> float:
        return sum(count * each[name] for name, count in self.calls.items()) / self._trainer.step


#: Way -> the one that it is compared with, how many steps are a round, and the options of its trainer.  As many steps a
#: round as make whole pools; a pool's first step is dearer than the others.
WAYS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "esd": ("esd", 10, {}),
    "esd, pool of 10": ("esd", 10, {"pool": 10}),
    "meta step, nothing cached": ("meta step, nothing cached", 2, {"cached": False}),
    "meta step": ("meta step, nothing cached", 2, {"cached": True}),
}


def measure_costs(small: Small, rounds: int, names: Sequence[str]) -> dict[str, Any]:
    """Steps of every way in turn, after a round that warms up.  Each has a pipeline of its own.

    The released loop of meta-unlearning encodes pictures and prompts whenever they are drawn.  Its erasing step is
    measured by itself, and is without a trajectory here.
    """
    trainers = {name: Counted(small.build(), **WAYS[name][2]) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name, trainer in trainers.items():
            found = trainer.run(WAYS[name][1])
            if number:
                seconds[name].append(found)
    models = {"small": small.count_flops(), "sd15": sd15_flops()}
    rows = {}
    for name, trainer in trainers.items():
        control = WAYS[name][0]
        rows[name] = {
            "control": control,
            "calls": {kind: count / trainer._trainer.step for kind, count in trainer.calls.items()},
            "steps": trainer._trainer.step,
            "tflop": {model: trainer.per_step(each) / 1e12 for model, each in models.items()},
            "seconds": seconds[name],
            "times": statistics.mean(seconds[control]) / statistics.mean(seconds[name]),
            "times_flop": {m: trainers[control].per_step(e) / trainer.per_step(e) for m, e in models.items()},
        }
    return {**asdict(small), "rounds": rounds, "flop_of_a_call": models, "rows": rows}
