"""UNets: seconds inside them for one image, for a short run, and for decoding k time steps at once.

Every provider in turn in one run (A B C D, A B C D, ...), the correctness gate first; ``registry`` says who competes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pipelines
import providers
import pytest
import registry
import torch
import workloads
from registry import STOCK, Bar, Case, Gate, Provider, Run
from session import REPLAY
from torch import Tensor, nn
from workloads import Decodings, Images

from difffast import models
from difffast.surgery.calls import bind_arguments
from difffast.unet import split
from difffast.unet.features import Features

STEPS = 50
NARROW, WIDE = (64, 128, 192), (128, 256, 512, 512)
SIZE = 32
_ISSUE_5, _ISSUE_6, _ENGINES = "the decoder's issue", "the planner's issue", "the engines' issue"
BARS = (
    Bar("difffast balanced", STOCK, 0.56, source=_ISSUE_5),
    Bar("difffast exact compiled", registry.COMPILED, 1.03, source=_ISSUE_5),
    Bar("difffast turbo", STOCK, 0.28, source=_ISSUE_6),
    *(
        Bar(f"difffast, reuse {each}", f"DeepCache {each}", 1 / 1.15, source=_ISSUE_6)
        for each in ("3, branch 0", "5, branch 0")
    ),
)
#: Of single UNets, by engine.
ENGINE_BARS = tuple(
    Bar(f"difffast exact OpenVINO {each}", f"{registry.PLAIN_OPENVINO} {each}", 1.03, source=_ENGINES)
    for each in ("f32", "bf16")
)
_BY_ENGINE = (
    *ENGINE_BARS,
    Bar("difffast exact", STOCK, 0.72, source=_ENGINES),
    Bar("difffast exact bfloat16", "stock bfloat16", 0.85, source=_ENGINES),
)


def cases(size: str, model: str | None) -> list[Case]:
    if model is not None:
        return []
    if size == "gpu":
        return [forward(name, full=True) for name in pipelines.NAMES[:5]] + [
            decode(name, k) for name in ("sd15", "sdxl") for k in (1, 2, 4, 8)
        ]
    return [
        *(forward(name, full=False) for name in ("SD2.1", "SDXL", "IF-I")),
        *(decode(NARROW, k) for k in (1, 2, 4, 8)),
        image(NARROW, weight=170),
        image(WIDE, weight=240),  # of 780: the rest is for a second run
        *(
            exact_savings(
                f"UNet {channels}",
                {"channels": list(channels), "latent": SIZE},
                lambda channels=channels: [pipelines.tiny(channels, SIZE)],
                steps=10,
                rounds=(5, 21),
                weight=weight,
            )
            for channels, weight in ((NARROW, 40), (WIDE, 40))
        ),
        by_engine("embedded model", 16, lambda: [pipelines.embedded()], steps=10, weight=10, bars=ENGINE_BARS),
        by_engine(f"UNet {NARROW}", SIZE, lambda: [pipelines.tiny(NARROW, SIZE)], steps=5, weight=20, bars=_BY_ENGINE),
        by_engine(
            f"UNet {WIDE}",
            SIZE,
            lambda: [pipelines.tiny(WIDE, SIZE)],
            steps=3,
            weight=30,
            rounds=(3, 5),
            bars=_BY_ENGINE,
        ),
        decoder(32),
    ]


@pytest.mark.benchmark(timer=REPLAY)
def test_unet(benchmark, session, case):
    session.report(benchmark, case)


def image(channels: tuple[int, ...], weight: float) -> Case:
    """Seconds inside the UNet for one image: what the issues ask for, and what balanced is made of."""
    compared = (
        providers.stock(),
        *providers.presets(),
        providers.stock_compiled(),
        *providers.competitors(),
        *(providers.reuse(interval, branch) for branch in (0, 1) for interval in (3, 5)),
        *providers.presets(compiled=True),
        *providers.savings(),
        providers.stock_steps(25, STEPS),
    )
    promised = {name for bar in BARS for name in (bar.provider, bar.against)}
    return Case(
        group="unet",
        name=f"UNet {channels} at {SIZE}x{SIZE}, {STEPS} DDIM steps, guidance on, one image",
        shapes={"channels": list(channels), "latent": SIZE, "steps": STEPS, "batch": 1},
        dtype="float32",
        device="cpu",
        build=lambda: Images([pipelines.tiny(channels, SIZE)], STEPS, latent=True, unet_only=True),
        # What was promised comes first, in case the time does not suffice for all.
        providers=tuple(sorted(compared, key=lambda provider: provider.name not in promised)),
        timed="seconds inside the UNet",
        headline="difffast balanced",
        rounds=(2, 11),
        weight=weight,
        bars=BARS,
    )


def exact_savings(
    name: str,
    shapes: Mapping[str, Any],
    stages: Callable[[], Sequence[workloads.Stage]],
    *,
    steps: int,
    rounds: tuple[int, int],
    weight: float,
) -> Case:
    """What exact is made of, in a short run: every step costs the same, and many rounds show small differences."""
    return Case(
        group="savings",
        name=f"{name}, exact at {shapes['latent']}x{shapes['latent']}, {steps} steps",
        shapes={**shapes, "steps": steps, "batch": 1},
        dtype="float32",
        device="cpu",
        build=lambda: Images(stages(), steps, latent=True, unet_only=True),
        providers=(
            providers.stock(),
            providers.difffast("difffast exact", "exact", Gate()),
            *providers.exact_savings(),
            providers.stock_channels_last(),
        ),
        timed="seconds inside the UNet",
        headline="difffast exact",
        rounds=rounds,
        weight=weight,
    )


def by_engine(
    name: str,
    latent: int,
    stages: Callable[[], Sequence[workloads.Stage]],
    *,
    steps: int,
    weight: float,
    precisions: Sequence[str] = ("f32", "bf16"),
    rounds: tuple[int, int] = (3, 11),
    bars: Sequence[Bar],
) -> Case:
    """What exact takes of stock and of plain OpenVINO inside the UNet, in float32 and in bfloat16."""
    by_openvino = {provider.name: provider for provider in providers.openvino_presets()}
    compared = [providers.stock()]
    if "f32" in precisions:
        compared.append(providers.difffast("difffast exact", "exact", Gate()))
    if "bf16" in precisions:
        compared += [
            providers.stock_bfloat16(),
            providers.stock_bfloat16(channels_last=True),
            providers.exact_bfloat16(),
        ]
    for each in precisions:
        compared += [providers.plain_openvino(each), by_openvino[f"difffast exact OpenVINO {each}"]]
    return Case(
        group="engines",
        name=f"{name} at {latent}x{latent}, {steps} step{'s' * (steps > 1)}, by engine",
        shapes={"unet": name, "latent": latent, "steps": steps, "batch": 1},
        dtype="float32",
        device="cpu",
        build=lambda: Images(stages(), steps, latent=True, unet_only=True),
        providers=tuple(compared),
        timed="seconds inside the UNet",
        headline=f"difffast exact OpenVINO {precisions[0]}",
        rounds=rounds,
        weight=weight,
        bars=tuple(bars),
    )


def decoder(latent: int) -> Case:
    """Pictures of latents, by the decoder of Stable Diffusion's VAE, in float32 and in bfloat16."""
    return Case(
        group="engines",
        name=f"VAE decoder at {latent}x{latent}, by engine",
        shapes={"vae": "SD1.5", "latent": latent, "batch": 1},
        dtype="float32",
        device="cpu",
        build=lambda: Decodings([pipelines.full_decoder()], 1, latent_size=latent),
        providers=(
            providers.stock(),
            providers.difffast("difffast exact", "exact", Gate()),
            providers.stock_bfloat16(),
            providers.stock_bfloat16(channels_last=True),
            providers.exact_bfloat16(),
        ),
        timed="seconds a picture",
        headline="difffast exact",
        rounds=(3, 11),
        weight=20,
    )


#: UNet calls of a short run.
_CALLS = 10


def forward(name: str, *, full: bool) -> Case:
    """UNet calls of one image, as it is patched: what a run costs once counts as it does in a short run."""
    device, dtype = ("cuda", torch.float16) if full else ("cpu", torch.float32)
    on_gpu = [providers.stock_compiled()] if full else []  # on a CPU, compiling would take longer than all the rest
    return Case(
        group="forward",
        name=f"{name} UNet, {'full' if full else 'small'}, {_CALLS} forwards",
        shapes={"unet": name, "full": full, "batch": 1, "steps": _CALLS},
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        build=lambda: Images(
            pipelines.stages(name, full=full, batch=1, device=device, dtype=dtype), _CALLS, latent=True, unet_only=True
        ),
        providers=(
            providers.stock(),
            providers.stock_channels_last(),
            *on_gpu,
            providers.difffast("difffast exact", "exact", Gate()),
        ),
        timed="seconds inside the UNet",
        headline="difffast exact",
        rounds=(5, 11),
        weight=5,
    )


def decode(unet: str | Sequence[int], k: int) -> Case:
    """k time steps decoded from one key step's features, per step: together, apart, and as whole UNet calls."""
    full = isinstance(unet, str)
    device, dtype = ("cuda", torch.float16) if full else ("cpu", torch.float32)

    def build() -> Decode:
        if full:
            made, width = models.unet(unet, device=device, dtype=dtype), None
        else:
            made, width = models.tiny_pipeline("sd", channels=unet, sample_size=SIZE).unet, SIZE
        return Decode(made, width or made.config.sample_size, k)

    together = "decoders together"
    return Case(
        group="decode",
        name=f"UNet {unet if full else tuple(unet)}, decode of {k} step{'s' * (k > 1)}",
        shapes={"unet": unet if full else list(unet), "k": k, "batch": 1},
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        build=build,
        providers=(
            Provider("UNet calls", "stock", lambda it, stack: it.whole, Gate("UNet calls")),
            Provider("decoders one at a time", "difffast", lambda it, stack: it.apart, Gate("decoders one at a time")),
            Provider(together, "difffast", lambda it, stack: it.together, Gate("decoders one at a time")),
            Provider(
                f"{together}, shared skips",
                "difffast",
                lambda it, stack: it.shared,
                Gate("decoders one at a time"),
            ),
        ),
        timed=f"seconds for {k} step{'s' * (k > 1)}",
        baseline="UNet calls",
        headline=f"{together}, shared skips",
        rounds=(5, 31),
        weight=4 + 1.5 * k,
    )


class Decode:
    """Features of one key step, and k time steps to decode from them."""

    def __init__(self, unet: nn.Module, size: int, k: int) -> None:
        self._unet = unet
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(unet.device, unet.dtype)

        text = {"encoder_hidden_states": draw(2, 77, unet.config.cross_attention_dim)}
        if unet.config.addition_embed_type == "text_time":
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            text["added_cond_kwargs"] = {"text_embeds": draw(2, pooled), "time_ids": draw(2, 6)}
        sample = draw(2, unet.config.in_channels, size, size)
        self._times = torch.linspace(800, 700, k, device=unet.device)
        self._call = bind_arguments(unet, (sample, self._times[0]), text)
        with torch.no_grad():
            self._features = split.encode(unet, self._call)
            self._sharing = split.encode(unet, self._call, share=True)

    def whole(self) -> Run:
        """What stock does: the UNet once a step."""
        return Run(torch.stack([self._unet(**{**self._call, "timestep": t}).sample for t in self._times]))

    def apart(self) -> Run:
        return Run(torch.stack([self._decode(self._features, t[None])[0] for t in self._times]))

    def together(self) -> Run:
        return Run(torch.stack(self._decode(self._features, self._times)))

    def shared(self) -> Run:
        # As after every key step: features that know no weights make what depends on the skips alone anew.
        features = Features(self._sharing.outputs, self._sharing.batch, self._sharing.parts)
        return Run(torch.stack(self._decode(features, self._times)))

    def _decode(self, features: Features, times: Tensor) -> tuple[Tensor, ...]:
        return split.decode(self._unet, features, self._call, times)
